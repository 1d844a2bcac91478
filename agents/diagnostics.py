"""How good is each credit's gradient? Signal, variance and direction, measured on one batch.

    gradients = turn_gradients(policy, batch)    # the one expensive pass
    gradient_diagnostics(gradients)              # against K: norm, variance, SNR, cosine, bound
    reward_dependence(gradients)                 # how the act at turn t moves the reward at turn u

Estimators and their limits: docs/diagnostics.md. Letters: B dialogues, T (also U) turns, N = B x T,
C (also D) credits, G groups, n members of one group, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .credit import Credit, advantages, credit_weights, parse_credit, partial_returns
from .statistics import LEVEL, Estimate
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
    num_groups = gradients.num_groups
    if num_groups < 2:
        raise ValueError(
            "All dialogues are of one group, so nothing tells signal from noise; collect at least "
            "two groups, better 32 (num_envs = 32 x group_size)."
        )
    share = num_groups / gradients.num_episodes
    weight_CN = np.stack(
        [share * credited(gradients, credit, baseline).ravel() for credit in credits]
    )
    group_N = np.repeat(gradients.group_B, gradients.num_turns)
    turns = [np.flatnonzero(group_N == g) for g in range(num_groups)]
    row_CGN = np.stack([weight_CN[:, own] @ gradients.product_NN[own] for own in turns], axis=1)
    product_CCGG = np.stack(
        [np.einsum("cgn,dn->cdg", row_CGN[:, :, own], weight_CN[:, own]) for own in turns], axis=3
    )
    return product_CCGG


def credited(gradients: TurnGradients, credit: Credit, baseline: str) -> np.ndarray:
    """Return advantage_BT under the credit, unscaled."""
    weight_TT = credit_weights(credit, gradients.num_turns, gradients.boundaries)
    return_BT = partial_returns(gradients.reward_BT, weight_TT, gradients.alive_BT)
    return advantages(
        return_BT,
        baseline=baseline,
        group_B=gradients.group_B,
        alive_BT=gradients.alive_BT,
        scorable_BT=~np.isnan(gradients.reward_BT),
    )


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

    In units of the reward: square roots of squared covariances per unit of squared gradient, with
    the sign of the square, which noise can make negative where nothing is.
    """

    strength_TT: np.ndarray
    low_TT: np.ndarray
    """Lower end of each entry's 95 % interval."""
    high_TT: np.ndarray
    """Upper end."""
    upper: Estimate
    """Mean of the squares on and above the diagonal."""
    lower: Estimate
    """Mean of the squares below the diagonal. No act moves an earlier reward: if the interval
    excludes 0, and does so for other seeds too, the batch or the estimator is at fault."""


def reward_dependence(gradients: TurnGradients) -> RewardDependence:
    """Return how strongly the act at turn t moves the reward at turn u, by group contrasts.

        strength[t,u]^2 = mean over groups of || Cov(grad log pi(a_t|h_t), r_u | group) ||^2
                          / mean of || grad log pi(a_t|h_t) ||^2

    Members of a group share persona, opening and partner seed: what differs between them is what
    the agent said. The squared norm is estimated without bias within each group: it is the
    Hilbert-Schmidt independence criterion with linear kernels (Song et al., "Feature selection via
    dependence maximization", JMLR 13, 2012). Acts need not be known. Intervals are Student's over
    groups. A turn that could not be scored, and one that did not take place, has reward 0, as in
    `partial_returns`.

    Raises:
        ValueError: if a group has fewer than four members, or there are fewer than two groups.
    """
    members = [np.flatnonzero(gradients.group_B == g) for g in range(gradients.num_groups)]
    smallest = min(map(len, members))
    if smallest < 4 or len(members) < 2:
        raise ValueError(
            f"A map needs two groups of at least 4 dialogues, got {len(members)} of which the "
            f"smallest has {smallest}; collect with options={{'group_size': 8}}."
        )
    reward_BT = _counted_rewards(gradients)
    square_GTT = np.stack(
        [_squared_covariances(_same_turn(gradients, own), reward_BT[own]) for own in members]
    )
    length_T = gradients.square_BT.mean(axis=0)
    square_GTT /= np.where(length_T > 0, length_T, 1.0)[:, None]
    mean_TT, half_TT = _student(square_GTT)
    is_below_TT = np.tri(gradients.num_turns, k=-1, dtype=bool)
    return RewardDependence(
        strength_TT=_signed_root(mean_TT),
        low_TT=_signed_root(mean_TT - half_TT),
        high_TT=_signed_root(mean_TT + half_TT),
        upper=_mean_estimate(square_GTT[:, ~is_below_TT]),
        lower=_mean_estimate(square_GTT[:, is_below_TT]),
    )


def _same_turn(gradients: TurnGradients, own: np.ndarray) -> np.ndarray:
    """Return product_Tnn: the inner products between the members' gradients of the same turn."""
    num_turns = gradients.num_turns
    row_Tn = own * num_turns + np.arange(num_turns)[:, None]
    return gradients.product_NN[row_Tn[:, :, None], row_Tn[:, None, :]].astype(np.float64)


def _squared_covariances(product_Tnn: np.ndarray, reward_nT: np.ndarray) -> np.ndarray:
    """Return unbiased estimates of ||Cov(s_t, r_u)||^2, shape (T, T), from the n of one group."""
    n = len(reward_nT)
    others_nn = 1.0 - np.eye(n)
    left_Tnn = product_Tnn * others_nn
    right_Unn = np.einsum("iu,ju->uij", reward_nT, reward_nT) * others_nn
    left_Tn, right_Un = left_Tnn.sum(axis=2), right_Unn.sum(axis=2)
    both_TU = np.einsum("tij,uij->tu", left_Tnn, right_Unn)
    apart_TU = np.outer(left_Tn.sum(axis=1), right_Un.sum(axis=1)) / ((n - 1) * (n - 2))
    chained_TU = left_Tn @ right_Un.T * 2 / (n - 2)
    return np.asarray((both_TU + apart_TU - chained_TU) / (n * (n - 3)))


def _student(value_GX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over groups and half the length of its interval."""
    num_groups = len(value_GX)
    error_X = value_GX.std(axis=0, ddof=1) / np.sqrt(num_groups)
    return value_GX.mean(axis=0), stats.t.ppf((1 + LEVEL) / 2, num_groups - 1) * error_X


def _mean_estimate(value_GX: np.ndarray) -> Estimate:
    """Return the mean over groups and entries; NaN where there are no entries."""
    if value_GX.shape[1] == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    mean, half = _student(value_GX.mean(axis=1))
    return Estimate(float(mean), float(mean - half), float(mean + half))


def _signed_root(square: np.ndarray) -> np.ndarray:
    return np.asarray(np.sign(square) * np.sqrt(np.abs(square)))
