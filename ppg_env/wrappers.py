"""Other views of the same environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from .dialogue import Messages
from .env import PersonaDialogueEnv


class DiscreteReply(gym.Wrapper[Messages, np.int64, Messages, str]):
    """A menu of dialogue acts instead of free text: action i performs `acts[i]` in words.

    The sentences are the domain's own phrasings with the persona's facts, never one already said.
    With this view the dialogue IS the process of acts in ppg_env.process.

    Args:
        env: a PersonaDialogue-v0 environment (possibly wrapped).
    """

    def __init__(self, env: gym.Env[Messages, str]) -> None:
        super().__init__(env)  # type: ignore[arg-type]
        inner = env.unwrapped
        if not isinstance(inner, PersonaDialogueEnv):
            raise TypeError(f"DiscreteReply wraps PersonaDialogue-v0, got {type(inner).__name__}.")
        self._inner = inner
        self.acts = inner.world.domain.dynamics().acts
        self.action_space = gym.spaces.Discrete(len(self.acts))
        self._rng = np.random.default_rng()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Messages, dict[str, Any]]:
        """Start a dialogue; the phrasings follow from the same seed."""
        if seed is not None:
            self._rng = np.random.default_rng([seed, 1])
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Messages, Any, bool, bool, dict[str, Any]]:
        """Perform the act with index `action`."""
        if not self.action_space.contains(action):
            listed = ", ".join(f"{i}: {act}" for i, act in enumerate(self.acts))
            raise ValueError(f"Invalid action {action!r}; there are {listed}.")
        act = self.acts[int(action)]
        line = self._inner.world.domain.speak(act, self._inner.transcript, self._rng)
        return self.env.step(line)  # type: ignore[arg-type]
