"""The other side of the dialogue: partners map transcripts to lines, many at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .chat import ChatModel, Completion, sayable
from .dialogue import Farewell, Messages, Transcript
from .domains import Attribute, Claim, Domain, get_domain
from .domains.domain import choose
from .domains.flaws import MARKUP

END = "[END]"
"""What a chat partner writes after a line that closes the dialogue."""
MAX_PARTNER_LINE = 2000
"""Characters of a chat partner's line; a longer answer ends after its last whole sentence."""
_BLANK_ANSWERS = 4
_MANNERS = (
    "Write only what you say yourself, as plain text: one or two short sentences, at most one "
    "question. Never speak for the other, never leave your part."
)
_CLOSING = (
    f"When the conversation has come to its natural end, say goodbye and write {END} after it."
)
_BEGIN = "(The conversation begins. Say your first line.)"
_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’)]*")


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


class ChatPartner:
    """A language model that plays the partner; it knows the setting and what was said, no secrets.

    What the domain lets a partner know (`Domain.partner_knows`) is told; the persona's text, other
    facts and traits never are. Reads the agent's lines as the user's and its own as the
    assistant's.

    Args:
        chat: who speaks.
        domain: whose `partner_brief` it gets.
        temperature: of its lines; each has a seed from its dialogue's own generator.
        max_tokens: longest answer in tokens; a line that is cut off ends after its last sentence.
        may_close: it may say goodbye, and the dialogue ends (`terminated`).

    Attributes:
        counts: "lines"; "blank" answers, in place of which it is asked again, and after the fourth
            says "...".
    """

    def __init__(
        self,
        chat: ChatModel,
        domain: str | Domain,
        *,
        temperature: float = 0.8,
        max_tokens: int = 256,
        may_close: bool = True,
    ) -> None:
        if temperature < 0 or max_tokens < 1:
            raise ValueError(
                "temperature must not be negative and max_tokens be at least 1, got "
                f"{temperature} and {max_tokens}."
            )
        self.chat, self.domain = chat, get_domain(domain)
        self.temperature, self.max_tokens, self.may_close = temperature, max_tokens, may_close
        self.counts: Counter[str] = Counter()

    @property
    def remote(self) -> bool:
        """Whether it waits for a server."""
        return self.chat.remote

    @property
    def nondeterministic(self) -> bool:
        """Whether equal transcripts with equal seeds may get different lines."""
        return self.chat.nondeterministic

    def __call__(
        self, transcripts: Sequence[Transcript], rngs: Sequence[np.random.Generator]
    ) -> list[str]:
        """Return one line for each transcript.

        Raises:
            ChatError: the model gave no answer.
        """
        chats = [self._view(transcript) for transcript in transcripts]
        lines = [""] * len(chats)
        silent = list(range(len(chats)))
        for _ in range(_BLANK_ANSWERS):
            answers = self.chat(
                [chats[i] for i in silent],
                [int(rngs[i].integers(2**31)) for i in silent],
                temperature=self.temperature,
                max_tokens=self.max_tokens,
            )
            for i, answer in zip(silent, answers, strict=True):
                lines[i] = self._line(answer, begun=bool(transcripts[i].turns))
            silent = [i for i in silent if not lines[i]]
            self.counts["blank"] += len(silent)
            if not silent:
                break
        self.counts["lines"] += len(lines)
        return [line or "..." for line in lines]

    def _view(self, transcript: Transcript) -> Messages:
        """Return the dialogue as the partner sees it; the user opens, as chat templates expect."""
        system = f"{self.domain.partner_prompt(transcript.persona)} {_MANNERS}"
        if self.may_close:
            system += f" {_CLOSING}"
        view = [{"role": "system", "content": system}, {"role": "user", "content": _BEGIN}]
        for turn in transcript.turns:
            # A model reads markup in a line as the beginning of somebody else's message.
            view.append({"role": "assistant", "content": MARKUP.sub(" ", turn.partner)})
            view.append({"role": "user", "content": MARKUP.sub(" ", turn.agent)})
        return view

    def _line(self, answer: Completion, begun: bool) -> str:
        """Return what was said, without stage directions of the format; "" if nothing.

        A dialogue that has not begun is not closed either: the agent has a turn in each.
        """
        text, mark, _ = answer.text.partition(END)
        # What follows markup is said in somebody else's name.
        text = next((part for part in MARKUP.split(sayable(text)) if part.strip()), "").strip()
        if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
            text = text[1:-1].strip()
        if (not mark and not answer.finished) or len(text) > MAX_PARTNER_LINE:
            text = _whole_sentences(text[:MAX_PARTNER_LINE])
        if mark and self.may_close and begun:
            return Farewell(text or "Goodbye!")
        return text


def _whole_sentences(text: str) -> str:
    """Return the text up to the end of its last whole sentence, all of it if there is none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text
