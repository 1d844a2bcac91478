"""Spread a model's layers over all processes, for models whose optimizer fits into no one device.

Fully sharded data parallel: each process keeps a share of every transformer layer, of its gradient
and of its optimizer state; embeddings, last norm and output head stay whole everywhere. A layer is
put together while it computes, and all of them while the agent speaks: dialogues have different
lengths, so that processes could not wait for each other token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_Tensor = TypeVar("_Tensor", bound=torch.Tensor)


def shard_layers(model: PreTrainedModel, num_processes: int) -> list[FSDPModule]:
    """Shard the model's transformer layers over all processes, in place; gradients are averaged.

    Raises:
        ValueError: if the model's layers cannot be told.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"The layers of {type(model).__name__} cannot be told, so not sharded.")
    mesh = init_device_mesh(model.device.type, (num_processes,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    return [fully_shard(layer, mesh=mesh, mp_policy=policy) for layer in layers]


@contextmanager
def whole_layers(layers: Sequence[FSDPModule]) -> Iterator[None]:
    """Put all layers together, so that processes can compute without each other."""
    for layer in layers:
        layer.unshard()
        layer.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in whole; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_on_cpu(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Return whole tensors on the CPU, one after the other; {} where they are not to be kept."""
    whole = {}
    for name, tensor in tensors.items():
        one = gathered(tensor.detach())
        if keep:
            whole[name] = one.cpu()
    return whole


def spread_like(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, sharded if `tensor` is."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether this process holds a share of the tensor only."""
    return isinstance(tensor, DTensor)


def by_kind(tensors: Sequence[_Tensor]) -> list[list[_Tensor]]:
    """Return whole and sharded tensors apart: torch computes with one kind at a time."""
    parts = [[t for t in tensors if is_sharded(t) is kind] for kind in (False, True)]
    return [part for part in parts if part]


def clip_gradients(parameters: Sequence[Parameter], max_norm: float) -> float:
    """Scale all gradients down to this norm together; return the norm that they had."""
    having = [p for p in parameters if p.grad is not None]
    parts = by_kind(having)
    norms = [get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts]
    norm = (
        torch.stack([gathered(norm).float() for norm in norms]).norm() if norms else torch.zeros(())
    )
    for part in parts:
        clip_grads_with_norm_(part, max_norm, norm)
    return float(norm)
