"""The token record of a batch of dialogues: what a model read and said, and who said what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tape:
    """B dialogues in S token sequences, right-padded to the longest (L); T turns.

    One sequence holds a whole dialogue where the chat template only appends; where it rewrites what
    was said, a dialogue has several, ordered by turn. Each agent token stands in one of them only.
    """

    token_SL: np.ndarray
    """Token ids, int64: prompt, own lines and the partner's, as the model read and sampled them."""
    turn_SL: np.ndarray
    """The turn that spoke the token, int64; -1 for tokens that are not the agent's."""
    old_logprob_SL: np.ndarray
    """Log-probability of each token when it was sampled, float32; 0 where `turn_SL` is -1."""
    length_S: np.ndarray
    """Number of tokens of each sequence, int64."""
    episode_S: np.ndarray
    """The dialogue that each sequence belongs to, int64, never falling."""
    cut_BT: np.ndarray
    """Whether the line was cut: no end mark was sampled within the allowed number of tokens."""
    truncated_B: np.ndarray
    """Whether the dialogue grew beyond the model's context and was stopped."""

    @property
    def action_mask_SL(self) -> np.ndarray:
        """Whether the agent sampled the token, bool."""
        return self.turn_SL >= 0

    def lines(self, episode: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (token ids, log-probabilities when sampled) of each of a dialogue's lines."""
        lines = []
        for s in np.flatnonzero(self.episode_S == episode):
            turn_L = self.turn_SL[s]
            for turn in np.unique(turn_L[turn_L >= 0]):
                at = turn_L == turn
                lines.append((turn, self.token_SL[s][at], self.old_logprob_SL[s][at]))
        return [(ids, logprobs) for _, ids, logprobs in sorted(lines, key=lambda line: line[0])]

    @property
    def num_sampled(self) -> int:
        """Tokens that the agent sampled."""
        return int(self.action_mask_SL.sum())
