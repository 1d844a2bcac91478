r"""The persona files of Consistent-LLMs in the forms in which they are published.

    [{"persona": "\"Meet ...\\n...\"", "name": ...}, ...]     chatting: quoted and escaped
    [[topic, {"description": ..., "grade_level": ...}], ...]  education: one for each topic
    [{"description": ..., "strategy": ...}, ...]              therapy
    {"persona_7": "I have ...", ...}                          therapy, by number; any domain
    [{"task_name": ..., "P1": ..., "P2": ...}, ...]           dialogues: each persona once
    {"chatting": [{"text": ...}, ...], ...}                   personas_dev.json: by domain

Only the texts are taken, and they stay as they are: in the first, second or third person.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

_NUMBERED = re.compile(r"\w*\d")


class Entry(NamedTuple):
    """One persona of a file, not read yet.

    Attributes:
        where: its place in the file, e.g. "record 3", counted from 0.
        field: name of the field that holds the text.
        read: returns the record in this project's form; raises ValueError if it cannot.
        may_repeat: whether the form itself repeats texts.
    """

    where: str
    field: str
    read: Callable[[], object]
    may_repeat: bool = False


def find_entries(document: object, stem: str, domain: str) -> list[Entry] | None:
    """Return the personas of a JSON document, None if it has none of the forms above.

    Args:
        document: the parsed file.
        stem: the file's name without suffix; ids are made of it and the place in the file.
        domain: what the personas are wanted for.

    Raises:
        ValueError: if the file sorts its personas by domain and has none for this one.
    """
    if isinstance(document, Mapping) and document:
        if all(isinstance(entries, list) for entries in document.values()):
            return _by_domain(document, stem, domain)
        if all(_NUMBERED.fullmatch(key) for key in document):
            return [
                Entry(f"record {key!r}", key, partial(_read, document, key, f"{stem}-{i:04d}"))
                for i, key in enumerate(document)
            ]
    if not isinstance(document, list):
        return None
    keys = {key for record in document if isinstance(record, Mapping) for key in record}
    if "text" in keys:
        return None
    if {"conversation", "P1", "P2"} <= keys:
        return list(_dialogues(document, stem, domain))
    for name, of in (("persona", "chatting"), ("description", "therapy")):
        if name in keys:
            read = partial(_read, field=name, wanted=domain, domain=of)
            return _listed(document, stem, name, read)
    if any(isinstance(record, list) for record in document):
        return _listed(document, stem, "description", partial(_topic, wanted=domain), True)
    return None


def _listed(
    records: Sequence[object],
    stem: str,
    field: str,
    read: Callable[..., object],
    may_repeat: bool = False,
) -> list[Entry]:
    return [
        Entry(f"record {i}", field, partial(read, record, identifier=f"{stem}-{i:04d}"), may_repeat)
        for i, record in enumerate(records)
    ]


def _by_domain(document: Mapping[str, Sequence[object]], stem: str, domain: str) -> list[Entry]:
    if domain not in document:
        raise ValueError(f"has no personas for {domain!r}; it has {', '.join(document)}")
    read = partial(_read, field="text", wanted=domain, domain=domain)
    entries = _listed(document[domain], f"{stem}-{domain}", "text", read)
    return [entry._replace(where=f"{domain} {entry.where}") for entry in entries]


def _dialogues(records: Sequence[object], stem: str, domain: str) -> Iterator[Entry]:
    """Yield each persona of both sides where it occurs first; "" stands for a side without one."""
    seen = {""}
    for i, record in enumerate(records):
        for side in ("P1", "P2"):
            text = record.get(side) if isinstance(record, Mapping) else None
            if isinstance(text, str):
                if text in seen:
                    continue
                seen.add(text)
            read = partial(_side, record, side, domain, f"{stem}-{i:04d}-{side}")
            yield Entry(f"record {i}", side, read)


def _side(record: object, side: str, wanted: str, identifier: str) -> dict[str, str]:
    of = _text_of(record, "task_name").lower()
    return _read(record, side, identifier, wanted=wanted, domain=of)


def _topic(record: object, identifier: str, wanted: str) -> dict[str, str]:
    match record:
        case [str(), entry]:
            return _read(entry, "description", identifier, wanted=wanted, domain="education")
    raise ValueError(f"expected [topic, description and grade], got {record!r:.80}")


def _read(
    record: object, field: str, identifier: str, wanted: str = "", domain: str = ""
) -> dict[str, str]:
    text = _text_of(record, field)
    if domain != wanted:
        raise ValueError(f"field {field!r}: a persona for {domain!r}, expected one for {wanted!r}")
    return {"id": identifier, "text": unquoted(text, field) if domain == "chatting" else text}


def _text_of(record: object, field: str) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if field not in record:
        raise ValueError(f"field {field!r} is missing")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r}: expected a text, got {text!r:.80}")
    return text


def unquoted(text: str, field: str) -> str:
    r"""Return a text that is kept as a string literal, in quotes and with \n for a new line.

    A text without quotes around it is returned as it is.

    Raises:
        ValueError: names the field, if what is between the quotes is no JSON string.
    """
    if len(text) < 2 or not (text[0] == text[-1] == '"'):
        return text
    try:
        return str(json.loads(text, strict=False))
    except ValueError as error:
        raise ValueError(f"field {field!r}: in quotes, but no JSON string ({error})") from None
