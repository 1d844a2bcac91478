"""How much does each policy class learn from N logged dialogues? The data-size curve.

    python -m benchmarks.offline_curve              # all domains, 3 seeds, 40 minutes on 2 cores
    python -m benchmarks.offline_curve --domains therapy --sizes 50 200 --steps 10

The untrained bundled model speaks with the training personas; its dialogues are the log, of which
the first N are used. Every cell (domain, method, N) starts from the same model and takes the same
gradient steps at the same learning rates, so a small log is read more often, not less. Measured on
test personas, on whole dialogues of the trained model (rollout) and on single turns after logged
histories (step). Cells that are in the output folder already are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import ppg_env  # noqa: F401  (registers PersonaDialogue-v0)
from agents.statistics import CrossedMean, crossed_mean

ENV_ID = "PersonaDialogue-v0"
IMITATION = {"sft": "sft", "filtered": "filtered"}


@dataclass(frozen=True)
class Cell:
    """One training run: which rewards, how many dialogues, which seed."""

    domain: str
    method: str
    size: int
    seed: int


def write_logs(folder: Path, domain: str, size: int, seed: int) -> None:
    """Let the untrained model speak: `size` dialogues to learn from, 20 to measure steps on."""
    from agents import collect_rollouts, load_policy, parse_dialogue, read_log, write_log

    for name, number in (("train", size), ("test", 20)):
        path = folder / f"{domain}-{name}-{seed}.jsonl.gz"
        if path.exists() and sum(1 for _ in read_log(path)) >= number:
            continue
        envs = gym.make_vec(ENV_ID, num_envs=min(50, number), domain=domain, personas=name)
        # The same people in the test log of every seed, so that seeds can be compared.
        people = envs.unwrapped.persona_ids[:number] if name == "test" else None
        policy, records = load_policy("nano", seed=seed), []
        for start in range(0, number, envs.num_envs):
            # Seeds far from those that evaluations use.
            batch = collect_rollouts(
                envs,
                policy,
                seed=500_000 + 10_000 * seed + start,
                options={"persona": people} if people else None,
            )
            records += batch.records()
        write_log(path, map(parse_dialogue, records[:number]))


def run_cell(folder: Path, cell: Cell, steps: int) -> dict[str, Any]:
    """Train and measure one cell."""
    import torch

    from agents import PPGAgent, evaluate_policy, evaluate_steps, load_policy, read_log

    torch.set_num_threads(1)
    log = list(read_log(folder / f"{cell.domain}-train-{cell.seed}.jsonl.gz"))[: cell.size]
    assert len(log) >= cell.size
    credit = "full" if cell.method in ("untrained", *IMITATION) else cell.method
    envs = gym.make_vec(ENV_ID, num_envs=60, domain=cell.domain, personas="test")
    policy = load_policy("nano", seed=cell.seed)
    row: dict[str, Any] = {**asdict(cell), "steps": steps}
    if cell.method != "untrained":
        settings = {"learning_rate": 1e-3, "lr_schedule": "linear", "seed": cell.seed}
        agent = PPGAgent(policy, None, credit, **settings)
        agent.learn_offline(
            log,
            epochs=-(-steps // -(-len(log) // 32)),
            max_steps=steps,
            batch_size=32,
            method=IMITATION.get(cell.method, "ppg"),
            baseline="log_mean" if cell.method not in IMITATION else "none",
        )
        speeds = [each["time/tokens_per_second"] for each in agent.history]
        row["tokens_per_second"] = sum(speeds) / len(speeds)
    rollout = evaluate_policy(envs, policy, seed=20_000 + cell.seed)
    single = evaluate_steps(
        gym.make_vec(ENV_ID, num_envs=40, domain=cell.domain, personas="test"),
        policy,
        read_log(folder / f"{cell.domain}-test-{cell.seed}.jsonl.gz"),
        seed=30_000 + cell.seed,
    )
    row["rollout"], row["step"] = dict(rollout.persona_reward), dict(single.persona_reward)
    row["degenerate"] = rollout.metrics["degenerate_rate"].mean
    return row


@dataclass(frozen=True)
class Point:
    """A method and a size of log in one domain, over all seeds."""

    domain: str
    method: str
    size: int
    rollout: CrossedMean
    step: CrossedMean
    over_greedy: CrossedMean | None
    degenerate: float


def points(rows: list[dict[str, Any]]) -> list[Point]:
    """Return means with intervals over seeds and personas, in the order of the rows."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        groups.setdefault((row["domain"], row["method"], row["size"]), []).append(row)

    def values(group: list[dict[str, Any]], kind: str) -> np.ndarray:
        return np.array([[row[kind][name] for name in sorted(row[kind])] for row in group])

    found = []
    for (domain, method, size), group in groups.items():
        rollout_SP, greedy = values(group, "rollout"), groups.get((domain, "greedy", size))
        paired = method != "greedy" and greedy is not None and len(greedy) == len(group)
        found.append(
            Point(
                domain,
                method,
                size,
                rollout=crossed_mean(rollout_SP),
                step=crossed_mean(values(group, "step")),
                over_greedy=crossed_mean(rollout_SP - values(greedy, "rollout"))
                if paired and greedy
                else None,
                degenerate=float(np.mean([row["degenerate"] for row in group])),
            )
        )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| domain | method | N | rollout | over greedy | step | degenerate |"]
    lines.append("|---|---|---|---|---|---|---|")
    for point in points(rows):
        size = f"{point.size:,}" if point.size else ""
        gap = "" if point.over_greedy is None else f"{point.over_greedy:+.3f}"
        lines.append(
            f"| {point.domain} | {point.method} | {size} | {point.rollout} | {gap} | {point.step} "
            f"| {point.degenerate:.3f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw reward against the size of the log, one panel a domain."""
    from matplotlib.figure import Figure

    colours = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
    found = points(rows)
    domains = list(dict.fromkeys(point.domain for point in found))
    methods = list(dict.fromkeys(point.method for point in found if point.size))
    figure = Figure(figsize=(4.2 * len(domains), 3.8), layout="constrained")
    axes = figure.subplots(1, len(domains), squeeze=False)[0]
    for axis, domain in zip(axes, domains, strict=True):
        here = [point for point in found if point.domain == domain]
        for i, method in enumerate(methods):
            own = sorted((p for p in here if p.method == method), key=lambda p: p.size)
            x = [point.size * (1 + 0.05 * (i - 2)) for point in own]
            mean = [point.rollout.mean for point in own]
            below = np.nan_to_num([p.rollout.mean - p.rollout.low for p in own])
            above = np.nan_to_num([p.rollout.high - p.rollout.mean for p in own])
            style = {"color": colours[i % 6], "marker": "os^DvP"[i % 6], "markersize": 4}
            axis.errorbar(x, mean, [below, above], label=method, capsize=2, **style)
        for point in here:
            if point.method == "untrained":
                axis.axhline(point.rollout.mean, color="#000000", ls=":", label="untrained")
        sizes = sorted({point.size for point in here if point.size})
        axis.set(title=domain, xscale="log", xlabel="logged dialogues")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reward per turn, test personas")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing and write table.md and curve.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/offline_curve"))
    parser.add_argument("--domains", nargs="+", default=["chatting", "education", "therapy"])
    parser.add_argument(
        "--methods", nargs="+", default=["greedy", "kstep:3", "segment:4", "full", "sft"]
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 200, 1000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=32, help="gradient steps of 32 dialogues")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "cells.jsonl"
    rows = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    known = {(r["domain"], r["method"], r["size"], r["seed"], r["steps"]) for r in rows}
    cells = [
        Cell(domain, method, size, seed)
        for seed in options.seeds
        for domain in options.domains
        for method in ["untrained", *options.methods]
        for size in (options.sizes if method != "untrained" else [0])
    ]
    missing = [cell for cell in cells if (*asdict(cell).values(), options.steps) not in known]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        logs = [
            pool.submit(write_logs, options.out, domain, max(options.sizes), seed)
            for domain in options.domains
            for seed in options.seeds
        ]
        for log in logs:
            log.result()
        runs = [pool.submit(run_cell, options.out, cell, options.steps) for cell in missing]
        for run in as_completed(runs):
            row = run.result()
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            mean = sum(row["rollout"].values()) / len(row["rollout"])
            print(f"{row['domain']} {row['method']} {row['size']} seed {row['seed']}: {mean:.3f}")
    wanted = {(*asdict(cell).values(), options.steps) for cell in cells}
    rows = [r for r in rows if tuple(r[k] for k in (*Cell.__annotations__, "steps")) in wanted]
    order = [(cell.domain, cell.method, cell.size) for cell in cells]
    rows.sort(key=lambda row: order.index((row["domain"], row["method"], row["size"])))
    (options.out / "table.md").write_text(table(rows) + "\n")
    plot(rows, options.out / "curve.png")
    print(f"wrote {options.out}/table.md and curve.png")


if __name__ == "__main__":
    main()
