"""Comparisons: all cells, once each, in any order, safe to stop, and a failure stops no other."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents import PPGAgent
from agents.compare import (
    PLAN,
    Cell,
    CompareConfig,
    Outcome,
    cells,
    compare,
    planned_cells,
    run_cell,
)
from agents.methods import UNTRAINED, parse_method
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
        budgets=(4,),
        seeds=1,
        episodes=4,
        group_size=2,
        eval_episodes=1,
        keep_agents=True,
        max_turns=2,
        workers=2,
    )


@pytest.fixture(scope="module")
def finished(config: CompareConfig) -> tuple[dict[Cell, dict[str, Any]], list[dict[Cell, float]]]:
    """The comparison run in two processes, with the progress that it reported."""
    shares: list[dict[Cell, float]] = []
    found = compare(config, lambda share: shares.append(dict(share)))
    assert all(outcome.error == "" for outcome in found.values())
    return results_in(found), shares


def results_in(found: Mapping[Cell, Outcome]) -> dict[Cell, dict[str, Any]]:
    return {cell: dict(outcome.result or {}) for cell, outcome in found.items()}


def as_text(result: Mapping[str, Any], leave_out: Collection[str] = ()) -> str:
    """A result as JSON, in which NaN equals NaN."""
    kept = {name: value for name, value in result.items() if name not in leave_out}
    return json.dumps(kept, sort_keys=True)


def files_of(c: CompareConfig) -> dict[Path, int]:
    files = (file for file in Path(c.run).rglob("*") if file.is_file() and file.name != PLAN)
    return {file: file.stat().st_mtime_ns for file in files}


def wait_for_children_to_end(seconds: float = 10.0) -> list[Any]:
    deadline = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return multiprocessing.active_children()


def test_there_is_a_cell_for_every_method_in_every_domain_the_untrained_model_first() -> None:
    c = CompareConfig(domains=("chatting", "therapy"), methods=("greedy", "kstep:3"), seeds=1)
    assert [(cell.domain, cell.method, cell.budget) for cell in cells(c)] == [
        ("chatting", UNTRAINED, 0),
        ("therapy", UNTRAINED, 0),
        *((d, m, 1024) for d in ("chatting", "therapy") for m in ("greedy", "kstep:3")),
    ]


def test_every_seed_budget_and_noise_has_its_cells_and_a_folder_of_its_own() -> None:
    c = CompareConfig(
        domains=("therapy",),
        methods=("base", "kstep:3", "full", "kstep:3"),
        seeds=2,
        budgets=(256, 64),
        noise=(0.1, 0.4),
    )
    found = cells(c)
    assert len(found) == 2 * 2 * (1 + 2 * 2) == len({cell.folder("run") for cell in found})
    assert [cell.seed for cell in found] == [0] * 10 + [1] * 10  # a seed after the other
    assert [cell.budget for cell in found[:10]] == [0, 0, 64, 64, 64, 64, 256, 256, 256, 256]
    assert all(":" not in str(cell.folder("run")) for cell in found)
    assert str(found[2]) == "therapy kstep:3 64 seed 0"


def test_all_stands_for_all_domains() -> None:
    assert CompareConfig(domains=("all",)).domains == ("chatting", "education", "therapy")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"budgets": (100,)}, "budget 100 is no multiple of the 64 dialogues of an update"),
        ({"budgets": (0,)}, "budget 0 is no multiple"),
        ({"episodes": 12}, "episodes=12 must be a multiple of group_size=8"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig(**settings)


@pytest.mark.slow
def test_a_comparison_gives_all_cells(
    config: CompareConfig, finished: tuple[dict[Cell, dict[str, Any]], list[dict[Cell, float]]]
) -> None:
    results, shares = finished
    assert list(results) == cells(config)
    untrained, trained = (results[cell] for cell in cells(config))
    assert (untrained["num_timesteps"], trained["num_timesteps"]) == (0, 1 * 4 * 2)
    assert untrained["by_persona"]["reward"].keys() == trained["by_persona"]["reward"].keys()
    assert len(trained["by_persona"]["reward"]) >= 40
    assert len(trained["reward_T"]) == 2
    assert {"reward", "drift", "prompt_to_line"} <= trained["metrics"].keys()

    for cell in cells(config):
        folder = cell.folder(config.run)
        assert as_text(json.loads((folder / "result.json").read_text())) == as_text(results[cell])
        assert len(list(read_transcripts(folder))) == len(trained["by_persona"]["reward"])
        assert len(read_metrics(folder)) == (0 if cell.method == UNTRAINED else 1)
    learned = PPGAgent.load(cells(config)[1].folder(config.run) / "agent")
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
    again = results_in(compare(more))
    assert list(again) == cells(more)
    for cell, result in finished[0].items():
        assert as_text(again[cell]) == as_text(result)  # times too: read, not run
    assert {file: time for file, time in files_of(config).items() if file in before} == before
    assert again[Cell("chatting", "greedy", 4)]["num_timesteps"] == 8
    assert planned_cells(config.run) == list(dict.fromkeys([*cells(config), *cells(more)]))


def test_a_finished_cell_is_read_and_not_run(
    tmp_path: Path, config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = replace(config, run=str(tmp_path))
    cell = Cell("chatting", UNTRAINED)
    result = run_cell(cell, c)
    monkeypatch.setattr("agents.compare.make_policy", None)  # would fail if it were called
    assert as_text(run_cell(cell, c)) == as_text(result)


def test_an_unfinished_cell_starts_again_from_nothing(
    tmp_path: Path, config: CompareConfig
) -> None:
    c = replace(config, run=str(tmp_path))
    cell = Cell("chatting", "greedy", 4)

    def killed(self: PPGAgent, path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPGAgent, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell, c)
    assert len(read_metrics(cell.folder(c.run))) == 1
    assert not (cell.folder(c.run) / "result.json").exists()
    run_cell(cell, c)
    assert len(read_metrics(cell.folder(c.run))) == 1


@pytest.mark.slow
def test_stopping_keeps_finished_cells_and_leaves_no_process_behind(
    config: CompareConfig, tmp_path: Path
) -> None:
    # The second cell would go on for hours.
    c = replace(config, run=str(tmp_path), budgets=(4 * 10**6,), workers=1)
    first, second = cells(c)

    def stop(share: Mapping[Cell, float]) -> None:
        if share[first] == 1.0 and share[second] > 0.0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(c, stop)
    assert not wait_for_children_to_end()
    assert (first.folder(c.run) / "result.json").exists()
    assert not (second.folder(c.run) / "result.json").exists()
    assert len(read_metrics(second.folder(c.run))) >= 1


@pytest.mark.parametrize("name", ["Speaking", "Wrapping"])
def test_an_agent_that_says_how_it_speaks_is_evaluated_by_what_it_says(
    name: str, tmp_path: Path, config: CompareConfig
) -> None:
    c = replace(config, run=str(tmp_path), methods=(f"tests.own_methods:{name}",))
    cell = Cell("chatting", f"tests.own_methods:{name}", c.budgets[0])
    result = run_cell(cell, c)
    assert result["metrics"]["reward"]["mean"] == 0.0  # it evades
    (first, *_) = read_transcripts(cell.folder(tmp_path))
    said = [m["content"] for m in first["messages"] if m["role"] == "assistant"]
    assert set(said) == {"I would rather not say."}
    if name == "Speaking":
        assert result["num_timesteps"] == c.budgets[0] * c.max_turns
        assert result["tokens_per_second"] is None
        assert read_metrics(cell.folder(tmp_path)) == [{"own/steps": result["num_timesteps"]}]


def test_a_class_whose_file_has_changed_is_not_taken_for_the_old_one(
    tmp_path: Path, config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = replace(config, run=str(tmp_path))
    cell = Cell("chatting", "tests.own_methods:Opening", c.budgets[0])
    run_cell(cell, c)
    assert parse_method("greedy").source == "" != parse_method(cell.method).source
    monkeypatch.setattr("agents.methods.file_hash", lambda path: "other")
    with pytest.raises(FileExistsError, match=r"source is .* there and 'other' now"):
        run_cell(cell, c)


@pytest.mark.parametrize("name", ["result.json", "manifest.json"])
def test_a_damaged_cell_is_done_again(name: str, tmp_path: Path, config: CompareConfig) -> None:
    c = replace(config, run=str(tmp_path), domains=("chatting",), methods=(), workers=1, seeds=1)
    (cell,) = cells(c)
    before = compare(c)[cell].result
    assert before is not None
    (cell.folder(tmp_path) / name).write_text('{"half')
    after = compare(c)[cell].result
    assert after is not None and as_text(after["by_persona"]) == as_text(before["by_persona"])


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, sys, time\n"
        "from agents.compare import _one_thread\n"
        "def work(path):\n"
        "    _one_thread()\n"
        "    open(path, 'w').write('ready')\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    child = spawn.Process(target=work, args=[sys.argv[1]])\n"
        "    child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = str(Path(__file__).parent.parent)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "ready")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_until(lambda: (tmp_path / "ready").exists(), 120)
    parent.kill()
    parent.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists(), 60)


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_unknown_method_fails_before_any_work_with_a_list() -> None:
    with pytest.raises(ValueError, match=r"gredy.*greedy") as raised:
        CompareConfig(methods=("kstep:2", "gredy"))
    assert all(name in str(raised.value) for name in ("full", "greedy", "kstep:3", "segment:2"))


def test_an_unknown_model_fails_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"'nanoo'\. Did you mean 'nano'"):
        CompareConfig(model="nanoo")


def test_an_unknown_domain_or_judge_fails_before_any_cell_runs(
    config: CompareConfig, tmp_path: Path
) -> None:
    for wrong in ({"domains": ("therapie",)}, {"judge": "rulez"}):
        with pytest.raises(ValueError, match=r"therapie|rulez"):
            compare(replace(config, run=str(tmp_path / "run"), **wrong))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_method_that_crashes_is_kept_with_its_error_and_stops_no_other(
    config: CompareConfig, tmp_path: Path
) -> None:
    names = ("Crashing", "Dying", "Leaving", "Opening")
    methods = tuple(f"tests.own_methods:{name}" for name in names)
    c = replace(config, run=str(tmp_path), methods=methods)
    found = compare(c)
    untrained, crashing, dying, leaving, opening = found
    assert found[leaving].error == "SystemExit: 3"
    assert found[untrained].result is not None and found[opening].result is not None
    assert found[crashing].error == ("RuntimeError: the reward model has left <b>the</b> building")
    assert "Traceback" in (crashing.folder(c.run) / "error.txt").read_text()
    assert found[dying].error == "Its process died: out of memory, or killed."
    assert found[dying].result is None and not wait_for_children_to_end()

    # The same command tries the failed ones again, and only these.
    before = files_of(c)
    again = compare(replace(c, methods=(methods[0],)))
    assert again[crashing].error == found[crashing].error
    finished = {f: t for f, t in before.items() if "Opening" in str(f) or UNTRAINED in str(f)}
    assert {f: t for f, t in files_of(c).items() if f in finished} == finished


def test_a_cell_that_failed_forgets_its_error_when_it_succeeds(
    config: CompareConfig, tmp_path: Path
) -> None:
    c = replace(config, run=str(tmp_path))
    cell = cells(c)[0]
    cell.folder(c.run).mkdir(parents=True)
    run_cell(cell, c)
    (cell.folder(c.run) / "result.json").unlink()
    (cell.folder(c.run) / "error.txt").write_text("no memory")
    run_cell(cell, c)
    assert not (cell.folder(c.run) / "error.txt").exists()


def test_a_run_with_other_settings_is_refused_with_the_difference(
    config: CompareConfig, tmp_path: Path
) -> None:
    c = replace(config, run=str(tmp_path))
    run_cell(Cell("chatting", UNTRAINED), c)
    with pytest.raises(FileExistsError, match=r"learning_rate is .* there and 0\.1 now"):
        run_cell(Cell("chatting", UNTRAINED), replace(c, learning_rate=0.1))
