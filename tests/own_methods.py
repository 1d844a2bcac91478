"""Methods of a user's own, for tests of comparisons: a credit, and agents that go wrong."""

from __future__ import annotations

import os
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


class Dying(Own):
    """Takes its whole process down, as a lack of memory does."""

    def learn(self, *arguments: Any, **settings: Any) -> Any:
        os._exit(9)


NOTHING = 3
