"""What an agent is to the rest of the house: anything with `predict(observation) -> (text, None)`.

The shape is Stable-Baselines3's. `LMPolicy` learns; the two policies here only speak, as baselines
and in tests. Nothing here imports torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import gymnasium as gym
import numpy as np

Message = Mapping[str, str]
Messages = Sequence[Message]


@runtime_checkable
class Policy(Protocol):
    """An agent: one method, from the dialogue so far to the next line."""

    def predict(self, observation: Messages, deterministic: bool = False) -> tuple[str, None]:
        """Return the next line, and None for the state that Stable-Baselines3 has."""
        ...


class RandomPolicy:
    """Says a random line of the list `source`, or a sample of the action space `source`.

    The space is copied, so that drawing from it leaves the environment's own random state alone.
    """

    def __init__(self, source: gym.Space[str] | Sequence[str], seed: int | None = None) -> None:
        if not isinstance(source, gym.Space) and len(source) == 0:
            raise ValueError("RandomPolicy needs at least one line to say, got an empty list.")
        self._rng = np.random.default_rng(seed)
        self._source = source
        if isinstance(source, gym.Space):
            self._source = copy.deepcopy(source)
            self._source.seed(int(self._rng.integers(2**31)))

    def predict(self, observation: Messages, deterministic: bool = False) -> tuple[str, None]:
        """Return a random line; with `deterministic` the first one of a list."""
        if isinstance(self._source, gym.Space):
            return self._source.sample(), None
        return self._source[
            0 if deterministic else int(self._rng.integers(len(self._source)))
        ], None


class ScriptedPolicy:
    """Says what a function of the observation returns, or the lines of a list, over and over."""

    def __init__(self, script: Callable[[Messages], str] | Sequence[str]) -> None:
        if not callable(script) and len(script) == 0:
            raise ValueError("ScriptedPolicy needs at least one line to say, got an empty list.")
        self._script = script

    def predict(self, observation: Messages, deterministic: bool = False) -> tuple[str, None]:
        """Return the line for this observation; the turn is the number of own lines in it."""
        if callable(self._script):
            return self._script(observation), None
        turn = sum(message["role"] == "assistant" for message in observation)
        return self._script[turn % len(self._script)], None
