"""Per-turn credit for the token tensors of other engines; numpy only, no engine is imported.

A row is one dialogue as one token sequence. The usual order is

    turn_BL = turns_of_mask(response_mask_BL)
    reward_BT, alive_BT = rewards_of_turns(token_reward_BL, turn_BL)
    advantage_BT, return_BT = TurnCredit("kstep:3").advantages(reward_BT, alive_BT, group_B)
    advantage_BL = on_tokens(advantage_BT, turn_BL)

Letters: B dialogues, T turns, L tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ..credit import Credit, Greedy, advantages, credit_weights, parse_credit, partial_returns

GROUP_BASELINES = ("leave_one_out", "group_mean")
"""Baselines that need to know which dialogues are samples of the same prompt."""


@dataclass(frozen=True)
class TurnCredit:
    """Which rewards a turn answers for, and what is subtracted. Settings as in `PPGAgent`.

    Raises:
        ValueError: unknown credit, baseline or scale, or a scale without `max_turns`.
    """

    credit: Credit | str = "full"
    """A policy class, or its name such as "kstep:3"."""
    baseline: str = "leave_one_out"
    """See credit.advantages."""
    scale: str = "none"
    """See credit.credit_weights."""
    max_turns: int | None = None
    """The most turns that a dialogue can have; needed by a scale, which must not depend on how
    long the dialogues of a batch happened to be."""
    divide_by_std: bool = False
    """See credit.advantages."""

    def __post_init__(self) -> None:
        if isinstance(self.credit, str):
            object.__setattr__(self, "credit", parse_credit(self.credit))
        credit_weights(Greedy(), 1, scale=self.scale)  # refuse what is unknown here
        advantages(np.zeros((2, 1)), baseline=self.baseline, group_B=np.zeros(2, dtype=int))
        if self.scale != "none" and self.max_turns is None:
            raise ValueError(
                f"scale={self.scale!r} needs max_turns, the most turns that a dialogue can have; "
                "or take scale='none' and a smaller step size."
            )
        if self.max_turns is not None and self.max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {self.max_turns}.")

    def advantages(
        self,
        reward_BT: np.ndarray,
        alive_BT: np.ndarray,
        group_B: Sequence[Hashable] | np.ndarray | None,
        boundaries: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (advantage_BT, return_BT), 0 for turns that a dialogue did not have.

        Args:
            reward_BT: reward of each turn; NaN where it could not be scored.
            alive_BT: True for the turns that the dialogue really had.
            group_B: what dialogues of one group have in common, texts or numbers.
            boundaries: first turn of each segment, one sequence for all or one for each dialogue.

        Raises:
            ValueError: see credit.partial_returns and credit.advantages; more turns than
                `max_turns`; no groups where the baseline needs them.
        """
        num_turns = reward_BT.shape[1]
        if self.max_turns is not None and alive_BT[:, self.max_turns :].any():
            raise ValueError(
                f"A dialogue has {int(alive_BT.sum(axis=1).max())} turns, but max_turns is "
                f"{self.max_turns}; set it to the most turns that a dialogue can have."
            )
        assert not isinstance(self.credit, str)
        per_dialogue = boundaries is not None and any(np.ndim(each) for each in boundaries)
        which = "boundaries_per_episode" if per_dialogue else "boundaries"
        weight = credit_weights(
            self.credit,
            max(num_turns, self.max_turns or 1),
            scale=self.scale,
            **{which: boundaries},  # type: ignore[arg-type]
        )[..., :num_turns, :num_turns]
        return_BT = partial_returns(reward_BT, weight, alive_BT)
        advantage_BT = advantages(
            return_BT,
            baseline=self.baseline,
            group_B=self._groups(group_B, len(reward_BT)),
            alive_BT=alive_BT,
            scorable_BT=~np.isnan(reward_BT),
            divide_by_std=self.divide_by_std,
        )
        return advantage_BT, return_BT

    def _groups(
        self, group_B: Sequence[Hashable] | np.ndarray | None, num_dialogues: int
    ) -> np.ndarray | None:
        if self.baseline not in GROUP_BASELINES:
            return None
        if group_B is None or len(group_B) != num_dialogues:
            given = "none" if group_B is None else f"{len(group_B)}"
            raise ValueError(
                f"The baseline {self.baseline!r} needs one group id for each of the "
                f"{num_dialogues} dialogues, got {given}. Pass them (verl: the column 'uid'; TRL: "
                "'group_id' from rollout_func), or take the baseline 'batch_mean' or 'none'."
            )
        number: dict[Hashable, int] = {}
        return np.array([number.setdefault(key, len(number)) for key in group_B], dtype=np.int64)


def turns_of_mask(mask_BL: np.ndarray) -> np.ndarray:
    """Return turn_BL, int64: every run of ones is a turn, numbered from 0; -1 where there is none.

    Raises:
        ValueError: the mask is no matrix of zeros and ones.
    """
    if mask_BL.ndim != 2 or not np.isin(mask_BL, (0, 1)).all():
        raise ValueError(
            f"A response mask is a (dialogues, tokens) matrix of 0 and 1, got shape "
            f"{mask_BL.shape} with values from {mask_BL.min()} to {mask_BL.max()}."
        )
    said_BL = mask_BL.astype(bool)
    before_BL = np.pad(said_BL[:, :-1], ((0, 0), (1, 0)))
    return np.where(said_BL, (said_BL & ~before_BL).cumsum(axis=1) - 1, -1)


def rewards_of_turns(
    token_reward_BL: np.ndarray, turn_BL: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (reward_BT, alive_BT): each turn gets the rewards from its first token on.

    A reward may stand on any token of the turn or of the answer to it, up to the next turn's first
    token; several add up. T is at least 1.

    Raises:
        ValueError: shapes disagree, a reward is not finite, or one comes before the first turn.
    """
    if token_reward_BL.shape != turn_BL.shape:
        raise ValueError(
            f"Rewards of shape {token_reward_BL.shape} do not fit a response mask of shape "
            f"{turn_BL.shape}; both are (dialogues, tokens)."
        )
    latest_BL = np.maximum.accumulate(turn_BL, axis=1)
    _refuse_first(
        token_reward_BL,
        ~np.isfinite(token_reward_BL),
        "rewards are finite; give turns that could not be scored a fixed reward, for instance with "
        "the environment's unscorable_reward=0.0",
    )
    _refuse_first(
        token_reward_BL,
        (token_reward_BL != 0) & (latest_BL < 0),
        "no turn has begun there; a turn is a run of ones in the response mask",
    )
    num_turns_B = turn_BL.max(axis=1, initial=-1) + 1
    reward_BT = np.zeros((len(turn_BL), max(1, int(num_turns_B.max(initial=0)))))
    row_N, token_N = np.nonzero(token_reward_BL)
    np.add.at(reward_BT, (row_N, latest_BL[row_N, token_N]), token_reward_BL[row_N, token_N])
    return reward_BT, np.arange(reward_BT.shape[1]) < num_turns_B[:, None]


def on_tokens(value_BT: np.ndarray, turn_BL: np.ndarray) -> np.ndarray:
    """Return value_BL: each token's is that of its turn, 0 where `turn_BL` is -1."""
    found_BL = np.take_along_axis(value_BT, np.maximum(turn_BL, 0), axis=1)
    return np.where(turn_BL >= 0, found_BL, 0.0)


def _refuse_first(value_BL: np.ndarray, wrong_BL: np.ndarray, rule: str) -> None:
    if wrong_BL.any():
        row, token = np.argwhere(wrong_BL)[0]
        raise ValueError(f"The reward at [{row}, {token}] is {value_BL[row, token]}: {rule}.")
