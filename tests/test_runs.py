"""The run folder: whose it is, what it holds, and that a kill in the middle does no harm."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from agents.loading import NANO
from agents.runs import RunFolder, read_metrics, read_transcripts

SETTINGS = {"domain": "therapy", "updates": 3, "cuts": (0, 2)}


def test_a_new_folder_says_what_was_run_and_on_what(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b", SETTINGS)
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["settings"] == {"domain": "therapy", "updates": 3, "cuts": [0, 2]}
    assert {"python", "torch", "transformers"} <= set(manifest["versions"])
    assert folder.result is None and folder.metrics() == []


def test_the_same_run_may_go_on_in_its_folder(tmp_path: Path) -> None:
    RunFolder(tmp_path, SETTINGS).finish({"reward": 0.5})
    assert RunFolder(tmp_path, dict(SETTINGS)).result == {"reward": 0.5}


def test_another_run_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, SETTINGS)
    with pytest.raises(FileExistsError, match="updates is 3 there and 4 now"):
        RunFolder(tmp_path, {**SETTINGS, "updates": 4})
    with pytest.raises(FileExistsError, match=r"noise is None there and 0\.1 now"):
        RunFolder(tmp_path, {**SETTINGS, "noise": 0.1})


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("Mine.")
    with pytest.raises(FileExistsError, match="not empty and holds no run; choose a new or empty"):
        RunFolder(tmp_path, SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file; name a folder"):
        RunFolder(tmp_path / "run", SETTINGS)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"Cannot make the run folder .*file/run"):
        RunFolder(tmp_path / "file" / "run", SETTINGS)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user can write anywhere")
    try:
        with pytest.raises(PermissionError, match=r"Cannot write to .* choose another"):
            RunFolder(tmp_path, SETTINGS)
    finally:
        tmp_path.chmod(0o700)


def test_metrics_are_there_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    rows = [{"time/total_timesteps": 8.0, "reward": 0.1 * i} for i in range(3)]
    for number, row in enumerate(rows, start=1):
        folder.log(row)
        assert read_metrics(tmp_path) == folder.metrics() == rows[:number]


def test_an_unfinished_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    folder.log({"reward": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"reward": 0.')
    assert folder.metrics() == [{"reward": 0.5}]


def test_no_metrics_yet_is_no_error(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "nowhere") == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_metrics(tmp_path) == []


def test_starting_again_forgets_the_metrics_of_the_unfinished_attempt(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    folder.log({"reward": 0.5})
    folder.keep_metrics([])
    folder.keep_metrics([])
    assert folder.metrics() == []


def test_a_result_is_written_in_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    folder.finish({"reward": 0.5})

    def break_off(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", break_off)
        with pytest.raises(KeyboardInterrupt):
            folder.finish({"reward": 0.9})
    assert RunFolder(tmp_path, SETTINGS).result == {"reward": 0.5}
    folder.finish({"reward": 0.9})
    assert folder.result == {"reward": 0.9}
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_whose_making_was_cut_short_can_be_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", break_off)
        with pytest.raises(KeyboardInterrupt):
            RunFolder(tmp_path, SETTINGS)
    assert RunFolder(tmp_path, SETTINGS).result is None


def test_transcripts_come_back_as_they_were_said(tmp_path: Path) -> None:
    said = [
        [{"role": "user", "content": "Grüße 🙂\nzwei Zeilen"}],
        [{"role": "user", "content": "No."}],
    ]
    RunFolder(tmp_path, SETTINGS).write_transcripts(
        [{"messages": said[0], "rewards": [0.5, 1.0]}, {"messages": said[1], "rewards": []}]
    )
    assert list(read_transcripts(tmp_path)) == [
        {"messages": said[0], "rewards": [0.5, 1.0]},
        {"messages": said[1], "rewards": []},
    ]
    assert "Grüße 🙂" in (tmp_path / "transcripts.jsonl").read_text(encoding="utf-8")


def test_unusual_line_separators_do_not_break_a_transcript_in_two(tmp_path: Path) -> None:
    said = [[{"role": "assistant", "content": "one\u2028two\u0085three\x0bfour"}]]
    RunFolder(tmp_path, SETTINGS).write_transcripts([{"messages": said[0], "rewards": [0.5]}])
    assert list(read_transcripts(tmp_path)) == [{"messages": said[0], "rewards": [0.5]}]


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\udcff"])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest\.json is .*remove its folder"):
        RunFolder(tmp_path, {"a": 1})


def test_a_run_on_other_data_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, SETTINGS, {"personas": "abc"})
    assert RunFolder(tmp_path, SETTINGS, {"personas": "abc"}).result is None
    with pytest.raises(FileExistsError, match="personas is 'abc' there and 'def' now"):
        RunFolder(tmp_path, SETTINGS, {"personas": "def"})


def test_a_resumed_run_keeps_the_rows_before_its_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    for number in range(4):
        folder.log({"update": number})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"upda')
    folder.keep_metrics([{"update": number} for number in range(3)])
    folder.log({"update": 7})
    assert [row["update"] for row in read_metrics(tmp_path)] == [0, 1, 2, 7]


# --- the trained agent ----------------------------------------------------------------------------


def agent_writer(text: str) -> Callable[[Path], None]:
    """Return what saves an agent of two files."""

    def save(path: Path) -> None:
        path.mkdir()
        (path / "model").write_text(text)
        (path / "tokenizer").write_text(text)

    return save


def agent_in(path: Path) -> list[str]:
    return [(path / "agent" / name).read_text() for name in ("model", "tokenizer")]


def fail(path: Path) -> None:
    """Save half an agent."""
    path.mkdir()
    (path / "model").write_text("ha")
    raise OSError("No space left on device")


def test_a_newer_agent_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    for text in ("old", "new"):
        folder.write_agent(agent_writer(text))
        assert agent_in(tmp_path) == [text, text]
    assert not list(tmp_path.glob("*.part"))


def test_an_agent_that_cannot_be_saved_leaves_the_one_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    remedy = "Cannot write .*agent: No space left on device. Free some space, then run the same"
    for before in ([], ["old", "old"]):
        with pytest.raises(OSError, match=remedy):
            folder.write_agent(fail)
        assert folder.agent.exists() == bool(before)
        assert not list(tmp_path.glob("*.part"))
        if not before:
            folder.write_agent(agent_writer("old"))
        assert agent_in(tmp_path) == ["old", "old"]


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_kill_between_two_renames_loses_no_agent(
    fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder(tmp_path, SETTINGS).write_agent(agent_writer("old"))
    rename, left = Path.rename, fail_at

    def break_off(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", break_off)
        with pytest.raises(KeyboardInterrupt):
            RunFolder(tmp_path, SETTINGS).write_agent(agent_writer("new"))
    with pytest.raises(OSError):
        RunFolder(tmp_path, SETTINGS).write_agent(fail)
    assert agent_in(tmp_path) == ["old", "old"]


def test_a_mistake_in_the_program_is_not_called_a_full_disk(tmp_path: Path) -> None:
    def mistake(path: Path) -> None:
        raise TypeError("no such argument")

    with pytest.raises(TypeError, match="no such argument"):
        RunFolder(tmp_path, SETTINGS).write_agent(mistake)


# --- a full disk ----------------------------------------------------------------------------------


@contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_with_the_file_and_the_remedy(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    folder.finish({"reward": 0.5})
    folder.log({"reward": 0.5})
    with full_disk(1000):
        with pytest.raises(OSError, match=r"Cannot write .*metrics\.jsonl: .*Free some space"):
            folder.log({"reward" * 300: 0.5})
        with pytest.raises(OSError, match=r"Cannot write .*result\.json: .*Free some space"):
            folder.finish({"reward" * 300: 0.5})
    assert folder.result == {"reward": 0.5}
    assert folder.metrics() == [{"reward": 0.5}]
    folder.keep_metrics([{"reward": 0.5}])  # as the same command does when it goes on
    folder.log({"reward": 0.6})
    assert folder.metrics() == [{"reward": 0.5}, {"reward": 0.6}]


def test_a_tokenizer_that_does_not_fit_is_told_like_all_else(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    folder = RunFolder(tmp_path, SETTINGS)
    with (
        full_disk(20_000),
        pytest.raises(OSError, match=r"Cannot write .*agent: File too large .*Free some space"),
    ):
        folder.write_agent(tokenizer.save_pretrained)
