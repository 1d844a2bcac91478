"""Score dialogues again that were played before, without playing them; how far two judges agree.

for record, verdicts in rejudge(read_transcripts("runs/train"), judge, "therapy"):
    print([verdict.reward for verdict in verdicts])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from .dialogue import Persona, Transcript, Turn, Verdict
from .domains import Domain, get_domain
from .judges import Judge

LABELS = ("consistent", "contradicts", "unscorable")
_CHUNK = 64
_NUM_RESAMPLES = 2000


def rejudge(
    records: Iterable[Mapping[str, Any]],
    judge: Judge,
    domain: str | Domain,
    personas: Sequence[Persona] = (),
) -> Iterator[tuple[Mapping[str, Any], list[Verdict]]]:
    """Yield each record with the judge's verdict of every agent turn.

    The judge gets the turns of many dialogues in one call.

    Args:
        records: dialogues as trainers write them (agents.runs.read_transcripts).
        judge: who scores now.
        domain: what the dialogues are of.
        personas: where to look up the records' personas; one that is not there is made from the
            system message, where there is one, and has a text, but no facts.

    Raises:
        ValueError: names the record whose messages are no dialogue.
    """
    domain = get_domain(domain)
    known = {persona.id: persona for persona in personas}
    remaining = iter(records)
    while chunk := list(islice(remaining, _CHUNK)):
        dialogues = [_prefixes(record, known, domain) for record in chunk]
        verdicts = iter(judge([prefix for dialogue in dialogues for prefix in dialogue]))
        for record, dialogue in zip(chunk, dialogues, strict=True):
            yield record, list(islice(verdicts, len(dialogue)))


def _prefixes(
    record: Mapping[str, Any], known: dict[str, Persona], domain: Domain
) -> list[Transcript]:
    """Return the dialogue as it stood after each agent turn."""
    name = record.get("persona") or "unnamed"
    messages = record.get("messages")
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"The record of persona {name!r} has no messages.")
    if messages[0].get("role") != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    roles = [message["role"] for message in messages]
    expected = ["system"] + ["user", "assistant"] * (len(messages) // 2)
    if roles != expected[: len(roles)]:
        raise ValueError(
            f"The record of persona {name!r} is no dialogue that can be judged: its messages have "
            f"the roles {roles[:6]}, not system, user, assistant, user, ..."
        )
    system = messages[0]["content"]
    persona = known.get(name)
    if persona is None or domain.system_prompt(persona) != system:
        text = system.removeprefix(domain.setting).strip()
        # the same persona is one object: judges use it as a key
        persona = known.setdefault(f"{name}\n{text}", Persona(name, domain.name, text))
    lines = [message["content"] for message in messages[1:]]
    turns = tuple(Turn(lines[i], lines[i + 1]) for i in range(0, len(lines) - 1, 2))
    return [
        Transcript(persona, system, turns[: t + 1], None, len(turns)) for t in range(len(turns))
    ]


def last_line(
    judge: Judge, domain: str | Domain, personas: Sequence[Persona] = ()
) -> Callable[[Sequence[Mapping[str, Any]]], list[float | None]]:
    """Return a function from records to the judge's reward of the last line of each.

    `agents.logs.score_log` and `agents.evaluate_steps` take it as `score`.

    Args:
        judge: who scores.
        domain: what the dialogues are of.
        personas: as in `rejudge`.
    """
    own, known = get_domain(domain), {persona.id: persona for persona in personas}

    def score(records: Sequence[Mapping[str, Any]]) -> list[float | None]:
        verdicts = judge([_prefixes(record, known, own)[-1] for record in records])
        return [verdict.reward for verdict in verdicts]

    return score


def rescored(record: Mapping[str, Any], verdicts: Sequence[Verdict], judge: str) -> dict[str, Any]:
    """Return the record with the rewards, parts and reasons of `judge` in place of its own."""
    parts = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    return {
        **record,
        "judge": judge,
        "rewards": [verdict.reward for verdict in verdicts],
        "reward_parts": {name: [verdict.parts.get(name) for verdict in verdicts] for name in parts},
        "reasons": [verdict.reason for verdict in verdicts],
    }


def label(prompt_to_line: float | None) -> str:
    """Return the label of a verdict's part prompt_to_line."""
    if prompt_to_line is None:
        return "unscorable"
    return "consistent" if prompt_to_line >= 0.5 else "contradicts"


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % interval, bootstrapped over personas."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return e.g. "0.81 [0.74, 0.88]"."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same lines.

    Attributes:
        confusion: lines by the first judge's label (rows) and the second's (columns), both in the
            order of LABELS, int (3, 3).
        accuracy: share of lines with equal labels among those that both judges scored.
        kappa: Cohen's kappa of the same lines: 0 = no better than chance, 1 = equal.
    """

    confusion: np.ndarray
    accuracy: Interval
    kappa: Interval

    @property
    def num_lines(self) -> int:
        """Lines that were judged."""
        return int(self.confusion.sum())

    @property
    def num_scored(self) -> int:
        """Lines that both judges scored."""
        return int(self.confusion[:2, :2].sum())


def agreement(
    first: Sequence[str], second: Sequence[str], personas: Sequence[str], seed: int = 0
) -> Agreement:
    """Return how far two judges agree.

    Lines of one persona resemble each other, so intervals resample personas, not lines; with fewer
    than two personas there is no interval (NaN).

    Args:
        first, second: label of each line, see LABELS.
        personas: whose line it is.
        seed: of the bootstrap.

    Source:
        Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    if not len(first) == len(second) == len(personas):
        raise ValueError(
            f"Labels and personas belong to the same lines, got {len(first)}, {len(second)} and "
            f"{len(personas)}."
        )
    names, persona_N = np.unique(
        np.asarray(personas, dtype=object).astype(str), return_inverse=True
    )
    confusion_P = np.zeros((len(names), 3, 3))
    for person, one, other in zip(persona_N, first, second, strict=True):
        confusion_P[person, LABELS.index(one), LABELS.index(other)] += 1
    drawn = np.random.default_rng(seed).integers(
        len(names), size=(_NUM_RESAMPLES if len(names) > 1 else 0, len(names))
    )
    weight_RP = np.zeros((len(drawn), len(names)))
    for row, people in zip(weight_RP, drawn, strict=True):
        row += np.bincount(people, minlength=len(names))
    confusion = confusion_P.sum(axis=0)
    resampled = np.tensordot(weight_RP, confusion_P, axes=1)
    return Agreement(
        confusion.astype(int),
        _interval(_accuracy(confusion), _accuracy(resampled)),
        _interval(_kappa(confusion), _kappa(resampled)),
    )


def _accuracy(confusion: np.ndarray) -> np.ndarray:
    scored = confusion[..., :2, :2]
    with np.errstate(invalid="ignore"):
        return np.trace(scored, axis1=-2, axis2=-1) / scored.sum(axis=(-2, -1))


def _kappa(confusion: np.ndarray) -> np.ndarray:
    """Return (observed - chance) / (1 - chance); NaN where only one label occurs."""
    scored = confusion[..., :2, :2]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = scored / scored.sum(axis=(-2, -1), keepdims=True)
        chance = (share.sum(axis=-1) * share.sum(axis=-2)).sum(axis=-1)
        return (np.trace(share, axis1=-2, axis2=-1) - chance) / (1 - chance)


def _interval(value: np.ndarray, resampled_R: np.ndarray) -> Interval:
    found = resampled_R[np.isfinite(resampled_R)]
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))
