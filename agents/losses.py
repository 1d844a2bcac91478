"""Losses as functions of tensors: policy gradient, clipped policy gradient, KL to a reference.

All are sums over an episode's turns and tokens, averaged over episodes, as the estimator demands;
a mean over tokens is another estimator and has to be asked for. Only tokens that the agent spoke
count.

Letters: B episodes, T turns, L token positions. turn_BL[b,l] is the turn that spoke token l, and
-1 for tokens of the persona, of the partner, and padding.
"""

from typing import Literal

import torch
from torch import Tensor

_LARGEST_LOG_RATIO = 20.0  # far beyond any useful ratio; its exp is finite in bfloat16


def turn_logprobs(
    logprob_BL: Tensor,
    turn_BL: Tensor,
    num_turns: int,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """log pi(a_t|h_t) = sum of the log-probabilities of turn t's tokens. Returns logprob_BT.

    Tokens with turn -1 get a gradient of exactly zero, whatever their value (NaN and -inf
    included). A turn without tokens has log-probability 0. reduction="mean" divides by the turn's
    number of tokens, another estimator: its expectation is not the policy gradient.

    Raises:
        ValueError: shapes disagree, or a turn index lies outside -1..num_turns-1.
    """
    _check_same_shape(logprob_BL=logprob_BL, turn_BL=turn_BL)
    _check_turns(turn_BL, num_turns)
    spoken_BL = turn_BL >= 0
    index_BL = turn_BL.clamp(min=0).long()
    zero_BT = logprob_BL.new_zeros(len(logprob_BL), num_turns)

    logprob_BT = zero_BT.scatter_add(1, index_BL, _only(logprob_BL, spoken_BL))
    if reduction == "sum":
        return logprob_BT
    if reduction == "mean":
        count_BT = zero_BT.scatter_add(1, index_BL, spoken_BL.to(logprob_BL.dtype))
        return logprob_BT / count_BT.clamp(min=1)
    raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}.")


def policy_gradient_loss(
    logprob: Tensor,
    advantage_BT: Tensor,
    turn_BL: Tensor | None = None,
    *,
    num_episodes: int | None = None,
) -> Tensor:
    """-(1/B) sum_b sum_t A[b,t] log pi(a_t|h_t).

    Its gradient is minus the estimated partial policy gradient.

    Args:
        logprob: logprob_BT; or logprob_BL, then `turn_BL` says which turn spoke each token.
        advantage_BT: partial return minus baseline; 0 for turns that were not taken. No gradient
            flows through it.
        turn_BL: turn of each token, -1 for tokens of others.
        num_episodes: B of the whole batch, if this call sees only a part of it; the parts' losses
            then add up to the loss of the whole.
    """
    if turn_BL is not None:
        logprob = turn_logprobs(logprob, turn_BL, advantage_BT.shape[1])
    _check_same_shape(logprob_BT=logprob, advantage_BT=advantage_BT)
    return -(advantage_BT.detach() * logprob).sum() / (num_episodes or len(logprob))


def clipped_loss(
    logprob_BL: Tensor,
    old_logprob_BL: Tensor,
    turn_BL: Tensor,
    advantage_BT: Tensor,
    *,
    clip_range: float = 0.2,
    level: Literal["turn", "token"] = "turn",
    num_episodes: int | None = None,
) -> Tensor:
    """-(1/B) sum min(rho A, clip(rho, 1 - c, 1 + c) A): for several passes over one batch.

    level="turn": rho[b,t] = exp(sum over turn t's tokens of new - old), the ratio of whole
    utterances, summed over turns. level="token": one ratio a token with its turn's advantage,
    summed over tokens; it ignores how the other tokens' probabilities changed and clips less
    often in long turns. While new = old both have the gradient of `policy_gradient_loss`.

    `old_logprob_BL` must come from the softmax that was sampled from: full support at temperature
    1, or the same restriction in both. Log-ratios are capped at 20, beyond which a token gets no
    gradient. Source: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv
    1707.06347.
    """
    _check_same_shape(logprob_BL=logprob_BL, old_logprob_BL=old_logprob_BL, turn_BL=turn_BL)
    if clip_range <= 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}; 0.2 is PPO's.")
    log_ratio, advantage = _log_ratios(logprob_BL, old_logprob_BL, turn_BL, advantage_BT, level)
    ratio = log_ratio.clamp(max=_LARGEST_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantage, clipped * advantage).sum() / (num_episodes or len(ratio))


@torch.no_grad()
def clip_fraction(
    logprob_BL: Tensor,
    old_logprob_BL: Tensor,
    turn_BL: Tensor,
    advantage_BT: Tensor,
    *,
    clip_range: float = 0.2,
    level: Literal["turn", "token"] = "turn",
) -> tuple[int, int]:
    """Return (how many ratios `clipped_loss` holds back, how many there are)."""
    log_ratio, advantage = _log_ratios(logprob_BL, old_logprob_BL, turn_BL, advantage_BT, level)
    ratio = log_ratio.exp()
    held = ((ratio > 1 + clip_range) & (advantage > 0)) | (
        (ratio < 1 - clip_range) & (advantage < 0)
    )
    return int(held.sum()), int((advantage != 0).sum())


def _log_ratios(
    logprob_BL: Tensor, old_logprob_BL: Tensor, turn_BL: Tensor, advantage_BT: Tensor, level: str
) -> tuple[Tensor, Tensor]:
    """Return log-ratios and their advantages, 0 where there is no turn or no token."""
    num_turns = advantage_BT.shape[1]
    spoken_BL = turn_BL >= 0
    log_ratio = _only(logprob_BL, spoken_BL) - _only(old_logprob_BL.detach(), spoken_BL)
    advantage = advantage_BT.detach()
    if level == "turn":
        log_ratio = turn_logprobs(log_ratio, turn_BL, num_turns)
        # A turn that has no token here is in another sequence of its dialogue.
        here_BT = turn_logprobs(spoken_BL.to(advantage.dtype), turn_BL, num_turns) > 0
        advantage = _only(advantage, here_BT)
    elif level == "token":
        _check_turns(turn_BL, num_turns)
        advantage = _only(advantage.gather(1, turn_BL.clamp(min=0).long()), spoken_BL)
    else:
        raise ValueError(f"level must be 'turn' or 'token', got {level!r}.")
    _check_same_shape(log_ratio=log_ratio, advantage=advantage)
    return log_ratio, advantage


def kl_to_reference(
    logprob_BL: Tensor,
    ref_logprob_BL: Tensor,
    mask_BL: Tensor,
    *,
    num_episodes: int | None = None,
) -> Tensor:
    """(1/B) sum over agent tokens of exp(d) - 1 - d, d = log ref - log pi: estimates KL(pi || ref).

    This is the estimator k3 of Schulman's note "Approximating KL divergence"
    (joschu.net/blog/kl-approx.html): never negative, and on tokens sampled from pi its mean at
    each token is KL(pi || ref). Summed over tokens, so a turn's KL is that of the whole
    utterance. A surprise worth knowing: as a loss on such samples its expected gradient at a
    token is that of KL(ref || pi), the other direction; both vanish at pi = ref.

    Args:
        logprob_BL: log-probabilities of the sampled tokens now.
        ref_logprob_BL: the same under the frozen reference; no gradient flows through it.
        mask_BL: boolean, True on tokens that the agent spoke (turn_BL >= 0).
        num_episodes: B of the whole batch, if this call sees only a part of it.
    """
    _check_same_shape(logprob_BL=logprob_BL, ref_logprob_BL=ref_logprob_BL, mask_BL=mask_BL)
    mask_BL = mask_BL.bool()
    log_ratio_BL = _only(ref_logprob_BL.detach(), mask_BL) - _only(logprob_BL, mask_BL)
    estimate_BL = log_ratio_BL.exp() - 1 - log_ratio_BL
    return estimate_BL.sum() / (num_episodes or len(estimate_BL))


def _only(value_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The value where the mask is True, elsewhere 0 with no gradient (a product would keep NaN)."""
    return torch.where(mask_BL, value_BL, torch.zeros_like(value_BL))


def _check_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(
            "These need one shape of two dimensions, episodes first: "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            + "."
        )


def _check_turns(turn_BL: Tensor, num_turns: int) -> None:
    if turn_BL.numel() and not -1 <= int(turn_BL.min()) <= int(turn_BL.max()) < num_turns:
        raise ValueError(
            f"turn_BL runs from {int(turn_BL.min())} to {int(turn_BL.max())}, but turns are "
            f"-1..{num_turns - 1} (-1 for tokens the agent did not speak)."
        )
