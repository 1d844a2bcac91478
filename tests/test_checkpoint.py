"""Checkpoints: no crash spoils one, no damaged or foreign one is taken for an own one.

Kills of whole training runs are in test_resume.py.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_policy, tiny_tokenizer
from tiny_worlds import EchoDialogue, EchoDialogues

from agents import PPGAgent, PPOAgent, resume
from agents.checkpoint import (
    CheckpointError,
    checkpoints,
    random_states,
    read_checkpoint,
    restore_random_states,
    write_checkpoint,
)
from agents.lm_policy import LMPolicy

ORIGIN = {"seed": 3, "sizes": (1, 2)}


def echo_agent(
    credit: str = "full", policy: LMPolicy | None = None, env: Any = None, **settings: Any
) -> PPGAgent:
    policy = tiny_policy() if policy is None else policy
    env = EchoDialogues(8) if env is None else env
    settings = {"group_size": 4, "seed": 0, "learning_rate": 1e-3, **settings}
    return PPGAgent(policy, env, credit, **settings)


def weights_of(agent: PPGAgent) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in agent.policy.model.parameters()])


def state_of(agent: PPGAgent) -> dict[str, str]:
    """Return what learning goes on from, as text that can be compared."""
    tensors, numbers = agent.optimization.state()
    tensors = {**tensors, "weights": weights_of(agent)}
    counters = [numbers, agent.num_updates, agent.num_timesteps, agent.history, agent.log]
    return {
        **{name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()},
        "counters": json.dumps(counters),
        "global randomness": json.dumps(random_states()),
        "own randomness": str(agent.policy.num_seeds_spawned),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def writer(text: str) -> Callable[[Path], None]:
    """Return what writes two files into a checkpoint."""

    def write(path: Path) -> None:
        (path / "one.txt").write_text(text)
        (path / "two.txt").write_text(text * 2)

    return write


def numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in checkpoints(folder)]


# --- crashes --------------------------------------------------------------------------------------


class Crash(BaseException):
    """This process is dead."""


class Disk:
    """Counts the file operations of this process; one of them leaves half a file and an error.

    After a Crash no other operation happens either, as if the process were dead.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, fail_at: int = 0, error: BaseException | None = None
    ) -> None:
        self.number, self.fail_at, self.error = 0, fail_at, error
        for name in ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "scandir"):
            patch.setattr(os, name, self.watched(getattr(os, name)))
        patch.setattr(io, "open", self.watched(io.open))
        patch.setattr(Path, "write_text", self.watched(Path.write_text, half_a_text))
        patch.setattr(resume, "save_file", self.watched(resume.save_file, half_a_file))

    def watched(
        self, operation: Callable[..., Any], half: Callable[..., None] | None = None
    ) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.number += 1
            if self.number == self.fail_at and half is not None:
                half(*args)
            dead = isinstance(self.error, Crash) and self.number > self.fail_at
            if self.error is not None and (self.number == self.fail_at or dead):
                raise self.error
            return operation(*args, **kwargs)

        return watched


def half_a_text(path: Path, text: str) -> None:
    with builtins.open(path, "w") as file:
        file.write(text[: len(text) // 2])


def half_a_file(tensors: Any, path: Path) -> None:
    with builtins.open(path, "wb") as file:
        file.write(b"\0" * 100)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with "before" and "after": an agent's checkpoints after updates 1 and 2."""
    folder = tmp_path_factory.mktemp("learned")
    places = iter(("before", "after"))

    def keep(agent: PPGAgent) -> bool:
        agent.checkpoint(folder / next(places))
        return agent.num_updates < 2

    echo_agent().learn(10_000, keep)
    return folder


@pytest.mark.parametrize(
    ("number", "keep"), [(2, 1), (2, 2), (1, 1)], ids=["the next, keep 1", "the next", "the same"]
)
def test_a_crash_at_any_point_leaves_a_valid_checkpoint(
    number: int, keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, *failure: Any) -> int:
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, 1, writer("old"), ORIGIN)
        with monkeypatch.context() as patch:
            disk = Disk(patch, *failure)
            write_checkpoint(folder, number, writer("new"), ORIGIN, keep)
        return disk.number

    folder, found = tmp_path / "run", []
    num_operations = write(folder)
    for fail_at in range(1, num_operations + 1):
        with pytest.raises(Crash):
            write(folder, fail_at, Crash())
        newest = checkpoints(folder)[-1]
        read_checkpoint(newest, ORIGIN)
        text = (newest / "one.txt").read_text()
        assert (newest / "two.txt").read_text() == text * 2
        found.append((int(newest.name), text))

        write_checkpoint(folder, 3, writer("newest"), ORIGIN, keep=1)  # and it goes on
        assert sorted(path.name for path in folder.iterdir()) == ["00000003"]
    assert num_operations > 15
    assert set(found) == {(1, "old"), (number, "new")}  # crashes came before and after the rename
    assert found == sorted(found, key=lambda newest: newest[1] == "new")


def test_an_error_at_any_point_is_told_with_the_remedy_and_leaves_a_valid_checkpoint(
    learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, folder = echo_agent(), tmp_path / "run"

    def write(*failure: Any) -> int:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(learned / "before", folder)
        agent.restore(learned / "after")
        with monkeypatch.context() as patch:
            disk = Disk(patch, *failure)
            agent.checkpoint(folder, keep=1)
        return disk.number

    agent.restore(learned / "before")
    before = state_of(agent)
    num_operations = write()
    after = state_of(agent)
    assert before != after
    told = 0
    for fail_at in range(1, num_operations + 1):
        try:
            write(fail_at, OSError(errno.ENOSPC, "No space left on device"))
        except CheckpointError as error:  # the one before could not be read
            assert "manifest.json is missing or damaged (OSError)" in str(error)
        except OSError as error:
            told += 1
            where = str(folder / "00000002")
            assert f"Cannot write the checkpoint {where}: " in str(error)
            assert "No space left on device" in str(error)
            assert "is still valid. Free some space or choose another run folder" in str(error)
        other = echo_agent()
        assert other.restore(folder)
        assert state_of(other) in (before, after)
    assert told > num_operations / 2


def test_the_newest_are_kept_and_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    for leftover in (".part-00000001", ".part-old-00000007"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half.txt").write_text("ha")
    (tmp_path / "notes.txt").write_text("Mine.")
    for number in range(1, 6):
        place = write_checkpoint(tmp_path, number, writer("text"), ORIGIN, keep=3)
        assert place == tmp_path / f"{number:08d}"
        assert numbers(tmp_path) == list(range(max(1, number - 2), number + 1))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000003", "00000004", "00000005", "notes.txt"]


@pytest.mark.parametrize("keep", [0, -3])
def test_the_one_just_written_is_always_kept(keep: int, tmp_path: Path) -> None:
    for number in (1, 2):
        write_checkpoint(tmp_path, number, writer("text"), ORIGIN, keep)
    assert numbers(tmp_path) == [2]


def test_checkpoints_are_ordered_by_number_and_not_by_name(tmp_path: Path) -> None:
    for number in (2, 10, 99_999_999, 100_000_000):
        write_checkpoint(tmp_path, number, writer("text"), ORIGIN, keep=9)
    for other in ("x", "²", "12b"):
        (tmp_path / other).mkdir()
    (tmp_path / "200000000").write_text("no folder")
    assert numbers(tmp_path) == [2, 10, 99_999_999, 100_000_000]
    assert checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_that_made_room_for_a_newer_one_comes_back(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path, 4, writer("old"), ORIGIN)
    place.rename(tmp_path / ".aside-00000004")
    assert checkpoints(tmp_path) == [place]
    read_checkpoint(place, ORIGIN)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write .*file/run/00000001.*there was none before"):
        write_checkpoint(tmp_path / "file" / "run", 1, writer("text"), ORIGIN)


# --- what is refused ------------------------------------------------------------------------------


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_in_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def add_a_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


DAMAGES = [flip_a_byte, cut_in_half, add_a_byte, Path.unlink]


def copy_of(learned: Path, tmp_path: Path) -> Path:
    """Return a folder with both checkpoints."""
    shutil.copytree(learned / "before", tmp_path / "run")
    shutil.copytree(learned / "after" / "00000002", tmp_path / "run" / "00000002")
    return tmp_path / "run"


def assert_refused(agent: PPGAgent, folder: Path, message: str) -> None:
    """The agent refuses to go on from this folder or to write into it, and changes nothing."""
    before, there = state_of(agent), contents(folder)
    with pytest.raises(CheckpointError, match=message):
        agent.restore(folder)
    assert state_of(agent) == before
    assert contents(folder) == there


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_changed(
    name: str, damage: Callable[[Path], None], learned: Path, tmp_path: Path
) -> None:
    folder, agent = copy_of(learned, tmp_path), echo_agent()
    damage(folder / "00000002" / name)
    what = "missing" if damage is Path.unlink else "damaged"
    remedy = "Remove the folder .*00000002 to go on from the checkpoint before it"
    assert_refused(agent, folder, rf"00000002/{name} is {what}\. {remedy}")
    shutil.rmtree(folder / "00000002")
    assert agent.restore(folder) and agent.num_updates == 1


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"origin": {}}', '{"origin": [], "files": {}}', "\udcff"]
)
def test_a_damaged_manifest_is_named_and_nothing_is_changed(
    text: str | None, learned: Path, tmp_path: Path
) -> None:
    folder, agent = copy_of(learned, tmp_path), echo_agent()
    manifest = folder / "00000002" / "manifest.json"
    if text is None:
        manifest.unlink()
    else:
        manifest.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_refused(agent, folder, r"00000002/manifest\.json is missing or damaged .*Remove that")
    agent.num_updates = 3
    with pytest.raises(CheckpointError, match="missing or damaged"):
        agent.checkpoint(folder)


def wider_policy() -> LMPolicy:
    model = tiny_model("llama", intermediate_size=64)
    return LMPolicy(model, tiny_tokenizer(), max_new_tokens=12, seed=0)


def deeper_policy() -> LMPolicy:
    model = tiny_model("llama", num_hidden_layers=3)
    return LMPolicy(model, tiny_tokenizer(), max_new_tokens=12, seed=0)


def low_precision_policy() -> LMPolicy:
    return LMPolicy(
        tiny_model("llama").to(torch.bfloat16), tiny_tokenizer(), max_new_tokens=12, seed=0
    )


FOREIGN: list[tuple[str, Callable[[], PPGAgent], str]] = [
    ("seed", lambda: echo_agent(seed=1), "seed is 0 there and 1 now"),
    ("credit", lambda: echo_agent("kstep:2"), "credit is 'full' there and 'kstep:2' now"),
    ("setting", lambda: echo_agent(kl_coef=0.1), "settings is .*'kl_coef': 0.0.* there and"),
    (
        "longest line",
        lambda: echo_agent(policy=tiny_policy(max_new_tokens=9)),
        "max_new_tokens is 12 there and 9 now",
    ),
    (
        "kind",
        lambda: PPOAgent(tiny_policy(), EchoDialogues(8), seed=0),
        "agent is 'PPGAgent' there and 'PPOAgent' now",
    ),
]
FOREIGN_MODEL: list[tuple[str, Callable[[], PPGAgent], str]] = [
    (
        "width",
        lambda: echo_agent(policy=wider_policy()),
        r"model\.\S+ is float32 \(32, 48\) there and float32 \(32, 64\) here",
    ),
    (
        "depth",
        lambda: echo_agent(policy=deeper_policy()),
        r"model\.\S+ is missing there and float32 \(32,\) here",
    ),
    (
        "precision",
        lambda: echo_agent(policy=low_precision_policy()),
        r"model\.\S+ is float32 \(.*\) there and bfloat16",
    ),
]


@pytest.mark.parametrize(
    ("make", "message"),
    [case[1:] for case in FOREIGN + FOREIGN_MODEL],
    ids=[case[0] for case in FOREIGN + FOREIGN_MODEL],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_changed(
    make: Callable[[], PPGAgent], message: str, learned: Path, tmp_path: Path
) -> None:
    folder = copy_of(learned, tmp_path)
    remedy = r".*[Cc]hoose another run folder, or the"
    assert_refused(make(), folder, f"00000002 is a checkpoint of another .*{message}{remedy}")


@pytest.mark.parametrize(
    ("make", "message"), [case[1:] for case in FOREIGN], ids=[case[0] for case in FOREIGN]
)
def test_nothing_is_written_among_the_checkpoints_of_another_run(
    make: Callable[[], PPGAgent], message: str, learned: Path, tmp_path: Path
) -> None:
    folder, agent = copy_of(learned, tmp_path), make()
    agent.num_updates = 7
    there = contents(folder)
    with pytest.raises(CheckpointError, match=message):
        agent.checkpoint(folder)
    assert contents(folder) == there


def test_nothing_is_written_before_a_later_checkpoint(learned: Path, tmp_path: Path) -> None:
    folder, agent = copy_of(learned, tmp_path), echo_agent()
    agent.num_updates = 1
    there = contents(folder)
    with pytest.raises(CheckpointError, match=r"after update 2, .* after update 1\. Go on from"):
        agent.checkpoint(folder, keep=1)
    assert contents(folder) == there


def test_a_checkpoint_of_more_processes_is_refused(learned: Path, tmp_path: Path) -> None:
    folder = copy_of(learned, tmp_path)
    manifest = folder / "00000002" / "manifest.json"
    text = manifest.read_text()
    assert '"num_processes": 1' in text
    manifest.write_text(text.replace('"num_processes": 1', '"num_processes": 2'))
    assert_refused(echo_agent(), folder, "num_processes is 2 there and 1 now")


# --- what is in one -------------------------------------------------------------------------------


def test_nothing_in_a_checkpoint_is_a_pickle(learned: Path) -> None:
    files = contents(learned / "after" / "00000002")
    assert files.keys() == {
        "manifest.json",
        "state.json",
        "model.safetensors",
        "optimizer.safetensors",
    }
    for name, data in files.items():
        if name.endswith(".json"):
            json.loads(data)
        else:  # a safetensors file begins with the length of its JSON header
            size = int.from_bytes(data[:8], "little")
            assert len(json.loads(data[8 : 8 + size])) > 10


def test_without_a_checkpoint_the_agent_starts_anew(tmp_path: Path) -> None:
    agent = echo_agent()
    before = state_of(agent)
    assert not agent.restore(tmp_path) and not agent.restore(tmp_path / "nowhere")
    assert state_of(agent) == before
    with pytest.raises(ValueError, match=r"Say how much to learn: total_timesteps is needed"):
        agent.learn()


SETTINGS: list[dict[str, Any]] = [
    {"lr_schedule": "linear"},
    {"lr_schedule": "linear", "n_epochs": 2, "batch_size": 4, "ratio_level": "token"},
    {"kl_coef": 0.1, "ent_coef": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["linear", "epochs", "kl and entropy"])
def test_learning_goes_on_to_its_goal_as_if_never_interrupted(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rates: dict[str, list[float]] = {"whole": [], "parts": []}

    def note(agent: PPGAgent, kind: str) -> None:
        rates[kind].append(agent.optimization.adam.param_groups[0]["lr"])

    whole = echo_agent(**settings).learn(120, lambda agent: note(agent, "whole"))
    assert whole.num_updates >= 4

    def stop_after_the_second(agent: PPGAgent) -> bool:
        note(agent, "parts")
        agent.checkpoint(tmp_path)
        return agent.num_updates % 2 == 1

    echo_agent(**settings).learn(120, stop_after_the_second)
    resumed = echo_agent(**settings)
    assert resumed.restore(tmp_path)
    assert (resumed.num_updates, len(resumed.history)) == (2, 2)
    resumed.learn(callback=lambda agent: note(agent, "parts"))

    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert resumed.num_timesteps == whole.num_timesteps >= 120
    assert rates["parts"] == rates["whole"]
    falls = all(b < a for a, b in itertools.pairwise(rates["whole"]))
    assert falls == ("lr_schedule" in settings)
    for name in ("train/grad_norm", "rollout/ep_rew_mean", "train/approx_kl"):
        assert [row[name] for row in resumed.history] == [row[name] for row in whole.history]
    resumed.learn()  # the goal is reached
    assert resumed.num_updates == whole.num_updates


def test_what_the_agent_says_next_is_the_same_after_a_restore(tmp_path: Path) -> None:
    chats = [[{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi."}]] * 4
    agent = echo_agent()
    agent.learn(1)
    agent.predict(chats)  # moves the policy's own generator on
    agent.checkpoint(tmp_path)
    restored = echo_agent()
    restored.restore(tmp_path)
    assert restored.predict(chats) == agent.predict(chats)
    assert restored.predict(chats) != echo_agent().predict(chats)


# --- randomness of others -------------------------------------------------------------------------


def draw() -> list[float]:
    """Draw from every global generator; normal numbers come in pairs, one of them is kept."""
    return [
        random.random(),
        random.gauss(),
        np.random.random(),  # noqa: NPY002
        np.random.standard_normal(),  # noqa: NPY002
        float(torch.rand(())),
    ]


def test_the_state_of_global_generators_goes_through_json() -> None:
    draw()
    states = json.loads(json.dumps(random_states()))
    first, second = draw(), draw()
    restore_random_states(states)
    assert [draw(), draw()] == [first, second]
    assert len({*first, *second}) == 10


class Whim(EchoDialogue):
    """A partner of someone else's, which draws its reward from global generators."""

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        messages, _, over, cut, info = super().step(action)
        return messages, sum(draw()), over, cut, info


class Whims(EchoDialogues):
    """Several whimsical partners."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs)
        self.envs = [Whim() for _ in range(num_envs)]


def test_even_a_world_that_draws_from_global_generators_goes_on_alike(tmp_path: Path) -> None:
    def stop(agent: PPGAgent) -> bool:
        agent.checkpoint(tmp_path)
        return False

    first = echo_agent(env=Whims(8)).learn(10_000, stop)
    first.learn(1)
    for other in range(2):
        random.seed(other)
        resumed = echo_agent(env=Whims(8))
        resumed.restore(tmp_path)
        resumed.learn(1)
        assert torch.equal(weights_of(resumed), weights_of(first))


def test_the_manifest_says_what_made_the_checkpoint(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path, 1, writer("text"), ORIGIN, data={"weights": "abc"})
    manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["origin"] == json.loads(json.dumps(ORIGIN))
    assert manifest["data"] == {"weights": "abc"}
    assert {"python", "torch", "transformers"} <= set(manifest["versions"])
    assert "git_commit" in manifest and "cores" in manifest["hardware"]


def test_other_versions_are_told_and_no_obstacle(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path, 1, writer("text"), ORIGIN)
    text = (place / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    manifest["versions"]["torch"] = "1.0"
    (place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.warns(UserWarning, match="not bit for bit"):
        read_checkpoint(place, ORIGIN)
