"""The run folder: the one owner of its format.

RUN/manifest.json        what was run: settings, hashes of data, git commit, versions, hardware
RUN/metrics.jsonl        one line an update (keys as in Stable-Baselines3)
RUN/checkpoints/         from which a stopped run goes on (checkpoint.py)
RUN/result.json          written last; its presence means that the run is complete
RUN/transcripts.jsonl    dialogues with the reward of every turn, see read_transcripts
RUN/rejudged/            the same dialogues with the rewards of other judges (ppg rejudge)
RUN/error.txt            why a run of a comparison failed, if it did
RUN/agent/               the trained agent (transformers folder, safetensors)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from .provenance import provenance

MANIFEST, METRICS, RESULT, TRANSCRIPTS, REJUDGED, AGENT, ERROR = (
    "manifest.json",
    "metrics.jsonl",
    "result.json",
    "transcripts.jsonl",
    "rejudged",
    "agent",
    "error.txt",
)


class DamagedRunError(ValueError):
    """A file of a run folder cannot be read; the run has to be done again."""


class RunFolder:
    """A folder that holds one run.

    Args:
        path: created if missing.
        settings: what makes this run this run; a folder that holds another one is refused.
        data: hashes of what the run reads; a run on other data is another run.

    Raises:
        FileExistsError: the folder holds another run, or files that are no run.
        PermissionError: the folder cannot be written to.
        DamagedRunError: what it holds was cut off or changed.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], data: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise FileExistsError(f"{self.path} is a file; name a folder for the run.") from None
        except OSError as error:
            raise PermissionError(f"Cannot make the run folder {self.path}: {error}.") from error
        if not os.access(self.path, os.W_OK):
            raise PermissionError(f"Cannot write to {self.path}; choose another run folder.")
        settings = json.loads(json.dumps(settings))
        manifest = self._read(MANIFEST)
        if manifest is None and any(file.suffix != ".part" for file in self.path.iterdir()):
            raise FileExistsError(
                f"{self.path} is not empty and holds no run; choose a new or empty folder."
            )
        data = dict(data or {})
        if manifest is None:
            self._write(MANIFEST, {"settings": settings, "data": data, **provenance()})
            return
        for there, here in ((manifest["settings"], settings), (manifest.get("data", {}), data)):
            if there != here:
                raise FileExistsError(
                    f"{self.path} holds another run ({_first_difference(there, here)}); choose "
                    "another folder or remove this one."
                )

    @property
    def result(self) -> dict[str, Any] | None:
        """Return the result of a complete run, else None."""
        return self._read(RESULT)

    @property
    def agent(self) -> Path:
        """Return the folder for the trained agent."""
        return self.path / AGENT

    def clear(self) -> None:
        """Forget what an earlier attempt left: the run begins."""
        self.keep_metrics([])
        (self.path / ERROR).unlink(missing_ok=True)

    def fail(self, error: str) -> None:
        """Keep why the run failed."""
        self._write_text(ERROR, [error])

    def keep_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Keep these rows only: what came after them will be done again."""
        self._write_text(METRICS, (json.dumps(row) for row in rows))

    def log(self, row: Mapping[str, float]) -> None:
        """Append one line of metrics."""
        path = self.path / METRICS
        with _failure_explained(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """Return the metrics written so far; an unfinished last line is left out."""
        return read_metrics(self.path)

    def write_transcripts(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write dialogues, as `RolloutBatch.records` gives them, in place of what is there."""
        self._write_text(TRANSCRIPTS, map(_one_line, records))

    def add_transcripts(self, records: Iterable[Mapping[str, Any]], update: int) -> None:
        """Append the dialogues of one update."""
        path = self.path / TRANSCRIPTS
        with _failure_explained(path), path.open("a", encoding="utf-8") as file:
            file.writelines(f"{_one_line({'update': update, **record})}\n" for record in records)

    def keep_transcripts(self, updates: int) -> None:
        """Keep the dialogues of the first `updates` updates only."""
        path, kept = self.path / TRANSCRIPTS, 0
        if not path.exists():
            return
        with _failure_explained(path), path.open("r+b") as lines:
            for line in lines:
                if not line.endswith(b"\n") or json.loads(line).get("update", 0) > updates:
                    break
                kept += len(line)
            lines.truncate(kept)

    def write_agent(self, save: Callable[[Path], None]) -> None:
        """Let `save` write the trained agent into the folder, in whole or not at all.

        Raises:
            OSError: it could not be written; one that was there before still is.
        """
        draft, old = self.path / f"{AGENT}.part", self.path / f"{AGENT}-old.part"
        if old.exists() and not self.agent.exists():  # a kill came between two renames
            old.rename(self.agent)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with _failure_explained(self.agent):
                save(draft)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        if self.agent.exists():
            self.agent.rename(old)
        draft.rename(self.agent)
        shutil.rmtree(old, ignore_errors=True)

    def write_batch(self, name: str, batch: Any) -> Path:
        """Write the arrays and transcripts of a RolloutBatch for inspection; return the folder."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        records = [batch] if batch.tape is None else [batch, batch.tape]
        arrays = {
            field.name: value
            for record in records
            for field in fields(record)
            if isinstance(value := getattr(record, field.name), np.ndarray)
        }
        np.savez_compressed(folder / "arrays.npz", allow_pickle=False, **arrays)
        text = "".join(json.dumps(list(t), ensure_ascii=False) + "\n" for t in batch.transcripts)
        (folder / TRANSCRIPTS).write_text(text, encoding="utf-8")
        return folder

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result; the run is complete then."""
        self._write(RESULT, result)

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedRunError(f"{file} is damaged ({error}); remove its folder.") from error
        if not isinstance(content, dict) or (name == MANIFEST and "settings" not in content):
            raise DamagedRunError(f"{file} is not what this project writes; remove its folder.")
        return content

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self._write_text(name, [json.dumps(content, indent=2, ensure_ascii=False)])

    def _write_text(self, name: str, lines: Iterable[str]) -> None:
        """Write a file in whole or not at all."""
        path, draft = self.path / name, self.path / f"{name}.part"
        with _failure_explained(path):
            draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            draft.replace(path)


@contextmanager
def _failure_explained(path: Path) -> Iterator[None]:
    """Name the file and the remedy where the disk is full or cannot be written to."""
    try:
        yield
    except Exception as error:
        # The tokenizers package raises plain Exceptions.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise OSError(
            f"Cannot write {path}: {error}. Free some space, then run the same command again."
        ) from error


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Return the metrics in a run folder; none if there are none yet."""
    file = Path(path) / METRICS
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_transcripts(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the dialogues in a run folder, one JSON object each, in the format of logs.py.

    Those of training also have "update", the number of the update in which they were played.

    Raises:
        FileNotFoundError: the folder holds no dialogues.
        ValueError: names a line that is not JSON.
    """
    file = Path(path) / TRANSCRIPTS
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no dialogues ({TRANSCRIPTS}).")
    yield from read_records(file)


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one a line.

    Raises:
        ValueError: names a line that is not JSON; an unfinished last line is left out.
    """
    # Not splitlines: lines of a dialogue may hold other line separators, such as U+2028.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error}).") from error


def dialogue_folders(path: str | Path) -> list[Path]:
    """Return the run folders with dialogues at `path`: itself, or all below it.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(file.parent for file in Path(path).rglob(TRANSCRIPTS))
    if not found:
        raise FileNotFoundError(
            f"There are no dialogues ({TRANSCRIPTS}) in {path}; name a run folder, such as "
            "runs/demo or one of `ppg train`."
        )
    return [Path(path)] if Path(path) in found else found


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings of a run folder, {} if it has no manifest."""
    file = Path(path) / MANIFEST
    if not file.exists():
        return {}
    return dict(json.loads(file.read_text(encoding="utf-8")).get("settings", {}))


def write_rejudged(path: str | Path, judge: str, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write dialogues with another judge's rewards to RUN/rejudged/JUDGE.jsonl, in whole or not.

    Returns:
        The file.
    """
    folder = Path(path) / REJUDGED
    folder.mkdir(exist_ok=True)
    file = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', judge).strip('-.')}.jsonl"
    draft = file.with_suffix(".part")
    with _failure_explained(file):
        with draft.open("w", encoding="utf-8") as lines:
            lines.writelines(f"{_one_line(record)}\n" for record in records)
        draft.replace(file)
    return file


def _one_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} is {old.get(key)!r} there and {new.get(key)!r} now"
    return "settings differ"
