"""The other side of the dialogue: partners map transcripts to lines, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .dialogue import Farewell, Transcript
from .domains import Attribute, Claim, Domain
from .domains.domain import choose


class Partner(Protocol):
    """Speaks to the agent. A transcript without turns asks for the opening line.

    Lines may be `Farewell` strings: the dialogue ends after them. All randomness comes from the
    dialogue's own generator, so that a dialogue does not depend on the batch it rides in.
    """

    def __call__(
        self, transcripts: Sequence[Transcript], rngs: Sequence[np.random.Generator]
    ) -> list[str]:
        """Return one line for each transcript."""
        ...


class ScriptedPartner:
    """Asks, follows up and tempts, by the templates of a domain.

    Args:
        domain: whose script to speak.
        noise: probability of being distracted in a turn; a distracted partner does not follow up,
            and the next reply is worth half. More noise means noisier rewards, the same dependence
            length.
        tempt_rate: probability of a leading question with a false presupposition; None = the
            domain's.
        patience: evasive replies in a row after which the partner closes the dialogue; None =
            never, which keeps the dependence length of the embedded worlds exact.
    """

    def __init__(
        self,
        domain: Domain,
        noise: float = 0.1,
        tempt_rate: float | None = None,
        patience: int | None = None,
    ) -> None:
        for name, rate in (("noise", noise), ("tempt_rate", tempt_rate)):
            if rate is not None and not 0.0 <= rate <= 1.0:
                raise ValueError(f"{name} is a probability in [0, 1], got {rate}.")
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1 or None, got {patience}.")
        self.domain, self.noise, self.patience = domain, noise, patience
        self.tempt_rate = domain.tempt_rate if tempt_rate is None else tempt_rate
        if not any(attribute.tempted for attribute in domain.attributes):
            self.tempt_rate = 0.0
        if not domain.open_questions and not any(a.asked for a in domain.attributes):
            raise ValueError(
                f"Domain {domain.name!r} gives its partner nothing to ask: "
                "fill `asked` of an attribute, or `open_questions`."
            )

        self._in_phase = [
            [domain.by_name[name] for name in phase.attributes] or list(domain.attributes)
            for phase in domain.phases
        ]
        self._askable = [a for a in domain.attributes if a.asked]

    def __call__(
        self, transcripts: Sequence[Transcript], rngs: Sequence[np.random.Generator]
    ) -> list[str]:
        """Return one line for each transcript."""
        return [self._line(t, rng) for t, rng in zip(transcripts, rngs, strict=True)]

    def _line(self, transcript: Transcript, rng: np.random.Generator) -> str:
        if not transcript.turns:
            return f"{self._opening(transcript, rng)} {self._next_line(transcript, rng)}"
        return self._next_line(transcript, rng)

    def _opening(self, transcript: Transcript, rng: np.random.Generator) -> str:
        by_name, facts = self.domain.by_name, transcript.persona.facts
        spoken = {name: by_name[name].values[value][0] for name, value in facts.items()}
        unknown = [f"{{{name}}}" for name in by_name if name not in facts]
        fitting = [o for o in self.domain.openings if not any(name in o for name in unknown)]
        return choose(rng, fitting or ("Hello!",)).format(**spoken)

    def _next_line(self, transcript: Transcript, rng: np.random.Generator) -> str:
        if self.patience is not None and self._out_of_patience(transcript):
            return Farewell("I think we should stop here. Goodbye!")
        if rng.random() < self.noise:
            return f"{choose(rng, self.domain.distractions)} {self._question(transcript, rng)}"
        followed = self._followed_claim(transcript)
        if followed is None or rng.random() >= self.domain.follow_rate:
            return self._question(transcript, rng)
        attribute = self.domain.by_name[followed.attribute]
        line = attribute.phrase(choose(rng, attribute.followed), followed.value)
        if self.domain.follow_rate < 1.0 or rng.random() >= self.tempt_rate:
            return line
        picked_up = attribute.phrase("Oh, {v}!", followed.value)
        return f"{picked_up} {self._tempt(transcript, rng)}".rstrip()

    def _followed_claim(self, transcript: Transcript) -> Claim | None:
        """Return the claim of the last reply to follow up on, an unasked one first."""
        if not transcript.turns:
            return None
        last = transcript.turns[-1]
        claims = [
            claim
            for claim in self.domain.interpret(transcript.persona, last.partner, last.agent).claims
            if claim.positive and self.domain.by_name[claim.attribute].followed
        ]
        topics = self.domain.lexicon.read(last.partner).topics
        unasked = [claim for claim in claims if claim.attribute not in topics]
        if unasked:
            return unasked[0]
        # where every volunteered detail is followed up, plain answers are not
        return claims[0] if claims and self.domain.follow_rate < 1.0 else None

    def _question(self, transcript: Transcript, rng: np.random.Generator) -> str:
        leading = self._tempt(transcript, rng) if rng.random() < self.tempt_rate else ""
        if leading:
            return leading
        asked = "\n".join([turn.partner for turn in transcript.turns])
        if self.domain.open_questions:
            fresh = [q for q in self.domain.open_questions if q not in asked]
            return choose(rng, fresh or self.domain.open_questions)
        attribute = choose(rng, self._fresh_attributes(transcript))
        fresh = [q for q in attribute.asked if q not in asked]
        return choose(rng, fresh or attribute.asked)

    def _tempt(self, transcript: Transcript, rng: np.random.Generator) -> str:
        """Return a leading question that presupposes something false, "" for want of a fact."""
        facts = transcript.persona.facts
        options = [a for a in self._phase_attributes(transcript) if a.tempted and a.name in facts]
        if not options:
            options = [a for a in self.domain.attributes if a.tempted and a.name in facts]
        options = [a for a in options if len(a.values) > 1]
        if not options:
            return ""
        attribute = choose(rng, options)
        false = [value for value in attribute.values if value != facts[attribute.name]]
        return attribute.phrase(choose(rng, attribute.tempted), choose(rng, false))

    def _phase_attributes(self, transcript: Transcript) -> list[Attribute]:
        phase = self.domain.phase_of(len(transcript.turns), transcript.max_turns)
        return self._in_phase[phase]

    def _fresh_attributes(self, transcript: Transcript) -> list[Attribute]:
        """Return what to ask about: what is new in this phase, else anywhere, else all again."""
        read, facts = self.domain.lexicon.read, transcript.persona.facts
        askable = [a for a in self._askable if a.name in facts] or self._askable
        asked: set[str] = set()
        for turn in transcript.turns:
            asked |= read(turn.partner).topics
        fresh = [a for a in askable if a.name not in asked]
        if fresh:
            now = self._phase_attributes(transcript)
            return [a for a in fresh if a in now] or fresh
        recent = read(transcript.turns[-1].partner).topics if transcript.turns else frozenset()
        return [a for a in askable if a.name not in recent] or askable

    def _out_of_patience(self, transcript: Transcript) -> bool:
        assert self.patience is not None
        last = transcript.turns[-self.patience :]
        return len(last) == self.patience and all(
            self.domain.interpret(transcript.persona, turn.partner, turn.agent).act == "evade"
            for turn in last
        )
