"""What each logged turn weighs: what one pass over a log tells, and the weights that follow.

    found = survey(log)
    weights = TurnWeights(OfflineSettings(baseline="log_mean"), weight_TT, found)
    weight_BT = weights.of(batch)

B dialogues of a batch, T turns of the longest dialogue of all logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .batching import group_key, group_numbers
from .credit import advantages, partial_returns
from .logs import LoggedDialogue
from .offline_settings import OfflineSettings


@dataclass(frozen=True)
class Survey:
    """What one pass over a log tells; of a dialogue only its rewards are kept."""

    rewards: Sequence[np.ndarray]
    """Of each dialogue, float32 (turns,), NaN where nobody could score."""
    domains: frozenset[str]
    """Those that are told."""
    has_groups: bool
    """Whether two dialogues of a group follow each other."""

    @property
    def num_dialogues(self) -> int:
        """Dialogues of the log."""
        return len(self.rewards)

    @property
    def num_turns(self) -> int:
        """Agent turns of the longest dialogue."""
        return max(map(len, self.rewards))

    @property
    def num_scored(self) -> int:
        """Turns with a reward."""
        return sum(int((~np.isnan(reward_T)).sum()) for reward_T in self.rewards)


def survey(dialogues: Iterable[LoggedDialogue]) -> Survey:
    """Return what a pass over a log tells."""
    rewards: list[np.ndarray] = []
    domains: set[str] = set()
    has_groups, previous = False, None
    for number, dialogue in enumerate(dialogues):
        rewards.append(dialogue.reward_T.astype(np.float32))
        domains.add(dialogue.domain)
        group = group_key(number, dialogue)
        has_groups, previous = has_groups or group == previous, group
    return Survey(rewards, frozenset(domains - {""}), has_groups)


class TurnWeights:
    """The weights that turns of a log get; 0 for turns that nobody could score.

    Args:
        settings: the method, the baseline, and how weights are clipped.
        weight_TT: the credit's matrix, scaled.
        learned_from: the log to learn from, which "log_mean" and "filtered" go by.

    Attributes:
        lowest, highest: what a weight can be before it is clipped, 0 included.
    """

    def __init__(
        self, settings: OfflineSettings, weight_TT: np.ndarray, learned_from: Survey
    ) -> None:
        self._settings = settings
        self._weight_TT = weight_TT
        low_T, high_T, self._mean_T = _returns_by_turn(learned_from.rewards, weight_TT)
        if settings.baseline == "log_mean":
            low_T, high_T = low_T - self._mean_T, high_T - self._mean_T
        elif settings.baseline != "none":  # others of the step may have any return of the log
            low_T, high_T = low_T - high_T, high_T - low_T
        self.lowest = float(np.fmin.reduce(low_T, initial=0.0))
        self.highest = float(np.fmax.reduce(high_T, initial=0.0))
        self._threshold = _threshold(learned_from.rewards, settings.top_share)

    def of(self, batch: Sequence[LoggedDialogue]) -> np.ndarray:
        """Return weight_BT, clipped, as a gradient step uses them."""
        weight_BT = self.unclipped(batch)
        if self._settings.method != "ppg":
            return weight_BT
        return np.where(self.counts(batch), self.clipped(weight_BT), 0.0)

    def clipped(self, weights: npt.ArrayLike) -> np.ndarray:
        """Return weights within min_weight and max_weight."""
        low, high = self._settings.min_weight, self._settings.max_weight
        return np.clip(
            weights, -math.inf if low is None else low, math.inf if high is None else high
        )

    def unclipped(self, batch: Sequence[LoggedDialogue]) -> np.ndarray:
        """Return weight_BT before they are clipped; of imitation 1 or 0."""
        reward_BT, alive_BT = rewards_of(batch, len(self._weight_TT))
        if self._settings.method == "sft":
            return alive_BT.astype(np.float64)
        if self._settings.method == "filtered":
            means = [_mean(dialogue.reward_T.astype(np.float32)) for dialogue in batch]
            best_B = np.array(means) >= self._threshold
            return (alive_BT & best_B[:, None]).astype(np.float64)
        return_BT = partial_returns(reward_BT, self._weight_TT, alive_BT)
        baseline = self._settings.baseline
        if baseline == "log_mean":
            return_BT, baseline = return_BT - np.nan_to_num(self._mean_T), "none"
        return advantages(
            return_BT,
            baseline=baseline,
            group_B=group_numbers(batch),
            alive_BT=alive_BT,
            scorable_BT=self.counts(batch),
        )

    def counts(self, batch: Sequence[LoggedDialogue]) -> np.ndarray:
        """Return count_BT, whether a turn took place and can have a weight."""
        reward_BT, alive_BT = rewards_of(batch, len(self._weight_TT))
        if self._settings.method != "ppg":
            return alive_BT
        known_T = ~np.isnan(self._mean_T) | (self._settings.baseline != "log_mean")
        return alive_BT & ~np.isnan(reward_BT) & known_T


def rewards_of(batch: Sequence[LoggedDialogue], num_turns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (reward_BT, alive_BT): rewards, NaN where unscorable, 0 where there was no turn."""
    reward_BT = np.zeros((len(batch), num_turns))
    alive_BT = np.zeros((len(batch), num_turns), dtype=bool)
    for b, dialogue in enumerate(batch):
        reward_BT[b, : dialogue.num_turns] = dialogue.reward_T
        alive_BT[b, : dialogue.num_turns] = True
    return reward_BT, alive_BT


def _returns_by_turn(
    rewards: Iterable[np.ndarray], weight_TT: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (lowest, highest, mean) partial return of each turn; NaN where none was scored."""
    total_T, count_T = np.zeros(len(weight_TT)), np.zeros(len(weight_TT))
    low_T, high_T = np.full(len(weight_TT), np.nan), np.full(len(weight_TT), np.nan)
    for reward_T in rewards:
        t = len(reward_T)
        (return_T,) = partial_returns(reward_T[None], weight_TT[:t, :t])
        scored = np.flatnonzero(~np.isnan(reward_T))
        total_T[scored] += return_T[scored]
        count_T[scored] += 1
        low_T[scored] = np.fmin(low_T[scored], return_T[scored])
        high_T[scored] = np.fmax(high_T[scored], return_T[scored])
    with np.errstate(invalid="ignore"):
        return low_T, high_T, total_T / count_T


def _threshold(rewards: Iterable[np.ndarray], top_share: float) -> float:
    """Return the mean reward of the last dialogue that belongs to the best share; NaN if none."""
    means = np.sort([mean for mean in map(_mean, rewards) if not np.isnan(mean)])
    number = max(1, math.ceil(top_share * len(means) - 1e-9))
    return float(means[-number]) if len(means) else float("nan")


def _mean(reward_T: np.ndarray) -> float:
    """Return the mean of the scored turns; NaN, which is above nothing, if there are none."""
    scored = reward_T[~np.isnan(reward_T)]
    return float(scored.mean()) if len(scored) else float("nan")


def effective_share(log_ratios: Sequence[float]) -> float:
    """Return the effective sample size of importance ratios as a share of their number.

        (sum w)^2 / sum w^2 / n,   1 if all are alike, 1/n if one outweighs all others

    Source: Kong, A note on importance sampling using standardized weights, 1992.
    """
    if not len(log_ratios):
        return 1.0
    log_N = np.asarray(log_ratios, dtype=np.float64)
    ratio_N = np.exp(log_N - log_N.max())
    return float(ratio_N.sum() ** 2 / (ratio_N**2).sum() / len(ratio_N))
