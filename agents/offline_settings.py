"""How to learn from logs: the settings of `learn_offline` and of ppg train --offline."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Method = Literal["ppg", "sft", "filtered"]
OfflineBaseline = Literal["none", "log_mean", "batch_mean", "leave_one_out", "group_mean"]


@dataclass(frozen=True)
class OfflineSettings:
    """How to learn from logs.

    Raises:
        ValueError: a setting is out of range, or two do not fit each other.
    """

    method: Method = "ppg"
    """Weights: "ppg" partial returns; "sft" 1 for every line; "filtered" 1 for the lines of the
    best dialogues, else 0 (filtered behaviour cloning)."""
    epochs: int = 1
    """Passes over the log."""
    max_steps: int | None = None
    """Gradient steps after which learning ends, in the midst of an epoch if need be; the learning
    rate's schedule ends with them. None = those of all epochs."""
    batch_size: int = 32
    """Dialogues in a gradient step, over all processes."""
    baseline: OfflineBaseline = "none"
    """Subtracted from partial returns: "none", "log_mean" (of each turn, over the log), or over the
    gradient step "batch_mean", "leave_one_out", "group_mean". With the last two, dialogues of a
    group that follow each other in the log stay together; let groups divide batch_size. One that is
    alone in its step has no weight by "group_mean", and is compared with other groups by
    "leave_one_out"."""
    min_weight: float | None = 0.0
    """Smaller weights are raised to it; None, or a number below 0, leaves negative ones, which need
    an anchor."""
    max_weight: float | None = None
    """Larger weights are lowered to it; None = none are."""
    importance: bool = False
    """Multiply weights with importance ratios; needs logged log-probabilities."""
    max_importance: float = 5.0
    """Larger ratios are lowered to it, those of `validation_loss` too."""
    min_ess: float = 0.1
    """Warn once when the effective sample size falls below this share of a step's turns."""
    sft_coef: float = 0.0
    """Weight of the plain log-likelihood of all logged lines: an anchor, where no weight is more
    negative than this is positive."""
    top_share: float = 0.25
    """Of the dialogues with a score, by mean reward, that "filtered" imitates; rounded up, and all
    that are as good as the last of them."""
    patience: int | None = None
    """Epochs without a better validation loss after which learning stops, and goes back to the
    best; None = all epochs, and the last weights."""
    shuffle: int = 1024
    """Dialogues in memory from which the next one is drawn; 0 = the log's order."""
    tokenise_again: bool = False
    """Use texts where logged ids are of no use (of another tokenizer, or of other lines), instead
    of refusing."""

    def __post_init__(self) -> None:
        _refuse_unknown("method", self.method, get_args(Method))
        _refuse_unknown("baseline", self.baseline, get_args(OfflineBaseline))
        whole = {"epochs": 1, "batch_size": 1, "max_steps": 1, "patience": 1, "shuffle": 0}
        for name, least in whole.items():
            number = getattr(self, name)
            if number is None and name in ("max_steps", "patience"):
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, got {number!r}."
                )
        for name in ("min_weight", "max_weight"):
            if getattr(self, name) is not None:
                _refuse_outside(name, getattr(self, name), -math.inf, math.inf, " or None")
        for name in ("top_share", "min_ess"):
            _refuse_outside(name, getattr(self, name), 0.0, 1.0)
        for name in ("sft_coef", "max_importance"):
            _refuse_outside(name, getattr(self, name), 0.0, math.inf)
        if not self.top_share or not self.max_importance:
            raise ValueError("top_share and max_importance must not be 0: nothing would be left.")
        low = -math.inf if self.min_weight is None else self.min_weight
        high = math.inf if self.max_weight is None else self.max_weight
        if low > high:
            raise ValueError(
                "min_weight must not be above max_weight, got "
                f"{self.min_weight} and {self.max_weight}."
            )
        if self.method != "ppg" and (self.baseline != "none" or self.importance):
            raise ValueError(
                f"method={self.method!r} imitates lines, whatever they earned: leave out "
                f"baseline={self.baseline!r} and importance={self.importance}."
            )

    @property
    def keeps_groups(self) -> bool:
        """Whether dialogues of a group that follow each other stay together."""
        return self.baseline in ("leave_one_out", "group_mean")

    @classmethod
    def of(cls, given: dict[str, Any]) -> OfflineSettings:
        """Return the settings of these keywords.

        Raises:
            TypeError: there is no such setting; names the nearest.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"Unknown setting {name!r}.{hint} There are {', '.join(known)}.")
        return cls(**given)


def _refuse_unknown(name: str, given: object, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"Unknown {name} {given!r}; there are {', '.join(known)}.")


def _refuse_outside(name: str, given: object, low: float, high: float, more: str = "") -> None:
    number = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
    if not number or not low <= given <= high:  # type: ignore[operator]
        bounds = "" if math.isinf(low) else f" of at least {low:g}"
        bounds = bounds if math.isinf(high) else f" in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number{bounds}{more}, got {given!r}.")
