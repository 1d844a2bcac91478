"""Personas on disk: one JSON object a line, validated when loaded, split by persona.

    {"id": "chatting-0001", "domain": "chatting", "name": "Mia", "split": "train",
     "facts": {"job": "nurse", ...}, "traits": {}}

`text` may be given instead of (or besides) `facts`; without it the domain words the facts. Bundled
files hold 400 personas a domain; ppg_env/data/DATASHEET.md tells how they were made.
"""

from __future__ import annotations

import difflib
import json
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from .dialogue import Persona
from .domains import Domain, get_domain
from .spaces import Utterance

SPLITS = ("train", "validation", "test")
_DATA = Path(__file__).parent / "data"
_FIELDS = ("id", "domain", "name", "split", "facts", "traits", "text")


class PersonaFileError(ValueError):
    """A persona file has malformed lines.

    Attributes:
        problems: one sentence per malformed line, naming line and field.
        personas: the personas of all other lines, unharmed.
    """

    def __init__(self, path: Path, problems: Sequence[str], personas: Sequence[Persona]) -> None:
        self.problems, self.personas = tuple(problems), tuple(personas)
        listed = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        super().__init__(
            f"{path}: {len(problems)} malformed line(s), {len(personas)} good one(s) "
            f"(kept in .personas; load_personas(..., on_error='skip') goes on with them):\n"
            f"  {listed}{more}"
        )


def load_personas(
    path: str | Path, domain: str | Domain, on_error: str = "raise"
) -> tuple[Persona, ...]:
    """Return the personas of a JSONL file, in file order.

    Args:
        path: the file, UTF-8.
        domain: what facts are validated against.
        on_error: "raise" reports every malformed line at once; "skip" returns the good ones.

    Raises:
        PersonaFileError: names line and field of every malformed line and carries the good
            personas.
        FileNotFoundError: if there is no such file.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is 'raise' or 'skip', got {on_error!r}.")
    path, domain = Path(path), get_domain(domain)
    personas: list[Persona] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, raw in enumerate(path.read_bytes().removeprefix(BOM_UTF8).split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            persona = parse_persona(json.loads(raw.decode("utf-8")), domain)
            if persona.id in seen:
                raise ValueError(f"field 'id': {persona.id!r} is used by an earlier line")
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg} at column {error.colno})")
        except UnicodeDecodeError as error:
            problems.append(f"line {number}: not UTF-8 (byte {error.start})")
        except RecursionError:
            problems.append(f"line {number}: nested too deeply")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
        else:
            seen.add(persona.id)
            personas.append(persona)
    if problems and on_error == "raise":
        raise PersonaFileError(path, problems, personas)
    if not personas:
        raise ValueError(f"{path} holds no personas.")
    return tuple(personas)


def parse_persona(record: object, domain: Domain) -> Persona:
    """Return the persona of one JSON record.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    for name in record:
        if name not in _FIELDS:
            raise ValueError(f"field {name!r} is unknown; fields are {', '.join(_FIELDS)}")
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
    for name, value in (("id", identifier), ("text", text)):
        problem = Utterance(100_000).problem(value)
        if problem is not None:
            raise ValueError(f"field {name!r}: {problem}")
    return Persona(identifier, domain.name, text, facts, traits, split)


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
