"""Two Gymnasium spaces: any Unicode utterance, and a dialogue as chat messages.

`gymnasium.spaces.Text` tests each character against an alphabet and so refuses blanks and emoji
unless they are listed; `Utterance` takes any text that can be encoded, up to a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from .dialogue import Messages

_SAMPLE_WORDS = (
    "well I think so but maybe not today because the rain is loud and you asked me something kind "
    "yes no it was fine naïve café 東京 🙂"
).split()


class Utterance(gym.Space[str]):
    """Any Unicode text of 1 to `max_length` characters.

    Excluded are blank text, NUL and lone surrogates, which tokenizers, files and terminals cannot
    carry.
    """

    def __init__(
        self, max_length: int = 2000, seed: int | np.random.Generator | None = None
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}.")
        self.max_length = max_length
        super().__init__(shape=None, dtype=None, seed=seed)

    def problem(self, x: object) -> str | None:
        """Return why `x` is no valid utterance, or None if it is one."""
        if not isinstance(x, str):
            return f"an utterance is a string, got {type(x).__name__}: {x!r:.80}"
        if x.isascii():
            broken = "\0" in x
        else:
            broken = "\0" in x or any("\ud800" <= character <= "\udfff" for character in x)
        if broken:
            return f"the utterance holds a NUL or a lone surrogate, remove it: {x!r:.80}"
        if not x or x.isspace():
            return "the utterance is empty; say something"
        if len(x) > self.max_length:
            return (
                f"the utterance has {len(x)} characters, the action space allows "
                f"{self.max_length}; shorten it or make the environment with a larger "
                "max_utterance_length"
            )
        return None

    def contains(self, x: object) -> bool:
        """Return whether `x` is a valid utterance."""
        return self.problem(x) is None

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Return a few random words; `mask` and `probability` are refused."""
        if mask is not None or probability is not None:
            raise ValueError("Utterance.sample takes no mask or probability.")
        number = int(self.np_random.integers(1, 9))
        words = self.np_random.choice(_SAMPLE_WORDS, size=number)
        return (" ".join(words) + ".")[: self.max_length]

    @property
    def is_np_flattenable(self) -> bool:
        """Return False: text has no fixed-size array form."""
        return False

    def __eq__(self, other: object) -> bool:
        """Two utterance spaces are equal when they allow the same lengths."""
        return isinstance(other, Utterance) and other.max_length == self.max_length

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"Utterance(max_length={self.max_length})"


class DialogueMessages(gym.Space[Messages]):
    """A dialogue as chat messages: system, then user and assistant in turn.

    `max_messages` bounds the number of messages, system message included.
    """

    def __init__(self, max_messages: int, seed: int | np.random.Generator | None = None) -> None:
        self.max_messages = max_messages
        self._line = Utterance()
        super().__init__(shape=None, dtype=None, seed=seed)

    def contains(self, x: object) -> bool:
        """Return whether `x` holds messages in the order system, user, assistant, user, ..."""
        if not isinstance(x, Sequence) or not 1 <= len(x) <= self.max_messages:
            return False
        for position, message in enumerate(x):
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                return False
            expected = "system" if position == 0 else ("assistant", "user")[position % 2]
            if message.get("role") != expected:
                return False
        return True

    def sample(self, mask: Any = None, probability: Any = None) -> Messages:
        """Return a short random dialogue; `mask` and `probability` are refused."""
        if mask is not None or probability is not None:
            raise ValueError("DialogueMessages.sample takes no mask or probability.")
        self._line.seed(int(self.np_random.integers(2**31)))
        turns = int(self.np_random.integers(0, max(1, self.max_messages // 2)))
        roles = ["system", "user"] + ["assistant", "user"] * turns
        return [
            {"role": role, "content": self._line.sample()} for role in roles[: self.max_messages]
        ]

    @property
    def is_np_flattenable(self) -> bool:
        """Return False: text has no fixed-size array form."""
        return False

    def __eq__(self, other: object) -> bool:
        """Two message spaces are equal when they allow the same number of messages."""
        return isinstance(other, DialogueMessages) and other.max_messages == self.max_messages

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"DialogueMessages(max_messages={self.max_messages})"
