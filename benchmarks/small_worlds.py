"""Two small worlds whose dependence length is known: how many rewards does an act move?

Perishables: an order arrives `lead_time` turns later, is sold on that day and perishes. It moves
the reward of exactly that turn, so kstep:lead_time+1 has no bias, and fewer steps have no signal.
KeysAndDoors: a key is worth nothing until it has been carried to the door.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from scipy.stats import poisson


class Perishables(gym.Env[np.ndarray, np.int64]):
    """Order every day what is sold `lead_time` days later; what is not sold then is thrown away.

    Demand is Poisson; its mean rises and falls with the season, which the observation tells.
    The reward is 1 for each unit sold minus `cost` for each unit that arrived, divided by 10.

    Args:
        lead_time: days between order and sale.
        num_days: days of an episode; orders that arrive after it are free and useless.
        cost: price of a unit, in units of its selling price.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    most = 12

    def __init__(self, lead_time: int = 3, num_days: int = 40, cost: float = 0.5) -> None:
        self.lead_time, self.num_days, self.cost = lead_time, num_days, cost
        self.action_space = gym.spaces.Discrete(self.most + 1)
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)

    def mean_demand(self, day: int) -> float:
        """Return the expected demand of a day: 6 plus or minus 4 with a season of 20 days."""
        return 6.0 + 4.0 * float(np.sin(2 * np.pi * day / 20))

    def expected_reward(self, day: int, stock: int) -> float:
        """Return the expected reward of a day on which `stock` units are there."""
        sold = np.arange(stock)  # E min(demand, stock) = sum over s < stock of P(demand > s)
        return float(poisson.sf(sold, self.mean_demand(day)).sum() - self.cost * stock) / 10

    def optimum(self) -> float:
        """Return the largest expected total reward of an episode."""
        days = range(self.lead_time, self.num_days)
        return sum(
            max(self.expected_reward(day, stock) for stock in range(self.most + 1)) for day in days
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start with nothing on its way."""
        super().reset(seed=seed)
        self._day, self._on_its_way = 0, [0] * self.lead_time
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Order `action` units; sell what has arrived."""
        self._on_its_way.append(int(action))
        stock = self._on_its_way.pop(0)
        demand = int(self.np_random.poisson(self.mean_demand(self._day)))
        reward = (min(demand, stock) - self.cost * stock) / 10
        self._day += 1
        return self._observation(), reward, self._day == self.num_days, False, {}

    def _observation(self) -> np.ndarray:
        season = 2 * np.pi * self._day / 20
        left = 1.0 - 2.0 * self._day / self.num_days
        return np.array([np.sin(season), np.cos(season), left], dtype=np.float32)


class KeysAndDoors(gym.Env[np.ndarray, np.int64]):
    """A grid with a key in one corner and a door in the opposite one; carried there, it is worth 1.

    Then there is a new key in its corner. Nothing else is rewarded, and one step in ten goes
    astray. From key to door and back takes `2 * (size - 1)` steps each.

    Args:
        size: width and height of the grid.
        num_turns: steps of an episode.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    _moves = ((0, 1), (0, -1), (1, 0), (-1, 0))

    def __init__(self, size: int = 3, num_turns: int = 48) -> None:
        self.size, self.num_turns = size, num_turns
        self.action_space = gym.spaces.Discrete(4)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (2 * size + 1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start in the door's corner, without the key."""
        super().reset(seed=seed)
        self._place, self._has_key, self._turn = [self.size - 1] * 2, False, 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move right, left, down or up; walls hold."""
        if self.np_random.random() < 0.1:
            action = self.np_random.integers(4)
        for axis, move in enumerate(self._moves[int(action)]):
            self._place[axis] = min(max(self._place[axis] + move, 0), self.size - 1)
        reward = 0.0
        if self._place == [0, 0]:
            self._has_key = True
        elif self._place == [self.size - 1] * 2 and self._has_key:
            self._has_key, reward = False, 1.0
        self._turn += 1
        return self._observation(), reward, self._turn == self.num_turns, False, {}

    def _observation(self) -> np.ndarray:
        found = np.zeros(2 * self.size + 1, dtype=np.float32)
        found[self._place[0]] = found[self.size + self._place[1]] = 1.0
        found[-1] = self._has_key
        return found
