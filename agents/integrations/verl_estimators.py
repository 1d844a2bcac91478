"""verl's advantage estimators with per-turn credit, as functions of tensors; verl is not imported.

`agents.integrations.verl` registers them. They take what verl hands to an estimator and are set by
`algorithm.ppg` in verl's configuration:

    algorithm.adv_estimator=ppg_kstep  +algorithm.ppg.k=3  +algorithm.ppg.baseline=batch_mean
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..credit import Credit, FullPlanning, Greedy, KStep, Segment
from .turn_credit import TurnCredit, on_tokens, rewards_of_turns, turns_of_mask

_FOR_ALL = ("baseline", "scale", "max_turns", "divide_by_std")


@dataclass(frozen=True)
class Estimator:
    """An estimator in verl's form: tensors in, (advantages, returns) out."""

    name: str
    """What `algorithm.adv_estimator` says."""
    settings: tuple[str, ...]
    """The entries of `algorithm.ppg` that say which credit it is."""
    make: Callable[[Mapping[str, Any]], Credit]
    """The credit that these entries describe."""

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(
        self,
        token_level_rewards: torch.Tensor,
        response_mask: torch.Tensor,
        config: Any = None,
        index: Sequence[Hashable] | np.ndarray | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (advantages, returns), both (B, L) like the rewards, 0 outside the turns.

        Args:
            token_level_rewards: (B, L). The rewards of a turn stand on its tokens or on the answer
                to it; several add up, so that a KL penalty inside the reward counts as well.
            response_mask: (B, L); every run of ones is a turn. A row without ones (verl fills
                batches up with such) is nobody's peer.
            config: verl's `algorithm`; its entry `ppg` is read.
            index: what dialogues of one group have in common, verl's `uid`.

        Raises:
            ValueError: an unknown or missing entry of `algorithm.ppg`, rewards that are not finite
                or come before the first turn, no `index` for a group baseline.
        """
        turn_credit = self._turn_credit(config)
        turn_BL = turns_of_mask(response_mask.detach().cpu().numpy())
        token_reward_BL = token_level_rewards.detach().cpu().double().numpy()
        reward_BT, alive_BT = rewards_of_turns(token_reward_BL, turn_BL)
        found = turn_credit.advantages(reward_BT, alive_BT, index)
        advantage_BL, return_BL = (
            torch.as_tensor(on_tokens(value_BT, turn_BL)).to(token_level_rewards)
            for value_BT in found
        )
        return advantage_BL, return_BL

    def _turn_credit(self, config: Any) -> TurnCredit:
        given = dict((config.get("ppg", None) if config is not None else None) or {})
        for key in given:
            if key not in self.settings + _FOR_ALL:
                known = ", ".join(self.settings + _FOR_ALL)
                near = difflib.get_close_matches(str(key), self.settings + _FOR_ALL, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"algorithm.ppg.{key} means nothing to {self.name}, which reads {known}.{hint}"
                )
        shared = {key: given[key] for key in _FOR_ALL if key in given}
        return TurnCredit(self.make(given), **shared)


def _kstep(given: Mapping[str, Any]) -> Credit:
    if "k" not in given:
        raise ValueError(
            "ppg_kstep needs the number of rewards that a turn answers for: "
            "write +algorithm.ppg.k=3."
        )
    return KStep(given["k"])


def _segment(given: Mapping[str, Any]) -> Credit:
    length, boundaries = given.get("segment_length"), given.get("boundaries")
    if length is None and boundaries is None:
        raise ValueError(
            "ppg_segment needs its segments: write +algorithm.ppg.segment_length=3, or the first "
            "turn of each, +algorithm.ppg.boundaries=[0,2,5]."
        )
    return Segment(length=length, boundaries=None if boundaries is None else tuple(boundaries))


ESTIMATORS = (
    Estimator("ppg_greedy", (), lambda given: Greedy()),
    Estimator("ppg_kstep", ("k",), _kstep),
    Estimator("ppg_segment", ("segment_length", "boundaries"), _segment),
    Estimator("ppg_full", (), lambda given: FullPlanning()),
)
"""What `agents.integrations.verl` registers."""
