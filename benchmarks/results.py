"""The evidence of docs/results.md: every method, domain and budget, noise, and gradient pilots.

    python -m benchmarks.results                  # under 2 hours on 2 cores
    python -m benchmarks.results --quick          # under 6 minutes: one domain, small budgets

Run again, it goes on with what is missing. Writes the report (runs/results/report/report.html), and
with --docs the tables and figures of docs/results.md between its markers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ppg_env
from agents.compare import Cell, CompareConfig, compare
from agents.figures import data_size_figure, dependence_figure, drift_figure, variance_figure
from agents.pilot import PilotConfig, read_pilots, run_pilot
from agents.report import (
    DIFFERENCES,
    EARNED,
    GRADIENTS,
    difference_rows,
    earned_rows,
    findings,
    pilot_findings,
    pilot_rows,
    write_report,
)
from agents.results import Comparison, read_comparison, world_name

METHODS = ("ppo", "trajectory", "greedy", "kstep:2", "kstep:3", "segment:2", "full")
NOISY_METHODS = ("greedy", "kstep:2", "kstep:3", "full")
COVERING = {"chatting": "kstep:2", "therapy": "kstep:3", "education": "full"}
"""The smallest lookahead that covers how far an act reaches (docs/worlds.md)."""
DOCS = Path(__file__).parent.parent / "docs"


def configurations(run: str, seeds: int, quick: bool, workers: int) -> list[CompareConfig]:
    """Return what is compared; all of it fits into one run folder."""
    if quick:
        few = CompareConfig(
            run=run,
            domains=("chatting",),
            methods=("greedy", "kstep:2", "full"),
            budgets=(256,),
            seeds=3,
            workers=workers,
        )
        return [few]
    return [
        CompareConfig(run=run, methods=METHODS, budgets=(256, 1024), seeds=seeds, workers=workers),
        CompareConfig(
            run=run,
            methods=NOISY_METHODS,
            budgets=(256, 1024),
            seeds=seeds,
            noise=(0.4,),
            workers=workers,
        ),
    ]


def measure_gradients(run: str, quick: bool) -> None:
    """Run the pilots that are missing, of the untrained model."""
    known = {pilot["config"]["domain"] for pilot in read_pilots(run)}
    for domain in ("chatting",) if quick else COVERING:
        if domain not in known:
            print(f"pilot in {domain}", flush=True)
            run_pilot(PilotConfig(domain, episodes=64 if quick else 256, run=run))


def predictions(found: Comparison) -> Iterator[str]:
    """Yield what docs/worlds.md predicts of every world and budget, beside what came out."""
    yield "| world | dialogues | smallest covering class | minus full | leader | minus greedy |"
    yield "|---|---|---|---|---|---|"
    for world in found.worlds:
        covering = COVERING[world[0]]
        for budget in found.budgets(world):
            rows = {row.method: row for row in found.of(world, budget) if row.seeds}
            if covering not in rows or "greedy" not in rows:
                continue
            own = rows[covering]
            leader = max((r for r in rows.values() if r.budget), key=lambda row: row.reward.mean)
            gap = "" if own.over_full is None else f"{own.over_full:+.3f}"
            over_greedy = own.reward.mean - rows["greedy"].reward.mean
            yield (
                f"| {world_name(world, found.worlds)} | {budget:,} | {covering} {own.reward} | "
                f"{gap} | {leader.method} {leader.reward} | {over_greedy:+.3f} |"
            )


def markdown_rows(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_text(found: Comparison, pilots: Sequence[Mapping[str, Any]]) -> str:
    """Return the generated part of docs/results.md."""
    return "\n\n".join(
        [
            "\n".join(f"- {warning}" for warning in found.warnings) or "No warnings.",
            "\n".join(f"- {sentence}" for sentence in findings(found)),
            "\n".join(predictions(found)),
            markdown_rows(EARNED, earned_rows(found)),
            markdown_rows(DIFFERENCES, difference_rows(found)),
            "\n".join(f"- {sentence}" for sentence in pilot_findings(pilots)),
            markdown_rows(GRADIENTS, pilot_rows(pilots)),
        ]
    )


def write_docs(found: Comparison, pilots: Sequence[Mapping[str, Any]]) -> None:
    """Replace the generated part of docs/results.md and its figures."""
    path, begin, end = DOCS / "results.md", "<!-- generated -->", "<!-- end -->"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(
        f"{before}{begin}\n{results_text(found, pilots)}\n{end}{after}", encoding="utf-8"
    )
    data_size_figure(found).savefig(DOCS / "results_data_size.png", dpi=110)
    drift_figure(found).savefig(DOCS / "results_drift.png", dpi=110)
    variance_figure(pilots).savefig(DOCS / "results_variance.png", dpi=110)
    covering = [COVERING[pilot["config"]["domain"]] for pilot in pilots]
    dependence_figure(pilots, covering).savefig(DOCS / "results_dependence.png", dpi=110)


def main() -> None:
    """Run what is missing, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/results")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="also write docs/results.md")
    options = parser.parse_args()
    run = f"{options.run}-quick" if options.quick else options.run
    started = time.perf_counter()
    ppg_env.bundled_personas("chatting")  # the world is there
    for c in configurations(run, options.seeds, options.quick, options.workers):
        told = 0.0

        def show(share: Mapping[Cell, float]) -> None:
            nonlocal told
            if time.perf_counter() - told > 30:
                told = time.perf_counter()
                print(f"{sum(share.values()):.1f} of {len(share)} cells", flush=True)

        compare(c, show)
    measure_gradients(run, options.quick)
    found = read_comparison(run)
    for path in write_report([run]):
        print(f"wrote {path}")
    print("\n".join(findings(found)))
    if options.docs:
        write_docs(found, read_pilots(run))
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
