"""The gradients grad log pi(a_t | h_t) of a batch's turns, as inner products: measured once.

    batch = collect_rollouts(envs, policy, options={"group_size": 8})
    gradients = turn_gradients(policy, batch)

Whatever credit and baseline, the batch's gradient is a weighted sum of these, so its length, angle
and variance follow from the inner products; the gradients themselves are not kept. Letters: B
dialogues, T turns, N = B x T, n of them spoken, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from .lm_policy import LMPolicy
from .losses import turn_logprobs
from .rollout import RolloutBatch
from .tape import Tape

# The gradients are held side by side while they are measured, 2 GiB in float32 at most; longer ones
# are sketched.
_LARGEST_TABLE = 2**29

# Mean difference of log-probabilities, in nats a token, above which a batch was sampled by another
# policy; bfloat16 alone makes about a tenth of it.
_LARGEST_DRIFT = 0.1


@dataclass(frozen=True)
class TurnGradients:
    """What a batch tells about gradients: <grad log pi(a_n|h_n), grad log pi(a_m|h_m)>, rewards."""

    product_NN: np.ndarray
    """Inner products; turn t of dialogue b is row b x T + t. Rows of turns not alive are 0."""
    reward_BT: np.ndarray
    """Reward of each turn, NaN where unscorable."""
    alive_BT: np.ndarray
    """Whether the turn took place, bool."""
    group_B: np.ndarray
    """Group of each dialogue as 0 .. G-1, none of them empty."""
    boundaries: tuple[int, ...] | None = None
    """First turn of each phase, where the environment has phases."""
    parameters: str = "all"
    """Which parameters the gradients are of."""
    num_parameters: int = 0
    """P, how many these are."""
    sketch_width: int | None = None
    """None = exact; else an inner product <x, y> has an error of at most sqrt(2 / sketch_width) |x|
    |y|, root mean square."""

    def __post_init__(self) -> None:
        size = self.reward_BT.size
        if self.product_NN.shape != (size, size) or len(self.group_B) != len(self.reward_BT):
            raise ValueError(
                f"product_NN {self.product_NN.shape}, reward_BT {self.reward_BT.shape} and group_B "
                f"{self.group_B.shape} do not fit: rewards of {size} turns need {size} x {size} "
                "products, and a group for each dialogue."
            )
        if not np.isfinite(self.product_NN).all():
            raise ValueError(
                "Some gradients are not finite, so nothing can be told from them: look at the "
                "model's weights, or load it in float32."
            )

    @classmethod
    def from_vectors(
        cls,
        gradient_BTP: np.ndarray,
        reward_BT: np.ndarray,
        group_B: np.ndarray,
        alive_BT: np.ndarray | None = None,
    ) -> TurnGradients:
        """Return those of a policy that is no language model, from its gradients themselves."""
        num_parameters = gradient_BTP.shape[2]
        if alive_BT is None:
            alive_BT = np.ones(reward_BT.shape, dtype=bool)
        table_NP = np.where(alive_BT[:, :, None], gradient_BTP, 0.0).reshape(-1, num_parameters)
        return cls(
            product_NN=table_NP @ table_NP.T,
            reward_BT=reward_BT,
            alive_BT=alive_BT,
            group_B=_numbered(group_B),
            num_parameters=num_parameters,
        )

    @property
    def num_episodes(self) -> int:
        """B."""
        return len(self.group_B)

    @property
    def num_turns(self) -> int:
        """T."""
        return int(self.reward_BT.shape[1])

    @property
    def num_groups(self) -> int:
        """G."""
        return int(self.group_B.max()) + 1

    @property
    def square_BT(self) -> np.ndarray:
        """Return ||grad log pi(a_t|h_t)||^2."""
        return np.diagonal(self.product_NN).reshape(self.reward_BT.shape).astype(np.float64)


def turn_gradients(
    policy: LMPolicy,
    batch: RolloutBatch,
    parameters: str = "auto",
    *,
    progress_bar: bool = False,
) -> TurnGradients:
    """Measure the gradients of all turns of a batch that `policy`, as it is now, has sampled.

    One forward pass a dialogue and one backward pass a turn. While it runs the gradients lie side
    by side in one table of at most 2 GiB; those too long for that are sketched (`_Sketch`). What
    is returned takes 4 (B T)^2 bytes.

    Args:
        policy: the language model; what requires a gradient is as before afterwards.
        batch: from `collect_rollouts` with this policy; with groups.
        parameters: "lora" (the adapter), "last_block" (all parameters of the last layer), "all";
            "auto" = "lora" if there is an adapter, else "last_block".
        progress_bar: show one.

    Raises:
        ValueError: `parameters` is unknown or the model has none such; the batch has no tokens, or
            was sampled by another policy or from a restricted support.
    """
    if batch.tape is None:
        raise ValueError(
            "This batch holds no tokens, so it has no gradients: collect it with an LMPolicy and "
            "keep_tokens=True."
        )
    if not policy.sampler.full_support:
        raise ValueError(
            f"This policy samples with top_k={policy.sampler.top_k} and "
            f"top_p={policy.sampler.top_p}, so its lines do not come from the softmax whose "
            "gradient is measured; use top_k=0 and top_p=1."
        )
    name, chosen = _choose_parameters(policy, parameters)
    num_parameters = sum(parameter.numel() for parameter in chosen)
    num_episodes, num_turns = batch.reward_BT.shape
    sketch = _Sketch.where_needed(num_parameters, batch.num_turns, policy.device)
    width = num_parameters if sketch is None else sketch.width

    table_nP = torch.zeros(batch.num_turns, width, device=policy.device)
    row = 0
    with _only_these_learn(policy, chosen):
        for b in tqdm(range(num_episodes), unit="dialogue", disable=not progress_bar):
            logprob_T = _dialogue_logprobs(policy, batch.tape, b, num_turns)
            for t in np.flatnonzero(batch.alive_BT[b]).tolist():
                parts = torch.autograd.grad(
                    logprob_T[t], chosen, retain_graph=True, materialize_grads=True
                )
                gradient_P = torch.cat([part.flatten().float() for part in parts])
                table_nP[row] = gradient_P if sketch is None else sketch(gradient_P)
                row += 1
    product_NN = np.zeros((num_episodes * num_turns,) * 2, dtype=np.float32)
    spoken_n = np.flatnonzero(batch.alive_BT)
    product_NN[np.ix_(spoken_n, spoken_n)] = (table_nP @ table_nP.T).cpu().numpy()
    return TurnGradients(
        product_NN=product_NN,
        reward_BT=batch.reward_BT,
        alive_BT=batch.alive_BT,
        group_B=_numbered(batch.group_B),
        boundaries=batch.boundaries,
        parameters=name,
        num_parameters=num_parameters,
        sketch_width=None if sketch is None else sketch.width,
    )


class _Sketch:
    """A count sketch: each parameter is added, with a random sign, to one of `width` buckets.

    It keeps inner products: E <Sx, Sy> = <x, y>, with variance at most (|x|^2 |y|^2 + <x, y>^2) /
    width. Source: Weinberger et al., "Feature hashing for large scale multitask learning", arXiv
    0902.2206.
    """

    def __init__(self, num_parameters: int, width: int, device: torch.device) -> None:
        self.width = width
        generator = torch.Generator().manual_seed(0)  # any fixed one: it has to be the same always
        bucket_P = torch.randint(width, (num_parameters,), generator=generator)
        sign_P = torch.randint(2, (num_parameters,), generator=generator) * 2.0 - 1.0
        self._bucket_P, self._sign_P = bucket_P.to(device), sign_P.to(device)

    @classmethod
    def where_needed(
        cls, num_parameters: int, num_gradients: int, device: torch.device
    ) -> _Sketch | None:
        """Return None if so many gradients fit into the table as they are."""
        if num_parameters * num_gradients <= _LARGEST_TABLE:
            return None
        return cls(num_parameters, max(1, _LARGEST_TABLE // num_gradients), device)

    def __call__(self, gradient_P: torch.Tensor) -> torch.Tensor:
        """Return the sketch, shape (width,)."""
        empty = gradient_P.new_zeros(self.width)
        return empty.index_add(0, self._bucket_P, gradient_P * self._sign_P)


def _dialogue_logprobs(policy: LMPolicy, tape: Tape, episode: int, num_turns: int) -> torch.Tensor:
    """Return log pi(a_t|h_t) of one dialogue, shape (T,), with gradient."""
    rows = np.flatnonzero(tape.episode_S == episode)
    longest = int(tape.length_S[rows].max(initial=1))
    turn_sL = torch.as_tensor(tape.turn_SL[rows, :longest], device=policy.device)
    logprob_sL = policy.logprobs(tape.token_SL[rows, :longest], turn_sL)
    old_sL = torch.as_tensor(tape.old_logprob_SL[rows, :longest], device=policy.device)
    _refuse_another_policy((logprob_sL.detach() - old_sL)[turn_sL >= 0])
    return turn_logprobs(logprob_sL, turn_sL, num_turns).sum(dim=0)


def _refuse_another_policy(difference_n: torch.Tensor) -> None:
    drift = float(difference_n.abs().mean()) if len(difference_n) else 0.0
    if drift > _LARGEST_DRIFT:
        raise ValueError(
            f"The policy gives the lines of this batch log-probabilities that differ by {drift:.2f}"
            " nats a token from those they were sampled with: it has learned since, or is another "
            "one. Collect a batch with the policy whose gradients are to be measured."
        )


def _choose_parameters(policy: LMPolicy, name: str) -> tuple[str, list[torch.nn.Parameter]]:
    if name == "auto":
        name = "lora" if policy.has_adapter else "last_block"
    if name == "all":
        return name, list(policy.model.parameters())
    if name == "lora":
        chosen = [p for key, p in policy.model.named_parameters() if "lora_" in key]
        remedy = "load it with lora_rank > 0"
    elif name == "last_block":
        blocks = [m for m in policy.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        chosen = list(blocks[-1].parameters()) if blocks else []
        remedy = "measure 'all'"
    else:
        raise ValueError(f"parameters is 'auto', 'lora', 'last_block' or 'all', got {name!r}.")
    if not chosen:
        raise ValueError(f"{policy.name} has no parameters called {name!r}; {remedy}.")
    return name, chosen


@contextmanager
def _only_these_learn(policy: LMPolicy, chosen: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require a gradient; passes then stop where none does."""
    before = [(p, p.requires_grad) for p in policy.model.parameters()]
    try:
        policy.model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _numbered(group_B: np.ndarray) -> np.ndarray:
    return np.asarray(np.unique(group_B, return_inverse=True)[1])
