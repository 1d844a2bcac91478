"""Means with intervals over the people and the training runs that a result should hold for.

    paired = value_SP["kstep:3"] - value_SP["full"]     # S training seeds x P held-out personas
    crossed_mean(paired)                                # 0.021 [0.004, 0.038]

Two things are drawn at random in a comparison: the training run (its seed) and the person spoken
for. Both are clusters, and they cross: every run meets every person. An interval that treats the
S x P values as independent is far too narrow; one over persons alone leaves out the luck of
training. Coverage of all intervals here is tested by simulation (tests/test_statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
_NAN = float("nan")
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A number with the bounds of its 95 % confidence interval; NaN bounds: there is none."""

    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether there was enough to tell an interval from."""
        return not np.isnan(self.low)

    def __str__(self) -> str:
        """Return e.g. "0.412 [0.391, 0.433]"."""
        return f"{self}"

    def __format__(self, spec: str) -> str:
        """Return mean and bounds, each formatted by `spec`, else with three decimals."""
        spec = spec or ".3f"
        if not self.has_interval:
            return f"{self.mean:{spec}}"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class CrossedMean(Estimate):
    """The mean over seeds and personas.

    `p_value` is of a mean of 0, two-sided; NaN without an interval.
    """

    p_value: float
    num_seeds: int
    num_personas: int


def crossed_mean(value_SP: np.ndarray) -> CrossedMean:
    """Return the mean of S seeds x P personas with an interval for other seeds and other personas.

    The variance of the mean is put together from the mean squares of a two-way layout without
    replication, (seeds + personas - residual) / (S P); the quantile is Student's t with
    Satterthwaite's degrees of freedom. A bootstrap over both clusters is too narrow for the 3 to 10
    seeds that one can afford (.82 instead of .95 with 3 seeds that differ).

    Personas that lack a value (NaN) in some seed are left out. With one seed, or one persona, there
    is no interval; with two seeds it may hold the truth 88 times in 100 only.

    Source: Searle, Casella and McCulloch, Variance Components, 1992, chapter 4; Satterthwaite, An
    approximate distribution of estimates of variance components, 1946.
    """
    value_SP = _complete(value_SP)
    num_seeds, num_personas = value_SP.shape
    if num_personas == 0:
        return CrossedMean(_NAN, _NAN, _NAN, _NAN, num_seeds, num_personas)
    mean = float(value_SP.mean())
    if min(num_seeds, num_personas) < 2:
        return CrossedMean(mean, _NAN, _NAN, _NAN, num_seeds, num_personas)
    error, freedom = _standard_error(value_SP)
    if error < 1e-12:  # all values are alike
        return CrossedMean(mean, mean, mean, float(abs(mean) < 1e-12), num_seeds, num_personas)
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return CrossedMean(mean, mean - reach, mean + reach, p_value, num_seeds, num_personas)


def interquartile_mean(value_SP: np.ndarray, seed: int = 0) -> Estimate:
    """Return the mean of the middle half of all S x P values: robust against a run that failed.

    Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice,
    arXiv 2108.13264.
    """

    def middle(value_RSP: np.ndarray) -> np.ndarray:
        flat_RN = value_RSP.reshape(len(value_RSP), -1)
        return np.asarray(stats.trim_mean(flat_RN, 0.25, axis=1))

    return _bootstrap([_complete(value_SP)], middle, seed)


def probability_of_improvement(
    first_SP: np.ndarray, second_SP: np.ndarray, seed: int = 0
) -> Estimate:
    """Return how likely a run of the first beats one of the second for the same persona.

    Each seed of the first meets each seed of the second; ties count half.
    Source: as for `interquartile_mean`.
    """
    together = ~np.isnan(first_SP).any(axis=0) & ~np.isnan(second_SP).any(axis=0)

    def share(one_RSP: np.ndarray, other_RSP: np.ndarray) -> np.ndarray:
        gap_RSSP = one_RSP[:, :, None] - other_RSP[:, None]
        beaten_RSSP = (gap_RSSP > 0) + 0.5 * (gap_RSSP == 0)
        return np.asarray(beaten_RSSP.mean(axis=(1, 2, 3)))

    return _bootstrap([first_SP[:, together], second_SP[:, together]], share, seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that all of them may be looked at: Holm's step-down method.

    NaN entries are no comparisons and stay NaN.
    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted = [_NAN] * len(p_values)
    compared = [i for i, p in enumerate(p_values) if not np.isnan(p)]
    order = sorted(compared, key=lambda i: p_values[i])
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def bootstrap_mean(value_P: np.ndarray, seed: int = 0, level: float = LEVEL) -> Estimate:
    """Return the mean of one value a persona with its percentile-bootstrap interval.

    It holds other personas, not other training runs. Personas without a value (NaN) are left out;
    with fewer than two there is no interval (NaN).
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    value_P = value_P[~np.isnan(value_P)]
    if len(value_P) < 2:
        mean = float(value_P[0]) if len(value_P) else _NAN
        return Estimate(mean, _NAN, _NAN)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(value_P), size=(NUM_RESAMPLES, len(value_P)))
    tail = 50 * (1 - level)
    low, high = np.percentile(value_P[drawn].mean(axis=1), [tail, 100 - tail])
    return Estimate(float(value_P.mean()), float(low), float(high))


def paired_difference(
    first: Mapping[str, float], second: Mapping[str, float], seed: int = 0
) -> Estimate:
    """Return mean(first - second) over the personas both have, with its bootstrap interval."""
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError("The two evaluations share no persona; nothing can be paired.")
    return bootstrap_mean(np.array([first[p] - second[p] for p in shared]), seed)


def drift_slopes(reward_ET: np.ndarray) -> np.ndarray:
    """Return the least-squares slope of each episode's reward over its turns, reward per turn.

    NaN entries are left out; an episode with fewer than two scored turns has slope NaN.
    """
    scored_ET = ~np.isnan(reward_ET)
    count_E = scored_ET.sum(axis=1)
    turn_ET = np.where(scored_ET, np.arange(reward_ET.shape[1]), 0.0)
    filled_ET = np.where(scored_ET, reward_ET, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred_ET = np.where(scored_ET, turn_ET - (turn_ET.sum(axis=1) / count_E)[:, None], 0.0)
        slope_E = (centred_ET * filled_ET).sum(axis=1) / (centred_ET**2).sum(axis=1)
    return np.where(count_E >= 2, slope_E, np.nan)


def _complete(value_SP: np.ndarray) -> np.ndarray:
    """Return the personas that have a value in every seed, float64 (S, P)."""
    value_SP = np.asarray(value_SP, dtype=np.float64)
    if value_SP.ndim != 2:
        raise ValueError(f"Expected values of seeds x personas, got the shape {value_SP.shape}.")
    return value_SP[:, ~np.isnan(value_SP).any(axis=0)]


def _standard_error(value_SP: np.ndarray) -> tuple[float, float]:
    """Return (standard error of the mean, degrees of freedom) of a complete two-way layout."""
    num_seeds, num_personas = value_SP.shape
    mean = value_SP.mean()
    seed_S, persona_P = value_SP.mean(axis=1) - mean, value_SP.mean(axis=0) - mean
    left_SP = value_SP - mean - seed_S[:, None] - persona_P
    freedom = np.array(
        [num_seeds - 1, num_personas - 1, (num_seeds - 1) * (num_personas - 1)], dtype=float
    )
    sums = [num_personas * (seed_S**2).sum(), num_seeds * (persona_P**2).sum(), (left_SP**2).sum()]
    squares = np.array(sums) / freedom
    # A sum below the residual alone would say that a cluster has a negative variance.
    together = max(squares[0] + squares[1] - squares[2], squares[2])
    if together <= 0:
        return 0.0, freedom[0]
    effective = together**2 / (squares**2 / freedom).sum()
    return float(np.sqrt(together / value_SP.size)), float(max(effective, freedom[0]))


def _bootstrap(
    values: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], seed: int
) -> Estimate:
    """Return the statistic with an interval from resampling seeds and personas, both together.

    The percentiles are moved outwards as a t interval would be, see Hesterberg, What Teachers
    Should Know About the Bootstrap, 2015: without that, few seeds give too narrow an interval.

    Args:
        values: one or two arrays of seeds x the same personas.
        statistic: from arrays with R resamples in front to R numbers.
        seed: of the resampling.
    """
    num_seeds, num_personas = min(len(value_SP) for value_SP in values), values[0].shape[1]
    if num_personas == 0:
        return Estimate(_NAN, _NAN, _NAN)
    found = float(statistic(*(value_SP[None] for value_SP in values))[0])
    if min(num_seeds, num_personas) < 2:
        return Estimate(found, _NAN, _NAN)
    rng = np.random.default_rng(seed)
    person_RP = rng.integers(num_personas, size=(NUM_RESAMPLES, num_personas))
    again = []
    for value_SP in values:
        run_RS = rng.integers(len(value_SP), size=(NUM_RESAMPLES, len(value_SP)))
        again.append(value_SP[run_RS[:, :, None], person_RP[:, None, :]])
    freedom = min(_standard_error(value_SP)[1] for value_SP in values)
    reach = np.sqrt((freedom + 1) / freedom) * stats.t.ppf(0.5 + LEVEL / 2, freedom)
    tail = 100 * float(stats.norm.sf(reach))
    low, high = np.percentile(statistic(*again), [tail, 100 - tail])
    return Estimate(found, float(low), float(high))
