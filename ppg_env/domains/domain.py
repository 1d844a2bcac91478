"""The shape of a domain: attributes a persona can have, how both sides speak of them, what acts are
worth.

A domain is mostly data. `Domain` itself is a complete small world (answers are worth 1, evasions
and contradictions 0); chatting, education and therapy override how an act is read, spoken and
valued.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np

from ..dialogue import Persona, Transcript
from ..process import Dynamics
from .lexicon import Claim, Lexicon, Reading, resolve_claims
from .words import COMMON_WORDS

T = TypeVar("T")

OPENERS = (
    *("", "", "", "Well, ", "Honestly, ", "Oh, ", "To be honest, ", "At the moment, "),
    *("Let me think, ", "In a way, ", "I must say, ", "These days, ", "For my part, "),
)
CORRECTIONS = (
    *("No, ", "Actually, ", "Not really, ", "Not at all, ", "No, to be honest, "),
    *("No, in fact, ", "No, these days, ", "No, for my part, "),
)
AGREEMENTS = ("Yes, ", "Of course, ", "Exactly, ")
REPEAT_OVERLAP = 0.8
_SECOND_PERSON = re.compile(r"\W*you(?:r|'re|’re)?\b", re.IGNORECASE)


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Return one of `options`, each equally likely."""
    return options[int(rng.random() * len(options))]


@dataclass(frozen=True, eq=False)
class Attribute:
    """Something a persona has one value of, and how it is spoken about.

    Templates may hold {v} (the value's first surface form) and {a} (the same with "a" or "an").

    Attributes:
        name: e.g. "pet".
        values: value -> surface forms; the first is the one that is spoken.
        told: the sentence of the persona text, second person.
        said: the agent's statements.
        asked: the partner's questions (no value in them).
        tempted: leading questions that presuppose the value {v}.
        followed: the partner's follow-ups on a value the agent has mentioned.
        cues: words by which a question about it is recognised.
        depth: how personal it is; 0 = anyone may know.
    """

    name: str
    values: Mapping[str, Sequence[str]]
    told: str
    said: Sequence[str]
    asked: Sequence[str] = ()
    tempted: Sequence[str] = ()
    followed: Sequence[str] = ()
    cues: Sequence[str] = ()
    depth: int = 0

    def phrase(self, template: str, value: str) -> str:
        """Return the template with the value filled in, first letter upper case."""
        spoken = self.values[value][0]
        article = "an" if spoken[0] in "aeiou" else "a"
        text = template.format(v=spoken, a=f"{article} {spoken}")
        return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Phase:
    """A stretch of the dialogue: its name, share of the turns, what the partner asks about."""

    name: str
    share: float
    attributes: Sequence[str] = ()


class Interpretation(NamedTuple):
    """One line understood against the persona: its act, its claims, and which of them are false."""

    act: str
    claims: tuple[Claim, ...]
    true_claims: tuple[Claim, ...]
    false_claims: tuple[Claim, ...]


@dataclass(frozen=True)
class AnswerDynamics:
    """Each turn for itself: an answer is worth 1, anything else 0 (dependence length m = 1)."""

    acts: tuple[str, ...] = ("answer", "evade", "contradict")
    start: Hashable = 0

    def value(self, state: Hashable, act: str, attentive: bool) -> float:
        """Return 1 for an answer, else 0."""
        return float(act == "answer")

    def advance(self, state: Hashable, act: str) -> Hashable:
        """Return the only state there is."""
        return state


@dataclass(frozen=True, eq=False)
class Domain:
    """One setting: who speaks with whom, about what, and what an act is worth.

    Attributes:
        name: as in gym.make(..., domain=name).
        agent_role, partner_role: names for transcripts, e.g. "student" and "teacher".
        setting: first sentence of the system message.
        attributes: what personas are made of; every persona has one value of each.
        openings: the partner's first lines; may hold {attribute} for a fact of the persona.
        open_questions: questions that leave the topic to the agent; used instead of `asked` if
            given.
        distractions: how a distracted partner begins; read as the mark "distracted".
        evasions: lines that answer nothing; also what the scripted speaker says to evade.
        phases: stretches of the dialogue whose shares add up to 1.
        traits: name -> values of persona traits that are told but not claimed, value -> sentence.
        marks: further named phrases for the lexicon.
        tempt_rate, follow_rate: how often the scripted partner tempts and follows up.
        value_name: name of the domain's own reward part.
        partner_brief: what a language model that plays the partner is told about its part.
        partner_knows: attributes whose values the partner may be told; all else is a secret.
        judge_brief: what a language model that judges lines is told to mind in this setting.
    """

    name: str
    agent_role: str
    partner_role: str
    setting: str
    attributes: Sequence[Attribute]
    openings: Sequence[str] = ("Hello!",)
    open_questions: Sequence[str] = ()
    distractions: Sequence[str] = ("Sorry, I was miles away.",)
    evasions: Sequence[str] = ("It depends on the day.", "Hard to say.")
    phases: Sequence[Phase] = (Phase("dialogue", 1.0),)
    traits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    marks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tempt_rate: float = 0.35
    follow_rate: float = 0.3
    value_name: str = "responsiveness"
    partner_brief: str = ""
    partner_knows: Sequence[str] = ()
    judge_brief: str = ""

    @cached_property
    def by_name(self) -> Mapping[str, Attribute]:
        """Return the attributes by name."""
        return {attribute.name: attribute for attribute in self.attributes}

    @cached_property
    def lexicon(self) -> Lexicon:
        """Return the lexicon that reads this domain's lines."""
        return Lexicon(
            forms={a.name: a.values for a in self.attributes},
            cues={a.name: a.cues for a in self.attributes},
            marks={
                "distracted": [line.strip(" .!?") for line in self.distractions],
                **self.marks,
            },
        )

    @cached_property
    def known_words(self) -> frozenset[str]:
        """Return common English words and all that this domain's own sentences hold."""
        texts = [*self.openings, *self.open_questions, *self.distractions, *self.evasions]
        texts += [phrase for phrases in self.marks.values() for phrase in phrases]
        for a in self.attributes:
            texts += [a.told, *a.said, *a.asked, *a.tempted, *a.followed, *a.cues]
            texts += [form for forms in a.values.values() for form in forms]
        return COMMON_WORDS.union(*(self.lexicon.read(text).words for text in texts))

    @cached_property
    def _interpretations(self) -> dict[tuple[Persona, str, str], Interpretation]:
        return {}

    def forget(self) -> None:
        """Drop all remembered readings and interpretations; they only save time."""
        self.lexicon.forget()
        self._interpretations.clear()

    # ---- persona -> process ----------------------------------------------------------------------

    def dynamics(self, persona: Persona | None = None) -> Dynamics:
        """Return what acts are worth to this persona; None stands for a typical one."""
        return AnswerDynamics()

    def system_prompt(self, persona: Persona) -> str:
        """Return the system message: who the agent is.

        A free text that does not address the agent ("I am ...", "Meet Ada, ...") is introduced as
        a description of it; otherwise it would read as one of the partner.
        """
        if persona.facts or _SECOND_PERSON.match(persona.text):
            return f"{self.setting} {persona.text}"
        return (
            f"{self.setting} The following text describes you, whoever wrote it; speak as the "
            f"person it describes.\n\n{persona.text}"
        )

    def partner_prompt(self, persona: Persona) -> str:
        """Return the system message of a language model that plays the partner; no secrets."""
        told = [
            self.partner_brief or f"You are a {self.partner_role}, talking to a {self.agent_role}."
        ]
        for name in self.partner_knows:
            if name in persona.facts:
                spoken = self.by_name[name].values[persona.facts[name]][0]
                told.append(f"The {self.agent_role}'s {name} is: {spoken}.")
        return " ".join(told)

    def persona_text(self, facts: Mapping[str, str], traits: Mapping[str, str], name: str) -> str:
        """Return the persona in sentences, second person."""
        told = [f"You are {name}."]
        told += [self.by_name[a].phrase(self.by_name[a].told, value) for a, value in facts.items()]
        told += [self.traits[trait][value] for trait, value in traits.items()]
        return " ".join(told)

    @cached_property
    def _phase_starts(self) -> dict[int, list[int]]:
        return {}

    def phase_boundaries(self, max_turns: int) -> list[int]:
        """Return the first turn of each phase that has at least one turn, starting with 0."""
        if max_turns not in self._phase_starts:
            ends = accumulate(phase.share for phase in self.phases)
            starts = {0, *(round(end * max_turns) for end in ends)}
            self._phase_starts[max_turns] = sorted(start for start in starts if start < max_turns)
        return list(self._phase_starts[max_turns])

    def phase_of(self, turn: int, max_turns: int) -> int:
        """Return the index of the phase that `turn` belongs to."""
        starts = self._phase_starts.get(max_turns) or self.phase_boundaries(max_turns)
        return bisect_right(starts, turn) - 1

    # ---- text -> act -----------------------------------------------------------------------------

    def attentive(self, partner_line: str) -> bool:
        """Return whether the partner's line shows attention (no distraction mark)."""
        return "distracted" not in self.lexicon.read(partner_line).marks

    def interpret(self, persona: Persona, partner_line: str, agent_line: str) -> Interpretation:
        """Return act and claims of `agent_line` in reply to `partner_line`. Pure, remembered."""
        key = (persona, partner_line, agent_line)
        known = self._interpretations.get(key)
        if known is None:
            if len(self._interpretations) >= 65536:
                self._interpretations.clear()
            known = self._interpretations[key] = self._interpret(*key)
        return known

    def _interpret(self, persona: Persona, partner_line: str, agent_line: str) -> Interpretation:
        agent, partner = self.lexicon.read(agent_line), self.lexicon.read(partner_line)
        claims = self.claims(agent, partner)
        true: list[Claim] = []
        false: list[Claim] = []
        for claim in claims:
            fact = persona.facts.get(claim.attribute)
            if fact is not None:
                (true if (fact == claim.value) == claim.positive else false).append(claim)
        # A bare "No" denies truly but tells nothing; if it counted, a model would say nothing else.
        told = tuple(claim for claim in true if claim.positive or claim in agent.claims)
        act = "contradict" if false else self.read_act(agent, partner, told)
        return Interpretation(act, claims, tuple(true), tuple(false))

    def claims(self, agent: Reading, partner: Reading) -> tuple[Claim, ...]:
        """Return what the agent's line claims about its speaker, given the line it answers."""
        return resolve_claims(agent, partner)

    def read_act(self, agent: Reading, partner: Reading, true_claims: tuple[Claim, ...]) -> str:
        """Return the act of a line without false claims.

        `true_claims` are those that tell something: positive ones, and negative ones in full words.
        """
        return "answer" if self.answered(partner, true_claims) else "evade"

    def answered(self, partner: Reading, true_claims: tuple[Claim, ...]) -> set[str]:
        """Return the attributes that the partner's line is about and the claims speak to.

        A negative claim ("I have no dog") speaks to a line only if that line presupposed the value.
        If the partner's line is about nothing in particular, every positive claim counts.
        """
        presupposed = {(c.attribute, c.value) for c in partner.about_listener}
        telling = {
            c.attribute for c in true_claims if c.positive or (c.attribute, c.value) in presupposed
        }
        return telling & partner.topics if partner.topics else telling

    # ---- act -> text -----------------------------------------------------------------------------

    def speak(self, act: str, transcript: Transcript, rng: np.random.Generator) -> str:
        """Return a line that performs `act` as the transcript's persona, in words not used before.

        Raises:
            ValueError: if the domain has no such act.
        """
        acts = self.dynamics(transcript.persona).acts
        if act not in acts:
            raise ValueError(
                f"Unknown act {act!r} in domain {self.name!r}; it has {', '.join(acts)}."
            )
        assert transcript.pending is not None
        partner = self.lexicon.read(transcript.pending)
        line = ""
        for _ in range(40):
            line = self.phrase_act(act, transcript.persona, partner, rng)
            if not self.repeats(line, [turn.agent for turn in transcript.turns]):
                break
        return line

    def phrase_act(
        self, act: str, persona: Persona, partner: Reading, rng: np.random.Generator
    ) -> str:
        """Return one phrasing of `act`; subclasses add their acts and fall back to these."""
        if act == "evade":
            return choose(rng, ("", "", "Hm, ")) + choose(rng, self.evasions)
        if act == "contradict":
            return self._contradict(persona, partner, rng)
        return self._state(self._topic(persona, partner, rng), persona, partner, rng)

    def _topic(self, persona: Persona, partner: Reading, rng: np.random.Generator) -> str:
        """Return the attribute the partner's line is about, or any the persona has."""
        topics = [a for a in persona.facts if a in partner.topics]
        return choose(rng, topics or list(persona.facts))

    def _state(
        self, name: str, persona: Persona, partner: Reading, rng: np.random.Generator
    ) -> str:
        """Return a true statement about attribute `name`, correcting a false presupposition."""
        attribute = self.by_name[name]
        said = attribute.phrase(choose(rng, attribute.said), persona.facts[name])
        false = any(persona.facts.get(c.attribute) != c.value for c in partner.about_listener)
        return prefixed(choose(rng, CORRECTIONS if false else OPENERS), said)

    def _contradict(self, persona: Persona, partner: Reading, rng: np.random.Generator) -> str:
        """Return agreement with a false presupposition if there is one, else a false statement."""
        false = [c for c in partner.about_listener if persona.facts.get(c.attribute) != c.value]
        if false:
            claim = choose(rng, false)
            attribute = self.by_name[claim.attribute]
            said = attribute.phrase(choose(rng, attribute.said), claim.value)
            return prefixed(choose(rng, AGREEMENTS), said)
        attribute = self.by_name[self._topic(persona, partner, rng)]
        wrong = [value for value in attribute.values if value != persona.facts[attribute.name]]
        said = attribute.phrase(choose(rng, attribute.said), choose(rng, wrong))
        return prefixed(choose(rng, OPENERS), said)

    def repeats(self, line: str, earlier: Sequence[str]) -> bool:
        """Return whether `line` says what one of the `earlier` lines said, nearly word by word."""
        read = self.lexicon.read
        reading = read(line)
        needed = REPEAT_OVERLAP * len(reading.pairs) if len(reading.words) >= 4 else float("inf")
        for other in earlier:
            past = read(other)
            if reading.core == past.core:
                return True
            shared = len(reading.pairs & past.pairs)
            if shared >= needed and shared >= REPEAT_OVERLAP * len(past.pairs):
                return True
        return False


def prefixed(prefix: str, sentence: str) -> str:
    """Return prefix and sentence, the sentence's first letter lowered unless it is an "I"."""
    if not prefix or sentence.startswith(("I ", "I'")):
        return prefix + sentence
    return prefix + sentence[0].lower() + sentence[1:]
