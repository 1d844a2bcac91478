r"""The dialogue files of Consistent-LLMs as records of a log, and back.

    for record in published_records("consistent-LLMs"):
        print(record["persona"], record["rewards"])

A record is one dialogue as one of its speakers saw it, in the fields of agents/logs.py: the persona
is the system message, the other's lines are the user's, the speaker's own the assistant's; P1
speaks first. In chatting both speakers are judged and a dialogue has two records with the same id,
in education and therapy the student and the patient (P2). A line keeps its text to the letter; what
it begins and ends with in the file, "Role: " and "\n", and all else that has no place in a log is
in the field "source", from which `write_published` makes the file again.

Rewards are the stored answers of the prompt-consistency judge, read strictly: YES = the line
contradicts the persona = 0, NO = 1, no clear verdict or none at all = null.

    reward_parts    prompt_to_line            the same
                    prompt_to_line_published  1 = the file's own score counts it as consistent
                    line_to_line              1 = no earlier own line conflicts, 0 = one does
    reasons         the judge's answers, "" where there is none
    behaviour       the model in the file's name
    flags           "other_judge": the scores stored in the file count YES as consistent, so another
                    judge with another prompt gave the answers; rewards are null unless asked for
                    "unjudged": no line of this speaker was judged

Also read is a converted copy, dev.jsonl.gz, with labels in place of answers.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, NoReturn

from .consistent_llms import unquoted
from .dialogue import Persona
from .domains import get_domain
from .published_verdicts import (
    consistent_llms,
    judged_lines,
    prompt_score,
    strict,
    strict_conflicts,
)

Agents = Literal["judged", "both", "P1", "P2"]

COPY = "dev.jsonl.gz"
JUDGE = "Consistent-LLMs: Llama-3.1-70B-Instruct"
"""The judge that the published code names; the files name none."""

_ANSWERS, _CONFLICTS = "eval_prompt_consistency", "eval_index_consistency"
_JUDGED = {"chatting": (0, 1), "education": (1,), "therapy": (1,)}
_NUMBERS = re.compile(r"(?:_\d+)+$")


class _Line(NamedTuple):
    """What is known of one line, whatever the form of the file; None where nothing is.

    Attributes:
        text: without role and line end.
        reward: the answer read strictly.
        without_yes: whether the answer holds no YES: consistent as the usual scores count.
        without_no: whether it holds no NO: consistent as the other judge's scores count.
        line_to_line: whether no earlier own line conflicts.
        answer: the judge's.
    """

    text: str
    reward: float | None
    without_yes: bool | None
    without_no: bool | None
    line_to_line: float | None
    answer: str = ""


@dataclass(frozen=True)
class _Dialogue:
    """One dialogue of either form; `source` is the file's object with texts taken out."""

    id: str
    file: str
    position: int
    domain: str
    personas: tuple[str, str]
    lines: Sequence[_Line]
    source: Mapping[str, Any]
    other_judge: bool = False


def published_records(
    folder: str | Path, agents: Agents = "judged", *, other_judge: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the records of all dialogues in a folder, each dialogue once.

    Where a file and the converted copy hold the same dialogues, the file is read.

    Args:
        folder: see `find_published`; one file will do, too.
        agents: see `dialogue_records`.
        other_judge: likewise.

    Raises:
        ValueError: the folder holds no dialogues, or a file is not what it should be; names file,
            record and field.
    """
    path = Path(folder)
    files: set[str] = set()
    for file in [path] if path.is_file() else find_published(path):
        yield from dialogue_records(file, agents, other_judge=other_judge, without=files)
        files.add(_file_name(file))


def find_published(folder: str | Path) -> list[Path]:
    """Return the dialogue files in a folder: <domain>/exp/**/*.json at any depth, then the copy.

    A folder within exp will do, too.

    Raises:
        ValueError: there are none.
    """
    folder = Path(folder)
    found = sorted(folder.glob("**/exp/**/*.json"))
    if not found and "exp" in folder.parts:
        found = sorted(folder.glob("**/*.json"))
    if (folder / COPY).is_file():
        found.append(folder / COPY)
    if not found:
        raise ValueError(
            f"{folder} holds no dialogues of Consistent-LLMs; expected <domain>/exp/**/*.json as "
            f"in its repository, or a {COPY}."
        )
    return found


def dialogue_records(
    path: str | Path,
    agents: Agents = "judged",
    *,
    other_judge: bool = False,
    without: Iterable[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield the records of one dialogue file, or of a converted copy (".jsonl.gz").

    Dialogues go by file and place: "therapy/exp/dialogues/x#3" is the fourth. If a manifest.json
    beside the domains' folders tells the place in an original file, it is that one.

    Args:
        path: the file.
        agents: whose views: "judged" = both in chatting, P2 elsewhere; "both", "P1" or "P2". A
            speaker without a persona has no system message.
        other_judge: read the answers of another judge like those of the usual one.
        without: names of source files that are left out, as in the records' source.

    Raises:
        ValueError: the file is not what it should be; names file, record and field.
    """
    if agents not in ("judged", "both", "P1", "P2"):
        raise ValueError(f"agents is 'judged', 'both', 'P1' or 'P2', got {agents!r}.")
    path, without = Path(path), frozenset(without)
    copied = path.name.endswith(".jsonl.gz")
    for dialogue in _of_copy(path) if copied else _of_file(path):
        if dialogue.file not in without:
            speakers = _speakers(agents, dialogue)
            yield from (_record(dialogue, speaker, other_judge) for speaker in speakers)


def published_dialogues(records: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the dialogues that records came from, by file, each as its file has it.

    One view of a dialogue is enough. What comes from the records are texts: lines, and answers in
    `reasons`; other changes to them, such as of rewards, do not reach the dialogue.

    Raises:
        ValueError: a record has no source or other messages than it, or two views of a dialogue
            tell different texts; names the dialogue.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        try:
            file, position = str(record["source"]["file"]), int(record["source"]["position"])
            dialogue = _restored(record)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            name = record.get("dialogue") if isinstance(record, Mapping) else record
            raise ValueError(
                f"The record of dialogue {name!r:.80} is not what dialogue_records makes: {error!r}"
            ) from error
        known = found.setdefault(file, {}).setdefault(position, dialogue)
        if known != dialogue:
            raise ValueError(f"The views of dialogue {record.get('dialogue')!r} differ in texts.")
    return {
        file: [dialogues[position] for position in sorted(dialogues)]
        for file, dialogues in found.items()
    }


def write_published(records: Iterable[Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Write records as the files they came from, the way the source writes them.

    Args:
        records: of `dialogue_records`, also after a log; of a converted copy they have no answers
            and cannot be written.
        folder: where to; files keep their path from the domain's folder on.

    Raises:
        ValueError: see `published_dialogues`; nothing has been written then.
    """
    folder, texts = Path(folder), {}
    for file, dialogues in published_dialogues(records).items():
        place = PurePosixPath(file)
        if place.is_absolute() or ".." in place.parts or not place.parts:
            raise ValueError(f"source.file is a path below a domain's folder, got {file!r}.")
        if any("conversation" not in dialogue for dialogue in dialogues):
            raise ValueError(
                f"The records of {file} come from a converted copy, which lacks the judge's "
                "answers; only records of an original file can be written as one."
            )
        texts[folder / place] = json.dumps(dialogues, indent=4, allow_nan=False)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("ascii"))
    return list(texts)


# ---- records -------------------------------------------------------------------------------------


def _speakers(agents: Agents, dialogue: _Dialogue) -> tuple[int, ...]:
    wanted = {"both": (0, 1), "P1": (0,), "P2": (1,)}.get(agents, _JUDGED[dialogue.domain])
    speaking = tuple(speaker for speaker in wanted if len(dialogue.lines) > speaker)
    if not speaking:
        raise ValueError(f"Dialogue {dialogue.id!r} has no line of {_name(wanted[0])}.")
    return speaking


def _name(speaker: int) -> str:
    return f"P{speaker + 1}"


def _record(dialogue: _Dialogue, speaker: int, other_judge: bool) -> dict[str, Any]:
    own = dialogue.lines[speaker::2]
    told = dialogue.personas[speaker]
    other = dialogue.other_judge
    judged = any(line.without_yes is not None for line in own)
    rewards = [None if other and not other_judge else line.reward for line in own]
    counted = [line.without_no if other else line.without_yes for line in own]
    persona = Persona(_persona_id(dialogue.domain, told), dialogue.domain, told) if told else None
    messages = [
        {"role": "assistant" if i % 2 == speaker else "user", "content": line.text}
        for i, line in enumerate(dialogue.lines)
    ]
    if persona is not None:
        system = get_domain(dialogue.domain).system_prompt(persona)
        messages.insert(0, {"role": "system", "content": system})
    record: dict[str, Any] = {
        "messages": messages,
        "rewards": rewards,
        "domain": dialogue.domain,
        "persona": persona.id if persona else "",
        "dialogue": dialogue.id,
        "behaviour": _model(dialogue.file),
        "judge": ("unknown" if other else JUDGE) if judged else "",
        "reward_parts": {
            "prompt_to_line": rewards,
            "prompt_to_line_published": [_number(consistent) for consistent in counted],
            "line_to_line": [line.line_to_line for line in own],
        },
        "flags": ["other_judge"] * (judged and other) + ["unjudged"] * (not judged),
        "source": {
            "file": dialogue.file,
            "position": dialogue.position,
            "speaker": _name(speaker),
            "record": _with_holes(dialogue.source, speaker),
        },
    }
    if _ANSWERS in dialogue.source:
        record["reasons"] = [line.answer for line in own]
    return record


def _persona_id(domain: str, text: str) -> str:
    return f"{domain}-{sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def _model(file: str) -> str:
    """Return "gemma-2-2b-it" for "therapy/exp/long_dialogues/long_gemma-2-2b-it_0_897.json"."""
    return _NUMBERS.sub("", PurePosixPath(file).stem).removeprefix("long_")


def _with_holes(source: Mapping[str, Any], speaker: int) -> dict[str, Any]:
    """Return the source without the answers that are in this speaker's reasons."""
    if _ANSWERS not in source:
        return dict(source)
    answers = source[_ANSWERS]
    left = [[line] if line % 2 == speaker else [line, answer] for line, answer in answers]
    return {**source, _ANSWERS: left}


def _restored(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file's object, its holes filled with the record's texts."""
    texts = [m["content"] for m in record["messages"] if m["role"] != "system"]
    dialogue = deepcopy(dict(record["source"]["record"]))
    if "conversation" not in dialogue:
        for turn, text in zip(dialogue["turns"], texts, strict=True):
            turn["text"] = text
        return dialogue
    dialogue["conversation"] = [
        [line, before + text + after]
        for (line, before, after), text in zip(dialogue["conversation"], texts, strict=True)
    ]
    for entry in dialogue.get(_ANSWERS, ()):
        if len(entry) == 1:
            entry.append(record["reasons"][entry[0] // 2])
    return dialogue


# ---- files as published --------------------------------------------------------------------------


def _of_file(path: Path) -> Iterator[_Dialogue]:
    try:
        records = _parse(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file ({error}).") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of dialogues, got {records!r:.80}.")
    file, dialogues = _file_name(path), []
    for position, identifier in enumerate(_ids(path, file, len(records))):
        try:
            dialogues.append(_published(records[position], identifier, file, position))
        except ValueError as error:
            raise ValueError(f"{path}, record {position}, {error}.") from error
    other = _counts_yes_as_consistent(dialogues)
    yield from (replace(dialogue, other_judge=other) for dialogue in dialogues)


def _parse(content: bytes) -> Any:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    return json.loads(content.decode("utf-8"), parse_constant=refuse)


def _file_name(path: Path) -> str:
    """Return the path from the domain's folder on: "therapy/exp/dialogues/x.json"."""
    parts = path.parts
    if "exp" not in parts[:-1]:
        return path.name
    at = len(parts) - 1 - parts[::-1].index("exp")
    return PurePosixPath(*parts[max(0, at - 1) :]).as_posix()


def _ids(path: Path, file: str, number: int) -> list[str]:
    """Return the dialogues' ids: those of a manifest beside the domains' folders, or by place."""
    depth = len(PurePosixPath(file).parts)
    manifest = path.parents[depth - 1] / "manifest.json"
    if depth > 1 and manifest.is_file():
        try:
            ids = _parse(manifest.read_bytes())[file]["ids"]
        except (ValueError, TypeError, KeyError, RecursionError):
            ids = None
        if isinstance(ids, list) and len(ids) == number and all(isinstance(i, str) for i in ids):
            return ids
    return [f"{file.removesuffix('.json')}#{position}" for position in range(number)]


def _published(dialogue: object, identifier: str, file: str, position: int) -> _Dialogue:
    if not isinstance(dialogue, Mapping):
        raise ValueError(f"expected a JSON object, got {dialogue!r:.80}")
    domain = _text(dialogue, "task_name").lower()
    if domain not in _JUDGED:
        raise ValueError(f"field 'task_name': expected {', '.join(_JUDGED)}, got {domain!r:.80}")
    pieces = _pieces(dialogue.get("conversation"))
    answers = _answers(dialogue, _ANSWERS, len(pieces))
    conflicts = _answers(dialogue, _CONFLICTS, len(pieces))
    return _Dialogue(
        id=identifier,
        file=file,
        position=position,
        domain=domain,
        personas=(_persona(dialogue, "P1", domain), _persona(dialogue, "P2", domain)),
        lines=[
            _answered(i, text, answers.get(i), conflicts.get(i))
            for i, (_, text, _) in enumerate(pieces)
        ],
        source={
            **dialogue,
            "conversation": [[i, before, after] for i, (before, _, after) in enumerate(pieces)],
        },
    )


def _answered(i: int, text: str, answer: str | None, conflicts: str | None) -> _Line:
    listed = None if conflicts is None else strict_conflicts(conflicts, range(i % 2, i, 2))
    return _Line(
        text,
        reward=None if answer is None else _number(strict(answer)),
        without_yes=None if answer is None else consistent_llms(answer),
        without_no=None if answer is None else "NO" not in answer,
        line_to_line=None if listed is None else float(not listed),
        answer=answer or "",
    )


def _text(record: Mapping[str, Any], field: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        raise ValueError(f"field {field!r}: expected a text, got {text!r:.80}")
    return text


def _persona(record: Mapping[str, Any], field: str, domain: str) -> str:
    text = _text(record, field)
    return unquoted(text, field) if domain == "chatting" else text


def _number(verdict: bool | None) -> float | None:
    return None if verdict is None else float(verdict)


def _answers(dialogue: Mapping[str, Any], key: str, num_lines: int) -> dict[int, str]:
    """Return the judge's answers by line."""
    if not isinstance(dialogue.get(key, []), list):
        raise ValueError(f"field {key!r}: expected a list, got {dialogue[key]!r:.80}")
    answers: dict[int, str] = {}
    for line, answer in judged_lines(dict(dialogue), key):
        if type(line) is not int or not 0 <= line < num_lines or line in answers:
            raise ValueError(
                f"field {key!r}: expected each of the {num_lines} lines once at most, got line "
                f"{line!r}"
            )
        answers[line] = answer
    return answers


def _pieces(conversation: object) -> list[tuple[str, str, str]]:
    r"""Return each line as ("Role: ", text, "\n"); P1 and P2 in turn.

    The role is what most lines of the speaker have before the first ": ". A line without it is all
    text.
    """
    if not isinstance(conversation, list) or not conversation:
        raise ValueError(f"field 'conversation': expected a list, got {conversation!r:.80}")
    lines: list[str] = []
    for i, entry in enumerate(conversation):
        match entry:
            case [int(number), str(line)] if type(number) is int and number == i:
                lines.append(line)
            case _:
                raise ValueError(
                    f"field 'conversation[{i}]': expected [{i}, line], in order, got {entry!r:.80}"
                )
    roles = [_role(lines[speaker::2]) for speaker in (0, 1)]
    pieces = []
    for i, line in enumerate(lines):
        before = roles[i % 2] if line.startswith(roles[i % 2]) else ""
        after = "\n" if line.endswith("\n") else ""
        pieces.append((before, line[len(before) : len(line) - len(after)], after))
    return pieces


def _role(lines: Sequence[str]) -> str:
    heads = Counter(
        head + mark
        for head, mark, _ in (line.partition(": ") for line in lines)
        if mark and "\n" not in head
    )
    return heads.most_common(1)[0][0] if heads else ""


def _counts_yes_as_consistent(dialogues: Sequence[_Dialogue]) -> bool:
    """Return whether the stored scores are shares of answers without NO, and not without YES."""
    pairs = []
    for dialogue in dialogues:
        for speaker in (0, 1):
            stored = dialogue.source.get(f"{_name(speaker)}_prompt_consistency_score")
            if stored is not None:
                judged = [x for x in dialogue.lines[speaker::2] if x.without_yes is not None]
                usual = prompt_score([bool(line.without_yes) for line in judged])
                other = prompt_score([bool(line.without_no) for line in judged])
                pairs.append((stored == usual, stored == other))
    return not all(usual for usual, _ in pairs) and all(other for _, other in pairs)


# ---- the converted copy --------------------------------------------------------------------------


def _of_copy(path: Path) -> Iterator[_Dialogue]:
    number = 0
    try:
        with gzip.open(path) as lines:
            for number, line in enumerate(lines, start=1):
                yield _of_line(line, f"{path}, line {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or damaged after line {number}: {error}") from error


def _of_line(line: bytes, where: str) -> _Dialogue:
    try:
        return _converted(_parse(line))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: no dialogue of the converted copy: {error!r}") from error


def _converted(copy: dict[str, Any]) -> _Dialogue:
    domain, other = copy["domain"], copy["prompt_label_status"] == "other_judge"
    by_speaker = {"P1": "", "P2": ""}
    agent = copy["persona_agent"]
    partner = "P1" if agent == "P2" else "P2"
    by_speaker |= {agent: copy["persona"], partner: copy["partner_persona"] or ""}
    if domain not in _JUDGED or set(by_speaker) != {"P1", "P2"}:
        raise ValueError(f"domain {domain!r:.80}, agent {agent!r:.80}")
    for i, turn in enumerate(copy["turns"]):
        if (turn["index"], turn["speaker"]) != (i, _name(i % 2)):
            raise ValueError(f"turns[{i}] is line {turn['index']!r:.80} of {turn['speaker']!r:.80}")
    return _Dialogue(
        id=_text(copy, "id"),
        file=_text(copy, "source_file"),
        position=int(copy["source_index"]),
        domain=domain,
        personas=(_persona(by_speaker, "P1", domain), _persona(by_speaker, "P2", domain)),
        lines=[_labelled(turn, other) for turn in copy["turns"]],
        other_judge=other,
        source={**copy, "turns": [{**turn, "text": None} for turn in copy["turns"]]},
    )


def _labelled(turn: Mapping[str, Any], other: bool) -> _Line:
    """Return a line of the copy; of the other judge there are words and no labels."""
    word, label, line_label = (
        turn.get(field) for field in ("prompt_verdict", "prompt_consistency", "line_consistency")
    )
    if other:
        label = {"NO": 1, "YES": 0}.get(word or "")
    return _Line(
        _text(turn, "text"),
        reward=None if label is None else float(label),
        without_yes=None if word is None else word in ("NO", "NONE"),
        without_no=None if word is None else word in ("YES", "NONE"),
        line_to_line=None if line_label is None else float(line_label),
    )
