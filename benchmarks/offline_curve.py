"""How much does each policy class learn from N logged dialogues? The data-size curve.

    python -m benchmarks.offline_curve              # all domains, about 15 minutes on 2 cores
    python -m benchmarks.offline_curve --domains therapy --sizes 50 200 --steps 10

The untrained bundled model speaks with the training personas; its dialogues are the log, of which
the first N are used. Every cell (domain, method, N) starts from the same model and takes the same
number of gradient steps, so a small log is read more often, not less. Measured on test personas,
on whole dialogues of the trained model (rollout) and on single turns after logged histories (step).
Cells that are in the output folder already are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

import ppg_env  # noqa: F401  (registers PersonaDialogue-v0)

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
    from agents import collect_rollouts, load_policy, write_log
    from agents.logs import parse_trajectory

    for name, personas, number in (("train", "train", size), ("test", "test", 20)):
        path = folder / f"{domain}-{name}-{seed}.jsonl.gz"
        if path.exists():
            continue
        envs = gym.make_vec(ENV_ID, num_envs=50, domain=domain, personas=personas)
        policy, records = load_policy("nano", seed=seed), []
        for start in range(0, number, 50):
            # Seeds far from those that evaluations use.
            batch = collect_rollouts(envs, policy, seed=500_000 + 10_000 * seed + start)
            records += batch.records()
        write_log(path, map(parse_trajectory, records[:number]))


def run_cell(folder: Path, cell: Cell, steps: int) -> dict[str, Any]:
    """Train and measure one cell."""
    import torch

    from agents import PPGAgent, evaluate_policy, evaluate_steps, load_policy, read_log

    torch.set_num_threads(1)
    log = list(read_log(folder / f"{cell.domain}-train-{cell.seed}.jsonl.gz"))[: cell.size]
    credit = "full" if cell.method in ("untrained", *IMITATION) else cell.method
    envs = gym.make_vec(ENV_ID, num_envs=60, domain=cell.domain, personas="test")
    policy = load_policy("nano", seed=cell.seed)
    row: dict[str, Any] = {**asdict(cell), "steps": steps}
    if cell.method != "untrained":
        settings = {"learning_rate": 1e-3, "lr_schedule": "linear", "seed": cell.seed}
        agent = PPGAgent(policy, None, credit, **settings)
        done = 0

        def enough(learner: PPGAgent) -> bool:
            nonlocal done
            done += 1
            return done < steps

        per_epoch = -(-len(log) // 32)
        agent.learn_offline(
            log,
            callback=enough,
            epochs=-(-steps // per_epoch),
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
    row["rollout"], row["step"] = asdict(rollout.metrics["reward"]), asdict(single.reward)
    row["degenerate"] = rollout.metrics["degenerate_rate"].mean
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table; where there are several seeds, their means."""
    lines = ["| domain | method | N | rollout | step | degenerate |", "|---|---|---|---|---|---|"]
    for row in rows:
        size = "" if row["method"] == "untrained" else f"{row['size']:,}"
        cells = [
            "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**row[kind]) for kind in ("rollout", "step")
        ]
        lines.append(
            f"| {row['domain']} | {row['method']} | {size} | {cells[0]} | {cells[1]} | "
            f"{row['degenerate']:.3f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw reward against the size of the log, one panel a domain."""
    from matplotlib.figure import Figure

    colours = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    figure = Figure(figsize=(4.2 * len(domains), 3.8), layout="constrained")
    axes = figure.subplots(1, len(domains), squeeze=False)[0]
    for axis, domain in zip(axes, domains, strict=True):
        here = [row for row in rows if row["domain"] == domain]
        methods = list(dict.fromkeys(row["method"] for row in here if row["method"] != "untrained"))
        for i, (method, colour) in enumerate(zip(methods, colours, strict=False)):
            points = sorted((r for r in here if r["method"] == method), key=lambda r: r["size"])
            x = [row["size"] * (1 + 0.05 * (i - 1.5)) for row in points]
            mean = [row["rollout"]["mean"] for row in points]
            below = [row["rollout"]["mean"] - row["rollout"]["low"] for row in points]
            above = [row["rollout"]["high"] - row["rollout"]["mean"] for row in points]
            style = {"color": colour, "marker": "os^DvP"[i], "markersize": 4, "capsize": 2}
            axis.errorbar(x, mean, [below, above], label=method, **style)
        for row in here:
            if row["method"] == "untrained":
                axis.axhline(row["rollout"]["mean"], color="#000000", ls=":", label="untrained")
        axis.set(title=domain, xscale="log", xlabel="logged dialogues")
        axis.set_xticks([row["size"] for row in points], [f"{row['size']:,}" for row in points])
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
    parser.add_argument("--methods", nargs="+", default=["greedy", "kstep:3", "full", "sft"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 200, 1000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=24, help="gradient steps of 32 dialogues")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "cells.jsonl"
    rows = (
        [json.loads(line) for line in results.read_text().splitlines()]
        if (results.exists())
        else []
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
        for run in runs:
            row = run.result()
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
    wanted = {(*asdict(cell).values(), options.steps) for cell in cells}
    rows = [r for r in rows if tuple(r[k] for k in (*Cell.__annotations__, "steps")) in wanted]
    (options.out / "table.md").write_text(table(rows) + "\n")
    plot([row for row in rows if row["seed"] == options.seeds[0]], options.out / "curve.png")
    print(f"wrote {options.out}/table.md and curve.png")


if __name__ == "__main__":
    main()
