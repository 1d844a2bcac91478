"""A log becomes two, to learn from and to test on, and no persona is in both.

    train, test = split_by_persona(read_log("log.jsonl.gz"), test_share=0.2)

Lines of one dialogue, and dialogues of one persona, resemble each other: split by line, a test
tells how well the agent remembers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from .logs import LogError, LoggedDialogue, read_log, write_log


def split_by_persona(
    dialogues: Iterable[LoggedDialogue], test_share: float = 0.2, seed: int = 0
) -> tuple[list[LoggedDialogue], list[LoggedDialogue]]:
    """Return (train, test) such that no persona and no dialogue is on both sides.

    A persona goes by its id; without one, by what the agent was told in a system message, which
    may not be told to any persona with an id on the other side; without either, by its group.
    Personas that share a dialogue stay together, and so do dialogues that
    agree word by word, those of one exchange excepted, which do so by chance.

    Args:
        dialogues: all of them.
        test_share: about this share of the dialogues is for testing: as near as whole personas
            allow, and never further away than the largest of them is large.
        seed: which.

    Raises:
        ValueError: if they cannot be split, because all belong together; names what they share.
    """
    everything = list(dialogues)
    is_test = _test_side(everything, test_share, seed)
    train = [dialogue for dialogue, test in zip(everything, is_test, strict=True) if not test]
    test = [dialogue for dialogue, test in zip(everything, is_test, strict=True) if test]
    return train, test


def split_log(
    path: str | Path,
    train: str | Path,
    test: str | Path,
    test_share: float = 0.2,
    seed: int = 0,
) -> tuple[int, int]:
    """Write a log as two, split as by `split_by_persona`; return how many dialogues each has.

    The log is streamed.

    Raises:
        LogError: as `read_log`.
        ValueError: as `split_by_persona`, or if an output is the log itself.
    """
    if len({Path(each).resolve() for each in (path, train, test)}) < 3:
        raise ValueError(f"The log and its two parts are three files, got {path}, {train}, {test}.")
    is_test = _test_side(read_log(path), test_share, seed)
    numbers = [
        write_log(out, (d for d, test in zip(read_log(path), is_test, strict=True) if test == side))
        for out, side in ((train, False), (test, True))
    ]
    return numbers[0], numbers[1]


def _test_side(dialogues: Iterable[LoggedDialogue], test_share: float, seed: int) -> list[bool]:
    """Return whether each is for testing."""
    if not 0 < test_share < 1:
        raise ValueError(f"test_share lies between 0 and 1, got {test_share}.")
    marks = [_marks(dialogue) for dialogue in dialogues]
    nameless = {mark for each in marks for mark in each if mark.startswith(_NAMELESS)}
    for own in marks:
        for mark in [mark for mark in own if mark.startswith(_NAMED)]:
            name, twin = own.pop(mark), _NAMELESS + mark.removeprefix(_NAMED)
            if twin in nameless:
                own[twin] = name
    clusters = _clusters(marks)
    sizes = Counter(clusters)
    if len(sizes) < 2:
        raise ValueError(_why_one_cluster(marks))
    wanted, number = test_share * len(marks), 0
    held_out: set[int] = set()
    for cluster in np.random.default_rng(seed).permutation(sorted(sizes)).tolist():
        larger = number + sizes[cluster]
        if larger < len(marks) and abs(larger - wanted) < abs(number - wanted):
            held_out.add(cluster)
            number = larger
    if not held_out:
        held_out.add(min(sizes, key=lambda cluster: (sizes[cluster], cluster)))
    return [cluster in held_out for cluster in clusters]


def refuse_leaks(train: Iterable[LoggedDialogue], test: Iterable[LoggedDialogue]) -> None:
    """Check that no persona, dialogue or text is on both sides.

    Raises:
        LogError: names what is.
    """
    seen = {mark for dialogue in train for mark in _marks(dialogue)}
    for dialogue in test:
        for mark, name in _marks(dialogue).items():
            shared = mark in seen
            if mark.startswith(_NAMED):  # personas with ids may all be told the same
                shared = _NAMELESS + mark.removeprefix(_NAMED) in seen
            elif mark.startswith(_NAMELESS):
                shared = shared or _NAMED + mark.removeprefix(_NAMELESS) in seen
            if shared:
                raise LogError(
                    f"Training and test data share {name}; split by persona "
                    "(agents.split_by_persona), never by line."
                )


def is_alone(dialogue: LoggedDialogue) -> bool:
    """Return whether nothing tells who the agent played: a split takes it for somebody else."""
    known = dialogue.persona or dialogue.group is not None
    return not known and dialogue.messages[0]["role"] != "system"


_NAMELESS, _NAMED = "told, nameless ", "told, named "
"""Before what a persona without an id was told, and before what one with an id was."""


def _marks(dialogue: LoggedDialogue) -> dict[str, str]:
    """Return what may be on one side of a split only: mark -> how to name it.

    What a persona with an id is told may be the same for all, about manners, say: it may be on both
    sides, but not where the other side has it from a persona without an id, who could be the same.
    """
    marks = {}
    told = dialogue.messages[0] if dialogue.messages[0]["role"] == "system" else None
    if dialogue.persona:
        marks[f"persona {dialogue.persona}"] = f"the persona {dialogue.persona!r}"
    if told is not None:
        mark = f"{_NAMED if dialogue.persona else _NAMELESS}{_digest(told['content'])}"
        marks[mark] = f"the persona text {told['content'][:60]!r}"
    elif not dialogue.persona and dialogue.group is not None:
        marks[f"group {dialogue.group}"] = f"the group {dialogue.group!r}"
    if dialogue.dialogue:
        marks[f"dialogue {dialogue.dialogue}"] = f"the dialogue {dialogue.dialogue!r}"
    # Without roles: seen by its other speaker, a dialogue is the same. A greeting and its answer
    # are the same by chance.
    said = [message["content"] for message in dialogue.messages if message is not told]
    nameless = told is None and not dialogue.persona
    if nameless or len(said) > 2:
        marks[f"said {_digest(json.dumps(said))}"] = f"a dialogue, word by word ({said[0][:60]!r})"
    return marks


def _why_one_cluster(marks: Sequence[Mapping[str, str]]) -> str:
    if not marks:
        return "There are no dialogues to split."
    shared, number = Counter(mark for each in marks for mark in each).most_common(1)[0]
    name = next(each[shared] for each in marks if shared in each)
    return (
        f"All {len(marks)} dialogues belong together and cannot be split: {number} of them share "
        f"{name}. Give personas ids of their own (field 'persona'); then what they are told may be "
        "the same."
    )


def _clusters(marks: Sequence[Iterable[str]]) -> list[int]:
    """Return a number for each dialogue; those that share a mark, if by way of others, agree."""
    leader = list(range(len(marks)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first: dict[str, int] = {}
    for i, own in enumerate(marks):
        for mark in own:
            leader[find(i)] = find(first.setdefault(mark, i))
    return [find(i) for i in range(len(marks))]


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
