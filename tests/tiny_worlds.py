"""A tiny dialogue world: the partner echoes, dialogues have different lengths."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

Messages = list[dict[str, str]]


class AnyText(gym.Space[str]):
    """Any string."""

    def __init__(self) -> None:
        super().__init__(shape=None, dtype=None)

    def contains(self, x: object) -> bool:
        """Return whether `x` is a string."""
        return isinstance(x, str)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Return one of three words."""
        return str(self.np_random.choice(["yes", "no", "perhaps"]))

    def __eq__(self, other: object) -> bool:
        """All such spaces are equal."""
        return isinstance(other, AnyText)


class AnyMessages(gym.Space[Messages]):
    """Any list of messages."""

    def __init__(self) -> None:
        super().__init__(shape=None, dtype=None)

    def contains(self, x: object) -> bool:
        """Return whether `x` is a list."""
        return isinstance(x, list)

    def sample(self, mask: Any = None, probability: Any = None) -> Messages:
        """Return a short chat."""
        return [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hello."}]

    def __eq__(self, other: object) -> bool:
        """All such spaces are equal."""
        return isinstance(other, AnyMessages)


class EchoDialogue(gym.Env[Messages, str]):
    """The partner repeats the line and adds words; the reward is the line's length over 100.

    The seed chooses the persona, the opening and the number of turns (2 to `max_turns`). Turn 1 is
    unscorable.
    """

    phase_boundaries = (0, 2)

    def __init__(self, max_turns: int = 4) -> None:
        self.observation_space = AnyMessages()
        self.action_space = AnyText()
        self.max_turns = max_turns

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Messages, dict[str, Any]]:
        """Start a dialogue."""
        super().reset(seed=seed)
        self.num_turns = int(self.np_random.integers(2, self.max_turns + 1))
        self.turn = 0
        trait = " and tea" * int(self.np_random.integers(0, 6))
        self.messages: Messages = [
            {"role": "system", "content": f"You like the rain{trait}."},
            {"role": "user", "content": "Hello, " * int(self.np_random.integers(1, 4)) + "you."},
        ]
        return list(self.messages), {"turn": 0}

    def step(self, action: str) -> tuple[Messages, float, bool, bool, dict[str, Any]]:
        """Say a line and hear the answer."""
        self.turn += 1
        more = "I see. " * int(self.np_random.integers(0, 5))
        self.messages += [
            {"role": "assistant", "content": action},
            {"role": "user", "content": f"{more}You said {action}?"},
        ]
        reward = float("nan") if self.turn == 2 else len(action) / 100
        info = {"turn": self.turn, "reward_parts": {"length": float(len(action))}}
        return list(self.messages), reward, self.turn >= self.num_turns, False, info


class EchoDialogues(gym.vector.VectorEnv[tuple[Messages, ...], tuple[str, ...], Any]):
    """Several `EchoDialogue`s at once: finished slots stay finished, groups share a seed."""

    phase_boundaries = (0, 2)

    def __init__(self, num_envs: int, max_turns: int = 4) -> None:
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
        self.num_envs = num_envs
        self.envs = [EchoDialogue(max_turns) for _ in range(num_envs)]
        self.done_B = np.zeros(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Messages, ...], dict[str, Any]]:
        """Start all dialogues; slots of a group get the same seed."""
        size = (options or {}).get("group_size", 1)
        group_B = np.arange(self.num_envs) // size
        assert isinstance(seed, int | None)
        for env, group in zip(self.envs, group_B, strict=True):
            env.reset(seed=None if seed is None else seed + int(group))
        self.done_B[:] = False
        return tuple(list(env.messages) for env in self.envs), {"group_id": group_B}

    def step(
        self, actions: tuple[str, ...]
    ) -> tuple[tuple[Messages, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the slots that are not finished."""
        reward_B = np.zeros(self.num_envs)
        length_B = np.zeros(self.num_envs)
        spoke_B = ~self.done_B
        for slot in np.flatnonzero(spoke_B):
            _, reward_B[slot], self.done_B[slot], _, info = self.envs[slot].step(actions[slot])
            length_B[slot] = info["reward_parts"]["length"]
        infos = {"reward_parts": {"length": length_B, "_length": spoke_B}, "_reward_parts": spoke_B}
        observations = tuple(list(env.messages) for env in self.envs)
        return observations, reward_B, self.done_B.copy(), np.zeros_like(spoke_B), infos
