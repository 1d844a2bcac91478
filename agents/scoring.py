"""Log-probabilities of tokens that were said, with gradient, within bounded memory.

One forward pass reads a sequence up to its last agent token. The output head is applied at agent
positions only, in chunks whose logits are formed again in the backward pass: memory does not grow
with vocabulary x length. Dimension letters: S sequences, L tokens, N agent tokens, c tokens of a
chunk, H width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .decoding import Network

# Log-probabilities are formed for so many (token, vocabulary entry) pairs at a time: 64 MiB in
# float32.
_LOGITS_PER_CHUNK = 2**24


@dataclass(frozen=True)
class Scores:
    """What a model says about tokens that were spoken; on the model's device."""

    logprob_SL: torch.Tensor
    """log pi(token | tokens before it) at spoken tokens, 0 elsewhere; float32."""
    entropy_SL: torch.Tensor | None
    """Entropy in nats of the distribution that each spoken token came from; float32."""
    hidden_NH: torch.Tensor | None
    """Hidden state just before each spoken token, in the order of `at`; the model's dtype."""
    at: tuple[torch.Tensor, torch.Tensor]
    """(rows, columns) of the N spoken tokens."""


def score_tokens(
    network: Network,
    token_SL: torch.Tensor,
    spoken_SL: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    hidden: bool = False,
) -> Scores:
    """Return log softmax(logits[s, l-1] / temperature)[token[s, l]] at the spoken tokens.

    Dropout is off. Activations are checkpointed where `checkpoint_layers` asked for it.

    Args:
        network: the model.
        token_SL: ids, right-padded with any valid id.
        spoken_SL: bool, True at the tokens to score.
        temperature: divides the logits.
        entropy, hidden: give these too.

    Raises:
        ValueError: if shapes differ, or the first token of a sequence is to be scored.
    """
    if token_SL.shape != spoken_SL.shape or token_SL.ndim != 2:
        raise ValueError(
            f"token_SL {tuple(token_SL.shape)} and spoken_SL {tuple(spoken_SL.shape)} must be (S, "
            "L) both."
        )
    row_N, column_N = spoken_SL.nonzero(as_tuple=True)
    zero_SL = torch.zeros(token_SL.shape, dtype=torch.float32, device=token_SL.device)
    if len(row_N) == 0:
        return Scores(zero_SL, zero_SL if entropy else None, None, (row_N, column_N))
    if int(column_N.min()) == 0:
        raise ValueError(
            "The first token of a sequence has no context, the agent cannot have said it."
        )

    network.model.eval()
    context_SL = token_SL[:, : int(column_N.max())]
    before = (row_N, column_N - 1)
    target_N = token_SL[row_N, column_N]
    hidden_NH = None
    with _checkpointing_on(network.model):
        if hidden or network.split is not None:
            hidden_NH = network.hidden_at(context_SL, before)
        if network.split is None:
            logit_NV = network.logits_at(context_SL, before)
            score_2N = _score(logit_NV, target_N, temperature, entropy)
    if network.split is not None:
        assert hidden_NH is not None
        score_2N = _score_in_chunks(network, hidden_NH, target_N, temperature, entropy)
    return Scores(
        zero_SL.index_put((row_N, column_N), score_2N[0]),
        zero_SL.index_put((row_N, column_N), score_2N[1]) if entropy else None,
        hidden_NH if hidden else None,
        (row_N, column_N),
    )


def _score_in_chunks(
    network: Network,
    hidden_NH: torch.Tensor,
    target_N: torch.Tensor,
    temperature: float,
    entropy: bool,
) -> torch.Tensor:
    split = network.split
    assert split is not None

    def score(hidden_cH: torch.Tensor, target_c: torch.Tensor) -> torch.Tensor:
        return _score(split.logits(hidden_cH), target_c, temperature, entropy)

    chunk = max(1, _LOGITS_PER_CHUNK // int(network.config.vocab_size))
    if len(target_N) <= chunk:
        return score(hidden_NH, target_N)
    parts = zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([score(hidden, target) for hidden, target in parts], dim=1)
    return torch.cat(
        [checkpoint(score, hidden, target, use_reentrant=False) for hidden, target in parts], dim=1
    )


def _score(
    logit_NV: torch.Tensor, target_N: torch.Tensor, temperature: float, entropy: bool
) -> torch.Tensor:
    """Return log-probabilities and, if asked for, entropies: (2, N), else (1, N)."""
    logit_NV = logit_NV.float()
    if temperature != 1.0:
        logit_NV = logit_NV / temperature
    if not entropy:
        return -torch.nn.functional.cross_entropy(logit_NV, target_N, reduction="none")[None]
    logprob_NV = logit_NV.log_softmax(-1)
    entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1)
    return torch.stack([logprob_NV.gather(-1, target_N[:, None])[:, 0], entropy_N])


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let `score_tokens` keep only the layers' inputs and compute the rest again in backward.

    Raises:
        ValueError: if the model does not know how.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} cannot checkpoint its layers; lower token_budget instead of "
            "asking for gradient_checkpointing."
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_read_twice, layer)  # type: ignore[assignment]


def _read_twice(layer: torch.nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer now and again in the backward pass, both times without its own dropout."""

    def rested(*inputs: Any) -> Any:
        training, layer.training = layer.training, False
        try:
            return forward(*inputs)
        finally:
            layer.training = training

    return checkpoint(rested, *inputs, use_reentrant=False)


@contextmanager
def _checkpointing_on(model: PreTrainedModel) -> Iterator[None]:
    """Set the layers themselves to training mode, which is when they look for checkpointing."""
    layers = [
        m
        for m in model.modules()
        if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    for layer in layers:
        layer.training = torch.is_grad_enabled()
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def microbatches(length_S: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Yield index arrays that cover all rows, longest first, each within the budget.

    rows x longest length in the batch <= token_budget, except that a row longer than the budget
    comes alone. Longest first: if memory is short, it shows at once.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1 token, got {token_budget}.")
    length_S = np.asarray(length_S)
    order_S = np.argsort(-length_S, kind="stable")
    start = 0
    while start < len(order_S):
        longest = max(1, int(length_S[order_S[start]]))
        stop = start + max(1, token_budget // longest)
        yield order_S[start:stop]
        start = stop
