"""Partial returns where rollouts have a fixed length and so cut episodes into fragments.

    credit = CreditMatrix(KStep(5), gamma=0.99)
    found = fragment_returns(reward_NE, start_NE, end_NE, first_turn_E, credit)
    found.return_NE[found.complete_NE]

N steps of a rollout, E environments side by side. A fragment is what one rollout holds of an
episode. A step counts if the rollout holds all rewards that it answers for, and if that was certain
before it was taken: were it a matter of how the episode went, those that end soon would count and
the others would not, and the gradient would be that of another objective. So it is a matter of
place: the step's window ends within the rollout, or the longest possible episode would. Other steps
are dropped, or, if asked for, one value stands for all that is still to come, where the credit
allows that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .credit import Credit, Discounted, FullPlanning, Greedy, KStep, Segment, Subset

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MOST_TURNS = 4096
"""Of more no matrix is made: it has twice as many rows and columns, 512 MiB."""

TO_THE_END = np.iinfo(np.int64).max
"""The last turn that a step asks for where that is beyond every rollout, as of full planning."""

_SAME_FROM_EVERY_TURN = (Greedy, KStep, FullPlanning, Discounted)


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
        self.counts_turns = not isinstance(credit, _SAME_FROM_EVERY_TURN)
        """Whether it matters how many turns an episode had before; if not, it may have any."""

    def over(self, num_turns: int, rollout: int = 0) -> FloatArray:
        """Return weight_TT of twice as many turns as episode or rollout have, or of a whole Subset.

        Raises:
            ValueError: that are more turns than a matrix is made for, or than a Subset covers.
        """
        most = max(num_turns, rollout)
        if most > MOST_TURNS:
            raise ValueError(
                f"An episode or a rollout has more than {MOST_TURNS} turns; for "
                f"{self._credit.name} end it earlier, for instance with "
                "gymnasium.wrappers.TimeLimit, or lower n_steps."
            )
        covered = len(np.asarray(self._credit.matrix)) if isinstance(self._credit, Subset) else None
        size = max(128, 2 * most) if covered is None else covered
        if len(self._weight_TT) < size:
            weight_TT = self._credit.weights(size, self._boundaries)
            turn_T = np.arange(size)
            asked_TT = weight_TT != 0  # however small a discount makes it
            if self._gamma == 0:
                asked_TT = asked_TT & np.eye(size, dtype=bool)
            self.first_T = np.where(asked_TT.any(axis=1), asked_TT.argmax(axis=1), turn_T)
            self.last_T = self._last(turn_T, size - 1 - asked_TT[:, ::-1].argmax(axis=1))
            self.last_T[~asked_TT.any(axis=1)] = -1
            if self._gamma < 1:
                weight_TT = weight_TT * self._gamma ** np.abs(turn_T[:, None] - turn_T)
            self._weight_TT = weight_TT
        if covered is not None and num_turns > covered:
            self._credit.weights(num_turns)  # says how many turns it covers
        return self._weight_TT

    def _last(
        self, turn_T: npt.NDArray[np.int64], seen_T: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return the last turn that each turn asks for; `seen_T`: that the matrix shows."""
        if self._gamma == 0 or isinstance(self._credit, Subset):
            return seen_T
        if isinstance(self._credit, FullPlanning | Discounted):
            return np.full(len(turn_T), TO_THE_END)
        if isinstance(self._credit, KStep):
            return turn_T + self._credit.k - 1
        if isinstance(self._credit, Segment) and self._credit.length:
            return (turn_T // self._credit.length + 1) * self._credit.length - 1
        return np.where(seen_T == turn_T[-1], TO_THE_END, seen_T)

    def certain(self, turns: slice, end: int, longest: int | None) -> BoolArray:
        """Return for which turns it is certain beforehand that a rollout holds all they ask for.

        Args:
            turns: of the fragment.
            end: which turn the episode would have after the rollout's last step.
            longest: turns that no episode exceeds; None = not known. Then a turn that asks for
                everything until its episode's end is taken on trust.
        """
        last_T = self.last_T[turns]
        if longest is None:
            return (last_T < end) | (last_T == TO_THE_END)
        return np.minimum(last_T, longest - 1) < end

    def ahead(self, rollout: int) -> int:
        """Return the most rewards that a turn asks for.

        More than `rollout` if one asks for so many; else TO_THE_END if one asks for all to come.
        """
        self.over(0, rollout if self.counts_turns else 0)
        last_T = self.last_T[: -(-len(self.last_T) // 2)]  # of later ones a matrix shows too little
        bounded_T = last_T < TO_THE_END
        most = int((last_T - np.arange(len(last_T)))[bounded_T].max(initial=-1)) + 1
        return most if most > rollout or bounded_T.all() else TO_THE_END

    @property
    def has_one_tail(self) -> bool:
        """Whether one value can stand for all rewards after a cut, whichever turn asks.

        That is so if rows hold later rewards only and, after any cut, are multiples of one another:
        of full planning, discounting, segments and greedy, not of K steps with K > 1.
        """
        weight_TT = self.over(0)
        if np.tril(weight_TT, -1).any():  # a value of what a turn asks for holds the past as well
            return False
        return all(
            _share_of_tail(weight_TT[:cut, cut:], weight_TT[cut, cut:]) is not None
            for cut in range(1, min(64, len(weight_TT)))
        )


@dataclass(frozen=True)
class FragmentReturns:
    """What the steps of a rollout answer for.

    Attributes:
        return_NE: partial returns; NaN where a step does not count.
        turn_NE: how many steps the episode had before.
    """

    return_NE: FloatArray
    turn_NE: npt.NDArray[np.int64]

    @property
    def complete_NE(self) -> BoolArray:
        """Whether the rollout surely holds (or a value stands for) all that the step asks for."""
        return ~np.isnan(self.return_NE)


def fragment_returns(
    reward_NE: npt.ArrayLike,
    start_NE: npt.ArrayLike,
    end_NE: npt.ArrayLike,
    first_turn_E: npt.ArrayLike,
    credit: CreditMatrix,
    value_NE: npt.ArrayLike | None = None,
    longest: int | None = None,
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
        longest: turns that no episode exceeds; None = not known. Then steps that answer for
            everything to come count if their episode happens to end.

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
            if longest is not None and turns.stop > longest:
                raise ValueError(
                    f"An episode of environment {e} has {turns.stop} steps or more, and "
                    f"longest_episode is {longest}: raise it."
                )
            end = offset + len(reward_NE) - first
            bound = longest
            if not credit.counts_turns:  # turns within the fragment will do
                turns, end = slice(0, stop - first), end - offset
                bound = None if longest is None else longest - offset
            weight_TT = credit.over(turns.stop, len(reward_NE) if credit.counts_turns else 0)
            found_T = weight_TT[turns, turns] @ reward_NE[first:stop, e]
            if not end_NE[stop - 1, e]:
                value = np.nan if value_NE is None else np.asarray(value_NE)[stop - 1, e]
                found_T += _tail(credit, turns, value)
            if value_NE is None:
                found_T[~credit.certain(turns, end, bound)] = np.nan
            # Rewards before the fragment are in an earlier rollout; only Trajectory asks for them.
            found_T[credit.first_T[turns] < turns.start] = np.nan
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
