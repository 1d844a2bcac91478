"""One optimiser step out of many backward passes: accumulate, sum over processes, clip, step.

Parameters of lower precision than float32 have a float32 master copy, which is what AdamW moves:
in bfloat16 a step smaller than 1/256 of a weight would be lost. Sampling and training read the same
low-precision weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.nn import Parameter

from .sharding import by_kind, clip_gradients, gathered_on_cpu, is_sharded, spread_like


def all_processes(on_cpu: bool = False) -> PartialState:
    """Return the processes that learn together: this one alone, or all that were launched.

    The first call decides. On the CPU they speak over gloo, which Accelerate starts only if told
    so.
    """
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(
                f"{name} is set, but this project shards models itself: launch with --multi_gpu "
                "and train with --shard."
            )
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise ValueError(
            "Accelerate's mixed precision is not used here: launch with --mixed_precision no and "
            "train with --dtype bfloat16."
        )
    return PartialState(cpu=on_cpu or not torch.cuda.is_available())


@dataclass(frozen=True)
class Step:
    """What came of one optimiser step."""

    grad_norm: float
    """Norm of the gradient before clipping; may be infinite or NaN."""
    skipped: bool
    """Whether nothing was changed, because the gradient was not finite or far too large."""


class Optimization:
    """AdamW without weight decay over float32 masters of a model's trainable parameters.

    Args:
        parameters: groups of parameters; each with its own learning rate.
        learning_rates: one for each group.
        adam_eps: AdamW's epsilon.
        max_grad_norm: the gradient is scaled down to this norm.
        skip_grad_norm: a step whose gradient is larger than this, or not finite, is skipped.
        processes: the others, over which gradients are summed.
    """

    def __init__(
        self,
        parameters: Sequence[Iterable[Parameter]],
        learning_rates: Sequence[float],
        *,
        adam_eps: float,
        max_grad_norm: float,
        skip_grad_norm: float,
        processes: PartialState,
    ) -> None:
        groups = [
            (part, rate)
            for group, rate in zip(parameters, learning_rates, strict=True)
            for part in by_kind([p for p in group if p.requires_grad])
        ]
        self._pairs = [[(p, _master(p)) for p in group] for group, _ in groups]
        self.adam = torch.optim.AdamW(
            [
                {"params": [master for _, master in pairs], "lr": rate, "full_lr": rate}
                for pairs, (_, rate) in zip(self._pairs, groups, strict=True)
            ],
            eps=adam_eps,
            weight_decay=0.0,
        )
        self._max_grad_norm = max_grad_norm
        self._skip_grad_norm = skip_grad_norm
        self._processes = processes
        self.num_skipped = 0

    def scale_learning_rates(self, share: float) -> None:
        """Set all learning rates to a share of what they were at the start."""
        for group in self.adam.param_groups:
            group["lr"] = group["full_lr"] * share

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient to what has been gathered since the last step."""
        loss.backward()
        for parameter, master in self._copies():
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def forget(self) -> None:
        """Drop what has been gathered since the last step, as after an error in between."""
        for pairs in self._pairs:
            for parameter, master in pairs:
                parameter.grad = master.grad = None

    def step(self) -> Step:
        """Sum the gradient over all processes, clip it, move the parameters, forget it."""
        self._sum_over_processes()
        masters = [master for pairs in self._pairs for _, master in pairs]
        norm = clip_gradients(masters, self._max_grad_norm)
        skipped = not math.isfinite(norm) or norm > self._skip_grad_norm
        if skipped:
            self.num_skipped += 1
        else:
            self.adam.step()
            with torch.no_grad():
                for parameter, master in self._copies():
                    parameter.copy_(master)
        self.forget()
        return Step(norm, skipped)

    def state(self, keep: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return (tensors by name, numbers) from which `restore` goes on exactly.

        To be called in all processes where the model is sharded; not to `keep` gives no tensors.
        """
        tensors = {
            f"{i}.{name}": value
            for i, moments in self.adam.state_dict()["state"].items()
            for name, value in moments.items()
        }
        tensors |= {f"master.{i}": m.detach() for i, (_, m) in enumerate(self._copies())}
        return gathered_on_cpu(tensors, keep), {
            "learning_rates": [group["lr"] for group in self.adam.param_groups],
            "num_skipped": self.num_skipped,
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a `state`; the model's own parameters are restored elsewhere."""
        masters = [master for pairs in self._pairs for _, master in pairs]
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            if number != "master":
                own = tensor if name == "step" else spread_like(tensor, masters[int(number)])
                moments.setdefault(int(number), {})[name] = own
        self.adam.load_state_dict({**self.adam.state_dict(), "state": moments})
        with torch.no_grad():
            for i, (_, master) in enumerate(self._copies()):
                master.copy_(spread_like(tensors[f"master.{i}"], master))
        for group, rate in zip(self.adam.param_groups, numbers["learning_rates"], strict=True):
            group["lr"] = rate
        self.num_skipped = numbers["num_skipped"]

    def _copies(self) -> list[tuple[Parameter, Parameter]]:
        """Return the parameters that have a master apart from themselves, with it."""
        return [pair for pairs in self._pairs for pair in pairs if pair[0] is not pair[1]]

    def _sum_over_processes(self) -> None:
        if self._processes.num_processes == 1:
            return
        for pairs in self._pairs:
            for _, master in pairs:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                if is_sharded(master):  # averaged already, layer by layer
                    master.grad *= self._processes.num_processes
                    continue
                master.grad = reduce(master.grad, reduction="sum")


def _master(parameter: Parameter) -> Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return Parameter(parameter.detach().float())
