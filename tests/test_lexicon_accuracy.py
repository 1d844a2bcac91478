"""How well the reader of dialogue lines understands lines that were not written from its words.

`data/handwritten_lines.jsonl` holds 420 exchanges, 140 per domain, written by someone who had not
seen the reader's patterns or the domains' sentences. Each says what a human takes the line to claim
about its speaker, and which act it is. The reader may be tuned on the lines marked "dev"; those
marked "test" are held out, and this module never prints them.

Run as a module from the repository's root, it prints the table of both splits; with `--dev` it
lists the lines marked "dev" that the reader gets wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ppg_env import Persona
from ppg_env.domains import get_domain

LINES = Path(__file__).parent / "data" / "handwritten_lines.jsonl"
DOMAIN_NAMES = ("chatting", "therapy", "education")
INFERRED = {"explain": "topic", "ask": "style"}
"""Claims that follow from an act by the domain's definition: explaining a topic claims it as one's
own, asking for a way of learning claims that way. Right if the act is, so not counted again."""
LEAST_PRECISION = 0.9
LEAST_RECALL = 0.8
LEAST_ACT_ACCURACY = 0.8


@dataclass(frozen=True)
class Reading:
    """One exchange as a human labelled it, and what the reader made of it."""

    record: dict[str, Any]
    claims: frozenset[str]
    act: str

    @property
    def gold(self) -> frozenset[str]:
        """The claims a human found in the line."""
        return frozenset(self.record["claims"])

    @property
    def right(self) -> bool:
        """Whether the reader found the same claims and the same act."""
        return self.claims == self.gold and self.act == self.record["act"]


@dataclass(frozen=True)
class Score:
    """Micro precision and recall of claims, and the accuracy of acts, over some readings."""

    count: int
    precision: float
    recall: float
    act_accuracy: float


def load_records() -> list[dict[str, Any]]:
    """All labelled exchanges of the file."""
    with LINES.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read(number: int, record: dict[str, Any]) -> Reading:
    """What the reader understands of one exchange."""
    domain = get_domain(record["domain"])
    inferred = INFERRED.get(record["act"])
    facts = record["facts"]
    text = domain.persona_text(facts, {}, "Sam")
    persona = Persona(f"handwritten-{number}", domain.name, text, facts)
    understood = domain.interpret(persona, record["partner"], record["line"])
    said = frozenset(str(c) for c in understood.claims if c.attribute != inferred)
    gold = [claim for claim in record["claims"] if claim.split("=")[0].split()[-1] != inferred]
    return Reading({**record, "claims": gold}, said, understood.act)


@cache
def readings() -> tuple[Reading, ...]:
    """What the reader understands of every exchange, computed once."""
    return tuple(read(number, record) for number, record in enumerate(load_records()))


def chosen(split: str, domain: str | None = None) -> list[Reading]:
    """The readings of a split, of one domain or of all."""
    return [
        reading
        for reading in readings()
        if reading.record["split"] == split and domain in (None, reading.record["domain"])
    ]


def score(some: Iterable[Reading]) -> Score:
    """Counts claims over all readings together (micro averages)."""
    some = list(some)
    hits = sum(len(reading.claims & reading.gold) for reading in some)
    read_claims = sum(len(reading.claims) for reading in some)
    gold_claims = sum(len(reading.gold) for reading in some)
    right_acts = sum(reading.act == reading.record["act"] for reading in some)
    return Score(
        count=len(some),
        precision=hits / max(read_claims, 1),
        recall=hits / max(gold_claims, 1),
        act_accuracy=right_acts / max(len(some), 1),
    )


def table(split: str) -> str:
    """The scores of a split as text, a row per domain and one for all."""
    head = f"{split:<10} {'lines':>6} {'precision':>10} {'recall':>8} {'acts':>8}"
    rows = [head]
    for name, domain in [*((name, name) for name in DOMAIN_NAMES), ("all", None)]:
        row = score(chosen(split, domain))
        rows.append(
            f"{name:<10} {row.count:>6} {row.precision:>10.3f} {row.recall:>8.3f}"
            f" {row.act_accuracy:>8.3f}"
        )
    return "\n".join(rows)


def failures(split: str) -> str:
    """The exchanges of a split that the reader gets wrong; only the dev split may be looked at."""
    if split != "dev":
        raise ValueError("only lines of the dev split may be listed")
    blocks = []
    for reading in chosen(split):
        if reading.right:
            continue
        record = reading.record
        blocks.append(
            f"[{record['domain']}] facts: {record['facts']}\n"
            f"  partner: {record['partner']}\n"
            f"  line:    {record['line']}\n"
            f"  gold:    {record['act']} {sorted(reading.gold)}\n"
            f"  read:    {reading.act} {sorted(reading.claims)}"
        )
    return "\n".join(blocks)


def test_the_file_holds_as_many_lines_per_domain_and_split_as_promised() -> None:
    """34 dev lines and 106 test lines in each domain, with facts for every attribute."""
    for name in DOMAIN_NAMES:
        assert len(chosen("dev", name)) == 34
        assert len(chosen("test", name)) == 106
        attributes = {attribute.name for attribute in get_domain(name).attributes}
        for record in load_records():
            if record["domain"] == name:
                assert set(record["facts"]) == attributes


def test_no_line_of_the_test_split_occurs_in_the_dev_split() -> None:
    """The held-out lines are other lines."""
    dev = {reading.record["line"] for reading in chosen("dev")}
    test = {reading.record["line"] for reading in chosen("test")}
    assert not dev & test


def test_the_reader_understands_lines_it_was_not_written_for() -> None:
    """Precision and recall of claims and accuracy of acts on the held-out lines."""
    print("\n" + table("test"))
    overall = score(chosen("test"))
    # Plain booleans: an assertion that pytest takes apart could show held-out lines.
    precise = overall.precision >= LEAST_PRECISION
    complete = overall.recall >= LEAST_RECALL
    right = overall.act_accuracy >= LEAST_ACT_ACCURACY
    assert precise, f"precision {overall.precision:.3f} < {LEAST_PRECISION}"
    assert complete, f"recall {overall.recall:.3f} < {LEAST_RECALL}"
    assert right, f"accuracy of acts {overall.act_accuracy:.3f} < {LEAST_ACT_ACCURACY}"


def main() -> None:
    """Prints the table of both splits, or the dev lines the reader gets wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", action="store_true", help="list the failing dev lines only")
    if parser.parse_args().dev:
        print(failures("dev"))
    else:
        print(table("dev") + "\n\n" + table("test"))


if __name__ == "__main__":
    main()
