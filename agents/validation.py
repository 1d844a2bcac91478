"""Is the agent getting better, by a log of other personas? One number a pass, lower is better.

    L = -(1/N) sum min(rho, max_importance) (A - mean A),   log rho = d - typical d,
    d = log pi_now(a_t|h_t) - log pi_before(a_t|h_t)

over the N logged turns with a reward. A = partial return minus baseline, never clipped, and its
mean is that over the validation log's turns t; pi_before = the policy when learning began, or with
importance weights the one that spoke; typical = mean without the highest and the lowest tenth. -L
is how much better than average those lines are that the agent has come to like more than a typical
one. It is 0 at the start, where its gradient is that of the objective but for what all turns share.

What all lines share cancels: that they become likelier because the agent learns the style of the
log, or less likely because it becomes more certain. A likelihood with weights above 0 falls with
the one and rises with the other whatever is earned, and with negative weights one line can outweigh
all others; here a line counts from 0 to max_importance times. (Ratios to pi_before as they are did
as well where the agent itself had spoken; of a log that it finds unlikely they soon are all above
any bound.)

Imitation has no advantages; its loss is -(1/B) sum log pi of the lines that it imitates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .batching import LogReader, batches
from .logs import LogError, LoggedDialogue
from .offline_settings import OfflineSettings
from .weighting import TurnWeights

TurnLogprobs = Callable[[Sequence[LoggedDialogue]], tuple[np.ndarray, np.ndarray]]
"""B dialogues -> (now_BT, logged_BT): log pi(a_t | h_t) as it is and as the log has it; NaN for
turns that the model's context has no room for."""


class Validation:
    """A validation log, read once before learning and once for every measurement.

    N turns that can be read and have a weight; of each two numbers are kept.

    Args:
        log: dialogues of other personas.
        settings: the method, importance, and how many dialogues are a batch for its baselines.
        weights: those of the log that is learned from.
        turn_logprobs: of the agent that learns.

    Attributes:
        loss_before: the loss of the agent as it is now, before it learns.

    Raises:
        LogError: it could not tell anything: its turns are all alike.
    """

    def __init__(
        self,
        log: LogReader,
        settings: OfflineSettings,
        weights: TurnWeights,
        turn_logprobs: TurnLogprobs,
    ) -> None:
        self._log, self._settings, self._turn_logprobs = log, settings, turn_logprobs
        self._counts: list[np.ndarray] = []  # of each batch, which turns are among the N
        now, before, weight, turns = [], [], [], []
        read = total = 0
        for batch in batches(log, settings.batch_size):
            now_BT, logged_BT = turn_logprobs(batch)
            longest, read_BT = now_BT.shape[1], ~np.isnan(now_BT)
            counts_BT = weights.counts(batch)[:, :longest] & read_BT
            self._counts.append(counts_BT)
            now.append(now_BT[counts_BT])
            before.append((logged_BT if settings.importance else now_BT)[counts_BT])
            weight.append(weights.unclipped(batch)[:, :longest][counts_BT])
            turns.append(np.nonzero(counts_BT)[1])
            read, total = read + int(read_BT.sum()), total + sum(d.num_turns for d in batch)
        self._dropped = 1.0 - read / total
        self._before_N, self._weight_N = np.concatenate(before), np.concatenate(weight)
        if settings.method == "ppg":
            self._weight_N = _minus_means(self._weight_N, np.concatenate(turns))
        if np.abs(self._weight_N).max(initial=0.0) < 1e-9:
            why = "in no turn did two of its dialogues earn differently"
            if settings.method != "ppg":
                why = f"none of its dialogues is among the best (top_share={settings.top_share})"
            raise LogError(
                f"{log.name} cannot tell whether the agent gets better: {why}. Take more dialogues."
            )

        self.loss_before = self._loss(np.concatenate(now))

    def measure(self) -> dict[str, float]:
        """Return the loss, and the share of turns that it could not read, by their log keys."""
        found = []
        for batch, counts_BT in zip(
            batches(self._log, self._settings.batch_size), self._counts, strict=True
        ):
            found.append(self._turn_logprobs(batch)[0][counts_BT])
        return {
            "offline/validation_loss": self._loss(np.concatenate(found)),
            "offline/validation_dropped_turns": self._dropped,
        }

    def _loss(self, now_N: np.ndarray) -> float:
        if self._settings.method != "ppg":
            return -float((now_N * self._weight_N).sum()) / sum(map(len, self._counts))
        change_N = now_N - self._before_N
        log_ratio_N = change_N - _typical(change_N)
        most = math.log(self._settings.max_importance)
        return -float((np.exp(np.minimum(log_ratio_N, most)) * self._weight_N).mean())


def _minus_means(value_N: np.ndarray, turn_N: np.ndarray) -> np.ndarray:
    """Return the values minus their turn's mean."""
    count_T = np.maximum(1, np.bincount(turn_N))
    return value_N - (np.bincount(turn_N, weights=value_N) / count_T)[turn_N]


def _typical(value_N: np.ndarray) -> float:
    """Return the mean without the highest and the lowest tenth: no single line can move it far."""
    tenth = len(value_N) // 10
    return float(np.sort(value_N)[tenth : len(value_N) - tenth].mean())
