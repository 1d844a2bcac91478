"""Partial returns where rollouts have a fixed length and so cut episodes into fragments.

    credit = CreditMatrix(KStep(5), gamma=0.99)
    found = fragment_returns(reward_NE, start_NE, end_NE, first_turn_E, credit)
    found.return_NE[found.complete_NE]

N steps of a rollout, E environments side by side. A fragment is what one rollout holds of an
episode. A step is complete if the rollout holds all rewards that it answers for; of the others
nothing is made up: they are dropped, or, if asked for, one value stands for all that is still to
come, where the credit allows that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .credit import Credit, Subset

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MOST_TURNS = 4096
"""Longer episodes are refused: a matrix of 4,096 x 4,096 weights takes 128 MB."""


class CreditMatrix:
    """The weights of a credit times gamma^|u-t|, for as many turns as are asked for; computed once.

    Args:
        credit: which rewards a turn answers for.
        gamma: discount factor in [0, 1].
        boundaries: first turns of the episodes' segments, which only Segment() reads.
    """

    def __init__(
        self, credit: Credit, gamma: float = 1.0, boundaries: Sequence[int] | None = None
    ) -> None:
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}.")
        self._credit, self._gamma, self._boundaries = credit, gamma, boundaries
        self._weight_TT = np.zeros((0, 0))
        self.first_T = self.last_T = np.zeros(0, dtype=np.int64)  # that a turn asks for

    def over(self, num_turns: int) -> FloatArray:
        """Return weight_TT of at least one turn more than `num_turns`, where the credit has more.

        Raises:
            ValueError: that are more turns than a matrix is made for, or than a Subset covers.
        """
        if num_turns > MOST_TURNS:
            raise ValueError(
                f"An episode has more than {MOST_TURNS} turns; end it earlier, for instance with "
                "gymnasium.wrappers.TimeLimit."
            )
        if num_turns >= len(self._weight_TT):
            size = max(64, 2 * num_turns)
            if isinstance(self._credit, Subset):
                size = max(num_turns, len(np.asarray(self._credit.matrix)))
            weight_TT = self._credit.weights(size, self._boundaries)
            turn_T = np.arange(size)
            self._weight_TT = weight_TT * self._gamma ** np.abs(turn_T[:, None] - turn_T)
            asked_TT = self._weight_TT != 0
            self.first_T = np.where(asked_TT.any(axis=1), asked_TT.argmax(axis=1), turn_T)
            self.last_T = size - 1 - asked_TT[:, ::-1].argmax(axis=1)
            self.last_T[~asked_TT.any(axis=1)] = -1
        return self._weight_TT

    @property
    def has_one_tail(self) -> bool:
        """Whether one value can stand for all rewards after a cut, whichever turn asks.

        That is so if, after any cut, all rows are multiples of one another: of full planning,
        discounting, segments and greedy, not of K steps with K > 1.
        """
        weight_TT = self.over(0)
        return all(
            _share_of_tail(weight_TT[:cut, cut:], weight_TT[cut, cut:]) is not None
            for cut in range(1, min(64, len(weight_TT)))
        )


@dataclass(frozen=True)
class FragmentReturns:
    """What the steps of a rollout answer for.

    Attributes:
        return_NE: partial returns; NaN where a step is not complete.
        turn_NE: how many steps the episode had before.
    """

    return_NE: FloatArray
    turn_NE: npt.NDArray[np.int64]

    @property
    def complete_NE(self) -> BoolArray:
        """Whether the rollout holds (or a value stands for) all that the step answers for."""
        return ~np.isnan(self.return_NE)


def fragment_returns(
    reward_NE: npt.ArrayLike,
    start_NE: npt.ArrayLike,
    end_NE: npt.ArrayLike,
    first_turn_E: npt.ArrayLike,
    credit: CreditMatrix,
    value_NE: npt.ArrayLike | None = None,
) -> FragmentReturns:
    """Return what each step of a rollout answers for.

    Args:
        reward_NE: rewards.
        start_NE: whether an episode begins with the step.
        end_NE: whether it ends with the step, so that nothing is still to come.
        first_turn_E: of the rollout's first step, how many steps its episode had before.
        credit: the weights.
        value_NE: where an episode is cut after the step, the value of what follows in the credit's
            own terms (the expected return of the next step); NaN = not known, as without it.

    Raises:
        ValueError: a reward is not finite, or an episode is too long.
    """
    reward_NE = np.asarray(reward_NE, dtype=np.float64)
    if not np.isfinite(reward_NE).all():
        n, e = np.argwhere(~np.isfinite(reward_NE))[0]
        raise ValueError(
            f"The reward of step {n} in environment {e} is {reward_NE[n, e]}; rewards are finite "
            "numbers. (PersonaDialogue-v0: choose unscorable_reward.)"
        )
    start_NE, end_NE = np.asarray(start_NE, dtype=bool), np.asarray(end_NE, dtype=bool)
    return_NE = np.full(reward_NE.shape, np.nan)
    turn_NE = np.zeros(reward_NE.shape, dtype=np.int64)
    for e, turn in enumerate(np.asarray(first_turn_E).tolist()):
        for first, stop in _fragments(start_NE[:, e], end_NE[:, e]):
            offset = turn if first == 0 and not start_NE[0, e] else 0
            turns = slice(offset, offset + stop - first)
            turn_NE[first:stop, e] = np.arange(turns.start, turns.stop)
            weight_TT = credit.over(turns.stop)
            found_T = weight_TT[turns, turns] @ reward_NE[first:stop, e]
            if not end_NE[stop - 1, e]:
                value = np.nan if value_NE is None else np.asarray(value_NE)[stop - 1, e]
                found_T += _tail(credit, turns, value)
            # Rewards before the fragment are in an earlier rollout; only Trajectory asks for them.
            found_T[credit.first_T[turns] < offset] = np.nan
            return_NE[first:stop, e] = found_T
    return FragmentReturns(return_NE, turn_NE)


def _fragments(start_N: BoolArray, end_N: BoolArray) -> Iterator[tuple[int, int]]:
    """Yield (first step, first step after) of each fragment in one environment."""
    cuts = np.flatnonzero(start_N[1:] | end_N[:-1]) + 1
    yield from pairwise([0, *cuts.tolist(), len(start_N)])


def _tail(credit: CreditMatrix, turns: slice, value: float) -> FloatArray:
    """Return what turns before a cut answer for after it; NaN where that is not known."""
    unknown_T = np.where(credit.last_T[turns] >= turns.stop, np.nan, 0.0)
    if np.isnan(value):
        return unknown_T
    weight_TT, cut = credit.over(turns.stop), turns.stop
    if cut >= len(weight_TT):
        return unknown_T
    share_T = _share_of_tail(weight_TT[turns, cut:], weight_TT[cut, cut:])
    return unknown_T if share_T is None else share_T * value


def _share_of_tail(later_TU: FloatArray, own_U: FloatArray) -> FloatArray | None:
    """Return share_T with later_TU = share_T x own_U; None if rows are no multiples of own_U."""
    if not own_U.any():
        return None if later_TU.any() else np.zeros(len(later_TU))
    nearest = int(np.flatnonzero(own_U)[0])
    share_T = later_TU[:, nearest] / own_U[nearest]
    fits = np.allclose(later_TU, share_T[:, None] * own_U, rtol=1e-9, atol=1e-300)
    return share_T if fits else None
