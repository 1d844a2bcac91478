"""Which rewards a turn answers for: policy classes as matrices, partial returns, baselines.

A policy class is a T x T matrix W: row t is the turn that acted, column u the reward it answers
for. Everything here is numpy and pure; nothing knows about models or environments. The usual
order is

    weight_TT    = credit_weights(KStep(3), num_turns)
    return_BT    = partial_returns(reward_BT, weight_TT, alive_BT)
    advantage_BT = advantages(return_BT, group_B=group_B, alive_BT=alive_BT)

Letters: B episodes, T (also U) turns, G groups. Source of the estimator: "Partial Policy Gradients
for RL in LLMs", arXiv 2603.06138.
"""

import difflib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


# --- policy classes -------------------------------------------------------------------------------


class Credit(Protocol):
    """A policy class: for any number of turns, the matrix of reward weights.

    The weights for fewer turns are the upper left block of the weights for more turns, so that
    padding a batch to a common length changes nothing.
    """

    @property
    def name(self) -> str:
        """Short name such as "kstep:3"; `parse_credit` reads it back."""

    def weights(self, num_turns: int, boundaries: Sequence[int] | None = None) -> FloatArray:
        """Return weight_TT.

        `boundaries` are the first turns of the episode's segments; only Segment() reads them.
        """


class _Named(ABC):
    """Prints a policy class by its name."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FullPlanning(_Named):
    """Every reward from now on: W[t,u] = 1 where u >= t. The ordinary policy gradient."""

    @property
    def name(self) -> str:
        return "full"

    def weights(self, num_turns: int, boundaries: Sequence[int] | None = None) -> FloatArray:
        return (_turns_ahead(num_turns) >= 0).astype(np.float64)


@dataclass(frozen=True)
class Greedy(_Named):
    """The turn's own reward only: W[t,u] = 1 where u == t."""

    @property
    def name(self) -> str:
        return "greedy"

    def weights(self, num_turns: int, boundaries: Sequence[int] | None = None) -> FloatArray:
        return KStep(1).weights(num_turns)


@dataclass(frozen=True)
class KStep(_Named):
    """The next k rewards, the turn's own included: W[t,u] = 1 where t <= u < t + k."""

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _positive_integer("k", self.k, "k=1 is Greedy()"))

    @property
    def name(self) -> str:
        return f"kstep:{self.k}"

    def weights(self, num_turns: int, boundaries: Sequence[int] | None = None) -> FloatArray:
        ahead_TT = _turns_ahead(num_turns)
        return ((ahead_TT >= 0) & (ahead_TT < self.k)).astype(np.float64)


@dataclass(frozen=True)
class Segment(_Named):
    """The rewards up to the end of the segment: W[t,u] = 1 where u >= t, u in the segment of t.

    Segments are `length` turns each, or start at the given `boundaries` (first turns, starting
    with 0), or, with neither, at the boundaries handed to `weights`: the env's own phases, per
    episode if need be.
    """

    length: int | None = None
    boundaries: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.length is not None and self.boundaries is not None:
            raise ValueError(
                f"Segment takes a length or boundaries, not both; got length={self.length} "
                f"and boundaries={tuple(self.boundaries)}."
            )
        if self.length is not None:
            length = _positive_integer("length", self.length, "length=1 is Greedy()")
            object.__setattr__(self, "length", length)
        if self.boundaries is not None:
            object.__setattr__(self, "boundaries", _checked_boundaries(self.boundaries))

    @property
    def name(self) -> str:
        if self.length is not None:
            return f"segment:{self.length}"
        if self.boundaries is not None:
            return "segment:" + ",".join(map(str, self.boundaries))
        return "segment"

    def weights(self, num_turns: int, boundaries: Sequence[int] | None = None) -> FloatArray:
        """Return weight_TT; boundaries at or beyond `num_turns` are segments never reached."""
        segment_T = self._segment_ids(num_turns, boundaries)
        same_TT = segment_T[:, None] == segment_T[None, :]
        return ((_turns_ahead(num_turns) >= 0) & same_TT).astype(np.float64)

    def _segment_ids(
        self, num_turns: int, boundaries: Sequence[int] | None
    ) -> npt.NDArray[np.int64]:
        turn_T = np.arange(_positive_integer("num_turns", num_turns))
        if self.length is not None:
            return np.floor_divide(turn_T, self.length)
        first_turns = self.boundaries if self.boundaries is not None else boundaries
        if first_turns is None:
            raise ValueError(
                "Segment() follows the episode's own phases, but none were passed in. Pass "
                "boundaries (for instance env.unwrapped.phase_boundaries), or use "
                "Segment(length=...) or Segment(boundaries=...)."
            )
        starts = np.asarray(_checked_boundaries(first_turns))
        return np.searchsorted(starts, turn_T, side="right").astype(np.int64)


@dataclass(frozen=True)
class Discounted(_Named):
    """Later rewards count less: W[t,u] = gamma^(u-t) where u >= t.

    gamma=1 is FullPlanning(), gamma=0 is Greedy().
    """

    gamma: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:  # also refuses NaN
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}; 0.9 is a common choice.")
        object.__setattr__(self, "gamma", float(self.gamma))

    @property
    def name(self) -> str:
        return f"discounted:{self.gamma!r}"

    def weights(self, num_turns: int, boundaries: Sequence[int] | None = None) -> FloatArray:
        ahead_TT = _turns_ahead(num_turns)
        power_TT: FloatArray = np.power(self.gamma, np.maximum(ahead_TT, 0))
        return np.where(ahead_TT >= 0, power_TT, 0.0)


@dataclass(frozen=True)
class Subset(_Named):
    """Any causal matrix: row t weighs the rewards that turn t answers for, none of them before t.

    The matrix is kept as a tuple of rows. Fewer turns take its upper left block; more are refused.
    """

    matrix: npt.ArrayLike

    def __post_init__(self) -> None:
        matrix_TT = np.asarray(self.matrix, dtype=np.float64)
        if matrix_TT.ndim != 2 or matrix_TT.shape[0] != matrix_TT.shape[1] or not matrix_TT.size:
            raise ValueError(f"Subset needs a square T x T matrix, got shape {matrix_TT.shape}.")
        _refuse_first(matrix_TT, ~np.isfinite(matrix_TT), "every weight must be a finite number")
        _refuse_first(
            matrix_TT,
            np.tril(matrix_TT, -1) != 0,
            "a turn cannot answer for a reward that came before it; set the entries below the "
            "diagonal to 0",
        )
        object.__setattr__(self, "matrix", tuple(map(tuple, matrix_TT.tolist())))

    @property
    def name(self) -> str:
        size = len(np.asarray(self.matrix))
        return f"subset({size}x{size})"

    def weights(self, num_turns: int, boundaries: Sequence[int] | None = None) -> FloatArray:
        matrix_TT = np.array(self.matrix, dtype=np.float64)
        num_turns = _positive_integer("num_turns", num_turns)
        if num_turns > len(matrix_TT):
            raise ValueError(
                f"This Subset covers {len(matrix_TT)} turns but {num_turns} are needed; "
                "give it a larger matrix."
            )
        return matrix_TT[:num_turns, :num_turns]


@dataclass(frozen=True)
class Trajectory(_Named):
    """All rewards of the episode, past ones too: W[t,u] = 1. Episode-level credit, as GRPO uses it.

    Not causal, hence not a policy class but something to compare with. Rewards from before turn t
    add noise and no mean: its expected gradient is that of FullPlanning().
    """

    @property
    def name(self) -> str:
        return "trajectory"

    def weights(self, num_turns: int, boundaries: Sequence[int] | None = None) -> FloatArray:
        return np.ones_like(_turns_ahead(num_turns), dtype=np.float64)


# --- names, for the command line ------------------------------------------------------------------


def parse_credit(text: str) -> Credit:
    """Turn a name into a policy class: "greedy", "kstep:3", "segment:2", "segment:0,2,5" ...

    Inverse of `Credit.name`, except for Subset, which needs a matrix. A list for "segment" that
    starts with 0 holds boundaries, a single positive number is a length.

    Raises:
        ValueError: the name is unknown (the message lists the known ones and suggests the
            nearest), or its argument is missing, superfluous or malformed.
    """
    name, colon, argument = text.strip().lower().partition(":")
    if name not in _PARSERS:
        raise ValueError(
            _unknown("policy class", name, [example for example, _ in _PARSERS.values()])
        )
    example, make = _PARSERS[name]
    try:
        return make(argument if colon else None)
    except ValueError as error:
        raise ValueError(
            f"Cannot read policy class {text!r}, write e.g. {example!r}: {error}"
        ) from None


def _parse_segment(argument: str | None) -> Credit:
    if argument is None:
        return Segment()
    numbers = [int(part) for part in argument.split(",")]
    if len(numbers) == 1 and numbers[0] != 0:
        return Segment(length=numbers[0])
    return Segment(boundaries=numbers)


def _bare(credit: Credit) -> Callable[[str | None], Credit]:
    def make(argument: str | None) -> Credit:
        if argument is not None:
            raise ValueError(f"{credit.name} takes no argument, got {argument!r}")
        return credit

    return make


def _required(argument: str | None) -> str:
    if not argument:
        raise ValueError("the number after the colon is missing")
    return argument


# name -> an example to show in messages, and what makes the object of the text after the colon
_PARSERS: dict[str, tuple[str, Callable[[str | None], Credit]]] = {
    "full": ("full", _bare(FullPlanning())),
    "greedy": ("greedy", _bare(Greedy())),
    "kstep": ("kstep:3", lambda argument: KStep(int(_required(argument)))),
    "segment": ("segment:2", _parse_segment),
    "discounted": ("discounted:0.9", lambda argument: Discounted(float(_required(argument)))),
    "trajectory": ("trajectory", _bare(Trajectory())),
}
CREDIT_NAMES = tuple(_PARSERS)
"""What a name may start with."""


# --- weights and partial returns ------------------------------------------------------------------


def credit_weights(
    credit: Credit,
    num_turns: int,
    boundaries: Sequence[int] | None = None,
    *,
    boundaries_per_episode: Sequence[Sequence[int]] | None = None,
    scale: str = "none",
) -> FloatArray:
    """Return weight_TT, or weight_BTT where the episodes' matrices differ.

    Args:
        credit: the policy class.
        num_turns: T, the number of turns the batch is padded to. With a `scale`, give the env's
            `max_turns`: the longest episode sampled depends on what was said.
        boundaries: first turn of each segment, the same for all episodes.
        boundaries_per_episode: B such sequences, one an episode, instead of `boundaries`.
        scale: makes step sizes comparable between policy classes, whose returns differ about K : 1.
            "none": W as it is.
            "window": each row divided by its sum: a return becomes a mean over the turn's window.
            Turns near the end have short windows and gain weight against early ones: for Full that
            is no longer the direction of the policy gradient.
            "mean_window": the matrix divided by its mean row sum, one number. Exactly a change of
            learning rate; take this one to compare horizons.

    The scale is computed from W alone and never from the turns that an episode really had: how
    long an episode lasts depends on what the agent says, and dividing by it would reward short or
    long ones. A scaled matrix is a weight matrix like any other, so all that is exact for W stays
    exact for it. For matrices with negative weights "sum" means the sum of absolute values; empty
    rows stay empty.

    Raises:
        ValueError: both kinds of boundaries given, boundaries malformed, or `scale` unknown.
    """
    if boundaries is not None and boundaries_per_episode is not None:
        raise ValueError("Give boundaries or boundaries_per_episode, not both.")
    if boundaries_per_episode is None:
        return _scaled(credit.weights(num_turns, boundaries), scale)
    if not len(boundaries_per_episode):
        raise ValueError("boundaries_per_episode is empty; give one sequence for each episode.")

    keys = [tuple(each) for each in boundaries_per_episode]
    row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    distinct: FloatArray = np.stack(
        [_scaled(credit.weights(num_turns, key), scale) for key in row_of]
    )
    if (distinct == distinct[0]).all():
        return distinct[0]
    return distinct[[row_of[key] for key in keys]]


def _scaled(weight_TT: FloatArray, scale: str) -> FloatArray:
    row_sum_T = np.abs(weight_TT).sum(axis=1)
    if scale == "none":
        return weight_TT
    if scale == "window":
        return weight_TT / np.where(row_sum_T > 0, row_sum_T, 1.0)[:, None]
    if scale == "mean_window":
        mean_sum = float(row_sum_T.mean())
        return weight_TT / (mean_sum if mean_sum > 0 else 1.0)
    raise ValueError(_unknown("scale", scale, ["none", "window", "mean_window"]))


def partial_returns(
    reward_BT: npt.ArrayLike, weight: npt.ArrayLike, alive_BT: npt.ArrayLike | None = None
) -> FloatArray:
    """R[b,t] = sum_u W[t,u] r[b,u]: what turn t of episode b answers for. Returns return_BT.

    Args:
        reward_BT: per-turn rewards. NaN marks a turn that the judge could not score.
        weight: weight_TT, or weight_BTT for a matrix per episode.
        alive_BT: True for the turns that the episode really had; all of them if absent. Rewards
            of other turns are never read, and the return of such a turn is 0.

    Unscorable rewards add 0 to every sum. What that means, if verdicts fail with probability q
    whatever was said: a turn that is itself scored sees its own reward in full and each later one
    (1 - q) times on average, so nothing but a slight discount of the future, and no bias from the
    baseline. The two alternatives are worse. Dropping every turn with a failed verdict in its
    window silences, under Full, the whole dialogue before it. Averaging over the scored rest
    credits the turn's own reward in place of the missing one. If failures depend on the text, the
    0 is an opinion: turns that lead to unscorable ones look bad (rewards lie in [0, 1]). To hold
    another opinion put a constant into `reward_BT` beforehand, and tell `advantages` through
    `scorable_BT` which turns it stands for.

    Raises:
        ValueError: shapes disagree, a reward or weight is infinite, a weight is NaN, or an
            episode comes back to life.
    """
    reward_BT = _matrix("reward_BT", reward_BT)
    weight = np.asarray(weight, dtype=np.float64)
    num_episodes, num_turns = reward_BT.shape
    if weight.shape not in {(num_turns,) * 2, (num_episodes, num_turns, num_turns)}:
        raise ValueError(
            f"weight has shape {weight.shape}; rewards of shape {reward_BT.shape} need "
            f"{(num_turns, num_turns)}, or {(num_episodes, num_turns, num_turns)} for a matrix an "
            "episode. Ask the credit for as many turns as the batch is padded to."
        )
    if not np.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite entries; weights are finite numbers.")
    alive_BT = _mask("alive_BT", alive_BT, reward_BT.shape)
    _refuse_revival(alive_BT)
    _refuse_first(
        reward_BT, alive_BT & np.isinf(reward_BT), "rewards are finite, or NaN if unscorable"
    )

    counted_BT = np.where(alive_BT & ~np.isnan(reward_BT), reward_BT, 0.0)
    return_BT = np.matmul(weight, counted_BT[:, :, None])[:, :, 0]
    return np.where(alive_BT, return_BT, 0.0)


# --- baselines ------------------------------------------------------------------------------------


def leave_one_out(
    return_BT: npt.ArrayLike, group_B: npt.ArrayLike | None, alive_BT: npt.ArrayLike | None = None
) -> FloatArray:
    """A[b,t] = R[b,t] - mean of R[b',t] over the OTHER group members b' alive at t.

    Returns advantage_BT.

    A member with no living peer at t is compared with the mean over all living members of the other
    groups at t. With nobody else alive in the whole batch its advantage is 0, not its raw return.
    Turns not alive have advantage 0.

    Bias (checked by enumeration in tests/test_gradient_exactness.py). Group members are
    independent given what they share (persona, opening, partner seed), so the baseline, the
    choice of fallback, and who is alive among the others all depend on other episodes only.
    Whether b itself is alive at t is settled before a_t is spoken. Hence, while anyone else is
    alive at t, the baseline leaves the mean alone, EARLY ENDS INCLUDED. It is not the mean over
    all peers with dead ones counted as 0; both would be unbiased, this one compares like with
    like. The last fallback is the one place that is not unbiased: it multiplies turn t's expected
    gradient by P(someone else is alive at t). No direction within a turn changes, late turns are
    weakened, and the factor goes to 1 as fast as batches grow. All this supposes that the batch
    was chosen before it was sampled, for example not "episodes until N turns are reached", and
    that every turn is scorable, see `advantages`.
    """
    return_BT, alive_BT = _returns_at_door(return_BT, alive_BT)
    group_B = _group_rows("leave_one_out", group_B, len(return_BT))
    sum_BT, count_BT = _group_totals(return_BT, alive_BT, group_B)

    peer_sum_BT, peer_count_BT = sum_BT - return_BT, count_BT - alive_BT
    other_sum_BT = return_BT.sum(axis=0) - sum_BT
    other_count_BT = alive_BT.sum(axis=0) - count_BT

    has_peer_BT, has_other_BT = peer_count_BT > 0, other_count_BT > 0
    baseline_BT = np.where(
        has_peer_BT,
        peer_sum_BT / np.maximum(peer_count_BT, 1),
        other_sum_BT / np.maximum(other_count_BT, 1),
    )
    return np.where(alive_BT & (has_peer_BT | has_other_BT), return_BT - baseline_BT, 0.0)


def group_mean(
    return_BT: npt.ArrayLike, group_B: npt.ArrayLike | None, alive_BT: npt.ArrayLike | None = None
) -> FloatArray:
    """A[b,t] = R[b,t] - mean over ALL group members alive at t, b itself INCLUDED.

    Returns advantage_BT.

    Including itself, a member subtracts part of its own return: with n alive the result is (1 -
    1/n) times the leave-one-out advantage. The expected gradient of turn t shrinks by the mean of
    that factor: exactly 1 - 1/group_size while all live, more where few are left. A lone member
    gets 0.
    """
    return_BT, alive_BT = _returns_at_door(return_BT, alive_BT)
    group_B = _group_rows("group_mean", group_B, len(return_BT))
    sum_BT, count_BT = _group_totals(return_BT, alive_BT, group_B)
    return np.where(alive_BT, return_BT - sum_BT / np.maximum(count_BT, 1), 0.0)


def batch_mean(
    return_BT: npt.ArrayLike,
    group_B: npt.ArrayLike | None = None,
    alive_BT: npt.ArrayLike | None = None,
) -> FloatArray:
    """A[b,t] = R[b,t] - mean over the batch's episodes alive at t, b included; groups are ignored.

    It is `group_mean` with the batch as one group, and shrinks the gradient likewise (1 - 1/B).
    """
    return_BT, alive_BT = _returns_at_door(return_BT, alive_BT)
    return group_mean(return_BT, np.zeros(len(return_BT), dtype=np.int64), alive_BT)


def no_baseline(
    return_BT: npt.ArrayLike,
    group_B: npt.ArrayLike | None = None,
    alive_BT: npt.ArrayLike | None = None,
) -> FloatArray:
    """A[b,t] = R[b,t], and 0 where not alive. Unbiased and noisy."""
    return _returns_at_door(return_BT, alive_BT)[0]


_BASELINES = {
    "leave_one_out": leave_one_out,
    "group_mean": group_mean,
    "batch_mean": batch_mean,
    "none": no_baseline,
}


def advantages(
    return_BT: npt.ArrayLike,
    *,
    baseline: str = "leave_one_out",
    group_B: npt.ArrayLike | None = None,
    alive_BT: npt.ArrayLike | None = None,
    scorable_BT: npt.ArrayLike | None = None,
    divide_by_std: bool = False,
) -> FloatArray:
    """Subtract a baseline by name. Returns advantage_BT, 0 for dead and for unscorable turns.

    Args:
        return_BT: partial returns.
        baseline: "leave_one_out", "group_mean", "batch_mean" or "none".
        group_B: group id of each episode (the env's `group_id`; never made from prompt text).
            Needed by the two group baselines.
        alive_BT: True for turns that the episode really had.
        scorable_BT: False where the turn's own reward is unscorable, usually
            ~np.isnan(reward_BT). Such a turn carries no gradient and is in nobody's baseline. If
            verdicts fail whatever was said, this costs data and no bias beyond what
            `partial_returns` states. If some replies are harder to score than others, advantage 0
            says "as good as the baseline", and the baseline then does move the mean; a fixed
            penalty given by the env avoids that.
        divide_by_std: divide by the standard deviation of the batch's advantages (one number, no
            second centring). Off by default: the divisor depends on the sample, so this changes
            the objective; batches where returns agree are blown up. If all advantages are equal
            nothing is divided.

    Raises:
        ValueError: unknown baseline, shapes that disagree, a missing group_B, or a return that is
            not finite at a turn that counts.
    """
    if baseline not in _BASELINES:
        raise ValueError(_unknown("baseline", baseline, list(_BASELINES)))
    return_BT = _matrix("return_BT", return_BT)
    alive_BT = _mask("alive_BT", alive_BT, return_BT.shape)
    counted_BT = alive_BT & _mask("scorable_BT", scorable_BT, return_BT.shape)

    advantage_BT = _BASELINES[baseline](return_BT, group_B, counted_BT)
    if divide_by_std and counted_BT.any():
        advantage_BT = advantage_BT / (advantage_BT[counted_BT].std() or 1.0)
    return advantage_BT


def generalized_advantages(
    reward_BT: npt.ArrayLike,
    value_BT: npt.ArrayLike,
    alive_BT: npt.ArrayLike | None = None,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> FloatArray:
    """Generalized advantage estimation over turns. Returns advantage_BT, 0 where not alive.

        A[b,t] = sum_{u >= t} (gamma lambda)^(u-t) (r[b,u] + gamma V[b,u+1] - V[b,u])

    lambda = 1 and gamma = 1 give the full return minus V[b,t], lambda = 0 the one-step error. The
    value after an episode's last turn is 0, cut-off episodes included. Unscorable rewards count as
    0, as in `partial_returns`. Source: Schulman et al., arXiv 1506.02438.

    Args:
        reward_BT: per-turn rewards, NaN where unscorable.
        value_BT: the critic's estimate of the return from turn t on, before a_t is spoken.
        alive_BT: True for the turns that the episode really had; all of them if absent.
        gamma: discount of later rewards, in [0, 1].
        gae_lambda: 0 trusts the critic, 1 the rewards.

    Raises:
        ValueError: shapes disagree, or gamma or gae_lambda lies outside [0, 1].
    """
    for name, number in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {number}.")
    reward_BT, value_BT = _matrix("reward_BT", reward_BT), _matrix("value_BT", value_BT)
    if value_BT.shape != reward_BT.shape:
        raise ValueError(
            f"value_BT has shape {value_BT.shape}, but rewards have shape {reward_BT.shape}."
        )
    alive_BT = _mask("alive_BT", alive_BT, reward_BT.shape)
    _refuse_revival(alive_BT)
    counted_BT = np.where(alive_BT, np.nan_to_num(reward_BT, nan=0.0), 0.0)
    value_BT = np.where(alive_BT, value_BT, 0.0)
    next_BT = np.pad(value_BT[:, 1:], ((0, 0), (0, 1)))
    error_BT = counted_BT + gamma * next_BT - value_BT
    weight_TT = Discounted(gamma * gae_lambda).weights(reward_BT.shape[1])
    return partial_returns(error_BT, weight_TT, alive_BT)


def _group_totals(
    return_BT: FloatArray, alive_BT: BoolArray, group_B: npt.NDArray[np.int64]
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """For each episode: sum of its group's returns and number of its living members, per turn."""
    sum_GT = np.zeros((group_B.max(initial=-1) + 1, return_BT.shape[1]))
    count_GT = np.zeros(sum_GT.shape, dtype=np.int64)
    np.add.at(sum_GT, group_B, return_BT)
    np.add.at(count_GT, group_B, alive_BT)
    return sum_GT[group_B], count_GT[group_B]


# --- checks at the door ---------------------------------------------------------------------------


def _turns_ahead(num_turns: int) -> npt.NDArray[np.int64]:
    """ahead_TT[t,u] = u - t."""
    turn_T = np.arange(_positive_integer("num_turns", num_turns))
    return turn_T[None, :] - turn_T[:, None]


def _positive_integer(name: str, value: int, hint: str = "") -> int:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < 1:
        raise ValueError(
            f"{name} must be an integer of at least 1, got {value!r}"
            + (f"; {hint}." if hint else ".")
        )
    return int(value)


def _checked_boundaries(boundaries: Sequence[int]) -> tuple[int, ...]:
    """First turns of the segments as a tuple: integers, strictly increasing, starting with 0."""
    for value in boundaries:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"A segment boundary must be an integer turn index, got {value!r}.")
    first_turns = tuple(int(value) for value in boundaries)
    for value in first_turns:
        if value < 0:
            raise ValueError(f"A segment boundary is a turn index from 0, got {value}.")
    if not first_turns or first_turns[0] != 0:
        raise ValueError(
            f"The first segment starts with turn 0, got boundaries {first_turns}; put 0 in front."
        )
    for before, after in itertools.pairwise(first_turns):
        if after <= before:
            raise ValueError(
                f"Segment boundaries must increase strictly, but {after} follows {before} in "
                f"{first_turns}; sort them and drop repeats."
            )
    return first_turns


def _matrix(name: str, values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (episodes, turns), got shape {array.shape}.")
    return array


def _mask(name: str, values: npt.ArrayLike | None, shape: tuple[int, ...]) -> BoolArray:
    if values is None:
        return np.ones(shape, dtype=np.bool_)
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(
            f"{name} has shape {array.shape}, but rewards and returns have shape {shape}."
        )
    if array.dtype != np.bool_:
        raise ValueError(
            f"{name} must be boolean, got {array.dtype}; compare or use .astype(bool)."
        )
    return array


def _refuse_revival(alive_BT: BoolArray) -> None:
    revived_BT = alive_BT[:, 1:] & ~alive_BT[:, :-1]
    if revived_BT.any():
        episode, turn = np.argwhere(revived_BT)[0]
        raise ValueError(
            f"alive_BT says that episode {episode} is over before turn {turn + 1} and alive in it. "
            "One row is one episode: split the rows where an environment was reset."
        )


def _returns_at_door(
    return_BT: npt.ArrayLike, alive_BT: npt.ArrayLike | None
) -> tuple[FloatArray, BoolArray]:
    """Check both; returns of turns that are not alive become 0."""
    return_BT = _matrix("return_BT", return_BT)
    alive_BT = _mask("alive_BT", alive_BT, return_BT.shape)
    _refuse_first(
        return_BT,
        alive_BT & ~np.isfinite(return_BT),
        "returns are finite; pass unscorable turns in scorable_BT",
    )
    return np.where(alive_BT, return_BT, 0.0), alive_BT


def _group_rows(
    baseline: str, group_B: npt.ArrayLike | None, num_episodes: int
) -> npt.NDArray[np.int64]:
    """Group ids as 0..G-1."""
    if group_B is None:
        raise ValueError(
            f"{baseline} needs group_B, the group id of each episode (the env's infos['group_id'])."
        )
    ids_B = np.asarray(group_B)
    if ids_B.shape != (num_episodes,) or not np.issubdtype(ids_B.dtype, np.integer):
        raise ValueError(
            f"group_B must hold {num_episodes} integer ids, one an episode; "
            f"got {ids_B.dtype} of shape {ids_B.shape}."
        )
    return np.unique(ids_B, return_inverse=True)[1]


def _refuse_first(values: FloatArray, wrong: BoolArray, rule: str) -> None:
    """Raise if anything is wrong, naming the first such entry."""
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"Entry [{row}, {column}] is {values[row, column]}: {rule}.")


def _unknown(kind: str, given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(
        given, [each.partition(":")[0] for each in known], n=1, cutoff=0.4
    )
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {given!r}. There are: {', '.join(known)}.{suggestion}"
