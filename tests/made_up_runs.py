"""Run folders of comparisons that were never run: cells with results of known means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.compare import Cell, CompareConfig, cell_settings
from agents.methods import UNTRAINED
from agents.runs import RunFolder

PERSONAS = [f"p{i:02d}" for i in range(20)]


def write_cell(
    run: str | Path, cell: Cell, level: float, *, c: CompareConfig | None = None
) -> None:
    """Write a complete cell: rewards around `level`, three updates, two dialogues."""
    folder = RunFolder(cell.folder(run), cell_settings(cell, c or CompareConfig(model="nano")))
    folder.clear()
    rng = np.random.default_rng([cell.seed, len(cell.method), cell.budget])
    rewards = dict(zip(PERSONAS, level + 0.02 * rng.standard_normal(20), strict=True))
    by_persona = {
        "reward": rewards,
        "drift": dict.fromkeys(PERSONAS, -0.03),
        "prompt_to_line": dict.fromkeys(PERSONAS, 0.7),
        "degenerate_rate": dict.fromkeys(PERSONAS, 0.125),
    }
    for update in range(0 if cell.method == UNTRAINED else 3):
        folder.log(
            {"time/total_timesteps": 8 * (update + 1), "rollout/turn_rew_mean": 0.2 * update}
        )
    folder.write_transcripts(dialogue(cell, name, level) for name in PERSONAS[:2])
    trained = cell.method != UNTRAINED
    folder.finish(
        {
            "metrics": {
                name: {"mean": float(np.mean(list(v.values()))), "low": 0.1, "high": 0.9}
                for name, v in by_persona.items()
            },
            "reward_T": [level, level - 0.1],
            "boundaries": [0, 1],
            "by_persona": by_persona,
            "num_timesteps": 24 if trained else 0,
            "train_seconds": 12.4,
            "tokens_per_second": 1234.5 if trained else None,
        }
    )


def dialogue(cell: Cell, persona: str, level: float) -> dict[str, Any]:
    """Return a dialogue of two turns, the second of which nobody could score."""
    return {
        "domain": cell.domain,
        "persona": persona,
        "group": 7,
        "messages": [
            {"role": "system", "content": f"You are {persona}."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": f"{cell.method}\nsays *this* in {cell.domain}."},
            {"role": "user", "content": "Oh."},
            {"role": "assistant", "content": "Yes."},
        ],
        "rewards": [level, None],
        "reward_parts": {"prompt_to_line": [1.0, None]},
        "reasons": ["it fits", "no verdict"],
    }


def write_comparison(
    run: str | Path,
    levels: dict[str, float],
    *,
    domains: Sequence[str] = ("chatting", "therapy"),
    budgets: Sequence[int] = (64, 128),
    seeds: int = 3,
    noise: Sequence[float] = (0.1,),
) -> None:
    """Write all cells; a method gains .01 with every further budget."""
    for domain in domains:
        for level_of_noise in noise:
            for seed in range(seeds):
                for method, level in levels.items():
                    for place, budget in enumerate([0] if method == UNTRAINED else budgets):
                        cell = Cell(domain, method, budget, seed, level_of_noise)
                        write_cell(run, cell, level + 0.01 * place + 0.002 * seed)
