"""A log, one pass at a time: streamed, shuffled in a buffer, cut into batches.

    dialogues = units(LogReader("log.jsonl.gz"), together=False, longest=32)
    for batch in batches(shuffled(dialogues, size=1024, seed=[0, 1]), size=32):
        ...

A unit is what is shuffled as one: a dialogue, or those of a group that follow each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .logs import LogError, LoggedDialogue, read_log

Log = str | Path | Sequence[LoggedDialogue]
"""A file of agents.logs, read anew in every pass, or dialogues in memory."""


class LogReader:
    """Reads a log as often as asked for; each pass yields the same dialogues, or says so.

    Args:
        log: whose dialogues.
        name: what errors call it, where it is no file.

    Raises:
        TypeError: the log can be read only once, or holds something else.
    """

    def __init__(self, log: Log, name: str = "log") -> None:
        if isinstance(log, LoggedDialogue) or not isinstance(log, str | Path | Sequence):
            raise TypeError(
                f"A log is the path of a file or a list of dialogues, which can be read more than "
                f"once, got a {type(log).__name__}; give list(...) of it, or of a dataset "
                "list(from_dataset(...))."
            )
        self._log = tuple(log) if isinstance(log, list) else log  # lists may change meanwhile
        self.name = str(log) if isinstance(log, str | Path) else f"the {name}"
        self._path = Path(log) if isinstance(log, str | Path) else None
        self._seen: tuple[int, int, int] | None = None  # dialogues, turns, most turns of one
        self._stamp: tuple[int, ...] | None = None  # of the file, in the first pass

    def __iter__(self) -> Iterator[LoggedDialogue]:
        """Yield the dialogues in the log's order.

        Raises:
            LogError: the log cannot be read, or has changed since the first pass.
        """
        number = turns = longest = 0
        self._refuse_another_file()
        for dialogue in read_log(self._log) if isinstance(self._log, str | Path) else self._log:
            if not isinstance(dialogue, LoggedDialogue):
                raise TypeError(
                    f"A log holds what agents.logs reads, got a {type(dialogue).__name__}; make it "
                    "with parse_dialogue, those of a dataset with from_dataset."
                )
            number, turns = number + 1, turns + dialogue.num_turns
            longest = max(longest, dialogue.num_turns)
            if self._seen is not None and (number > self._seen[0] or longest > self._seen[2]):
                self._refuse_changed()
            yield dialogue
        if not number:
            raise LogError(f"{self.name} holds no dialogues.")
        if self._seen is not None and self._seen != (number, turns, longest):
            self._refuse_changed()
        self._refuse_another_file()
        self._seen = (number, turns, longest)

    def _refuse_another_file(self) -> None:
        """Refuse a file that was written to, or replaced, since the first pass began."""
        if self._path is None or not self._path.exists():
            return
        found = self._path.stat()
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if self._stamp not in (None, stamp):
            self._refuse_changed()
        self._stamp = stamp

    def _refuse_changed(self) -> None:
        raise LogError(
            f"{self.name} has changed while it was read; let what writes it finish, or copy it."
        )


def units(
    dialogues: Iterable[LoggedDialogue], together: bool, longest: int
) -> Iterator[list[LoggedDialogue]]:
    """Yield each dialogue by itself, or `together` those of a group side by side.

    A unit has at most `longest` dialogues: however large a group is, it is not held in memory.
    """

    def key(numbered: tuple[int, LoggedDialogue]) -> tuple[str, Any]:
        number, dialogue = numbered
        return group_key(number, dialogue) if together else ("", number)

    for _, group in groupby(enumerate(dialogues), key):
        yield from batches((dialogue for _, dialogue in group), longest)


def shuffled(
    units: Iterable[list[LoggedDialogue]], size: int, seed: Sequence[int]
) -> Iterator[LoggedDialogue]:
    """Yield all, each unit drawn from `size` dialogues held in memory; 0 keeps the order."""
    rng, held, number = np.random.default_rng(list(seed)), [], 0
    for unit in units:
        held.append(unit)
        number += len(unit)
        while number > size:
            taken = _taken(held, rng) if size else held.pop()
            number -= len(taken)
            yield from taken
    while held:
        yield from _taken(held, rng)


def batches(dialogues: Iterable[LoggedDialogue], size: int) -> Iterator[list[LoggedDialogue]]:
    """Yield them `size` at a time; the last batch may be smaller."""
    batch: list[LoggedDialogue] = []
    for dialogue in dialogues:
        batch.append(dialogue)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def group_key(number: int, dialogue: LoggedDialogue) -> tuple[str, Any]:
    """Return what tells a group; a dialogue that tells none is one by itself."""
    group = dialogue.group
    return ("", number) if group is None else (type(group).__name__, group)


def group_numbers(batch: Sequence[LoggedDialogue]) -> np.ndarray:
    """Return group_B, numbered as they come."""
    numbers: dict[tuple[str, Any], int] = {}
    keys = [group_key(b, dialogue) for b, dialogue in enumerate(batch)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def num_alone(batch: Sequence[LoggedDialogue]) -> int:
    """Return how many dialogues of a batch have no other of their group beside them."""
    return int((np.bincount(group_numbers(batch), minlength=1) == 1).sum())


def _taken(held: list[list[LoggedDialogue]], rng: np.random.Generator) -> list[LoggedDialogue]:
    i = int(rng.integers(len(held)))
    held[i], held[-1] = held[-1], held[i]
    return held.pop()
