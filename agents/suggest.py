"""Which lookahead K suits an agent here, for updates of so many dialogues? Read from a pilot batch.

    gradients = turn_gradients(policy, pilot_batch)
    suggest_k(gradients, update_episodes=64).verdict

A small K ignores rewards (bias), a large one adds their noise (variance); how much of either is
measured on the pilot. What is minimised, and when the answer is "cannot tell": docs/diagnostics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .credit import Credit, parse_credit
from .diagnostics import (
    NUM_RESAMPLES,
    default_credits,
    group_products,
    interval,
    mean_between,
    mean_within,
    resampling_weights,
)
from .statistics import Estimate
from .turn_gradients import TurnGradients

FEWEST_GROUPS = 16
"""A pilot of fewer groups cannot tell: resampling so few tells nothing about their spread."""

CERTAINTY = 0.9
"""The share of resamples in which a credit must win to be named."""

ONE_STEP = (
    "That is about one update of the very model that spoke: over many updates noise averages out "
    "and bias does not."
)
"""What no verdict says."""


@dataclass(frozen=True)
class CreditError:
    """How far an update under one credit is from the full gradient. g = E of the full gradient."""

    credit: str
    """Name of the policy class."""
    error: Estimate
    """Expected squared error of the best-scaled update as a share of ||g||^2: 0 = g itself, 1 = no
    better than standing still; NaN where the pilot shows no g."""
    squared_bias: Estimate
    """||E g^ - g||^2, noise subtracted: can come out negative."""
    variance: Estimate
    """E ||g^ - E g^||^2 of one update."""
    wins: float
    """Share of resamples in which this credit's error is the smallest."""


@dataclass(frozen=True)
class Suggestion:
    """Which credit makes updates of `update_episodes` dialogues most accurate, if that is clear."""

    update_episodes: int
    pilot_episodes: int
    pilot_groups: int
    shown: float
    """Share of resamples in which there is a full gradient at all beyond the noise."""
    errors: tuple[CreditError, ...]
    """One a credit, in the order asked for."""
    credit: str | None
    """Name of the credit with the smallest expected error; None = cannot tell."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """Return the credits that win in at least one of twenty resamples, the likeliest first."""
        likeliest = sorted(self.errors, key=lambda each: -each.wins)
        return tuple(each.credit for each in likeliest if each.wins >= 0.05)

    @property
    def verdict(self) -> str:
        """Return the answer in a sentence, with its reason."""
        start = f"For updates of {self.update_episodes} dialogues: "
        wins = {each.credit: each.wins for each in self.errors}
        if self.credit is not None:
            return start + (
                f"{self.credit}; it has the smallest expected error in {wins[self.credit]:.0%} of "
                "the resampled pilots."
            )
        if self.pilot_groups < FEWEST_GROUPS:
            return start + (
                f"cannot tell; the pilot has {self.pilot_groups} groups, and at least "
                f"{FEWEST_GROUPS} are needed."
            )
        if self.shown < CERTAINTY:
            return start + (
                f"cannot tell; only {self.shown:.0%} of the resampled pilots show a gradient "
                "beyond their noise. A larger pilot is needed."
            )
        shares = ", ".join(f"{name} {wins[name]:.0%}" for name in self.candidates)
        return start + (
            f"cannot tell; the smallest expected error is that of {shares} of the resampled "
            f"pilots, and {CERTAINTY:.0%} are needed. A larger pilot narrows it down."
        )


def suggest_k(
    gradients: TurnGradients,
    update_episodes: Sequence[int],
    credits: Sequence[str | Credit] | None = None,
    *,
    baseline: str = "leave_one_out",
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Suggestion]:
    """Return, for each size of an update, the credit whose update has the smallest error.

    With g = E of the full gradient, and g^ a credit's gradient over n' dialogues,

        error = min over a of E ||a g^ - g||^2 / ||g||^2
              = 1 - <g, E g^>^2 / (||g||^2 E ||g^||^2),        E ||g^||^2 = ||E g^||^2 + v / n'

    The best scale a is granted since the step size is tuned, and since returns of different K
    differ in scale. 1 - error is the squared cosine that an update makes with g, and sqrt(1 -
    error) proportional to what a step of given length improves to first order: the smallest error
    is also the best step.

    A credit is named if it wins in at least 90 % of the resamples of the pilot's groups; a
    resample that shows no full gradient has no winner. Groups of an update are as large as the
    pilot's.

    Args:
        gradients: of the pilot, from `turn_gradients`.
        update_episodes: n', dialogues of one update; several for several answers.
        credits: policy classes or their names; None = every lookahead, from greedy to full.
        baseline: see credit.advantages.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: an update of no dialogues, fewer than two groups, an unknown credit or baseline.
    """
    for number in update_episodes:
        if number < 1:
            raise ValueError(f"An update needs at least 1 dialogue, got update_episodes={number}.")
    names = default_credits(gradients.num_turns) if credits is None else credits
    chosen = [parse_credit(name) if isinstance(name, str) else name for name in names]
    product_CCGG = group_products(gradients, [*chosen, parse_credit("full")], baseline)
    weight_RG = resampling_weights(gradients.num_groups, num_resamples, seed)
    signal_CR = np.stack([mean_between(product_CCGG[c, c], weight_RG) for c in range(len(chosen))])
    square_CR = np.stack([mean_within(product_CCGG[c, c], weight_RG) for c in range(len(chosen))])
    shared_CR = np.stack([mean_between(product_CCGG[c, -1], weight_RG) for c in range(len(chosen))])
    pilot = _Pilot(
        credits=tuple(credit.name for credit in chosen),
        num_episodes=gradients.num_episodes,
        num_groups=gradients.num_groups,
        signal_CR=signal_CR,
        noise_CR=square_CR - signal_CR,
        shared_CR=shared_CR,
        full_R=mean_between(product_CCGG[-1, -1], weight_RG),
    )
    return [_suggestion(pilot, number) for number in update_episodes]


@dataclass(frozen=True)
class _Pilot:
    """What is known of groups of dialogues: of the whole pilot first, then of each resample."""

    credits: tuple[str, ...]
    num_episodes: int
    num_groups: int
    signal_CR: np.ndarray
    """||E g^||^2 of each credit."""
    noise_CR: np.ndarray
    """E ||g^ - E g^||^2 of one group."""
    shared_CR: np.ndarray
    """<E g^, g>."""
    full_R: np.ndarray
    """||g||^2."""


def _suggestion(pilot: _Pilot, update_episodes: int) -> Suggestion:
    variance_CR = pilot.noise_CR * (pilot.num_episodes / pilot.num_groups / update_episodes)
    bias_CR = pilot.signal_CR - 2 * pilot.shared_CR + pilot.full_R
    error_CR = _error(pilot, variance_CR)
    shown_R = pilot.full_R > 0
    winner_R = np.where(shown_R, np.argmin(error_CR, axis=0), -1)[1:]
    errors = tuple(
        CreditError(
            credit=name,
            error=_share(error_CR[c], shown_R),
            squared_bias=interval(bias_CR[c]),
            variance=interval(variance_CR[c]),
            wins=float((winner_R == c).mean()),
        )
        for c, name in enumerate(pilot.credits)
    )
    best = max(errors, key=lambda each: each.wins)
    clear = best.wins >= CERTAINTY and pilot.num_groups >= FEWEST_GROUPS
    return Suggestion(
        update_episodes=update_episodes,
        pilot_episodes=pilot.num_episodes,
        pilot_groups=pilot.num_groups,
        shown=float(shown_R[1:].mean()),
        errors=errors,
        credit=best.credit if clear else None,
    )


def _error(pilot: _Pilot, variance_CR: np.ndarray) -> np.ndarray:
    """Return the error of the best-scaled update, in [0, 1]; 1 where it points away from g."""
    full_R = np.where(pilot.full_R > 0, pilot.full_R, np.inf)
    toward_CR = np.maximum(pilot.shared_CR, 0.0) ** 2 / full_R
    # No length below what the Cauchy-Schwarz inequality allows: noise can subtract too much.
    square_CR = np.maximum(pilot.signal_CR, toward_CR) + np.maximum(variance_CR, 0.0)
    return np.asarray(1.0 - toward_CR / np.where(square_CR > 0, square_CR, np.inf))


def _share(error_R: np.ndarray, shown_R: np.ndarray) -> Estimate:
    """Return the error with its interval; a resample without gradient leaves it open: 0 and 1."""
    low = np.percentile(np.where(shown_R, error_R, 0.0)[1:], 2.5)
    high = np.percentile(np.where(shown_R, error_R, 1.0)[1:], 97.5)
    return Estimate(float(error_R[0]) if shown_R[0] else float("nan"), float(low), float(high))
