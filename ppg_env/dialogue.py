"""What a dialogue is: personas, turns, transcripts, verdicts. Frozen data and nothing else.

A transcript is written once and seen from several sides: the agent reads it as chat messages in
which its own lines are the assistant's; partners and judges get the transcript itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

Message = dict[str, str]
"""One chat message: {"role": "system" | "user" | "assistant", "content": text}."""

Messages = list[Message]
"""A dialogue as one side sees it, ready for a chat template."""


class Farewell(str):
    """A partner's line that closes the dialogue: the episode ends (`terminated`) after it."""

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Persona:
    """Who the agent plays.

    Attributes:
        id: unique within its file, e.g. "therapy-0042".
        domain: name of the domain it was written for.
        text: the persona, best in the second person, as the agent's system message shows it.
        facts: what is true of the persona, attribute -> value of the domain's lexicon; what the
            rule judge checks claims against. May be empty for free-text personas.
        traits: what shapes the dynamics without being a checkable claim, e.g. guardedness.
        split: "train", "validation" or "test"; personas are split, never lines.

    Two personas are equal when they are the same object: identity makes them cheap cache keys.
    """

    id: str
    domain: str
    text: str
    facts: Mapping[str, str] = field(default_factory=dict)
    traits: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", MappingProxyType(dict(self.facts)))
        object.__setattr__(self, "traits", MappingProxyType(dict(self.traits)))

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self.id, self.domain, self.text, dict(self.facts), dict(self.traits), self.split)
        return Persona, state


class Turn(NamedTuple):
    """One turn: the partner's line that opened it and the agent's reply."""

    partner: str
    agent: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """A dialogue so far: finished turns, then the partner's open line if one waits for a reply.

    Attributes:
        persona: who the agent plays.
        system: the system message that tells the agent so.
        turns: what has been said, oldest first.
        pending: the partner's line that waits for the agent; None once the dialogue is over.
        max_turns: agent turns after which the dialogue ends.
    """

    persona: Persona
    system: str
    turns: tuple[Turn, ...]
    pending: str | None
    max_turns: int

    def reply(self, utterance: str) -> Transcript:
        """Return the transcript after the agent answered the pending line with `utterance`."""
        assert self.pending is not None, "nobody waits for a reply"
        turns = (*self.turns, Turn(self.pending, utterance))
        return Transcript(self.persona, self.system, turns, None, self.max_turns)

    def with_partner_line(self, line: str) -> Transcript:
        """Return the transcript after the partner said `line`."""
        return Transcript(self.persona, self.system, self.turns, line, self.max_turns)

    def messages(self) -> Messages:
        """Return the dialogue as the agent sees it: system = who you are, user = partner."""
        view = [{"role": "system", "content": self.system}]
        for turn in self.turns:
            view.append({"role": "user", "content": turn.partner})
            view.append({"role": "assistant", "content": turn.agent})
        if self.pending is not None:
            view.append({"role": "user", "content": self.pending})
        return view


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer about the latest turn of a transcript.

    Attributes:
        reward: in [0, 1], or None when the turn cannot be scored (never silently 1).
        parts: named components, each in [0, 1] or None where a part does not apply.
        reason: one readable sentence.
        act: the dialogue act read from the line, "" if the judge reads none.
        claims: what the line says about its speaker, e.g. ("pet=cat", "not pet=dog").
    """

    reward: float | None
    parts: Mapping[str, float | None]
    reason: str
    act: str = ""
    claims: tuple[str, ...] = ()


def turns_from_messages(history: Sequence[Mapping[str, str]]) -> tuple[tuple[Turn, ...], str]:
    """Return (finished turns, pending partner line) of logged chat messages.

    Args:
        history: messages that alternate user, assistant, ..., user; a leading system message is
            skipped, because the persona's own system message takes its place.

    Raises:
        ValueError: names the position where the alternation breaks or a content is no text.
    """
    if isinstance(history, (str, Mapping)) or not isinstance(history, Sequence):
        raise ValueError(f"history is a list of chat messages, got {history!r:.80}")
    messages = list(history)
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"history[{position}] is a message like "
                f'{{"role": "user", "content": "Hello!"}}, got {message!r:.80}'
            )
    offset = 1 if messages and messages[0].get("role") == "system" else 0
    spoken = messages[offset:]
    for position, message in enumerate(spoken):
        expected = "user" if position % 2 == 0 else "assistant"
        if message.get("role") != expected:
            raise ValueError(
                f"history[{position + offset}] has role {message.get('role')!r}, "
                f"expected {expected!r}: "
                "messages alternate user (partner), assistant (agent), and start and end with user."
            )
        if not isinstance(message.get("content"), str):
            raise ValueError(f"history[{position + offset}] has no text under 'content'.")
    if len(spoken) % 2 == 0:
        raise ValueError(
            "history must end with a partner line (role 'user') for the agent to answer; "
            f"it has {len(spoken)} spoken messages."
        )
    lines = [message["content"] for message in spoken]
    turns = tuple(Turn(lines[i], lines[i + 1]) for i in range(0, len(lines) - 1, 2))
    return turns, lines[-1]
