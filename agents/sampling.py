"""Draw the tokens of a line: from which support, until when, and what it says aloud.

A line ends at an end mark: the tokenizer's end token, those of the model's own configuration, or
what the chat template puts after a line, be it several tokens. Dimension letters as in decoding.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .chat_format import ChatFormat
from .decoding import Decoder, Network


@dataclass(frozen=True)
class Line:
    """One sampled line."""

    ids: list[int]
    """Its tokens, with the end mark if that was said."""
    logprobs: list[float]
    """Their log-probabilities when sampled."""
    mark: str | None
    """The end mark that ended it, with blanks that its last token adds; None if it was cut."""
    text: str
    """What it says aloud, "..." for nothing: no end mark, special tokens, NULs or thoughts."""
    has_thoughts: bool
    """Whether it holds thoughts (all up to the last "</think>", or a thought that was cut)."""


@dataclass(frozen=True)
class Sampler:
    """Samples lines from a network."""

    network: Network
    """The model as token ids -> logits."""
    format: ChatFormat
    """Its chat template."""
    max_new_tokens: int
    """Longest line in tokens, end mark included."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int = 0
    """Only the k most likely tokens are drawn; 0 = all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability are drawn; 1 = all."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; for the most likely tokens "
                "use deterministic=True."
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k is at least 0 (0 = all tokens) and top_p in (0, 1], got {self.top_k} and "
                f"{self.top_p}."
            )

    @property
    def full_support(self) -> bool:
        """Whether every token can be drawn, as training supposes."""
        return self.top_k == 0 and self.top_p == 1.0

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The single tokens that end a line."""
        configured = getattr(self.network.model.generation_config, "eos_token_id", None)
        more = configured if isinstance(configured, list) else [configured]
        return self.format.end_ids | {int(token) for token in more if token is not None}

    def room(self, length: int) -> int:
        """Return how long a line after `length` tokens may be; below 1 the context is full."""
        limit = self.network.context_length
        return self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - length)

    def lines(
        self,
        decoder: Decoder,
        pending: dict[int, Sequence[int]],
        rooms: dict[int, int],
        rngs: Sequence[np.random.Generator],
        deterministic: bool,
    ) -> dict[int, Line]:
        """Read each dialogue's pending ids, sample its line of at most `rooms[row]` (>= 1) tokens.

        `rngs` holds one generator for each of the decoder's dialogues.
        """
        ids: dict[int, list[int]] = {row: [] for row in pending}
        logprobs: dict[int, list[float]] = {row: [] for row in pending}
        marks: dict[int, str | None] = dict.fromkeys(pending)
        order, logit_nV = decoder.feed(np.array(list(pending)), list(pending.values()))
        while True:
            row_rngs = [rngs[row] for row in order.tolist()]
            token_n, logprob_n = self.draw(logit_nV, row_rngs, deterministic)
            speaks_n = np.ones(len(order), dtype=bool)
            drawn = zip(order.tolist(), token_n.tolist(), logprob_n.tolist(), strict=True)
            for i, (row, token, logprob) in enumerate(drawn):
                ids[row].append(token)
                logprobs[row].append(logprob)
                marks[row] = self.mark_at_end(ids[row])
                speaks_n[i] = marks[row] is None and len(ids[row]) < rooms[row]
            if not speaks_n.any():
                break
            order, logit_nV = decoder.feed(order[speaks_n], token_n[speaks_n])
        said = self._said([self._before_end_token(ids[row]) for row in pending])
        return {
            row: Line(ids[row], logprobs[row], marks[row], *said[i])
            for i, row in enumerate(pending)
        }

    def draw(
        self, logit_nV: torch.Tensor, rngs: Sequence[np.random.Generator], deterministic: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `sample_tokens` from these logits with this sampler's support."""
        return sample_tokens(
            logit_nV,
            rngs,
            self.temperature,
            deterministic,
            top_k=self.top_k,
            top_p=self.top_p,
        )

    def mark_at_end(self, ids: list[int]) -> str | None:
        """Return the text of the end mark that these ids end in, None if they end in none."""
        text_mark = self.format.text_mark
        if text_mark is not None:
            # A model may split the mark otherwise than the tokenizer does, so texts are compared.
            ending = self._decode(ids[-len(text_mark.encode()) - 1 :])
            if ending.rstrip().endswith(text_mark):
                return ending[ending.rindex(text_mark) :]
        return self._end_marks.get(ids[-1])

    def has_thoughts(self, ids: list[int]) -> bool:
        """Return whether a line of these ids holds what it does not say aloud."""
        return self._said([self._before_end_token(ids)])[0][1]

    @cached_property
    def _end_marks(self) -> dict[int, str]:
        """The single tokens that end a line, with their texts."""
        return {token: self._decode([token]) for token in self.end_ids}

    def _before_end_token(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids[-1] in self.end_ids else ids

    def _decode(self, ids: list[int]) -> str:
        return str(self.format.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _said(self, rows: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
        """Return (what each row says aloud, whether it holds thoughts)."""
        if not rows:
            return []
        silent = self.format.silent_ids
        texts = self.format.tokenizer.batch_decode(
            [[token for token in row if token not in silent] for row in rows],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return [self._aloud(text.replace("\0", "")) for text in texts]

    def _aloud(self, text: str) -> tuple[str, bool]:
        if self.format.text_mark is not None:
            text = text.rstrip().removesuffix(self.format.text_mark)
        _, end_of_thought, after = text.rpartition("</think>")
        aloud, begin_of_thought, _ = after.partition("<think>")  # one that was cut
        if self.format.opens_thought and not end_of_thought:
            return "...", True
        return aloud.strip() or "...", bool(end_of_thought or begin_of_thought)


def sample_tokens(
    logit_nV: torch.Tensor,
    rngs: Sequence[np.random.Generator],
    temperature: float = 1.0,
    deterministic: bool = False,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token per row: the smallest v with P(token <= v) > u.

    Args:
        logit_nV: logits, any float dtype.
        rngs: n generators; each gives one uniform u in [0, 1) (none if deterministic), so that a
            row's draws do not depend on the other rows.
        temperature: divides the logits.
        deterministic: take the most likely token instead.
        top_k, top_p: as in `Sampler`; what is left is normalised again.

    Returns:
        (token_n, logprob_n): ids, and their log-probabilities under what was sampled from.
    """
    logit_nV = logit_nV.float()
    if logit_nV.device.type == "mps":  # no float64 there
        logit_nV = logit_nV.cpu()
    if temperature != 1.0:
        logit_nV = logit_nV / temperature
    if top_k > 0 or top_p < 1.0:
        logit_nV = _restricted(logit_nV, top_k, top_p)
    logprob_nV = torch.log_softmax(logit_nV, -1)
    if deterministic:
        token_n1 = logprob_nV.argmax(-1, keepdim=True)
    else:
        cdf_nV = logprob_nV.exp().cumsum(-1, dtype=torch.float64)
        u_n1 = torch.tensor([[rng.random()] for rng in rngs], dtype=torch.float64)
        level_n1 = u_n1.to(cdf_nV.device) * cdf_nV[:, -1:]
        token_n1 = torch.searchsorted(cdf_nV, level_n1, right=True)
        token_n1.clamp_(max=cdf_nV.shape[1] - 1)
    logprob_n = logprob_nV.gather(-1, token_n1)[:, 0]
    return token_n1[:, 0].cpu().numpy(), logprob_n.cpu().numpy()


def _restricted(logit_nV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return the logits with -inf where a token is not to be drawn; one always remains."""
    sorted_nV, index_nV = logit_nV.sort(dim=-1, descending=True)
    closed_nV = torch.zeros_like(sorted_nV, dtype=torch.bool)
    if top_k > 0:
        closed_nV[:, top_k:] = True
    if top_p < 1.0:
        prob_nV = sorted_nV.masked_fill(closed_nV, -torch.inf).softmax(-1)
        closed_nV |= prob_nV.cumsum(-1) - prob_nV >= top_p
    return logit_nV.masked_fill(closed_nV.gather(1, index_nV.argsort(-1)), -torch.inf)
