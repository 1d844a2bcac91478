"""What the side-by-side benchmarks share: their options, the rounds, the table, the JSON file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from .contenders import CONTENDERS, make_contender
from .measure import Order, Round, Step, as_json, machine, markdown, ratio, side_by_side, spread
from .workload import Workload, add_options, from_options

Column = Callable[[Sequence[Round], str], str]
"""What a table says about one contender, given the rounds at one number of turns and its name."""


@dataclass(frozen=True)
class Contest:
    """Who plays what, and how often."""

    contenders: tuple[str, ...]
    turns: tuple[int, ...]
    rounds: int
    workload: Workload
    out: Path | None


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of a contest; the first line of `about` describes it."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument(
        "--rounds", type=int, default=3, help="each contender is asked once a round"
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS)
    )
    parser.add_argument("--out", type=Path, help="JSON file to write all measurements to")
    add_options(parser)
    return parser


def contest_of(options: argparse.Namespace) -> Contest:
    """Return the contest asked for; without TRL, and with a hint, where that is not installed."""
    names = list(options.contenders)
    if "trl" in names and importlib.util.find_spec("trl") is None:
        say('TRL is not installed (pip install -e ".[bench]"); going on without it.')
        names.remove("trl")
    return Contest(
        tuple(names), tuple(options.turns), options.rounds, from_options(options), options.out
    )


def hold(contest: Contest, order: Order) -> dict[int, list[Round]]:
    """Return the rounds by number of turns; `order` says which phases are measured."""
    rounds = {}
    for turns in contest.turns:
        say(f"{turns} turns")
        entries = {
            name: (make_contender(name, contest.workload, turns), replace(order, turns=turns))
            for name in contest.contenders
        }
        rounds[turns] = side_by_side(entries, contest.rounds, say)
    return rounds


def say(line: str) -> None:
    """Print a line of progress, apart from the tables."""
    print(line, file=sys.stderr, flush=True)


# -- tables ----------------------------------------------------------------------------------------


def table(rounds: Mapping[int, Sequence[Round]], columns: Mapping[str, Column]) -> str:
    """Return one row for each number of turns and contender."""
    rows = [
        [str(turns), name, *[column(found, name) for column in columns.values()]]
        for turns, found in rounds.items()
        for name in found[0]
    ]
    return markdown(["turns", "contender", *columns], rows)


def value(cost: Callable[[Step], float]) -> Column:
    """Return the column of a contender's own cost."""
    return lambda rounds, name: str(spread([cost(steps[name]) for steps in rounds]))


def over_ours(cost: Callable[[Step], float]) -> Column:
    """Return the column that tells how many times our cost a contender's is."""

    def column(rounds: Sequence[Round], name: str) -> str:
        others = name != "ours" and "ours" in rounds[0]
        return str(ratio(rounds, name, "ours", cost)) if others else ""

    return column


def tokens(rounds: Sequence[Round], name: str) -> str:
    """Count tokens: of a line, of all lines, of all dialogues; equal in all contenders."""
    step = rounds[0][name]
    shortest, longest = step.line_tokens
    line = str(shortest) if shortest == longest else f"{shortest}-{longest}"
    return f"{line}; {step.new_tokens:,}; {step.tokens:,}"


# -- records ---------------------------------------------------------------------------------------


def conditions(contest: Contest) -> dict[str, str]:
    """Return what the figures depend on besides the code."""
    trl = {"trl": version("trl")} if "trl" in contest.contenders else {}
    return {**machine(), **trl, "load at the end": f"{os.getloadavg()[0]:.1f}"}


def show_conditions(contest: Contest) -> None:
    """Print what the figures depend on besides the code."""
    print(", ".join(f"{name} {what}" for name, what in conditions(contest).items()))
    print(contest.workload)


def write(contest: Contest, rounds: Mapping[str, Sequence[Round]]) -> None:
    """Write all measurements, with the conditions, if a file was named."""
    if contest.out is None:
        return
    record = {
        "options": sys.argv[1:],
        "conditions": conditions(contest),
        "workload": asdict(contest.workload),
        "rounds": {name: as_json(found) for name, found in rounds.items()},
    }
    contest.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
