"""The demo's report: each trained agent with its own interval, and dialogues before and after.

One training run of every method, so intervals are over held-out personas alone and say so. With
several seeds, see report.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .compare import Cell, CompareConfig
from .figures import drift_figure, learning_figure
from .methods import UNTRAINED
from .results import read_comparison
from .runs import read_transcripts
from .statistics import Estimate, paired_difference

COLUMNS = (
    "reward/turn",
    "prompt_to_line",
    "line_to_line",
    "domain part",
    "degenerate",
    "drift/turn",
    "seconds",
    "tokens/s",
)
Results = Mapping[Cell, Mapping[str, Any]]


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """Return (domain, method, *COLUMNS) as text, one row a cell; means with 95 % intervals."""
    rows: list[tuple[str, ...]] = []
    for cell, result in results.items():
        metrics = {name: Estimate(**value) for name, value in result["metrics"].items()}
        known = {"reward", "drift", "prompt_to_line", "line_to_line", "degenerate_rate"}
        known.add("prompt_to_line_drift")
        own = next((name for name in metrics if name not in known), None)
        speed = result["tokens_per_second"]
        rows.append(
            (
                cell.domain,
                cell.method,
                str(metrics["reward"]),
                str(metrics.get("prompt_to_line", "")),
                str(metrics.get("line_to_line", "")),
                "" if own is None else f"{own} {metrics[own]}",
                f"{metrics['degenerate_rate'].mean:.3f}" if "degenerate_rate" in metrics else "",
                f"{metrics['drift']:+.3f}",
                f"{result['train_seconds']:.0f}",
                "" if speed is None else f"{speed:,.0f}",
            )
        )
    return rows


def markdown_table(results: Results) -> str:
    """Return the table in Markdown."""
    header = ("domain", "method", *COLUMNS)
    rows = [header, tuple("---" for _ in header), *table_rows(results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def findings(results: Results) -> list[str]:
    """Return, per domain, which method leads, by how much, and whether the intervals separate."""
    sentences = []
    for domain in dict.fromkeys(cell.domain for cell in results):
        here = {c.method: r for c, r in results.items() if c.domain == domain}
        trained = {m: r for m, r in here.items() if m != UNTRAINED}
        if not trained:
            continue
        ranked = sorted(trained, key=lambda m: -trained[m]["metrics"]["reward"]["mean"])
        best = ranked[0]
        sentence = f"{domain}: {best} leads"
        if UNTRAINED in here:
            gain = _difference(here[best], here[UNTRAINED])
            sentence += f", {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] over untrained"
        if len(ranked) > 1:
            gap = _difference(here[best], here[ranked[1]])
            verdict = "separated" if gap.low > 0 else "not separated"
            sentence += (
                f"; {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] over {ranked[1]} ({verdict})"
            )
        rates = {m: r["metrics"].get("degenerate_rate") for m, r in here.items()}
        if rates[best] and rates.get(UNTRAINED):
            sentence += (
                f"; degenerate lines {rates[best]['mean']:.3f}, "
                f"untrained {rates[UNTRAINED]['mean']:.3f}"
            )
        sentences.append(sentence)
    return sentences


def _difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Estimate:
    return paired_difference(first["by_persona"]["reward"], second["by_persona"]["reward"])


def save_demo(results: Results, c: CompareConfig) -> list[Path]:
    """Write table, findings, plots and transcripts to the run folder; return their paths."""
    run = Path(c.run)
    table = run / "table.md"
    notes = [f"- {sentence}" for sentence in findings(results)]
    settings = (
        f"{c.budgets[0]:,} dialogues x {c.max_turns} turns a method, noise {c.noise[0]}; 95 % "
        "intervals over held-out personas (bootstrap), one training seed: they do not hold the "
        "luck of training."
    )
    table.write_text(
        f"{markdown_table(results)}\n{settings}\n\n" + "\n".join(notes) + "\n", encoding="utf-8"
    )
    drift, curves = run / "drift.png", run / "learning_curves.png"
    found = read_comparison(c.run)
    drift_figure(found).savefig(drift, dpi=150)
    learning_figure(found).savefig(curves, dpi=150)
    transcripts = run / "transcripts.md"
    transcripts.write_text(before_after(results, c), encoding="utf-8")
    return [table, drift, curves, transcripts]


def before_after(results: Results, c: CompareConfig, dialogues: int = 2) -> str:
    """Return the first held-out dialogues of each domain before and after training, in Markdown.

    "After" is the domain's best method. Chosen by position, not by how well they read.
    """
    parts = ["# Dialogues before and after training\n"]
    for domain in dict.fromkeys(cell.domain for cell in results):
        here = [(cell, result) for cell, result in results.items() if cell.domain == domain]
        trained = [pair for pair in here if pair[0].method != UNTRAINED]
        best = max(trained, key=lambda pair: pair[1]["metrics"]["reward"]["mean"], default=None)
        shown = [cell for cell, _ in here if cell.method == UNTRAINED] + ([best[0]] if best else [])
        records = {
            cell: list(islice(read_transcripts(cell.folder(c.run)), dialogues)) for cell in shown
        }
        for number in range(min(map(len, records.values()), default=0)):
            for cell in shown:
                record = records[cell][number]
                parts.append(f"## {domain}, dialogue {number + 1}, {cell.method}\n")
                parts.append(_dialogue(record["messages"], record["rewards"]))
    return "\n".join(parts)


def _dialogue(messages: Sequence[Mapping[str, str]], rewards: Sequence[float | None]) -> str:
    lines, turn = [], 0
    for message in messages:
        text = message["content"].replace("\n", " ")
        if message["role"] == "assistant":
            reward = rewards[turn]
            shown = "unscorable" if reward is None else f"{reward:.2f}"
            lines.append(f"- **agent** ({shown}): {text}")
            turn += 1
        else:
            speaker = {"system": "persona", "user": "partner"}[message["role"]]
            lines.append(f"- {speaker}: {text}")
    return "\n".join(lines) + "\n"
