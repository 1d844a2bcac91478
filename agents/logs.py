"""Logged dialogues on disk: one trajectory a line of JSON, plain or gzipped (".gz").

    for trajectory in read_log("runs/train/transcripts.jsonl"):
        print(trajectory.persona, trajectory.rewards)

What `ppg train` and `ppg evaluate` leave behind is such a log, what `ppg train --offline` reads is
one. A line is a JSON object:

    messages      [{"role", "content"}, ...]: system (who the agent is), then user (the partner) and
                  assistant (the agent) in turn, from either of them on
    rewards       one a line of the agent; null = nobody could score it. The environment's are in
                  [0, 1], differences of scores (see `decompose`) in [-1, 1]
    domain        name of the setting
    persona       id of who the agent played; splits go by it
    dialogue      id of the dialogue, if several records come from one (both speakers' views)
    group         dialogues with equal ids had the same persona, opening and partner seed
    behaviour     who spoke: the model that was sampled from
    judge         who scored
    reward_parts  {name: one number or null a line}
    reasons       the judge's, one a line
    token_ids     [[id, ...], ...]: each line of the agent as it was sampled, end mark included
    logprobs      log-probability of each of these tokens when it was sampled
    tokenizer     fingerprint of the tokenizer that `token_ids` belong to
    flags         what to mind about the record

Only `messages` and `rewards` are needed. Other fields are kept as they are, and so is every text:
a log that is read and written again has the same texts to the byte.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .policy import Messages

_ROLES = ("system", "user", "assistant")
_PER_TURN = ("reasons", "token_ids", "logprobs")


@dataclass(frozen=True)
class Trajectory:
    """One logged dialogue, as the agent saw it; fields as in the module's docstring.

    T lines of the agent.
    """

    messages: Messages
    rewards: tuple[float | None, ...]
    domain: str = ""
    persona: str = ""
    dialogue: str = ""
    group: int | str | None = None
    behaviour: str = ""
    judge: str = ""
    reward_parts: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    reasons: tuple[str, ...] | None = None
    token_ids: tuple[tuple[int, ...], ...] | None = None
    logprobs: tuple[tuple[float, ...], ...] | None = None
    tokenizer: str = ""
    flags: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_turns(self) -> int:
        """Lines of the agent: T."""
        return len(self.rewards)

    @property
    def lines(self) -> list[str]:
        """What the agent said, one text a turn."""
        return [m["content"] for m in self.messages if m["role"] == "assistant"]

    @property
    def reward_T(self) -> np.ndarray:
        """Rewards, float64 (T,); NaN where nobody could score the turn."""
        return np.array([np.nan if r is None else r for r in self.rewards], dtype=np.float64)

    def history(self, turn: int) -> Messages:
        """Return what the agent had seen when it spoke its line number `turn`, from 0."""
        at = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return self.messages[: at[turn]]

    def record(self) -> dict[str, Any]:
        """Return the JSON object; what was not known is left out."""
        record: dict[str, Any] = {"messages": self.messages, "rewards": list(self.rewards)}
        for name in ("domain", "persona", "dialogue", "behaviour", "judge", "tokenizer"):
            if getattr(self, name):
                record[name] = getattr(self, name)
        if self.group is not None:
            record["group"] = self.group
        if self.reward_parts:
            record["reward_parts"] = {name: list(p) for name, p in self.reward_parts.items()}
        for name in _PER_TURN:
            found = getattr(self, name)
            if found is not None:
                record[name] = [list(x) if isinstance(x, tuple) else x for x in found]
        if self.flags:
            record["flags"] = list(self.flags)
        return {**record, **self.extra}


class LogError(ValueError):
    """A log cannot be used; names the file, the line and the field."""


def read_log(path: str | Path) -> Iterator[Trajectory]:
    """Yield the trajectories of a log, one at a time: memory does not grow with the file.

    Raises:
        LogError: for a malformed line, a truncated file or a log without trajectories; all lines
            before it have been yielded.
        FileNotFoundError: there is no such file.
    """
    path, number = Path(path), 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parsed(line, f"{path}, line {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LogError(
            f"{path} is truncated or damaged after line {number} ({error}); copy it again."
        ) from error
    if number == 0:
        raise LogError(f"{path} is empty: it holds no trajectories.")


def write_log(path: str | Path, trajectories: Iterable[Trajectory]) -> int:
    """Write a log, gzipped if the name ends in ".gz", in whole or not at all; return how many."""
    path, number = Path(path), 0
    draft = path.with_name(f"{path.name}.part")
    try:
        with draft.open("wb") as raw, _compressed(raw, path) as lines:
            for trajectory in trajectories:
                text = json.dumps(trajectory.record(), ensure_ascii=False, allow_nan=False)
                lines.write(text.encode("utf-8", "surrogatepass") + b"\n")
                number += 1
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return number


def parse_trajectory(record: object) -> Trajectory:
    """Return the trajectory of one JSON object.

    Raises:
        ValueError: names the field, its value and what is expected.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    rest = dict(record)
    messages = _messages(rest.pop("messages", None))
    turns = sum(message["role"] == "assistant" for message in messages)
    if "rewards" not in rest:
        raise ValueError(
            "field 'rewards' is missing: one number in [-1, 1] or null for each of the agent's "
            f"{turns} lines"
        )
    texts = {}
    for name in ("domain", "persona", "dialogue", "behaviour", "judge", "tokenizer"):
        texts[name] = rest.pop(name, "")
        if not isinstance(texts[name], str):
            raise ValueError(f"field {name!r}: expected a text, got {texts[name]!r:.80}")
    group = rest.pop("group", None)
    if group is not None and (isinstance(group, bool) or not isinstance(group, int | str)):
        raise ValueError(f"field 'group': expected a whole number or a text, got {group!r:.80}")
    rewards = _numbers("rewards", rest.pop("rewards"), turns, -1.0, 1.0)
    parts = rest.pop("reward_parts", None) or {}
    if not isinstance(parts, Mapping):
        raise ValueError(f"field 'reward_parts': expected an object, got {parts!r:.80}")
    reasons = rest.pop("reasons", None)
    if reasons is not None:
        _refuse_unless_texts("reasons", reasons, turns)
    flags = rest.pop("flags", None) or ()
    _refuse_unless_texts("flags", flags)
    ids, logprobs = _tokens(rest.pop("token_ids", None), rest.pop("logprobs", None), turns)
    return Trajectory(
        messages=messages,
        rewards=rewards,
        group=group,
        reward_parts={
            name: _numbers(f"reward_parts.{name}", part, turns) for name, part in parts.items()
        },
        reasons=None if reasons is None else tuple(reasons),
        token_ids=ids,
        logprobs=logprobs,
        flags=tuple(flags),
        extra=rest,
        **texts,
    )


def _parsed(line: bytes, where: str) -> Trajectory:
    try:
        return parse_trajectory(json.loads(line))
    except json.JSONDecodeError as error:
        raise LogError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
    except UnicodeDecodeError as error:
        raise LogError(f"{where}: not UTF-8 (byte {error.start}).") from error
    except RecursionError as error:
        raise LogError(f"{where}: nested too deeply.") from error
    except ValueError as error:
        raise LogError(f"{where}, {error}.") from error


def _messages(given: object) -> Messages:
    if not isinstance(given, list) or not given:
        raise ValueError(f"field 'messages': expected a list of chat messages, got {given!r:.80}")
    for i, message in enumerate(given):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(
                f'field \'messages[{i}]\': expected {{"role": ..., "content": text}}, got '
                f"{message!r:.80}"
            )
        role = message.get("role")
        if role not in _ROLES:
            raise ValueError(
                f"field 'messages[{i}].role': unknown role {role!r}; there are {', '.join(_ROLES)}"
            )
        if role == "system" and i > 0:
            raise ValueError(f"field 'messages[{i}].role': a system message comes first or not")
        if i > 0 and role == given[i - 1]["role"]:
            raise ValueError(
                f"field 'messages[{i}].role': two lines of {role!r} in a row; partner (user) and "
                "agent (assistant) take turns"
            )
    if all(message["role"] != "assistant" for message in given):
        raise ValueError("field 'messages': the agent (role 'assistant') says nothing")
    return [{"role": message["role"], "content": message["content"]} for message in given]


def _numbers(
    name: str, given: object, turns: int, low: float = -math.inf, high: float = math.inf
) -> tuple[float | None, ...]:
    if not isinstance(given, list):
        raise ValueError(f"field {name!r}: expected a list, got {given!r:.80}")
    if len(given) != turns:
        raise ValueError(
            f"field {name!r}: {len(given)} values for {turns} lines of the agent; write null where "
            "there is none"
        )
    for t, value in enumerate(given):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or (number and math.isfinite(value) and low <= value <= high):
            continue
        wanted = "a number" if math.isinf(low) else f"a number in [{low:g}, {high:g}]"
        raise ValueError(f"field '{name}[{t}]': expected {wanted} or null, got {value!r:.80}")
    return tuple(None if value is None else float(value) for value in given)


def _refuse_unless_texts(name: str, given: object, turns: int | None = None) -> None:
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"field {name!r}: expected a list of texts, got {given!r:.80}")
    if turns is not None and len(given) != turns:
        raise ValueError(f"field {name!r}: {len(given)} texts for {turns} lines of the agent")


def _tokens(
    ids: object, logprobs: object, turns: int
) -> tuple[tuple[tuple[int, ...], ...] | None, tuple[tuple[float, ...], ...] | None]:
    if ids is None:
        if logprobs is not None:
            raise ValueError("field 'logprobs': there are no token_ids that they belong to")
        return None, None
    if not isinstance(ids, list) or len(ids) != turns:
        raise ValueError(f"field 'token_ids': expected {turns} lists of ids, one a line")
    for t, line in enumerate(ids):
        whole = isinstance(line, list) and line and all(type(i) is int and i >= 0 for i in line)
        if not whole:
            raise ValueError(f"field 'token_ids[{t}]': expected token ids, got {line!r:.80}")
    tokens = tuple(map(tuple, ids))
    if logprobs is None:
        return tokens, None
    if not isinstance(logprobs, list) or len(logprobs) != turns:
        raise ValueError(f"field 'logprobs': expected {turns} lists of numbers, one a line")
    for t, line in enumerate(logprobs):
        if not isinstance(line, list) or len(line) != len(ids[t]):
            raise ValueError(
                f"field 'logprobs[{t}]': expected {len(ids[t])} numbers, one a token, got "
                f"{line!r:.80}"
            )
        for value in line:
            if type(value) not in (int, float) or not -math.inf < value <= 1e-3:
                raise ValueError(
                    f"field 'logprobs[{t}]': expected finite log-probabilities, got {value!r:.80}"
                )
    return tokens, tuple(tuple(map(float, line)) for line in logprobs)


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    with path.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if gzipped:
            with gzip.GzipFile(fileobj=raw) as lines:
                yield lines
        else:
            yield raw


@contextmanager
def _compressed(raw: io.BufferedWriter, path: Path) -> Iterator[io.BufferedIOBase]:
    if path.suffix != ".gz":
        yield raw
        return
    with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as lines:  # same bytes again
        yield lines


# ---- splits --------------------------------------------------------------------------------------


def split_by_persona(
    trajectories: Iterable[Trajectory], test_share: float = 0.2, seed: int = 0
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Return (train, test) such that no persona and no dialogue is on both sides.

    A persona goes by its id together with what the agent was told, so that two texts under one id
    are two personas and one text under two ids is one. Personas that share a dialogue stay
    together.

    Args:
        trajectories: all of them.
        test_share: about this share of the trajectories is for testing.
        seed: which.

    Raises:
        ValueError: if they cannot be split, because all belong together.
    """
    everything = list(trajectories)
    if not 0 < test_share < 1:
        raise ValueError(f"test_share lies between 0 and 1, got {test_share}.")
    clusters = _clusters(everything)
    sizes: dict[int, int] = {}
    for cluster in clusters:
        sizes[cluster] = sizes.get(cluster, 0) + 1
    if len(sizes) < 2:
        raise ValueError(
            f"The {len(everything)} trajectories share personas or dialogues throughout and cannot "
            "be split."
        )
    order = np.random.default_rng(seed).permutation(sorted(sizes))
    held_out: set[int] = set()
    wanted, number = max(1, round(test_share * len(everything))), 0
    for cluster in order[:-1]:
        if number and number + sizes[cluster] > wanted * 1.2:
            continue
        held_out.add(int(cluster))
        number += sizes[cluster]
        if number >= wanted:
            break
    train = [t for t, c in zip(everything, clusters, strict=True) if c not in held_out]
    test = [t for t, c in zip(everything, clusters, strict=True) if c in held_out]
    return train, test


def refuse_leaks(train: Iterable[Trajectory], test: Iterable[Trajectory]) -> None:
    """Check that no persona, dialogue or text is on both sides.

    Raises:
        LogError: names what is.
    """
    seen: dict[str, str] = {}
    for trajectory in train:
        seen.update(_marks(trajectory))
    for trajectory in test:
        for mark, name in _marks(trajectory).items():
            if mark in seen:
                raise LogError(
                    f"Training and test data share {name}; split by persona "
                    "(agents.logs.split_by_persona), never by line."
                )


def _marks(trajectory: Trajectory) -> dict[str, str]:
    """Return what may be on one side of a split only: mark -> how to name it."""
    marks = {}
    if trajectory.persona:
        marks[f"persona {trajectory.persona}"] = f"the persona {trajectory.persona!r}"
    if trajectory.dialogue:
        marks[f"dialogue {trajectory.dialogue}"] = f"the dialogue {trajectory.dialogue!r}"
    if trajectory.messages[0]["role"] == "system":
        told = trajectory.messages[0]["content"]
        named = f" (of persona {trajectory.persona!r})" if trajectory.persona else ""
        marks[f"told {_digest(told)}"] = f"the persona text {told[:60]!r}{named}"
    said = json.dumps([m for m in trajectory.messages if m["role"] != "system"])
    marks[f"said {_digest(said)}"] = f"a dialogue, word by word ({trajectory.lines[0][:60]!r})"
    return marks


def _clusters(trajectories: Sequence[Trajectory]) -> list[int]:
    """Return a number for each trajectory; those that share a mark, if by way of others, agree."""
    leader = list(range(len(trajectories)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first: dict[str, int] = {}
    for i, trajectory in enumerate(trajectories):
        for mark in _marks(trajectory):
            leader[find(i)] = find(first.setdefault(mark, i))
    return [find(i) for i in range(len(trajectories))]


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---- rewards of whole dialogues or prefixes ------------------------------------------------------


def decompose(
    prefix_scores: Sequence[float], method: Literal["difference", "running_maximum"] = "difference"
) -> list[float]:
    """Return one reward a turn from scores of the dialogue so far.

    difference: r_t = f_t - f_{t-1}, with f_{-1} = 0. The rewards add up to the final score; where
        the score falls they are negative.
    running_maximum: r_t = max(0, f_t - best before). Never negative, but the rewards add up to the
        best score of any prefix, not to the final one: THE TOTAL IS ANOTHER as soon as the score
        ever falls.

    Args:
        prefix_scores: f_0 ... f_{T-1}: the score after each turn. For a score of the whole dialogue
            alone write 0 for all turns but the last.
        method: which.

    Raises:
        ValueError: for scores that are not finite, and an unknown method.
    """
    scores = np.asarray(prefix_scores, dtype=np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(f"prefix_scores are finite numbers, one a turn, got {prefix_scores!r:.80}")
    if method == "running_maximum":
        scores = np.maximum.accumulate(np.maximum(scores, 0.0))
    elif method != "difference":
        raise ValueError(f"method is 'difference' or 'running_maximum', got {method!r}.")
    return np.diff(scores, prepend=0.0).tolist()


# ---- Hugging Face datasets -----------------------------------------------------------------------


def to_dataset(trajectories: Iterable[Trajectory]) -> Any:
    """Return a datasets.Dataset with one row a trajectory; `extra` becomes a column of JSON text.

    Raises:
        ImportError: if datasets is not installed.
    """
    datasets = _datasets()
    rows = []
    for trajectory in trajectories:
        row = {**trajectory.record(), "extra": json.dumps(dict(trajectory.extra))}
        for name in trajectory.extra:
            del row[name]
        # One schema for all rows: names of parts and kinds of group ids differ between logs.
        row["reward_parts"] = json.dumps(row.get("reward_parts", {}))
        row["group"] = json.dumps(row.get("group"))
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows])


def from_dataset(dataset: Any) -> Iterator[Trajectory]:
    """Yield the trajectories of a datasets.Dataset that has the fields of a log as columns.

    Raises:
        LogError: names row and field.
    """
    for number, row in enumerate(dataset):
        record = {name: value for name, value in row.items() if value is not None}
        try:
            for name in ("reward_parts", "group", "extra"):
                if isinstance(record.get(name), str):
                    record[name] = json.loads(record[name])
            record.update(record.pop("extra", {}))
            yield parse_trajectory(record)
        except ValueError as error:
            raise LogError(f"row {number}, {error}.") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Datasets need the package datasets: pip install datasets.") from error
    return datasets
