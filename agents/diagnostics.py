"""How good is each credit's gradient? Signal, variance and direction, measured on one batch.

    gradients = turn_gradients(policy, batch)    # the one expensive pass
    gradient_diagnostics(gradients)              # against K: norm, variance, SNR, cosine, bound
    reward_dependence(gradients)                 # how the act at turn t moves the reward at turn u

Estimators and their limits: docs/diagnostics.md. Letters: B dialogues, T (also U) turns, N = B x T,
C (also D) credits, G (also H) groups, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .credit import Credit, advantages, credit_weights, parse_credit, partial_returns
from .statistics import Estimate
from .turn_gradients import TurnGradients

NUM_RESAMPLES = 1000


# --- the gradients of the groups ------------------------------------------------------------------


def default_credits(num_turns: int) -> tuple[str, ...]:
    """Return the names of every lookahead: greedy, kstep:2 ... kstep:T-1, full."""
    middle = [f"kstep:{k}" for k in range(2, num_turns)]
    return ("greedy", *middle, "full") if num_turns > 1 else ("full",)


def group_products(
    gradients: TurnGradients, credits: Sequence[Credit], baseline: str
) -> np.ndarray:
    """Return product_CCGG[c,d,g,h] = <Y[c,g], Y[d,h]>, the gradients of groups under credits.

        Y[c,g] = (G / B) sum over b in g, over t of A[c,b,t] grad log pi(a_bt | h_bt)

    Their mean over g is the gradient of the whole batch, minus that of `policy_gradient_loss`.

    Raises:
        ValueError: if there are fewer than two groups.
    """
    num_groups = _checked_groups(gradients)
    share = num_groups / gradients.num_episodes
    weights = [
        credit_weights(credit, gradients.num_turns, gradients.boundaries) for credit in credits
    ]
    weight_CN = np.stack(
        [share * credited(gradients, weight_TT, baseline).ravel() for weight_TT in weights]
    )
    group_N = np.repeat(gradients.group_B, gradients.num_turns)
    turns = [np.flatnonzero(group_N == g) for g in range(num_groups)]
    row_CGN = np.stack([weight_CN[:, own] @ gradients.product_NN[own] for own in turns], axis=1)
    product_CCGG = np.stack(
        [np.einsum("cgn,dn->cdg", row_CGN[:, :, own], weight_CN[:, own]) for own in turns], axis=3
    )
    return product_CCGG


def credited(gradients: TurnGradients, weight_TT: np.ndarray, baseline: str) -> np.ndarray:
    """Return advantage_BT under a credit matrix, as PPGAgent computes it but unscaled."""
    return_BT = partial_returns(gradients.reward_BT, weight_TT, gradients.alive_BT)
    return advantages(
        return_BT,
        baseline=baseline,
        group_B=gradients.group_B,
        alive_BT=gradients.alive_BT,
        scorable_BT=~np.isnan(gradients.reward_BT),
    )


def _checked_groups(gradients: TurnGradients) -> int:
    """Return the number of groups if it is enough."""
    if gradients.num_groups < 2:
        raise ValueError(
            "All dialogues are of one group, so nothing tells signal from noise; collect at least "
            "two groups, better 32 (num_envs = 32 x group_size)."
        )
    return gradients.num_groups


def resampling_weights(num_groups: int, num_resamples: int, seed: int) -> np.ndarray:
    """Return weight_RG: how often each resample drew each group; row 0 is the batch itself."""
    drawn_RG = np.random.default_rng(seed).multinomial(
        num_groups, np.full(num_groups, 1 / num_groups), size=num_resamples
    )
    return np.vstack([np.ones(num_groups), drawn_RG])


def mean_between(product_GG: np.ndarray, weight_RG: np.ndarray) -> np.ndarray:
    """Return the mean of <Y_g, Z_h> over pairs of DIFFERENT groups, one of each resample.

    Different groups share no noise, so it estimates <E Y, E Z> without bias. A group that was drawn
    twice does not meet itself: its own noise would pass for signal.
    """
    square_RG = weight_RG**2
    all_R = ((weight_RG @ product_GG) * weight_RG).sum(axis=1)
    pairs_R = weight_RG.sum(axis=1) ** 2 - square_RG.sum(axis=1)
    return (all_R - square_RG @ np.diagonal(product_GG)) / np.maximum(pairs_R, 1)


def mean_within(product_GG: np.ndarray, weight_RG: np.ndarray) -> np.ndarray:
    """Return the mean of <Y_g, Z_g>: estimates E <Y, Z>, signal and noise of one group."""
    return (weight_RG @ np.diagonal(product_GG)) / weight_RG.sum(axis=1)


def interval(value_R: np.ndarray) -> Estimate:
    """Return the first value with the middle 95 % of the others, those that are NaN left out."""
    known_R = value_R[1:][~np.isnan(value_R[1:])]
    low, high = np.percentile(known_R, [2.5, 97.5]) if len(known_R) else (np.nan, np.nan)
    return Estimate(float(value_R[0]), float(low), float(high))


# --- one credit beside the other ------------------------------------------------------------------


@dataclass(frozen=True)
class CreditDiagnosis:
    """What one batch tells about the gradient of one credit. g^ is the batch's gradient."""

    credit: str
    """Name of the policy class."""
    window: float
    """How many rewards a turn answers for, mean over the turns of the longest dialogue."""
    norm: float
    """||g^||."""
    signal: Estimate
    """||E g^||^2 with the noise subtracted; can come out negative, see `signal_found`."""
    variance: Estimate
    """E ||g^ - E g^||^2: of the mean over this batch's groups."""
    snr: Estimate
    """signal / variance; NaN where nothing varies."""
    cosine: Estimate
    """Between E g^ and the full E g^, from different groups; NaN where no signal was found."""
    batch_cosine: float
    """Between g^ and the full g^ of this batch; they share their noise, so it says little."""
    bound: float
    """A worst case that the variance stays below, see `variance_bound`."""

    @property
    def signal_found(self) -> bool:
        """Whether the batch shows that there is a gradient at all: signal's interval is above 0."""
        return self.signal.low > 0


def gradient_diagnostics(
    gradients: TurnGradients,
    credits: Sequence[str | Credit] | None = None,
    *,
    baseline: str = "leave_one_out",
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[CreditDiagnosis]:
    """Compare the gradients of several credits on one batch.

    Groups are independent and alike in law, so with Y_g the gradient of group g

        signal    = mean of <Y_g, Y_h> over g != h        variance = (mean ||Y_g||^2 - signal) / G
        snr       = signal / variance
        cosine    = mean <Y_g, F_h> / sqrt(signal of Y x signal of F),  g != h,  F = full

    with intervals from bootstrapped groups. A baseline that leans on other groups ("batch_mean", or
    a member left without peers) makes groups slightly dependent, which is neglected.

    Args:
        gradients: from `turn_gradients`.
        credits: policy classes or their names; None = every lookahead and "trajectory".
        baseline: see credit.advantages.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two groups, an unknown credit or baseline.
    """
    names = (*default_credits(gradients.num_turns), "trajectory") if credits is None else credits
    chosen = [parse_credit(name) if isinstance(name, str) else name for name in names]
    product_CCGG = group_products(gradients, [*chosen, parse_credit("full")], baseline)
    num_groups = gradients.num_groups
    weight_RG = resampling_weights(num_groups, num_resamples, seed)

    full_signal_R = mean_between(product_CCGG[-1, -1], weight_RG)
    square = product_CCGG[-1, -1].mean()
    found = []
    for c, credit in enumerate(chosen):
        own_GG, with_full_GG = product_CCGG[c, c], product_CCGG[c, -1]
        signal_R = mean_between(own_GG, weight_RG)
        variance_R = (mean_within(own_GG, weight_RG) - signal_R) / num_groups
        shared_R = mean_between(with_full_GG, weight_RG)
        weight_TT = credit_weights(credit, gradients.num_turns, gradients.boundaries)
        found.append(
            CreditDiagnosis(
                credit=credit.name,
                window=float(np.abs(weight_TT).sum(axis=1).mean()),
                norm=float(np.sqrt(own_GG.mean())),
                signal=interval(signal_R),
                variance=interval(variance_R),
                snr=interval(_ratio(signal_R, variance_R)),
                cosine=_cosine(shared_R, signal_R, full_signal_R),
                batch_cosine=float(_ratio(with_full_GG.mean(), np.sqrt(own_GG.mean() * square))),
                bound=variance_bound(gradients, weight_TT),
            )
        )
    return found


def variance_bound(gradients: TurnGradients, weight_TT: np.ndarray) -> float:
    """Return a worst case of E ||g^ - E g^||^2, for groups of one size.

        rho^2 / G  x  (sum_t w_t)  x  (sum_t w_t sigma_t^2)

    rho = range of the rewards, 0 included; w_t = sum_u |W[t,u]|, the window of turn t; sigma_t^2 =
    mean of ||grad log pi(a_t|h_t)||^2 over the batch. For advantages are at most rho w_t, and the
    rest is the Cauchy-Schwarz inequality (docs/diagnostics.md). It grows like the square of K, and
    does not say which of two credits really varies more.
    """
    reward_BT = _counted_rewards(gradients)
    reward_range = max(reward_BT.max(), 0.0) - min(reward_BT.min(), 0.0)
    window_T = np.abs(weight_TT).sum(axis=1)
    square_T = gradients.square_BT.mean(axis=0)
    return float(reward_range**2 * window_T.sum() * (window_T @ square_T) / gradients.num_groups)


def _counted_rewards(gradients: TurnGradients) -> np.ndarray:
    """Return reward_BT with 0 for turns that did not take place or could not be scored."""
    counted_BT = gradients.alive_BT & ~np.isnan(gradients.reward_BT)
    return np.where(counted_BT, gradients.reward_BT, 0.0)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient, NaN where the denominator is not positive."""
    positive = denominator > 0
    return np.where(positive, numerator / np.where(positive, denominator, 1.0), np.nan)


def _cosine(shared_R: np.ndarray, own_R: np.ndarray, full_R: np.ndarray) -> Estimate:
    """Return the cosine; a resample without signal leaves it open and counts as -1 and as 1."""
    known_R = (own_R > 0) & (full_R > 0)
    length_R = np.sqrt(np.where(known_R, own_R * full_R, 1.0))
    cosine_R = np.clip(shared_R / length_R, -1.0, 1.0)
    low, _ = np.percentile(np.where(known_R, cosine_R, -1.0)[1:], [2.5, 97.5])
    _, high = np.percentile(np.where(known_R, cosine_R, 1.0)[1:], [2.5, 97.5])
    return Estimate(float(cosine_R[0]) if known_R[0] else float("nan"), float(low), float(high))


# --- which act moves which reward -----------------------------------------------------------------


@dataclass(frozen=True)
class RewardDependence:
    """How strongly the act at turn t moves the reward at turn u, T x T arrays; t = row, u = column.

    In units of the reward: square roots of the squared lengths below, which have their noise
    subtracted and keep their sign: where nothing is, about half come out negative.
    """

    strength_TT: np.ndarray
    low_TT: np.ndarray
    """Lower end of each entry's 95 % interval."""
    high_TT: np.ndarray
    """Upper end."""
    upper: Estimate
    """Mean of the squared strengths on and above the diagonal."""
    lower: Estimate
    """Mean of the squared strengths below the diagonal. No act moves an earlier reward: if the
    interval excludes 0, and does so for other seeds too, the batch or the estimator is at fault."""


def caution(diagnoses: Sequence[CreditDiagnosis]) -> str:
    """Return a warning if all credits point the same way, as they do early in learning; else ""."""
    cosines = [each.cosine.mean for each in diagnoses if each.signal_found]
    if not cosines or min(cosines) < 0.95:
        return ""
    return (
        f"All credits point the same way here (cosine to full at least {min(cosines):.2f}), as "
        "they mostly do before training, so that the shortest wins by its small noise. Train for a "
        "while and measure again: later the shortest may point elsewhere."
    )


def reward_dependence(
    gradients: TurnGradients, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> RewardDependence:
    """Return how strongly the act at turn t moves the reward at turn u, by group contrasts.

        strength[t,u]^2 = || E D[t,u] ||^2 / E || grad log pi(a_t|h_t) ||^2
        D[t,u] = mean over a group of (r_u - its leave-one-out mean) grad log pi(a_t|h_t)

    Members of a group share persona, opening and partner seed, so their rewards differ by what the
    agent said; E D[t,u] is their covariance with the act, the piece of the full gradient that a
    credit keeps where W[t,u] = 1. Its squared length is the mean of <D_g, D_h> over pairs of
    different groups, without bias. Acts need not be known. What moves rewards one way for some
    personas and the opposite way for others cancels. Turns that could not be scored are treated as
    in training, see credit.advantages.

    Raises:
        ValueError: if there are fewer than two groups.
    """
    product_TTGG = _piece_products(gradients)
    num_turns = gradients.num_turns
    weight_RG = resampling_weights(gradients.num_groups, num_resamples, seed)
    length_T = gradients.square_BT.mean(axis=0)
    square_RTT = np.empty((num_resamples + 1, num_turns, num_turns))
    for t, u in np.ndindex(num_turns, num_turns):
        piece_R = mean_between(product_TTGG[t, u], weight_RG)
        square_RTT[:, t, u] = piece_R / (length_T[t] or 1.0)
    root_RTT = np.sign(square_RTT) * np.sqrt(np.abs(square_RTT))
    low_TT, high_TT = np.percentile(root_RTT[1:], [2.5, 97.5], axis=0)
    is_below_TT = np.tri(num_turns, k=-1, dtype=bool)
    return RewardDependence(
        strength_TT=root_RTT[0],
        low_TT=low_TT,
        high_TT=high_TT,
        upper=_mean_over(square_RTT, ~is_below_TT),
        lower=_mean_over(square_RTT, is_below_TT),
    )


def _mean_over(square_RTT: np.ndarray, chosen_TT: np.ndarray) -> Estimate:
    """Return the mean of the chosen entries; NaN if there are none."""
    if not chosen_TT.any():
        return Estimate(np.nan, np.nan, np.nan)
    return interval(square_RTT[:, chosen_TT].mean(axis=1))


def _piece_products(gradients: TurnGradients) -> np.ndarray:
    """Return product_TTGG[t,u,g,h] = <D_g[t,u], D_h[t,u]>."""
    num_episodes, num_turns = gradients.reward_BT.shape
    product_BTBT = gradients.product_NN.reshape((num_episodes, num_turns) * 2)
    share = _checked_groups(gradients) / num_episodes
    member_GB = share * (np.arange(gradients.num_groups)[:, None] == gradients.group_B)
    product_TTGG = np.empty((num_turns, num_turns, *(gradients.num_groups,) * 2))
    for u in range(num_turns):
        column_TT = np.zeros((num_turns, num_turns))
        column_TT[:, u] = 1.0
        advantage_BT = credited(gradients, column_TT, "leave_one_out")
        for t in range(num_turns):
            piece_GB = member_GB * advantage_BT[:, t]
            product_TTGG[t, u] = piece_GB @ product_BTBT[:, t, :, t] @ piece_GB.T
    return product_TTGG
