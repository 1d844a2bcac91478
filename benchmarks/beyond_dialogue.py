"""Does partial credit help outside dialogue? K sweep x data budget x 10 seeds in four worlds.

    python -m benchmarks.beyond_dialogue                 # 40 CPU minutes
    python -m benchmarks.beyond_dialogue --seeds 2 --worlds perishables     # a look

Run again, it goes on with what is missing. With --docs writes the table and the figure of
docs/results.md. Every cell is one PartialPG run with leave-one-out baselines; only the credit
differs, and with it how many steps count: those that a rollout might cut do not (agents.sb3), so
rollouts hold several of the longest episodes, and their share is in the table. A budget is a number
of environment steps; one run is measured at all three.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from agents.sb3 import PartialPG
from agents.statistics import Estimate, holm

DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class World:
    """What is learned, with which settings.

    Attributes:
        env: registered id, or module:Class.
        longest: time limit of an episode, in steps.
        n_envs, n_steps: a rollout.
    """

    env: str
    longest: int
    n_envs: int
    n_steps: int
    budgets: tuple[int, ...]
    credits: tuple[str, ...]


WORLDS = {
    "perishables": World(
        "benchmarks.small_worlds:Perishables",
        longest=40,
        n_envs=8,
        n_steps=240,
        budgets=(7_680, 24_960, 80_640),
        credits=("kstep:1", "kstep:3", "kstep:4", "kstep:10", "full"),
    ),
    "keys and doors": World(
        "benchmarks.small_worlds:KeysAndDoors",
        longest=48,
        n_envs=8,
        n_steps=240,
        budgets=(19_200, 61_440, 122_880),
        credits=("kstep:1", "kstep:4", "kstep:8", "kstep:16", "full"),
    ),
    "CartPole-v1": World(
        "CartPole-v1",
        longest=200,
        n_envs=4,
        n_steps=1024,
        budgets=(20_480, 61_440, 122_880),
        credits=("kstep:1", "kstep:5", "kstep:20", "kstep:80", "full"),
    ),
    "Acrobot-v1": World(
        "Acrobot-v1",
        longest=500,
        n_envs=4,
        n_steps=2000,
        budgets=(40_000, 80_000, 160_000),
        credits=("kstep:1", "kstep:20", "kstep:80", "full"),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    world: str
    credit: str
    seed: int


def make_envs(world: World, seed: int) -> Any:
    """Return parallel environments."""
    module, colon, name = world.env.partition(":")
    if colon:  # their episodes have this very length
        return make_vec_env(getattr(importlib.import_module(module), name), world.n_envs, seed)
    settings = {"max_episode_steps": world.longest}
    return make_vec_env(world.env, world.n_envs, seed, env_kwargs=settings)


class ShareThatCounts(BaseCallback):
    """Notes which share of each rollout's steps counts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.found.append(float(np.mean(~np.isnan(self.model.rollout_buffer.advantages))))


def run_cell(cell: Cell) -> dict[str, Any]:
    """Learn, and measure the mean return of 32 episodes at every budget."""
    torch.set_num_threads(1)
    world = WORLDS[cell.world]
    agent = PartialPG(
        "MlpPolicy",
        make_envs(world, 1_000 * cell.seed),
        cell.credit,
        longest_episode=world.longest,
        n_steps=world.n_steps,
        learning_rate=3e-3,
        ent_coef=0.01,
        normalize_advantage=True,
        seed=cell.seed,
        device="cpu",
    )
    returns, shares = [], ShareThatCounts()
    for budget in world.budgets:
        steps = budget - agent.num_timesteps
        agent.learn(steps, callback=shares, reset_num_timesteps=False)
        held_out = make_envs(world, 500_000 + 1_000 * cell.seed)
        returns.append(evaluate_policy(agent, held_out, n_eval_episodes=32, deterministic=False)[0])
    return {
        **asdict(cell),
        "settings": settings_of(world),
        "returns": [float(r) for r in returns],
        "count": float(np.mean(shares.found)),
    }


def settings_of(world: World) -> dict[str, Any]:
    """Return what a cell of the world depends on, as JSON gives it back."""
    return json.loads(json.dumps({**asdict(world), "credits": ()}))


# -- what came out ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A credit under a budget: mean return, difference to full, its p-value after Holm.

    `count` is the share of a run's steps that count for the credit, over all of the run.
    """

    world: str
    credit: str
    budget: int
    mean: Estimate
    over_full: Estimate | None
    p_value: float
    count: float


def interval(value_S: np.ndarray) -> Estimate:
    """Return the mean over seeds with Student's 95 % interval."""
    if len(value_S) < 2:
        return Estimate(float(value_S.mean()), float("nan"), float("nan"))
    if np.ptp(value_S) == 0:
        return Estimate(*[float(value_S.mean())] * 3)
    low, high = stats.ttest_1samp(value_S, 0.0).confidence_interval(0.95)
    return Estimate(float(value_S.mean()), float(low), float(high))


def points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """Return all means and differences; seeds are paired, p-values are Holm's within a budget."""
    found = []
    for name, world in WORLDS.items():
        of_world = [row for row in rows if row["world"] == name]
        for i, budget in enumerate(world.budgets):
            returns = {
                credit: {r["seed"]: r["returns"][i] for r in of_world if r["credit"] == credit}
                for credit in world.credits
            }
            returns = {credit: by_seed for credit, by_seed in returns.items() if by_seed}
            gaps = {
                credit: np.array([r - returns["full"][s] for s, r in by_seed.items()])
                for credit, by_seed in returns.items()
                if credit != "full" and by_seed.keys() <= returns.get("full", {}).keys()
            }
            testable = [c for c, gap in gaps.items() if len(gap) > 1 and np.ptp(gap) > 0]
            p_values = holm([float(stats.ttest_1samp(gaps[c], 0.0).pvalue) for c in testable])
            adjusted = dict(zip(testable, p_values, strict=True))
            found += [
                Point(
                    name,
                    credit,
                    budget,
                    interval(np.array(list(by_seed.values()))),
                    interval(gaps[credit]) if credit in gaps else None,
                    adjusted.get(credit, float("nan")),
                    float(np.mean([r["count"] for r in of_world if r["credit"] == credit])),
                )
                for credit, by_seed in returns.items()
            ]
    return found


def table(found: Sequence[Point]) -> str:
    """Return a Markdown table."""
    header = ("world", "steps", "credit", "return", "minus full", "p", "steps that count")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for point in found:
        gap = "" if point.over_full is None else f"{point.over_full:+.3g}"
        p_value = "" if np.isnan(point.p_value) else f"{point.p_value:.2g}"
        lines.append(
            f"| {point.world} | {point.budget:,} | {point.credit} | {point.mean:.3g} | {gap} | "
            f"{p_value} | {point.count:.2f} |"
        )
    return "\n".join(lines)


def draw(found: Sequence[Point], path: Path) -> None:
    """Draw the return against the budget, one panel a world."""
    names = list(dict.fromkeys(point.world for point in found))
    figure = Figure(figsize=(4.0 * len(names), 3.6), layout="constrained")
    styles = [("#999999", "s"), ("#E69F00", "o"), ("#56B4E9", "v"), ("#009E73", "^")]
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, credit in enumerate(WORLDS[name].credits):
            colour, marker = ("#000000", "D") if credit == "full" else styles[number]
            own = [p for p in found if (p.world, p.credit) == (name, credit)]
            place = [p.budget * 1.05 ** (number - 2) for p in own]  # intervals stay readable
            mean = np.array([p.mean.mean for p in own])
            below, above = mean - [p.mean.low for p in own], [p.mean.high for p in own] - mean
            marks = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2}
            axis.errorbar(place, mean, [below, above], label=credit, **marks)
        axis.set(title=name, xlabel="environment steps", xscale="log")
        axis.set_xticks(WORLDS[name].budgets, [f"{b:,}" for b in WORLDS[name].budgets])
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.axes[0].set_ylabel("mean return, 95 % interval over seeds")
    figure.savefig(path, dpi=110)


def write_docs(found: Sequence[Point]) -> None:
    """Replace the generated part of docs/results.md and its figure."""
    path, begin, end = DOCS / "results.md", "<!-- beyond dialogue -->", "<!-- end beyond -->"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{table(found)}\n{end}{after}", encoding="utf-8")
    draw(found, DOCS / "beyond_dialogue.png")


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/beyond_dialogue")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="also write docs/results.md")
    options = parser.parse_args()
    if options.docs and set(options.worlds) != set(WORLDS):
        parser.error("--docs writes the whole table: leave --worlds out.")
    file = Path(options.out) / "cells.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for row in rows:
        if row["settings"] != settings_of(WORLDS[row["world"]]):
            raise SystemExit(f"{file} holds cells of {row['world']} with other settings: move it.")
    known = {(row["world"], row["credit"], row["seed"]) for row in rows}
    cells = [
        Cell(name, credit, seed)
        for seed in range(options.seeds)
        for name in options.worlds
        for credit in WORLDS[name].credits
        if (name, credit, seed) not in known
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(run_cell, cell) for cell in cells]):
            rows.append(future.result())
            with file.open("a") as out:
                print(json.dumps(rows[-1]), file=out)
            print(len(rows), rows[-1], flush=True)
    found = points(rows)
    print(table(found))
    draw(found, file.with_name("beyond_dialogue.png"))
    if options.docs:
        write_docs(found)


if __name__ == "__main__":
    main()
