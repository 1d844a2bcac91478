"""A report as one HTML file that needs nothing but a browser: tables, figures, dialogues.

    write_page(Page("Demo", tables=[Table(...)], dialogues=dialogues), "runs/demo/report.html")

This file knows nothing of runs or plots: it is handed texts, drawings and dialogues. The template,
the style sheet and the two scripts are files of their own in page_template/ and go into the page
as they are. The page asks nothing of a network (its content security policy forbids it), and what
a model said is only ever text: the template escapes it, the scripts set it as text. It needs a
browser of 2024 or later.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_TEMPLATE = Path(__file__).parent / "page_template"
_SCRIPTS = ("page.js", "transcripts.js")
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True, slots=True)
class Line:
    """One message of a dialogue after the system message; the numbers are an agent line's only."""

    speaker: Literal["agent", "partner"]
    text: str
    reward: float | None = None
    """None: nobody could score the line."""
    reason: str = ""
    """The judge's."""
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """Reward parts by name."""
    credited: float | None = None
    """The partial return that the method credits this line with."""
    advantage: float | None = None


@dataclass(frozen=True)
class Dialogue:
    """One held-out dialogue of one cell; `method` at `budget` training dialogues, `seed`.

    Two dialogues are shown side by side if domain, persona, group and seed are the same.
    """

    domain: str
    method: str
    budget: int
    """Training dialogues; 0 for a model that was not trained."""
    seed: int
    persona: str
    group: str
    """Dialogues of equal persona and group had the same opening and partner seed."""
    system: str
    """Who the agent is: the system message."""
    lines: Sequence[Line]


@dataclass(frozen=True)
class Table:
    """A table of texts; "mean [low, high]" is shown with a quieter interval."""

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A drawing: SVG as matplotlib writes it with a transparent background."""

    title: str
    caption: str
    svg: str
    alt: str
    """What the drawing shows, for those who cannot see it."""
    follows_theme: bool = True
    """Black, white and greys turn with the page's theme. False for text on filled areas (a
    heat map with numbers): the drawing then keeps its colours on a light ground."""


@dataclass(frozen=True)
class Page:
    """All that a report says, in the order in which it is read."""

    title: str
    warnings: Sequence[str] = ()
    """What limits the results: one seed only, mixed versions."""
    failures: Sequence[tuple[str, str]] = ()
    """(cell, error) of every method that crashed."""
    findings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    dialogues: Iterable[Dialogue] = ()
    """Read once."""
    facts: Sequence[tuple[str, str]] = ()
    """(name, value): command, settings, versions."""


def write_page(page: Page, path: str | Path, max_bytes: int = 20_000_000) -> Path:
    """Write the page as one HTML file and return its path.

    Where the file would exceed `max_bytes`, it holds the first n (persona, group) of every domain
    and seed, n about as large as fits, the same for all methods; the page says how many are shown.

    Raises:
        ValueError: a table's row is not as wide as its header, a figure is not a drawing without
            scripts and links, a number is not finite, or the page exceeds `max_bytes` without any
            dialogue.
    """
    _check_tables(page.tables)
    figures = [
        (figure, _drawing(figure, f"drawing-{number}-"))
        for number, figure in enumerate(page.figures, start=1)
    ]
    cells = _cells(page.dialogues)
    most = max((rank + 1 for cell in cells for rank in cell.ranks), default=0)

    def content(kept: int) -> bytes:
        return _render(page, figures, cells, kept).encode()

    frame, kept = len(content(0)), most
    if frame > max_bytes:
        raise ValueError(
            f"The page has {frame:,} bytes without any dialogue, max_bytes is {max_bytes:,}: "
            "hand in fewer or smaller figures, or raise max_bytes."
        )
    html = content(kept)
    while len(html) > max_bytes:
        share = (max_bytes - frame) / (len(html) - frame)
        kept = min(kept - 1, int(kept * share))
        html = content(kept)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(html)
    part.replace(path)
    return path


# --- dialogues: one compressed block a cell, and an index of them all -----------------------------


@dataclass
class _Cell:
    """The dialogues of one cell, one entry of every list a dialogue."""

    domain: str
    method: str
    budget: int
    seed: int
    ranks: list[int] = field(default_factory=list)
    """Which go first where not all can stay."""
    personas: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    """Means over the lines that could be scored."""
    records: list[str] = field(default_factory=list)
    """What was said, as JSON."""
    lowest: float = 0.0
    highest: float = 1.0
    """Reward of a line, the scale's usual ends included."""

    def add(self, dialogue: Dialogue, rank: int) -> None:
        """Append a dialogue."""
        lines = [_line(line, dialogue) for line in dialogue.lines]
        rewards = [line["reward"] for line in lines if line.get("reward") is not None]
        self.ranks.append(rank)
        self.personas.append(dialogue.persona)
        self.groups.append(dialogue.group)
        self.rewards.append(round(sum(rewards) / len(rewards), 6) if rewards else None)
        self.records.append(_json({"system": dialogue.system, "lines": lines}))
        self.lowest = min([self.lowest, *rewards])
        self.highest = max([self.highest, *rewards])

    def index(self, kept: int) -> dict[str, Any]:
        """Return what the browser needs before a dialogue is looked at."""
        return {
            "domain": self.domain,
            "method": self.method,
            "budget": self.budget,
            "seed": self.seed,
            "personas": self._first(self.personas, kept),
            "groups": self._first(self.groups, kept),
            "rewards": self._first(self.rewards, kept),
        }

    def block(self, kept: int) -> str:
        """Return the dialogues' records, compressed."""
        return _packed("[" + ",".join(self._first(self.records, kept)) + "]")

    def _first(self, values: Sequence[Any], kept: int) -> list[Any]:
        return [value for value, rank in zip(values, self.ranks, strict=True) if rank < kept]


def _cells(dialogues: Iterable[Dialogue]) -> list[_Cell]:
    """Sort dialogues into cells; those that are shown side by side have the same rank."""
    cells: dict[tuple[str, str, int, int], _Cell] = {}
    rank_of: dict[tuple[str, int], dict[tuple[str, str], int]] = {}  # in each domain and seed
    for dialogue in dialogues:
        name = (dialogue.domain, dialogue.method, dialogue.budget, dialogue.seed)
        group = (dialogue.persona, dialogue.group)
        ranks = rank_of.setdefault((dialogue.domain, dialogue.seed), {})
        rank = ranks.setdefault(group, len(ranks))
        cells.setdefault(name, _Cell(*name)).add(dialogue, rank)
    return list(cells.values())


def _line(line: Line, dialogue: Dialogue) -> dict[str, Any]:
    if line.speaker == "partner":
        return {"partner": line.text}
    if line.speaker != "agent":
        raise ValueError(
            f"Speaker {line.speaker!r} in a dialogue of {dialogue.persona!r}: "
            'a line is spoken by "agent" or "partner".'
        )

    def number(name: str, value: float | None) -> float | None:
        if value is None:
            return None
        if not math.isfinite(value):
            raise ValueError(
                f"{name} {value} in a dialogue of {dialogue.persona!r} under "
                f"{dialogue.method!r}: numbers are finite; None says that there is none."
            )
        return round(float(value), 6)

    return {
        "agent": line.text,
        "reward": number("reward", line.reward),
        "reason": line.reason,
        "parts": {name: number(name, value) for name, value in line.parts.items()},
        "credited": number("credited return", line.credited),
        "advantage": number("advantage", line.advantage),
    }


def _json(value: Any) -> str:
    """Return JSON in ASCII, in which every text survives, half a UTF-16 pair too."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _packed(text: str) -> str:
    return b64encode(gzip.compress(text.encode("ascii"), compresslevel=6, mtime=0)).decode("ascii")


# --- drawings -------------------------------------------------------------------------------------


def _drawing(figure: Figure, prefix: str) -> str:
    """Return the figure's SVG for use inside a page.

    Its ids get a prefix, so that figures do not take each other's; width and height become a
    viewBox and a largest width; greys turn with the theme where the figure follows it.
    """
    try:
        root = ElementTree.fromstring(figure.svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"Figure {figure.title!r} is not SVG: {error}.") from None
    if root.tag != f"{{{_SVG}}}svg" or "viewBox" not in root.attrib:
        raise ValueError(f"Figure {figure.title!r} is not SVG with a viewBox: {root.tag}.")
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _check_harmless(element, figure)
        for name, value in element.attrib.items():
            element.set(name, _inside_page(name, value, prefix, figure.follows_theme))
    width = float(root.attrib["viewBox"].replace(",", " ").split()[2])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("style", f"--natural: {width:g}pt")
    root.set("fill", "currentColor" if figure.follows_theme else "#000000")
    root.set("aria-hidden", "true")  # the template names the drawing and says what it shows
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _check_harmless(element: ElementTree.Element, figure: Figure) -> None:
    tag = element.tag.rpartition("}")[2].lower()
    if tag in ("script", "foreignobject", "a", "iframe"):
        raise ValueError(f"Figure {figure.title!r} holds <{tag}>: hand in a plain drawing.")
    for name, value in element.attrib.items():
        here = name.rpartition("}")[2].lower()
        if here.startswith("on"):
            raise ValueError(f"Figure {figure.title!r} holds {here}=: hand in a plain drawing.")
        linked = here in ("href", "src") and not value.startswith(("#", "data:image/png;"))
        if linked or re.search(r"url\((?!#)", value):
            raise ValueError(f"Figure {figure.title!r} links to {value!r}: take the link out.")


def _inside_page(name: str, value: str, prefix: str, follows_theme: bool) -> str:
    if name == "id":
        return prefix + value
    if name.endswith("href") and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{prefix}", value)
    if follows_theme and name in ("style", "fill", "stroke"):
        value = re.sub(r"#([0-9a-fA-F]{2})\1\1\b", _themed_grey, value)
    return value


def _themed_grey(grey: re.Match[str]) -> str:
    """Black is the ink, white the ground, a grey so much of the one in the other."""
    ink = round(100 * (255 - int(grey[1], 16)) / 255)
    if ink == 100:
        return "currentColor"
    return f"color-mix(in srgb, currentColor {ink}%, var(--card))"


# --- the page -------------------------------------------------------------------------------------


def _render(
    page: Page,
    figures: Sequence[tuple[Figure, str]],
    cells: Sequence[_Cell],
    kept: int,
) -> str:
    """Return the HTML with the dialogues whose rank is below `kept`."""
    index = [cell.index(kept) for cell in cells]
    scale = (
        math.floor(min((cell.lowest for cell in cells), default=0)),
        math.ceil(max((cell.highest for cell in cells), default=1)),
    )
    scripts = [(_TEMPLATE / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    return _template().render(
        page=page,
        figures=figures,
        style=(_TEMPLATE / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        script_hashes=[b64encode(sha256(s.encode()).digest()).decode() for s in scripts],
        index=_packed(_json({"scale": scale, "cells": index})),
        blocks=[cell.block(kept) for cell in cells],
        num_dialogues=sum(len(cell.records) for cell in cells),
        num_shown=sum(len(cell["personas"]) for cell in index),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["carried"] = _carried
    environment.filters["mean_and_interval"] = _mean_and_interval
    environment.filters["json"] = _json
    environment.globals["numeric_columns"] = _numeric_columns
    return environment.get_template("page.html.jinja")


def _carried(text: str) -> str:
    """Return what HTML can carry of a text; page.js puts the rest back where this is not all."""
    return re.sub("[\r\0\ud800-\udfff]", "\ufffd", text)


def _mean_and_interval(text: str) -> tuple[str, str]:
    """Split ".281 [.264, .299]" before its " ["; of any other text, the second part is empty."""
    match = re.fullmatch(r"([^\[\]]*\d)( \[[^\[\]]*\d\])", text)
    return (match[1], match[2]) if match else (text, "")


def _numeric_columns(table: Table) -> list[bool]:
    """Return for each column whether all its texts begin like a number (or are empty)."""
    columns = [[row[place] for row in table.rows] for place in range(len(table.header))]
    numeric = re.compile(r"\s*([-+\u2212]?\.?\d|[-\u2013\u2014]?\s*$)")
    return [any(texts) and all(numeric.match(text) for text in texts) for texts in columns]


def _check_tables(tables: Sequence[Table]) -> None:
    for table in tables:
        for number, row in enumerate(table.rows, start=1):
            if len(row) != len(table.header):
                raise ValueError(
                    f"Row {number} of table {table.title!r} has {len(row)} cells, the header "
                    f"{len(table.header)}: give every column a text, if an empty one."
                )
