"""Logged dialogues on disk: one a line of JSON, plain or gzipped (".gz").

    for dialogue in read_log("runs/train/transcripts.jsonl"):
        print(dialogue.persona, dialogue.rewards)

What `ppg train` leaves behind (transcripts.jsonl) is such a log, what `ppg train --offline` reads
is one. A line is a JSON object:

    messages      [{"role", "content"}, ...]: system (who the agent is), then user (the partner) and
                  assistant (the agent) in turn, from either of them on; further keys are kept
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

Only `messages` and `rewards` are needed, and null stands for a field that is not known. Other
fields are kept as they are, and so is every text: a log that is read and written again has the same
texts to the byte. Files are UTF-8; half of a character that takes two UTF-16 units (a lone
surrogate), which UTF-8 has no bytes for, is written as its JSON escape.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import math
import sys
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from .policy import Messages

_ROLES = ("system", "user", "assistant")
_MESSAGE = ("role", "content")
_TEXTS = ("domain", "persona", "dialogue", "behaviour", "judge", "tokenizer")
_PER_TURN = ("reasons", "token_ids", "logprobs")
_FIELDS = {"messages", "rewards", "group", "reward_parts", "flags", *_TEXTS, *_PER_TURN}
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class LoggedDialogue:
    """One dialogue of a log, as the agent saw it; fields as in the module's docstring.

    T lines of the agent.

    Raises:
        ValueError: names the field, its value and what is expected.
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

    def __post_init__(self) -> None:
        known = sorted(_FIELDS.intersection(self.extra))
        if known:
            raise ValueError(f"{', '.join(known)} are fields of a dialogue, not extra ones")
        messages = _messages(self.messages)
        turns = _own_lines(messages)
        ids, logprobs = _tokens(self.token_ids, self.logprobs, turns)
        checked = {
            "messages": messages,
            "rewards": _numbers("rewards", self.rewards, turns, -1.0, 1.0),
            "group": _group(self.group),
            "reward_parts": _parts(self.reward_parts, turns),
            "reasons": None if self.reasons is None else _texts("reasons", self.reasons, turns),
            "token_ids": ids,
            "logprobs": logprobs,
            "flags": _texts("flags", self.flags),
            **{name: _text(name, getattr(self, name)) for name in _TEXTS},
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

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

    def so_far(self, turn: int) -> Messages:
        """Return the dialogue up to and with the agent's line number `turn`, from 0."""
        return self.messages[: len(self.history(turn)) + 1]

    def record(self) -> dict[str, Any]:
        """Return the JSON object; what was not known is left out."""
        record: dict[str, Any] = {
            "messages": [dict(message) for message in self.messages],
            "rewards": list(self.rewards),
        }
        for name in _TEXTS:
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


OPENING = "(You begin.)"
"""Stands for the partner's first line where the agent spoke first: chat templates want one."""


def opened_by_the_partner(messages: Messages) -> Messages:
    """Return the dialogue with a first line of the partner where the agent spoke first."""
    first = 1 if messages[0]["role"] == "system" else 0
    if messages[first]["role"] == "user":
        return messages
    opening = {"role": "user", "content": OPENING}
    return [*messages[:first], opening, *messages[first:]]


def join_lines(messages: Sequence[Mapping[str, str]]) -> Messages:
    """Return chat messages in which lines of one role in a row are one, joined by line breaks.

    A log wants partner and agent to take turns; people often write twice before they get an answer.
    """
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += f"\n{message['content']}"
        else:
            joined.append(dict(message))
    return joined


class LogError(ValueError):
    """A log cannot be used; names the file, the line and the field."""


def read_log(path: str | Path, unscored: bool = False) -> Iterator[LoggedDialogue]:
    """Yield the dialogues of a log, one at a time: memory does not grow with the file.

    Args:
        path: the file.
        unscored: let dialogues without the field "rewards" pass: nobody has scored them yet, see
            `score_log`.

    Raises:
        LogError: for a malformed line, a truncated file or a log without dialogues; all lines
            before it have been yielded.
        FileNotFoundError: there is no such file.
    """
    path, number, found = Path(path), 0, 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(BOM_UTF8)
                if line.strip():
                    yield _parsed(line, f"{path}, line {number}", unscored)
                    found += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LogError(
            f"{path} is truncated or damaged after line {number} ({error}); copy it again."
        ) from error
    if not found:
        raise LogError(f"{path} is empty: it holds no dialogues.")


def write_log(path: str | Path, dialogues: Iterable[LoggedDialogue]) -> int:
    """Write a log, gzipped if the name ends in ".gz", in whole or not at all; return how many.

    Raises:
        LogError: for a dialogue that `read_log` would refuse, if there are none, and if the place
            is no file's; a file that was there before still is.
        OSError: names the file that could not be written or, if the disk is full, this one.
    """
    path, number = Path(path), 0
    target = path.resolve()  # what a link points to, not the link
    if target.exists() and not target.is_file():
        raise LogError(f"{path} is a folder, a pipe or a device; name a file to write.")
    if not target.parent.is_dir():
        raise LogError(f"There is no folder {path.parent} to write {path.name} to; make it first.")
    draft = target.with_name(f"{target.name}.part")
    try:
        with draft.open("wb") as raw, _compressed(raw, path) as lines:
            for number, dialogue in enumerate(dialogues, start=1):
                lines.write(_one_line(dialogue, number))
        if not number:
            raise LogError(f"There are no dialogues to write to {path}.")
        draft.replace(target)
    except OSError as error:  # others name their file, or are of where the dialogues come from
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)
    return number


Score = Callable[[Sequence[Mapping[str, Any]]], Sequence[float | None]]
"""Records of dialogues that end with a line of the agent -> the reward of that line, None where
nobody can tell. `ppg_env.rejudge.last_line` makes one of a judge."""


def score_log(dialogues: Iterable[LoggedDialogue], score: Score) -> Iterator[LoggedDialogue]:
    """Yield the dialogues with a reward for every line of the agent, in place of those they had.

    Args:
        dialogues: one at a time is enough; 64 are held in memory.
        score: gets each dialogue as it stood after each line of the agent: "messages" up to there,
            "persona", "domain" and the log's own further fields; those of many dialogues in one
            call.

    Raises:
        ValueError: `score` returned something else than a reward in [-1, 1] or None for each.
    """
    remaining = iter(dialogues)
    while chunk := list(islice(remaining, 64)):
        about = [
            {"persona": d.persona, "domain": d.domain, **d.extra, "messages": d.so_far(turn)}
            for d in chunk
            for turn in range(d.num_turns)
        ]
        found = checked_scores(score, about)
        for dialogue in chunk:
            own = tuple(next(found) for _ in range(dialogue.num_turns))
            yield replace(dialogue, rewards=own, reward_parts={}, reasons=None, judge="")


def checked_scores(score: Score, records: Sequence[Mapping[str, Any]]) -> Iterator[float | None]:
    """Return what `score` gives for these records, one each.

    Raises:
        ValueError: it gave another number of rewards, or what is none.
    """
    given = score(records)
    found = list(given) if isinstance(given, Iterable) else [given]
    wanted = "a reward in [-1, 1] for each dialogue, None where nobody can tell"
    if len(found) != len(records):
        raise ValueError(
            f"score returned {len(found)} values for {len(records)} dialogues; it returns {wanted}."
        )
    for value in found:
        number = isinstance(value, int | float | np.number) and -1.0 <= value <= 1.0
        if value is not None and not number:
            raise ValueError(f"score returned {value!r:.80}; it returns {wanted}.")
    return iter([None if value is None else float(value) for value in found])


def parse_dialogue(record: object, unscored: bool = False) -> LoggedDialogue:
    """Return the logged dialogue of one JSON object.

    Args:
        record: the object.
        unscored: let it pass without the field "rewards": nobody has scored it yet.

    Raises:
        ValueError: names the field, its value and what is expected.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if "messages" not in record:
        raise ValueError(
            "field 'messages' is missing: a list of chat messages; there are "
            f"{', '.join(map(repr, list(record)[:8])) or 'no fields'}"
        )
    if "rewards" not in record:
        turns = _own_lines(_messages(record.get("messages")))
        if unscored:
            return parse_dialogue({**record, "rewards": [None] * turns})
        raise ValueError(
            "field 'rewards' is missing: one number in [-1, 1] or null for each of the agent's "
            f"{turns} lines; let a judge write them (ppg rejudge, agents.logs.score_log)"
        )
    known = {name: value for name in _FIELDS if (value := record.get(name)) is not None}
    rest = {name: value for name, value in record.items() if name not in _FIELDS}
    return LoggedDialogue(**{"messages": None, "rewards": None, **known, "extra": rest})


def _parsed(line: bytes, where: str, unscored: bool) -> LoggedDialogue:
    # Only the last line can lack its end.
    cut = "" if line.endswith(b"\n") else "; the file ends within this line, it may be truncated"
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_one_each)
    except json.JSONDecodeError as error:
        raise LogError(
            f"{where}: not a JSON object on one line ({error.msg} at column {error.colno}){cut}."
        ) from error
    except UnicodeDecodeError as error:
        raise LogError(f"{where}: not UTF-8 (byte {error.start} of the line){cut}.") from error
    except RecursionError as error:
        raise LogError(f"{where}: nested too deeply.") from error
    except _TwiceError as error:
        raise LogError(f"{where}: the field '{error}' stands there twice.") from error
    except ValueError as error:
        most = sys.get_int_max_str_digits()
        raise LogError(f"{where}: a whole number of more than {most} digits.") from error
    try:
        return parse_dialogue(record, unscored)
    except ValueError as error:
        raise LogError(f"{where}, {error}.") from error


class _TwiceError(ValueError):
    """An object has a field twice, of which readers of JSON take the one or the other."""


def _one_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def _one_line(dialogue: LoggedDialogue, number: int) -> bytes:
    try:
        text = json.dumps(dialogue.record(), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        odd = [repr(name) for name, value in dialogue.extra.items() if _is_odd(value)]
        raise LogError(
            f"Dialogue {number} cannot be written: JSON does not know what is in the field "
            f"{', '.join(odd) or 'messages'} ({error})."
        ) from error
    # What UTF-8 cannot encode are lone surrogates, and their Python escape is the JSON one.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _is_odd(value: object) -> bool:
    """Return whether JSON cannot hold it."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return True
    return False


def _own_lines(messages: Messages) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def _messages(given: object) -> Messages:
    if not isinstance(given, list | tuple) or not given:
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
                "agent (assistant) take turns (agents.logs.join_lines makes one of them)"
            )
    if not _own_lines(given):
        raise ValueError("field 'messages': the agent (role 'assistant') says nothing")
    return [dict(message) for message in given]


def _numbers(
    name: str, given: object, turns: int, low: float = -math.inf, high: float = math.inf
) -> tuple[float | None, ...]:
    if not isinstance(given, list | tuple):
        raise ValueError(f"field {name!r}: expected a list, got {given!r:.80}")
    if len(given) != turns:
        raise ValueError(
            f"field {name!r}: {len(given)} values for {turns} lines of the agent; write null where "
            "there is none"
        )
    for t, value in enumerate(given):
        if value is None or (_is_finite(value) and low <= value <= high):
            continue
        wanted = "a number" if math.isinf(low) else f"a number in [{low:g}, {high:g}]"
        raise ValueError(f"field '{name}[{t}]': expected {wanted} or null, got {value!r:.80}")
    return tuple(None if value is None else float(value) for value in given)


def _is_finite(value: object) -> TypeGuard[float]:
    """Return whether it is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def _text(name: str, given: object) -> str:
    if not isinstance(given, str):
        raise ValueError(f"field {name!r}: expected a text, got {given!r:.80}")
    return given


def _texts(name: str, given: object, turns: int | None = None) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"field {name!r}: expected a list of texts, got {given!r:.80}")
    if turns is not None and len(given) != turns:
        raise ValueError(f"field {name!r}: {len(given)} texts for {turns} lines of the agent")
    return tuple(given)


def _group(given: object) -> int | str | None:
    if isinstance(given, bool) or not isinstance(given, int | str | None):
        raise ValueError(f"field 'group': expected a whole number or a text, got {given!r:.80}")
    return given


def _parts(given: object, turns: int) -> dict[str, tuple[float | None, ...]]:
    if not isinstance(given, Mapping):
        raise ValueError(f"field 'reward_parts': expected an object, got {given!r:.80}")
    return {name: _numbers(f"reward_parts.{name}", part, turns) for name, part in given.items()}


def _tokens(
    ids: object, logprobs: object, turns: int
) -> tuple[tuple[tuple[int, ...], ...] | None, tuple[tuple[float, ...], ...] | None]:
    if ids is None:
        if logprobs is not None:
            raise ValueError("field 'logprobs': there are no token_ids that they belong to")
        return None, None
    if not isinstance(ids, list | tuple) or len(ids) != turns:
        raise ValueError(f"field 'token_ids': expected {turns} lists of ids, one a line")
    for t, line in enumerate(ids):
        if not isinstance(line, list | tuple) or not line:
            raise ValueError(f"field 'token_ids[{t}]': expected token ids, got {line!r:.80}")
        for token in line:
            if type(token) is not int or not 0 <= token < 2**31:
                raise ValueError(f"field 'token_ids[{t}]': expected token ids, got {token!r:.80}")
    tokens = tuple(map(tuple, ids))
    if logprobs is None:
        return tokens, None
    if not isinstance(logprobs, list | tuple) or len(logprobs) != turns:
        raise ValueError(f"field 'logprobs': expected {turns} lists of numbers, one a line")
    for t, line in enumerate(logprobs):
        if not isinstance(line, list | tuple) or len(line) != len(ids[t]):
            raise ValueError(
                f"field 'logprobs[{t}]': expected {len(ids[t])} numbers, one a token, got "
                f"{line!r:.80}"
            )
        for value in line:
            if not _is_finite(value) or value > 1e-3:
                raise ValueError(
                    f"field 'logprobs[{t}]': expected finite log-probabilities, got {value!r:.80}"
                )
    return tokens, tuple(tuple(map(float, line)) for line in logprobs)


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    _refuse_unless_file(path)
    with path.open("rb") as raw:
        start = raw.read(2)
        raw.seek(0)
        # A name that promises gzip counts only where the file ends before its first two bytes do.
        if start == _GZIP_MAGIC or (path.suffix == ".gz" and start == _GZIP_MAGIC[:1]):
            with gzip.GzipFile(fileobj=raw) as lines:
                yield lines
        else:
            yield raw


def _refuse_unless_file(path: Path) -> None:
    if path.is_dir():
        inside = path / "transcripts.jsonl"
        hint = f"its log is {inside}" if inside.is_file() else "give the log in it"
        raise LogError(f"{path} is a folder; {hint}.")
    if path.exists() and not path.is_file():
        raise LogError(
            f"{path} is a pipe or a device, and a log is read more than once; write it to a file."
        )


@contextmanager
def _compressed(raw: io.BufferedWriter, path: Path) -> Iterator[io.BufferedIOBase]:
    if path.suffix != ".gz":
        yield raw
        return
    # No name and no time inside: the same dialogues give the same bytes.
    with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as lines:
        yield lines


# ---- rewards of whole dialogues or prefixes ------------------------------------------------------


def decompose(
    prefix_scores: Sequence[float], method: Literal["difference", "running_maximum"] = "difference"
) -> list[float]:
    """Return one reward a turn from scores of the dialogue so far.

    difference: r_t = f_t - f_{t-1}, with f_{-1} = 0. The rewards add up to the final score; where
        the score falls they are negative.
    running_maximum: r_t = max(0, f_t - best before), where 0 is the best before the first turn.
        Never negative, but the rewards add up to the best score of any prefix (or 0), not to the
        final one: THE TOTAL IS ANOTHER unless the dialogue ends at its best score.

    Scores in [0, 1] give rewards in [-1, 1], as a log wants them.

    Args:
        prefix_scores: f_0 ... f_{T-1}: the score after each turn. For a score of the whole dialogue
            alone write 0 for all turns but the last.
        method: which.

    Raises:
        ValueError: for scores that are not finite numbers, and an unknown method.
    """
    scores = np.array(prefix_scores)
    if scores.dtype.kind not in "iuf" or scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(f"prefix_scores are finite numbers, one a turn, got {prefix_scores!r:.80}")
    scores = scores.astype(np.float64)
    if method == "running_maximum":
        scores = np.maximum.accumulate(np.maximum(scores, 0.0))
    elif method != "difference":
        raise ValueError(f"method is 'difference' or 'running_maximum', got {method!r}.")
    return np.diff(scores, prepend=0.0).tolist()


# ---- Hugging Face datasets -----------------------------------------------------------------------

_REST = "rest_json"


def to_dataset(dialogues: Iterable[LoggedDialogue]) -> Any:
    """Return a datasets.Dataset with one row a dialogue and one column a field.

    A column has one type in all rows. What has not, and all fields that this module does not know,
    is JSON text in the column "rest_json"; `from_dataset` puts it back.

    Raises:
        ImportError: if datasets is not installed.
        LogError: a text holds what Arrow cannot carry, a lone surrogate.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Datasets need the package datasets: pip install datasets.") from error
    try:
        return datasets.Dataset.from_list(_rows(dialogues))
    except UnicodeEncodeError as error:
        raise LogError(
            f"A text holds a lone surrogate, which Arrow cannot carry ({error})."
        ) from error


def from_dataset(dataset: Any) -> Iterator[LoggedDialogue]:
    """Yield the dialogues of a datasets.Dataset that has the fields of a log as columns.

    Raises:
        LogError: names row and field; all rows before it have been yielded.
        TypeError: a DatasetDict, which holds several.
    """
    if isinstance(dataset, Mapping):
        raise TypeError(f"Give one dataset of {', '.join(map(repr, dataset))}, not all of them.")
    for number, row in enumerate(dataset):
        try:
            yield parse_dialogue(_record_of(row))
        except (ValueError, RecursionError) as error:
            raise LogError(f"row {number}, {error}.") from error


def _rows(dialogues: Iterable[LoggedDialogue]) -> list[dict[str, Any]]:
    """Return flat records with the same fields, each of one type."""
    everything = list(dialogues)
    kinds = {type(t.group) for t in everything if t.group is not None}
    plain_groups = len(kinds) < 2 and not any(
        isinstance(t.group, int) and abs(t.group) >= 2**63 for t in everything
    )
    rows = []
    for dialogue in everything:
        row = dialogue.record()
        rest = {name: row.pop(name) for name in dialogue.extra}
        if not plain_groups and dialogue.group is not None:
            rest["group"] = row.pop("group")
        more = [{k: v for k, v in m.items() if k not in _MESSAGE} for m in row["messages"]]
        if any(more):
            rest["messages"] = more
            row["messages"] = [{k: m[k] for k in _MESSAGE} for m in row["messages"]]
        rows.append({**row, _REST: json.dumps(rest)} if rest else row)
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _record_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a row: what Arrow fills up with nulls is taken out again."""
    record = {name: value for name, value in row.items() if value is not None}
    rest = json.loads(str(record.pop(_REST, "{}")))
    if not isinstance(rest, dict):
        raise ValueError(f"field {_REST!r}: expected a JSON object, got {rest!r:.80}")
    if isinstance(parts := record.get("reward_parts"), Mapping):
        record["reward_parts"] = {name: p for name, p in parts.items() if p is not None}
    if isinstance(messages := record.get("messages"), list):
        more = rest.pop("messages", [{}] * len(messages))
        record["messages"] = [
            {k: v for k, v in m.items() if v is not None} | kept if isinstance(m, Mapping) else m
            for m, kept in zip(messages, more, strict=True)
        ]
    return record | rest
