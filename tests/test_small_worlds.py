"""The worlds of the study beyond dialogue: their dependence length, their optimum, its table."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.stats import poisson, ttest_rel

from benchmarks import beyond_dialogue
from benchmarks.beyond_dialogue import WORLDS, Cell, points, run_cell, settings_of, table
from benchmarks.small_worlds import KeysAndDoors, Perishables


def rewards_of(world: Perishables, orders: list[int], seed: int = 0) -> np.ndarray:
    world.reset(seed=seed)
    return np.array([world.step(order)[1] for order in orders])


@pytest.mark.parametrize("world", [Perishables, KeysAndDoors])
def test_gymnasium_finds_nothing_wrong(world: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(world(), skip_render_check=True)


@pytest.mark.parametrize("lead_time", [0, 1, 3])
@pytest.mark.parametrize("day", [0, 10, 30])
def test_an_order_moves_the_reward_of_one_day_and_no_other(lead_time: int, day: int) -> None:
    world, orders = Perishables(lead_time), [5] * 40
    usual = rewards_of(world, orders)
    orders[day] = 0
    assert np.flatnonzero(rewards_of(world, orders) != usual).tolist() == [day + lead_time]


def test_the_expected_reward_is_that_of_the_poisson_distribution() -> None:
    world, demand = Perishables(cost=0.4), np.arange(200)
    for day, stock in ((0, 0), (3, 4), (15, 12)):
        chance = poisson.pmf(demand, world.mean_demand(day))
        by_hand = (chance @ np.minimum(demand, stock) - 0.4 * stock) / 10
        assert world.expected_reward(day, stock) == pytest.approx(by_hand)


def test_the_optimum_is_earned_by_the_best_orders_and_by_no_others() -> None:
    world = Perishables()
    best = [
        max(range(13), key=lambda stock, d=day: world.expected_reward(d + 3, stock))
        for day in range(37)
    ] + [0] * 3
    earned = np.array([rewards_of(world, best, seed).sum() for seed in range(400)])
    error = earned.std() / 20
    assert abs(earned.mean() - world.optimum()) < 4 * error
    assert rewards_of(world, [6] * 40, 0).sum() < world.optimum()
    worse = [max(order - 2, 0) for order in best]
    others = np.array([rewards_of(world, worse, seed).sum() for seed in range(400)])
    assert (earned - others).mean() > 4 * (earned - others).std() / 20


def test_a_key_is_worth_something_at_the_door_only() -> None:
    world = KeysAndDoors()
    world.reset(seed=0)
    right, left, down, up = range(4)
    earned, keys = 0.0, 0
    for _ in range(48):  # to the key, and back to the door; one step in ten goes astray
        row = world._place[0]
        to_key, to_door = up if row else left, down if row < 2 else right
        act = to_door if world._has_key else to_key
        had_key = world._has_key
        _, reward, over, _, _ = world.step(act)
        assert reward == float(had_key and world._place == [2, 2])
        keys += world._has_key and not had_key
        earned += reward
    assert over and 3 <= earned <= keys <= 6


def test_a_door_without_a_key_earns_nothing() -> None:
    world = KeysAndDoors()
    world.reset(seed=1)
    assert sum(world.step(0)[1] for _ in range(48)) == 0.0


def test_the_table_pairs_seeds_and_minds_how_many_credits_there_are() -> None:
    rng = np.random.default_rng(0)
    levels = {"kstep:1": 0.0, "kstep:3": 0.0, "kstep:4": 2.0, "kstep:10": 1.0, "full": 1.0}
    luck = rng.standard_normal(10)
    rows = [
        {
            "world": "perishables",
            "credit": credit,
            "seed": seed,
            "returns": [level + luck[seed] + 0.1 * rng.standard_normal() for _ in range(3)],
            "count": 0.5 + 0.1 * (credit == "full"),
        }
        for credit, level in levels.items()
        for seed in range(10)
    ]
    found = {(point.credit, point.budget): point for point in points(rows)}
    assert len(found) == 15 and all(p.world == "perishables" for p in found.values())
    budget = WORLDS["perishables"].budgets[1]
    of = {
        credit: np.array([r["returns"][1] for r in rows if r["credit"] == credit])
        for credit in levels
    }
    best = found["kstep:4", budget]
    assert best.mean.mean == pytest.approx(of["kstep:4"].mean())
    assert best.over_full is not None and best.over_full.mean == pytest.approx(
        (of["kstep:4"] - of["full"]).mean()
    )
    raw = [ttest_rel(of[credit], of["full"]).pvalue for credit in levels if credit != "full"]
    assert best.p_value >= raw[2]
    assert found["kstep:10", budget].p_value == pytest.approx(max(raw))  # Holm: the last times 1
    assert found["full", budget].over_full is None
    assert found["full", budget].count == pytest.approx(0.6)
    assert table(list(found.values())).count("\n") == 16
    alone = points([row for row in rows if row["seed"] == 0])
    assert not any(point.mean.has_interval for point in alone)


@pytest.mark.parametrize("name", WORLDS)
def test_a_cell_of_the_study_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rollout; those of known length lose no step, whatever the credit."""
    world = WORLDS[name]
    rollout = world.n_envs * world.n_steps
    assert all(budget % rollout == 0 for budget in world.budgets)
    monkeypatch.setitem(beyond_dialogue.WORLDS, name, replace(world, budgets=(rollout,)))
    found = run_cell(Cell(name, "full", 0))
    assert (
        found["settings"] == settings_of(WORLDS[name]) == json.loads(json.dumps(found))["settings"]
    )
    assert len(found["returns"]) == 1 and np.isfinite(found["returns"]).all()
    known = name in ("perishables", "keys and doors")
    assert found["count"] == 1.0 if known else 0.5 < found["count"] <= 1.0


def test_cells_of_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"world": "perishables", "credit": "full", "seed": 0, "settings": {"n_steps": 1}}
    (tmp_path / "cells.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(sys, "argv", ["beyond_dialogue", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="cells of perishables with other settings"):
        beyond_dialogue.main()
