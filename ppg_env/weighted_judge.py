"""Several judges as one: their rewards' weighted mean, each of them still visible.

judge = WeightedJudge({"rules": (0.3, RuleJudge(domain)), "model": (0.7, ChatJudge(...))})
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

from .chat import side_by_side
from .dialogue import Transcript, Verdict

PASSED_UP = ("prompt_to_line", "line_to_line", "well_formed", "parsed")
"""Parts that the joint verdict has under their own names too."""

_Judge = Callable[[Sequence[Transcript]], list[Verdict]]


class WeightedJudge:
    """Asks several judges about every turn.

        reward = sum over judges of weight * reward of the judge

    It is None (unscorable) if one of the rewards is: the others do not stand in for it.

    Parts of the verdict:
        <judge>: the judge's reward.
        weight/<judge>: its weight.
        <judge>/<part>: each part of its verdict.
        well_formed, parsed: the smallest that a judge gives: 0 as soon as one judge says 0.
        prompt_to_line, line_to_line: those of the judge that comes first among those with such a
            part, also where it says None: what is compared over time is one judge's opinion.

    Act and claims are those of the first judge that reads some. Judges that wait for a server are
    asked side by side in threads if there are several, the others one after the other.

    Args:
        judges: name -> (weight, judge). Weights are above 0 and sum to 1. A name is free of "/" and
            none of the part names above.

    Attributes:
        judges: name -> judge.
        weights: name -> weight.

    Raises:
        ValueError: no judges, or weights or names that are not as described.
    """

    def __init__(self, judges: Mapping[str, tuple[float, _Judge]]) -> None:
        _check(judges)
        self.judges = {name: judge for name, (_, judge) in judges.items()}
        self.weights = {name: float(weight) for name, (weight, _) in judges.items()}

    @property
    def cache_key(self) -> str:
        """The judges' own, with names and weights in their order.

        Raises:
            AttributeError: a judge has none.
        """
        keys = []
        for name, judge in self.judges.items():
            key = getattr(judge, "cache_key", None)
            if not isinstance(key, str) or not key:
                raise AttributeError(f"its part {name!r}, a {type(judge).__name__}, has none")
            keys.append([name, self.weights[name], key])
        return f"WeightedJudge/1/{json.dumps(keys)}"

    @property
    def remote(self) -> bool:
        """Whether one of them mostly waits for somebody else's computer."""
        return any(map(_is_remote, self.judges.values()))

    @property
    def nondeterministic(self) -> bool:
        """Whether one of them may give equal transcripts different verdicts."""
        return any(getattr(judge, "nondeterministic", False) for judge in self.judges.values())

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Verdict]:
        """Return one verdict for each transcript.

        Raises:
            ValueError: a judge returned another number of verdicts than it was asked for.
        """
        if not transcripts:
            return []

        def ask(name: str) -> list[Verdict]:
            verdicts = self.judges[name](transcripts)
            if len(verdicts) != len(transcripts):
                raise ValueError(
                    f"The judge {name!r} returned {len(verdicts)} verdicts for {len(transcripts)} "
                    "transcripts; a judge returns one for each."
                )
            return verdicts

        waiting = [name for name, judge in self.judges.items() if _is_remote(judge)]
        found = {name: ask(name) for name in self.judges if name not in waiting}
        found.update(zip(waiting, side_by_side(ask, waiting, len(waiting)), strict=True))
        return [
            self._joined({name: found[name][i] for name in self.judges})
            for i in range(len(transcripts))
        ]

    def _joined(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        """Return the joint verdict about one transcript."""
        rewards = {name: verdict.reward for name, verdict in verdicts.items()}
        parts: dict[str, float | None] = dict(rewards)
        for name, verdict in verdicts.items():
            parts[f"weight/{name}"] = self.weights[name]
            parts.update({f"{name}/{part}": value for part, value in verdict.parts.items()})
        parts.update(_passed_up(list(verdicts.values())))
        scored = [(self.weights[name], r) for name, r in rewards.items() if r is not None]
        reward = None
        if len(scored) == len(rewards):
            reward = min(1.0, math.fsum(weight * r for weight, r in scored))
        return Verdict(
            reward,
            parts,
            "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items()),
            next((verdict.act for verdict in verdicts.values() if verdict.act), ""),
            next((verdict.claims for verdict in verdicts.values() if verdict.claims), ()),
        )


def _check(judges: Mapping[str, tuple[float, _Judge]]) -> None:
    """Check names and weights.

    Raises:
        ValueError: names what is wrong.
    """
    if not judges:
        raise ValueError('There are no judges; hand in {"name": (weight, judge), ...}.')
    for name, given in judges.items():
        if not isinstance(name, str) or not name or "/" in name or name in ("weight", *PASSED_UP):
            raise ValueError(
                f"{name!r} cannot be the name of a judge: a name is a text without '/', and not "
                f"one of weight, {', '.join(PASSED_UP)}."
            )
        if not isinstance(given, tuple | list) or len(given) != 2 or not callable(given[1]):
            raise ValueError(f"{name!r} needs (weight, judge), got {given!r:.200}.")
    weights = {name: weight for name, (weight, _) in judges.items()}
    if not all(isinstance(w, Real) and w > 0 for w in weights.values()) or not math.isclose(
        sum(weights.values()), 1.0, abs_tol=1e-6
    ):
        raise ValueError(f"The judges' weights must be above 0 and sum to 1, got {weights}.")


def _is_remote(judge: _Judge) -> bool:
    return bool(getattr(judge, "remote", False))


def _passed_up(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Return the parts that the joint verdict has under their own names."""
    passed: dict[str, float | None] = {}
    for part in PASSED_UP:
        given = [verdict.parts[part] for verdict in verdicts if part in verdict.parts]
        if given and part in ("well_formed", "parsed"):
            passed[part] = min([value for value in given if value is not None], default=None)
        elif given:
            passed[part] = given[0]
    return passed
