"""From run folders to evidence: pairing, intervals, and nothing dropped or mixed silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from agents.compare import Cell, CompareConfig, cell_settings
from agents.methods import UNTRAINED
from agents.results import Comparison, Row, read_comparison, world_name
from agents.runs import RunFolder
from agents.statistics import crossed_mean, holm
from tests.made_up_runs import PERSONAS, write_cell, write_comparison

LEVELS = {UNTRAINED: 0.3, "greedy": 0.5, "kstep:3": 0.6, "full": 0.6}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    write_comparison(folder, LEVELS)
    return folder


@pytest.fixture(scope="module")
def found(run: Path) -> Comparison:
    return read_comparison(run)


def row_of(found: Comparison, method: str, budget: int = 64, domain: str = "therapy") -> Row:
    (row,) = [r for r in found.rows if (r.domain, r.method, r.budget) == (domain, method, budget)]
    return row


def rewards(run: Path, cell: Cell) -> dict[str, float]:
    return dict(json.loads((cell.folder(run) / "result.json").read_text())["by_persona"]["reward"])


def three(method: str) -> list[Cell]:
    return [Cell("therapy", method, 64, seed) for seed in range(3)]


def table(run: Path, method: str, budget: int) -> np.ndarray:
    cells = [Cell("therapy", method, budget, seed) for seed in range(3)]
    return np.array([[rewards(run, cell)[name] for name in PERSONAS] for cell in cells])


def test_there_is_a_row_for_every_method_and_budget_of_every_world(found: Comparison) -> None:
    assert found.worlds == [("chatting", 0.1), ("therapy", 0.1)]
    names = [(row.method, row.budget) for row in found.of(("therapy", 0.1))]
    trained = [(m, b) for b in (64, 128) for m in ("greedy", "kstep:3", "full")]
    assert names == [(UNTRAINED, 0), *trained]
    assert found.budgets(("therapy", 0.1)) == [64, 128]
    assert [row.method for row in found.of(("therapy", 0.1), 64)] == list(LEVELS)
    assert all(row.seeds == (0, 1, 2) and row.missing == 0 for row in found.rows)
    assert not found.warnings


def test_means_and_differences_are_of_the_same_people_and_seeds(
    run: Path, found: Comparison
) -> None:
    row = row_of(found, "greedy")
    assert row.reward == crossed_mean(table(run, "greedy", 64))
    assert row.over_full == crossed_mean(table(run, "greedy", 64) - table(run, "full", 64))
    untrained = table(run, UNTRAINED, 0)
    assert row.over_untrained == crossed_mean(table(run, "greedy", 64) - untrained)
    assert row.metrics["drift"].mean == pytest.approx(-0.03)


def test_the_best_is_compared_with_all_others_and_not_with_itself(found: Comparison) -> None:
    rows = [row_of(found, method) for method in ("greedy", "kstep:3", "full")]
    best = max(rows, key=lambda row: row.reward.mean)
    assert best.method != "greedy" and best.to_best is None
    others = [row for row in rows if row is not best]
    adjusted = holm([row.to_best.p_value for row in others if row.to_best is not None])
    assert [row.p_best for row in others] == adjusted
    assert row_of(found, "greedy").p_best < 0.01
    assert row_of(found, "full").over_full is None
    assert np.isnan(row_of(found, "full").p_full)


def test_the_probability_of_improvement_is_over_full(found: Comparison) -> None:
    assert row_of(found, "greedy").beats_full.mean < 0.15
    assert 0.3 < row_of(found, "kstep:3").beats_full.mean < 0.7


def test_one_seed_has_no_interval_and_that_is_said(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, seeds=1)
    found = read_comparison(tmp_path)
    assert not any(row.reward.has_interval for row in found.rows)
    assert all(np.isnan(row.p_best) for row in found.rows)
    assert any("one training seed: no interval" in warning for warning in found.warnings)


def test_two_seeds_are_called_rough(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, seeds=2)
    assert any("rough intervals" in warning for warning in read_comparison(tmp_path).warnings)


def test_failed_and_unfinished_cells_are_counted(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    failed, unfinished = (Cell("therapy", "greedy", 64, seed) for seed in (0, 1))
    (failed.folder(tmp_path) / "result.json").unlink()
    (failed.folder(tmp_path) / "error.txt").write_text("Traceback\nMemoryError: too large\n")
    (unfinished.folder(tmp_path) / "result.json").unlink()
    damaged = Cell("therapy", "kstep:3", 64, 0)
    (damaged.folder(tmp_path) / "result.json").write_text('{"half": ')
    empty = Cell("therapy", "kstep:3", 64, 1)
    (empty.folder(tmp_path) / "result.json").write_text("{}")
    found = read_comparison(tmp_path)
    row = row_of(found, "greedy")
    assert (row.seeds, row.missing) == ((2,), 2)
    assert [record.error for record in found.failed] == ["Traceback\nMemoryError: too large"]
    said = " ".join(found.warnings)
    assert "1 of 12 cells failed" in said and "1 of 12 cells unfinished" in said
    assert "2 of 12 cells damaged: the same command does them again" in said
    assert row_of(found, "kstep:3").missing == 2
    assert "differ in their seeds" in said
    # What is left is paired over the seed that both have.
    assert row.over_full is not None and row.over_full.num_seeds == 1


def test_a_cell_whose_manifest_is_damaged_is_not_dropped(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    cell = Cell("therapy", "greedy", 64, 0)
    (cell.folder(tmp_path) / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged; remove its folder"):
        read_comparison(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps([vars(cell)]))
    found = read_comparison(tmp_path)
    assert "1 of 12 cells damaged" in " ".join(found.warnings)
    assert row_of(found, "greedy").missing == 1


def test_personas_without_a_reward_are_told_and_do_not_decide_who_is_best(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    file = Cell("therapy", "greedy", 64, 0).folder(tmp_path) / "result.json"
    result = json.loads(file.read_text())
    by_persona = result["by_persona"]["reward"]
    worst = sorted(by_persona, key=by_persona.get)[:-2]
    for name in worst:
        by_persona[name] = float("nan")
    for name in set(by_persona) - set(worst):
        by_persona[name] += 0.5  # greedy looks best on the two who are left of it
    file.write_text(json.dumps(result))
    found = read_comparison(tmp_path)
    greedy, others = row_of(found, "greedy"), [row_of(found, m) for m in ("kstep:3", "full")]
    assert (greedy.num_personas, others[0].num_personas) == (2, 20)
    (warning,) = [w for w in found.warnings if "personas" in w]
    assert warning.startswith("therapy greedy 64: only 2 of 20 personas have a reward")
    assert greedy.reward.mean > max(row.reward.mean for row in others)
    best = [row.method for row in (greedy, *others) if row.to_best is None]
    left = sorted(set(by_persona) - set(worst))
    shared = {
        row.method: np.mean(
            [rewards(tmp_path, c)[name] for c in three(row.method) for name in left]
        )
        for row in (greedy, *others)
    }
    assert best == [max(shared, key=lambda method: shared[method])]


def test_cells_that_were_planned_and_never_begun_are_counted(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    assert not read_comparison(tmp_path).warnings  # no plan, as of older runs
    methods = ("greedy", "discounted:0.5")
    planned = [Cell("therapy", method, 64, seed) for method in methods for seed in (2, 3)]
    (tmp_path / "plan.json").write_text(json.dumps([vars(cell) for cell in planned]))
    found = read_comparison(tmp_path)
    assert (row_of(found, "greedy").seeds, row_of(found, "greedy").missing) == ((0, 1, 2), 1)
    never = row_of(found, "discounted:0.5")
    assert (never.seeds, never.missing, dict(never.metrics)) == ((), 2, {})
    assert "3 of 15 cells not begun: the same command begins them" in " ".join(found.warnings)
    assert not any("made with different" in warning for warning in found.warnings)
    for text in ("[", '[{"domain": "therapy"}, {"colour": 1}]'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json is damaged .*; remove it"):
            read_comparison(tmp_path)


def test_a_method_that_failed_everywhere_keeps_its_row(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    for seed in range(3):
        folder = Cell("therapy", "full", 64, seed).folder(tmp_path)
        (folder / "result.json").unlink()
        (folder / "error.txt").write_text("MemoryError")
    found = read_comparison(tmp_path)
    assert row_of(found, "full").missing == 3 and not row_of(found, "full").metrics
    assert row_of(found, "greedy").over_full is None


def test_several_folders_of_one_kind_are_one_comparison(run: Path, tmp_path: Path) -> None:
    write_cell(tmp_path, Cell("therapy", "greedy", 64, seed=3), 0.5)
    assert row_of(read_comparison(run, tmp_path), "greedy").seeds == (0, 1, 2, 3)


def test_cells_of_other_settings_are_refused(run: Path, tmp_path: Path) -> None:
    other = CompareConfig(max_turns=6)
    write_cell(tmp_path, Cell("therapy", "greedy", 64, seed=3), 0.5, c=other)
    with pytest.raises(ValueError, match=r"max_turns=6, .* with 8: that is no fair comparison"):
        read_comparison(run, tmp_path)


def test_a_cell_that_is_there_twice_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "therapy", tmp_path / "therapy")
    with pytest.raises(ValueError, match=r"is in .* and in .*; name one of them"):
        read_comparison(run, tmp_path)


def test_cells_of_other_versions_are_marked(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    file = Cell("therapy", "greedy", 64, 0).folder(tmp_path) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["versions"]["torch"] = "2.6.0"
    file.write_text(json.dumps(manifest))
    (warning,) = read_comparison(tmp_path).warnings
    assert "different versions" in warning and "2.6.0" in warning


def test_a_folder_without_a_comparison_says_how_to_make_one(tmp_path: Path) -> None:
    RunFolder(tmp_path / "train", {"domain": "therapy"})
    with pytest.raises(FileNotFoundError, match=r"no comparison in .*ppg compare"):
        read_comparison(tmp_path)


def test_a_domain_is_named_with_its_noise_only_where_there_are_several(tmp_path: Path) -> None:
    assert world_name(("therapy", 0.1), [("therapy", 0.1), ("chatting", 0.4)]) == "therapy"
    assert world_name(("therapy", 0.1), [("therapy", 0.1), ("therapy", 0.4)]) == (
        "therapy, noise 0.1"
    )


def test_settings_of_a_cell_name_all_that_it_depends_on() -> None:
    c, cell = CompareConfig(), Cell("therapy", "greedy", 64, 1, 0.3)
    settings = cell_settings(cell, c)
    assert {"domain", "method", "budget", "seed", "noise", "model", "weights"} <= set(settings)
    assert settings["noise"] == 0.3 and "run" not in settings and "seeds" not in settings
