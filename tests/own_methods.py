"""Methods of a user's own, for tests of comparisons: a credit, and agents that go wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from agents import PPGAgent


class Opening:
    """A credit: every turn answers for its own reward, the first for all."""

    name = "opening"

    def weights(self, num_turns: int, boundaries: Sequence[int] | None = None) -> np.ndarray:
        weight_TT = np.eye(num_turns)
        weight_TT[0] = 1.0
        return weight_TT


class Own(PPGAgent):
    """An agent of one's own: greedy credit under another name."""

    def __init__(self, policy: Any, env: Any, **settings: Any) -> None:
        super().__init__(policy, env, "greedy", **settings)


class Crashing(Own):
    """Raises in training."""

    def learn(self, *arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("the reward model has left <b>the</b> building")


class Leaving(Own):
    """Calls sys.exit."""

    def learn(self, *arguments: Any, **settings: Any) -> Any:
        sys.exit(3)


class Speaking:
    """An agent that is no PPGAgent: says the same line whatever it is asked, and learns nothing."""

    def __init__(self, policy: Any, env: Any, **settings: Any) -> None:
        self.policy = policy

    def learn(self, total_timesteps: int, callback: Any = None) -> Any:
        self.log = {"own/steps": float(total_timesteps)}
        callback(self)
        return self

    def predict(self, observation: Any, deterministic: bool = False) -> tuple[str, None]:
        return "I would rather not say.", None


class Wrapping(Own):
    """A PPGAgent with a way of its own to speak."""

    def predict(self, observation: Any, deterministic: bool = False) -> tuple[str, None]:
        return "I would rather not say.", None


class Dying(Own):
    """Takes its whole process down, as a lack of memory does."""

    def learn(self, *arguments: Any, **settings: Any) -> Any:
        os._exit(9)


NOTHING = 3
