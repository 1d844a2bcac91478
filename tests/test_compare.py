"""Comparisons: all cells, once each, in any order, and safe to stop."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents import PPGAgent
from agents.compare import UNTRAINED, Cell, CompareConfig, cells, compare, run_cell
from agents.runs import read_metrics, read_transcripts

TIMES = ("train_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    """The smallest comparison: one domain, one method, one update of four dialogues."""
    return CompareConfig(
        run=str(tmp_path_factory.mktemp("run")),
        domains=("chatting",),
        methods=("kstep:2",),
        model="nano",
        updates=1,
        episodes=4,
        group_size=2,
        eval_episodes=1,
        max_turns=2,
        workers=2,
    )


@pytest.fixture(scope="module")
def finished(config: CompareConfig) -> tuple[dict[Cell, Any], list[dict[Cell, float]]]:
    """The comparison run in two processes, with the progress that it reported."""
    shares: list[dict[Cell, float]] = []
    return compare(config, lambda share: shares.append(dict(share))), shares


def as_text(result: Mapping[str, Any], leave_out: Collection[str] = ()) -> str:
    """A result as JSON, in which NaN equals NaN."""
    kept = {name: value for name, value in result.items() if name not in leave_out}
    return json.dumps(kept, sort_keys=True)


def files_of(c: CompareConfig) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in Path(c.run).rglob("*") if file.is_file()}


def wait_for_children_to_end(seconds: float = 10.0) -> list[Any]:
    deadline = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return multiprocessing.active_children()


def test_there_is_a_cell_for_every_method_in_every_domain_the_untrained_model_first() -> None:
    c = CompareConfig(domains=("chatting", "therapy"), methods=("greedy", "kstep:3"))
    assert [(cell.domain, cell.method) for cell in cells(c)] == [
        (domain, method)
        for domain in ("chatting", "therapy")
        for method in (UNTRAINED, "greedy", "kstep:3")
    ]
    folders = {cell.folder(c) for cell in cells(c)}
    assert len(folders) == 6 and all(":" not in folder.name for folder in folders)


@pytest.mark.slow
def test_a_comparison_gives_all_cells(
    config: CompareConfig, finished: tuple[dict[Cell, Any], list[dict[Cell, float]]]
) -> None:
    results, shares = finished
    assert list(results) == cells(config)
    untrained, trained = (results[cell] for cell in cells(config))
    assert (untrained["num_timesteps"], trained["num_timesteps"]) == (0, 1 * 4 * 2)
    assert untrained["persona_reward"].keys() == trained["persona_reward"].keys()
    assert len(trained["persona_reward"]) >= 40
    assert len(trained["reward_T"]) == 2
    assert {"reward", "drift", "prompt_to_line"} <= trained["metrics"].keys()

    for cell in cells(config):
        folder = cell.folder(config)
        assert as_text(json.loads((folder / "result.json").read_text())) == as_text(results[cell])
        assert len(list(read_transcripts(folder))) == len(trained["persona_reward"])
        assert len(read_metrics(folder)) == (0 if cell.method == UNTRAINED else 1)
    learned = PPGAgent.load(cells(config)[1].folder(config) / "agent")
    assert (str(learned.credit), learned.num_updates) == ("kstep:2", 1)

    assert all(0.0 <= share <= 1.0 for row in shares for share in row.values())
    assert set(shares[-1].values()) == {1.0}
    assert not wait_for_children_to_end()


@pytest.mark.slow
def test_cells_do_not_depend_on_who_runs_beside_them(
    config: CompareConfig, finished: tuple[dict[Cell, Any], Any], tmp_path: Path
) -> None:
    alone = replace(config, run=str(tmp_path))
    for cell, result in finished[0].items():
        assert as_text(run_cell(cell, alone), TIMES) == as_text(result, TIMES)


@pytest.mark.slow
def test_running_again_keeps_finished_cells_and_runs_the_missing_ones(
    config: CompareConfig, finished: tuple[dict[Cell, Any], Any]
) -> None:
    before = files_of(config)
    more = replace(config, methods=("kstep:2", "greedy"), workers=1)
    again = compare(more)
    assert list(again) == cells(more)
    for cell, result in finished[0].items():
        assert as_text(again[cell]) == as_text(result)  # times too: read, not run
    assert {file: time for file, time in files_of(config).items() if file in before} == before
    assert again[Cell("chatting", "greedy")]["num_timesteps"] == 8


def test_a_finished_cell_is_read_and_not_run(
    tmp_path: Path, config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = replace(config, run=str(tmp_path))
    cell = Cell("chatting", UNTRAINED)
    result = run_cell(cell, c)
    monkeypatch.setattr("agents.compare.load_policy", None)  # would fail if it were called
    assert as_text(run_cell(cell, c)) == as_text(result)


def test_an_unfinished_cell_starts_again_from_nothing(
    tmp_path: Path, config: CompareConfig
) -> None:
    c = replace(config, run=str(tmp_path))
    cell = Cell("chatting", "greedy")

    def killed(self: PPGAgent, path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPGAgent, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell, c)
    assert len(read_metrics(cell.folder(c))) == 1
    assert not (cell.folder(c) / "result.json").exists()
    run_cell(cell, c)
    assert len(read_metrics(cell.folder(c))) == 1


@pytest.mark.slow
def test_stopping_keeps_finished_cells_and_leaves_no_process_behind(
    config: CompareConfig, tmp_path: Path
) -> None:
    # The second cell would go on for hours.
    c = replace(config, run=str(tmp_path), updates=10**6, workers=1)
    first, second = cells(c)

    def stop(share: Mapping[Cell, float]) -> None:
        if share[first] == 1.0 and share[second] > 0.0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(c, stop)
    assert not wait_for_children_to_end()
    assert (first.folder(c) / "result.json").exists()
    assert not (second.folder(c) / "result.json").exists()
    assert len(read_metrics(second.folder(c))) >= 1


def test_an_unknown_method_fails_before_any_work_with_a_list(
    config: CompareConfig, tmp_path: Path
) -> None:
    c = replace(config, run=str(tmp_path / "run"), methods=("kstep:2", "gredy"))
    with pytest.raises(ValueError, match=r"gredy.*greedy") as raised:
        compare(c)
    assert all(name in str(raised.value) for name in ("full", "greedy", "kstep:3", "segment:2"))
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_fails_before_any_work(config: CompareConfig, tmp_path: Path) -> None:
    c = replace(config, run=str(tmp_path / "run"), model="nanoo")
    with pytest.raises(ValueError, match=r"'nanoo'\. Did you mean 'nano'"):
        compare(c)
    assert not (tmp_path / "run").exists()


def test_a_run_under_another_budget_is_refused_with_the_difference(
    config: CompareConfig, tmp_path: Path
) -> None:
    c = replace(config, run=str(tmp_path))
    run_cell(Cell("chatting", UNTRAINED), c)
    with pytest.raises(FileExistsError, match=r"learning_rate is .* there and 0\.1 now"):
        run_cell(Cell("chatting", UNTRAINED), replace(c, learning_rate=0.1))
