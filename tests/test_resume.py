"""A run that was killed goes on as if nothing had happened, wherever the kill came.

Every kill is a real SIGKILL in a process of its own; what comes out is compared, bit for bit, with
a run that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_runs import ForkedRuns

from agents import PPGAgent
from agents.loading import NANO
from agents.runs import read_metrics

pytestmark = pytest.mark.slow

# Six updates, a checkpoint after every second: what follows one is done again.
SMALL: dict[str, Any] = {
    "episodes": 8,
    "group_size": 4,
    "max_turns": 3,
    "max_new_tokens": 12,
    "total_timesteps": 6 * 8 * 3,
    "checkpoint_every": 2,
}
SHORT = {**SMALL, "total_timesteps": 4 * 8 * 3}
KINDS = {
    "plain": SMALL,
    "ppo": {**SHORT, "algorithm": "ppo", "n_epochs": 2, "batch_size": 4},
    "adapter": {**SHORT, "lora_rank": 2, "kl_coef": 0.1, "learning_rate": 1e-2},
    "bfloat16": {**SHORT, "dtype": "bfloat16", "tracker": "tensorboard"},
}


@pytest.fixture(scope="module")
def runs() -> Iterator[ForkedRuns]:
    forked = ForkedRuns()
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def never_stopped(
    runs: ForkedRuns, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return the folder of a run of some kind that was never stopped; each is made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("never_stopped") / kind
            ended = runs.train(run=str(made[kind]), **KINDS[kind])
            assert ended.code == 0, ended.output
        return made[kind]

    return folder


def what_was_learned(run: Path) -> dict[str, Any]:
    """Return all that two equal runs have in common: all but wall-clock time and file names."""
    newest = max(path for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    files = [run / "agent" / "ppg_agent.json"]
    for folder in (run / "agent", newest):
        files += sorted(folder.glob("*.safetensors"))
    result = json.loads((run / "result.json").read_text())
    return {
        "hashes": {str(file.relative_to(run)): sha256(file) for file in files},
        "metrics": [timeless(row) for row in read_metrics(run)],
        "result": (result["num_timesteps"], timeless(result["last"])),
    }


def timeless(row: dict[str, float]) -> dict[str, float]:
    kept = {k: v for k, v in row.items() if not k.startswith("time/")}
    return {**kept, "time/total_timesteps": row["time/total_timesteps"]}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_no_half_checkpoint(run: Path) -> None:
    """Whatever bears a checkpoint's name is whole: kills leave halves under other names."""
    places = [path for path in (run / "checkpoints").glob("*") if path.name.isdecimal()]
    for place in places:
        files = json.loads((place / "manifest.json").read_text())["files"]
        assert {"model.safetensors", "optimizer.safetensors", "state.json"} == files.keys()
        assert {name: sha256(place / name) for name in files} == {
            name: file["sha256"] for name, file in files.items()
        }


def assert_goes_on(
    runs: ForkedRuns, run: Path, reference: Path, kind: str, *kills: tuple[str, int]
) -> None:
    """Kill a run at these places in turn, let it go on, compare it with the reference."""
    for kill in kills:
        ended = runs.train(kill_at=kill, run=str(run), **KINDS[kind])
        assert ended.killed, f"not killed {kill}: {ended.output}"
        assert not (run / "result.json").exists()
        assert_no_half_checkpoint(run)
    ended = runs.train(run=str(run), **KINDS[kind])
    assert ended.code == 0, ended.output
    assert what_was_learned(run) == what_was_learned(reference)
    assert not list(run.glob("*.part"))


def test_the_run_that_is_compared_with_has_learned(never_stopped: Callable[[str], Path]) -> None:
    run = never_stopped("plain")
    assert sha256(run / "agent" / "model.safetensors") != sha256(NANO / "model.safetensors")
    assert len(what_was_learned(run)["metrics"]) == 6
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000004", "00000006"]


@pytest.mark.parametrize(
    "kill",
    [
        ("half the run's manifest", 1),
        ("in a rollout", 3 * 3 + 2),
        ("between backward and step", 4),
        ("before the metrics", 6),
        ("half a row of metrics", 4),
        ("after the metrics", 2),
        ("half the weights", 2),
        ("after the weights", 1),
        ("half the manifest", 2),
        ("before the rename", 2),
        ("after the rename", 3),
        ("while the old one is removed", 1),
        ("half an agent", 1),
        ("before the agent's rename", 1),
        ("before the result", 1),
        ("half the result", 1),
    ],
    ids=lambda kill: kill[0],
)
def test_a_kill_changes_nothing(
    kill: tuple[str, int],
    runs: ForkedRuns,
    never_stopped: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    assert_goes_on(runs, tmp_path, never_stopped("plain"), "plain", kill)


def test_kills_in_a_row_change_nothing(
    runs: ForkedRuns, never_stopped: Callable[[str], Path], tmp_path: Path
) -> None:
    # The first comes before any checkpoint, the third while the first checkpoint is made again.
    kills = [
        ("in a rollout", 2),
        ("half the weights", 1),
        ("before the rename", 1),
        ("between backward and step", 3),
        ("between backward and step", 1),
        ("while the old one is removed", 1),
        ("half an agent", 1),
        ("before the agent's rename", 1),
    ]
    assert_goes_on(runs, tmp_path, never_stopped("plain"), "plain", *kills)


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("ppo", [("between backward and step", 2 * 4 + 3), ("half the manifest", 1)]),
        ("adapter", [("in a rollout", 3 * 3 - 1), ("half an agent", 1)]),
        ("bfloat16", [("after the metrics", 2)]),
    ],
    ids=["ppo", "adapter", "bfloat16"],
)
def test_a_critic_an_adapter_and_float32_masters_go_on_too(
    kind: str,
    kills: list[tuple[str, int]],
    runs: ForkedRuns,
    never_stopped: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    assert_goes_on(runs, tmp_path, never_stopped(kind), kind, *kills)


def test_a_full_disk_spoils_neither_checkpoint_nor_agent(
    runs: ForkedRuns, never_stopped: Callable[[str], Path], tmp_path: Path
) -> None:
    # nano's weights are 3.7 MB, its optimizer twice that.
    assert runs.train(kill_at=("after the metrics", 2), run=str(tmp_path), **SMALL).killed
    remedy = r"File too large.* Free some space"

    ended = runs.train(largest_file=5_000_000, run=str(tmp_path), **SMALL)
    place = tmp_path / "checkpoints" / "00000004"
    assert ended.code == 1
    assert re.search(rf"OSError: Cannot write the checkpoint {place}: .*{remedy}", ended.output)
    assert f"{tmp_path / 'checkpoints' / '00000002'} is still valid" in ended.output
    assert_no_half_checkpoint(tmp_path)
    assert PPGAgent.load(tmp_path / "agent").num_updates == 4  # that was small enough

    # All is learned, and the kill comes when the agent of before has just been moved aside.
    assert runs.train(kill_at=("before the agent's rename", 1), run=str(tmp_path), **SMALL).killed
    for largest_file in (1_000_000, 50_000):
        ended = runs.train(largest_file=largest_file, run=str(tmp_path), **SMALL)
        assert ended.code == 1
        agent = tmp_path / "agent"
        assert re.search(rf"OSError: Cannot write {agent}: .*{remedy}", ended.output), ended.output
        assert PPGAgent.load(agent).num_updates == 4  # the one of before is back
        assert not list(tmp_path.glob("*.part"))

    assert_goes_on(runs, tmp_path, never_stopped("plain"), "plain")
