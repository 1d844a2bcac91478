"""How much does each policy class learn from N logged dialogues? The data-size curve.

    python -m benchmarks.offline_curve              # all domains, 3 seeds, 80 minutes on 2 cores
    python -m benchmarks.offline_curve --domains therapy --sizes 50 200 --steps 10

A speaker talks with the training personas; its dialogues are the log, of which the first N are
used. Speakers: the untrained bundled model, or the same after some updates of full planning
online. Every cell (speaker, domain, method, N) starts from the untrained model and takes the same
gradient steps at the same learning rates, so a small log is read more often, not less. Measured on
test personas, on whole dialogues of the trained model (rollout) and on single turns after logged
histories (step). Beside it stands what an endless log of that speaker would teach, computed from
how often it spoke each dialogue act. Cells that are in the output folder already are not run again;
after a change of the code take another folder.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import gymnasium as gym
import numpy as np

from agents.credit import parse_credit
from agents.logs import read_log
from agents.statistics import CrossedMean, crossed_mean
from ppg_env import DOMAINS, ActProcess, RuleJudge, bundled_personas
from ppg_env.rejudge import rejudge

ENV_ID = "PersonaDialogue-v0"
IMITATION = {"sft": "sft", "filtered": "filtered"}
SPEAKERS = {"untrained": 0, "half-trained": 4}
"""Who speaks in the logs: updates of full planning online, of 64 dialogues each."""


@dataclass(frozen=True)
class Cell:
    """One training run: whose dialogues, which rewards, how many dialogues, which seed."""

    speaker: str
    domain: str
    method: str
    size: int
    seed: int


def log_file(folder: Path, speaker: str, domain: str, split: str, seed: int) -> Path:
    """Return where a speaker's dialogues with personas of a split are."""
    return folder / f"{speaker}-{domain}-{split}-{seed}.jsonl.gz"


def write_logs(folder: Path, speaker: str, domain: str, size: int, seed: int) -> None:
    """Let the speaker speak: `size` dialogues to learn from, 20 to measure steps on."""
    import torch

    from agents import PPGAgent, collect_rollouts, load_policy, parse_dialogue, write_log

    torch.set_num_threads(1)
    missing = []
    for split, number in (("train", size), ("test", 20)):
        path = log_file(folder, speaker, domain, split, seed)
        if not path.exists() or sum(1 for _ in read_log(path)) < number:
            missing.append((split, number, path))
    if not missing:
        return
    policy = load_policy("nano", seed=seed)
    if SPEAKERS[speaker]:
        school = gym.make_vec(ENV_ID, num_envs=64, domain=domain, personas="train")
        learner = PPGAgent(policy, school, "full", seed=seed)
        learner.learn(total_timesteps=SPEAKERS[speaker] * 64 * school.unwrapped.max_turns)
    for name, number, path in missing:
        envs = gym.make_vec(ENV_ID, num_envs=min(50, number), domain=domain, personas=name)
        # The same people in the test log of every seed, so that seeds can be compared.
        people = envs.unwrapped.persona_ids[:number] if name == "test" else None
        records: list[dict[str, Any]] = []
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

    from agents import PPGAgent, evaluate_policy, evaluate_steps, load_policy

    torch.set_num_threads(1)
    place = (folder, cell.speaker, cell.domain)
    log = list(read_log(log_file(*place, "train", cell.seed)))[: cell.size]
    assert len(log) >= cell.size
    credit = "full" if cell.method in ("untrained", *IMITATION) else cell.method
    envs = gym.make_vec(ENV_ID, num_envs=60, domain=cell.domain, personas="test")
    policy = load_policy("nano", seed=cell.seed)
    row: dict[str, Any] = {**asdict(cell), "steps": steps}
    if cell.method != "untrained":
        settings: dict[str, Any] = {
            "learning_rate": 1e-3,
            "lr_schedule": "linear",
            "seed": cell.seed,
        }
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
        log_file(*place, "test", cell.seed),
        seed=30_000 + cell.seed,
    )
    row["rollout"], row["step"] = dict(rollout.persona_reward), dict(single.persona_reward)
    row["degenerate"] = rollout.metrics["degenerate_rate"].mean
    return row


# ---- what an endless log teaches -----------------------------------------------------------------


def habits(
    records: list[dict[str, Any]], domain: str, processes: Sequence[ActProcess]
) -> np.ndarray:
    """Return who spoke as behaviour_TSA: how often which act followed on what was said before.

    By turn and by what the dynamics remember; where that was rare, by turn alone (a prior of 5).
    """
    personas = bundled_personas(domain)
    dynamics = {persona.id: DOMAINS[domain].dynamics(persona) for persona in personas}
    first = processes[0]
    memories = [memory for memory, _ in first.states[::2]]  # state 2 m: attentive, 2 m + 1: not
    counts_TMA = np.zeros((first.num_turns, len(memories), len(first.acts)))
    judge = RuleJudge(DOMAINS[domain])
    for record, verdicts in rejudge(records, judge, domain, personas):
        own = dynamics[record["persona"]]
        memory = own.start
        for t, verdict in enumerate(verdicts):
            act = verdict.act if verdict.act in first.acts else "evade"
            counts_TMA[t, memories.index(memory), first.acts.index(act)] += 1.0
            memory = own.advance(memory, act)
    share_T1A = counts_TMA.sum(axis=1, keepdims=True) / counts_TMA.sum(axis=(1, 2), keepdims=True)
    counts_TMA += 5.0 * share_T1A
    behaviour_TMA = counts_TMA / counts_TMA.sum(axis=2, keepdims=True)
    return np.repeat(behaviour_TMA, 2, axis=1)


def endless(records: list[dict[str, Any]], domain: str, methods: Iterable[str]) -> dict[str, float]:
    """Return what each method earns a turn on test personas after an endless log of this speaker.

    Exact for a speaker whose next act depends on the turn and on what the dynamics remember, as
    often as in the records, and on nothing else. "sft" earns what the speaker does.
    """
    train, test = (
        Counter(map(DOMAINS[domain].dynamics, bundled_personas(domain, split)))
        for split in ("train", "test")
    )
    kinds = list(train | test)
    processes = [ActProcess(kind) for kind in kinds]
    logged_K, met_K = (
        np.array([split[kind] / split.total() for kind in kinds]) for split in (train, test)
    )
    spoke_TSA = habits(records, domain, processes)
    found = {"sft": float(met_K @ [process.value(spoke_TSA) for process in processes])}
    for method in methods:
        if method in IMITATION:
            continue
        weight_TT = parse_credit(method).weights(processes[0].num_turns)
        mean_KT = np.array([process.mean_credit(spoke_TSA, weight_TT) for process in processes])
        learned = [
            process.value(process.learned_from_log(spoke_TSA, weight_TT, logged_K @ mean_KT))
            for process in processes
        ]
        found[method] = float(met_K @ learned)
    return found


# ---- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A method and a size of log of one speaker in one domain, over all seeds."""

    speaker: str
    domain: str
    method: str
    size: int
    rollout: CrossedMean
    step: CrossedMean
    over_greedy: CrossedMean | None
    degenerate: float


def points(rows: list[dict[str, Any]]) -> list[Point]:
    """Return means with intervals over seeds and personas, in the order of the rows."""
    groups: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        place = (row["speaker"], row["domain"], row["method"], row["size"])
        groups.setdefault(place, []).append(row)

    def values(group: list[dict[str, Any]], kind: str) -> np.ndarray:
        return np.array([[row[kind][name] for name in sorted(row[kind])] for row in group])

    found = []
    for (speaker, domain, method, size), group in groups.items():
        rollout_SP = values(group, "rollout")
        greedy = groups.get((speaker, domain, "greedy", size), [])
        paired = method != "greedy" and [r["seed"] for r in greedy] == [r["seed"] for r in group]
        gap = crossed_mean(rollout_SP - values(greedy, "rollout")) if paired else None
        degenerate = float(np.mean([row["degenerate"] for row in group]))
        step = crossed_mean(values(group, "step"))
        whole = crossed_mean(rollout_SP)
        found.append(Point(speaker, domain, method, size, whole, step, gap, degenerate))
    return found


Limits = dict[tuple[str, str], dict[str, float]]
"""(speaker, domain) -> what an endless log teaches each method."""


def tables(found: Sequence[Point], limits: Limits) -> str:
    """Return the results as Markdown tables, two a speaker: whole dialogues and single turns."""
    parts = []
    for speaker in dict.fromkeys(point.speaker for point in found):
        own = [point for point in found if point.speaker == speaker]
        sizes = sorted({point.size for point in own if point.size})
        names = [f"N = {size:,}" for size in sizes]
        lines = [["domain", "method", *names, "endless", "over greedy, " + names[-1], "degenerate"]]
        steps = [["domain", "method", *names]]
        for domain, method in dict.fromkeys((point.domain, point.method) for point in own):
            row = {p.size: p for p in own if (p.domain, p.method) == (domain, method)}
            last, limit = row[max(row)], limits[speaker, domain]
            end = limit.get(method, math.nan)
            gap = "" if last.over_greedy is None else f"{last.over_greedy:+.3f}"
            cells = [str(row[size].rollout) if size in row else "" for size in sizes]
            singles = [str(row[size].step) if size in row else "" for size in sizes]
            if 0 in row:  # not trained: no log
                cells[0], singles[0], gap = str(last.rollout), str(last.step), ""
            shown = "" if math.isnan(end) else f"{end:.3f}"
            lines.append([domain, method, *cells, shown, gap, f"{last.degenerate:.3f}"])
            steps.append([domain, method, *singles])
        for title, rows in (("whole dialogues", lines), ("single turns", steps)):
            rows.insert(1, ["---"] * len(rows[0]))
            table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
            parts.append(f"Logs of the {speaker} model, {title}:\n\n{table}\n")
    return "\n".join(parts)


def plot(found: Sequence[Point], limits: Limits, path: Path) -> None:
    """Draw reward against the size of the log: a row a speaker, a column a domain."""
    from matplotlib.figure import Figure

    colours = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
    speakers = list(dict.fromkeys(point.speaker for point in found))
    domains = list(dict.fromkeys(point.domain for point in found))
    methods = list(dict.fromkeys(point.method for point in found if point.size))
    sizes = sorted({point.size for point in found if point.size})
    end = 3.0 * sizes[-1]
    figure = Figure(figsize=(4.2 * len(domains), 0.8 + 3.1 * len(speakers)), layout="constrained")
    axes = figure.subplots(len(speakers), len(domains), squeeze=False, sharey="col", sharex=True)
    for (row, speaker), (column, domain) in product(enumerate(speakers), enumerate(domains)):
        axis, limit = axes[row, column], limits[speaker, domain]
        here = [p for p in found if (p.speaker, p.domain) == (speaker, domain)]
        for i, method in enumerate(methods):
            own = sorted((p for p in here if p.method == method), key=lambda p: p.size)
            if not own:
                continue
            x = [point.size * (1 + 0.05 * (i - 2)) for point in own]
            mean = [point.rollout.mean for point in own]
            below = np.nan_to_num([p.rollout.mean - p.rollout.low for p in own])
            above = np.nan_to_num([p.rollout.high - p.rollout.mean for p in own])
            style = {"color": colours[i % 6], "marker": "os^DvP"[i % 6], "markersize": 4}
            axis.errorbar(x, mean, [below, above], label=method, capsize=2, **style)
            reached = limit.get(method, math.nan)
            place = end * (1 + 0.05 * (i - 2))
            axis.plot([x[-1], place], [mean[-1], reached], ":", color=colours[i % 6], lw=0.8)
            axis.plot([place], [reached], **style, markerfacecolor="white", ls="")
        for point in here:
            if point.method == "untrained":
                axis.axhline(point.rollout.mean, color="#000000", ls=":", label="untrained")
        if row == 0:
            axis.set_title(domain)
        axis.set_xscale("log")
        axis.set_xticks([*sizes, end], [*(f"{size:,}" for size in sizes), "endless"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for row, speaker in enumerate(speakers):
        axes[row, 0].set_ylabel(f"logs of the {speaker} model:\nreward per turn, test personas")
    for axis in axes[-1]:
        axis.set_xlabel("logged dialogues")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing and write tables.md and curve.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/offline_curve"))
    parser.add_argument("--speakers", nargs="+", default=list(SPEAKERS), choices=list(SPEAKERS))
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
    names = (*Cell.__annotations__, "steps")
    known = {tuple(row[name] for name in names) for row in rows}
    cells = [
        Cell(speaker, domain, method, size, seed)
        for seed in options.seeds
        for speaker in options.speakers
        for domain in options.domains
        for method in ["untrained", *options.methods]
        for size in (options.sizes if method != "untrained" else [0])
    ]
    missing = [cell for cell in cells if (*asdict(cell).values(), options.steps) not in known]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        logs = [
            pool.submit(write_logs, options.out, speaker, domain, max(options.sizes), seed)
            for seed in options.seeds
            for speaker in options.speakers
            for domain in options.domains
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
            print(*(row[name] for name in names), f"{mean:.3f}", flush=True)
    report(options, cells, rows)
    print(f"wrote {options.out}/tables.md and curve.png")


def report(options: argparse.Namespace, cells: Sequence[Cell], rows: list[dict[str, Any]]) -> None:
    """Write tables and figure of the cells that were asked for."""
    by_cell = {
        Cell(*(row[name] for name in Cell.__annotations__)): row
        for row in rows
        if row["steps"] == options.steps
    }
    found = points([by_cell[cell] for cell in cells])
    limits = {}
    for speaker, domain in product(options.speakers, options.domains):
        each = []
        for seed in options.seeds:
            log = read_log(log_file(options.out, speaker, domain, "train", seed))
            each.append(endless([d.record() for d in log], domain, options.methods))
        limits[speaker, domain] = {name: fmean(own[name] for own in each) for name in each[0]}
    (options.out / "tables.md").write_text(tables(found, limits))
    plot(found, limits, options.out / "curve.png")


if __name__ == "__main__":
    main()
