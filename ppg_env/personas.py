"""Personas on disk, validated when loaded, split by persona: JSON Lines, one object a line.

    {"id": "chatting-0001", "domain": "chatting", "name": "Mia", "split": "train",
     "facts": {"job": "nurse", ...}, "traits": {}}

`text` may be given instead of (or besides) `facts`; without it the domain words the facts. A record
with a text may have further fields, which are not kept. Bundled files hold 400 personas a domain;
ppg_env/data/DATASHEET.md tells how they were made.

A `.json` file is a list of such records, or one of the persona files of Consistent-LLMs.
"""

from __future__ import annotations

import difflib
import json
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from .consistent_llms import Entry, find_entries
from .dialogue import Persona
from .domains import Domain, get_domain
from .spaces import Utterance

SPLITS = ("train", "validation", "test")
_DATA = Path(__file__).parent / "data"
_FIELDS = ("id", "domain", "name", "split", "facts", "traits", "text")


class PersonaFileError(ValueError):
    """A persona file has malformed records.

    Attributes:
        problems: one sentence per malformed record, naming its place and the field.
        personas: the personas of all other records, unharmed.
    """

    def __init__(
        self,
        path: Path,
        problems: Sequence[str],
        personas: Sequence[Persona],
        unit: str = "line",
    ) -> None:
        self.problems, self.personas = tuple(problems), tuple(personas)
        listed = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        super().__init__(
            f"{path}: {len(problems)} malformed {unit}(s), {len(personas)} good one(s) "
            f"(kept in .personas; load_personas(..., on_error='skip') goes on with them):\n"
            f"  {listed}{more}"
        )


def load_personas(
    path: str | Path, domain: str | Domain, on_error: str = "raise"
) -> tuple[Persona, ...]:
    """Return the personas of a file, in file order.

    Args:
        path: the file, UTF-8: JSON Lines, or `.json` in one of the forms of `consistent_llms.py`,
            where ids are made of the file's name and the place in it.
        domain: what facts are validated against.
        on_error: "raise" reports every malformed record at once; "skip" returns the good ones.

    Raises:
        PersonaFileError: names place and field of every malformed record and carries the good
            personas. Two personas with the same text and no facts are one too many, except where
            a published form repeats texts.
        FileNotFoundError: if there is no such file.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is 'raise' or 'skip', got {on_error!r}.")
    path, domain = Path(path), get_domain(domain)
    content = path.read_bytes().removeprefix(BOM_UTF8)
    entries = _document_entries(path, content, domain) if path.suffix == ".json" else None
    personas: list[Persona] = []
    problems: list[str] = []
    ids: set[str] = set()
    texts: dict[object, str] = {}
    for entry in _line_entries(content) if entries is None else entries:
        try:
            persona = parse_persona(entry.read(), domain, entry.field)
            if persona.id in ids:
                raise ValueError(f"field 'id': {persona.id!r} is used by an earlier line")
            says = (persona.text, tuple(sorted(persona.traits.items())))
            if not persona.facts and not entry.may_repeat:
                if says in texts:
                    raise ValueError(f"field {entry.field!r}: the same text as {texts[says]!r}")
                texts[says] = persona.id
        except (ValueError, RecursionError) as error:
            problems.append(f"{entry.where}: {_told(error)}")
        else:
            ids.add(persona.id)
            personas.append(persona)
    if problems and on_error == "raise":
        raise PersonaFileError(path, problems, personas, "line" if entries is None else "record")
    if not personas:
        raise ValueError(f"{path} holds no personas.")
    return tuple(personas)


def _line_entries(content: bytes) -> list[Entry]:
    return [
        Entry(f"line {number}", "text", partial(_parse_json, raw))
        for number, raw in enumerate(content.split(b"\n"), start=1)
        if raw.strip()
    ]


def _document_entries(path: Path, content: bytes, domain: Domain) -> list[Entry] | None:
    """Return the records of a file that is one JSON document, None if it holds JSON Lines."""
    try:
        document = _parse_json(content)
        entries = find_entries(document, path.stem, domain.name)
    except (ValueError, RecursionError) as error:
        if _is_object(content.lstrip().split(b"\n")[0]):
            return None
        raise PersonaFileError(path, [_told(error)], (), "file") from None
    if entries is not None:
        return entries
    records = document if isinstance(document, list) else [document]
    return [Entry(f"record {i}", "text", partial(_as_is, r)) for i, r in enumerate(records)]


def _as_is(record: object) -> object:
    return record


def _parse_json(raw: bytes) -> object:
    return json.loads(raw.decode("utf-8"))


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(_parse_json(raw), dict)
    except (ValueError, RecursionError):
        return False


def _told(error: Exception) -> str:
    """Return what is wrong with a record in one sentence."""
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"not JSON ({error.msg} at {line}column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def parse_persona(record: object, domain: Domain, text_field: str = "text") -> Persona:
    """Return the persona of one JSON record.

    Args:
        record: the parsed record.
        domain: what facts and traits are validated against.
        text_field: what the file calls the text, for messages.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    _check_fields(record)
    identifier = record.get("id")
    if not isinstance(identifier, str) or not identifier:
        raise ValueError(f"field 'id': expected a non-empty string, got {identifier!r}")
    if record.get("domain", domain.name) != domain.name:
        raise ValueError(f"field 'domain': expected {domain.name!r}, got {record['domain']!r}")
    split = record.get("split", "train")
    if split not in SPLITS:
        raise ValueError(f"field 'split': expected one of {SPLITS}, got {split!r}")
    facts = _choices(
        "facts", record.get("facts", {}), {a.name: tuple(a.values) for a in domain.attributes}
    )
    traits = _choices(
        "traits", record.get("traits", {}), {t: tuple(v) for t, v in domain.traits.items()}
    )
    text = record.get("text")
    if text is None:
        if not facts:
            raise ValueError("field 'facts': a persona needs facts or a text")
        text = domain.persona_text(facts, traits, str(record.get("name", identifier)))
    for name, value in (("id", identifier), (text_field, text)):
        problem = Utterance(100_000).problem(value)
        if problem is not None:
            raise ValueError(f"field {name!r}: {problem}")
    return Persona(identifier, domain.name, text, facts, traits, split)


def _check_fields(record: Mapping[str, object]) -> None:
    """Check for fields that are unknown, or in a record with a text: that look like misspelt ones.

    Raises:
        ValueError: names the field and the nearest known one that the record lacks.
    """
    lacking = [name for name in _FIELDS if name not in record]
    for name in record:
        if name in _FIELDS:
            continue
        near = difflib.get_close_matches(name.lower(), lacking, n=1, cutoff=0.75)
        hint = f", did you mean {near[0]!r}?" if near else ""
        if near or record.get("text") is None:
            raise ValueError(f"field {name!r} is unknown{hint} (fields are {', '.join(_FIELDS)})")


def _choices(field: str, given: object, allowed: Mapping[str, Sequence[str]]) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise ValueError(f"field {field!r}: expected an object, got {given!r}")
    for name, value in given.items():
        if name not in allowed:
            raise ValueError(f"field '{field}.{name}': unknown; there are {', '.join(allowed)}")
        if value not in allowed[name]:
            near = difflib.get_close_matches(str(value), allowed[name], n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"field '{field}.{name}': unknown value {value!r}{hint} "
                f"(there are {', '.join(allowed[name])})"
            )
    return dict(given)


@cache
def _bundled(name: str) -> tuple[Persona, ...]:
    return load_personas(_DATA / f"{name}.jsonl", name)


def bundled_personas(domain: str | Domain, split: str | None = None) -> tuple[Persona, ...]:
    """Return the bundled personas of a domain, all or those of one split.

    Raises:
        ValueError: for an unknown split, or a domain of one's own, which has no bundled personas.
    """
    domain = get_domain(domain)
    if not (_DATA / f"{domain.name}.jsonl").exists():
        raise ValueError(
            f"There are no bundled personas for the domain {domain.name!r}; "
            "hand in personas=[...] or the path of a persona file."
        )
    if split is None:
        return _bundled(domain.name)
    if split not in SPLITS:
        near = difflib.get_close_matches(split, SPLITS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown split {split!r}.{hint} There are {', '.join(SPLITS)}.")
    return tuple(persona for persona in _bundled(domain.name) if persona.split == split)


def resolve_personas(
    personas: str | Path | Sequence[Persona] | None, domain: Domain
) -> tuple[Persona, ...]:
    """Return personas from what a user may write: a split name, "all", a file, or Persona objects.

    None means the bundled training split.
    """
    if personas is None:
        return bundled_personas(domain, "train")
    if isinstance(personas, str) and personas == "all":
        return bundled_personas(domain)
    if isinstance(personas, (str, Path)):
        if Path(personas).suffix or Path(personas).exists():
            return load_personas(personas, domain)
        return bundled_personas(domain, str(personas))
    chosen = tuple(personas)
    if not chosen:
        raise ValueError("personas is empty; hand in at least one Persona.")
    for persona in chosen:
        if not isinstance(persona, Persona):
            raise TypeError(f"personas must hold Persona objects, got {persona!r:.80}")
        check_facts(persona, domain)
    return chosen


def check_facts(persona: Persona, domain: Domain) -> None:
    """Check that the persona's facts are attributes and values of the domain.

    Raises:
        ValueError: names persona and field.
    """
    try:
        _choices("facts", persona.facts, {a.name: tuple(a.values) for a in domain.attributes})
    except ValueError as error:
        raise ValueError(f"Persona {persona.id!r}, {error}") from None


def find_persona(persona: str | Persona, known: Sequence[Persona]) -> Persona:
    """Return the persona with this id among `known`, or `persona` itself if it is one already.

    Raises:
        ValueError: for an unknown id; suggests the nearest.
    """
    if isinstance(persona, Persona):
        return persona
    for candidate in known:
        if candidate.id == persona:
            return candidate
    ids = [candidate.id for candidate in known]
    near = difflib.get_close_matches(str(persona), ids, n=3)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    raise ValueError(
        f"Unknown persona id {persona!r}.{hint} This environment has {len(ids)} personas, "
        f"{ids[0]!r} to {ids[-1]!r}; make it with personas='all' to reach every split."
    )
