"""What resumes a run: all that an agent's learning needs to go on, written and read back.

    agent.learn(10_000, callback)       # which calls agent.checkpoint("checkpoints")
    ...                                 # killed; the same agent is made again
    if agent.restore("checkpoints"):
        agent.learn()                   # to the old goal

Here is what a checkpoint of an agent holds; checkpoint.py sees to it that it is whole.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from .checkpoint import (
    CheckpointError,
    checkpoints,
    random_states,
    read_checkpoint,
    restore_random_states,
    write_checkpoint,
)
from .lm_policy import LMPolicy
from .optimization import Optimization
from .sharding import gathered, gathered_on_cpu, spread_like


class Resumable(ABC):
    """Gives an agent `checkpoint` and `restore`.

    The agent sets the attributes below and says what it is (`_origin`) and what it trains
    (`_trained`).
    """

    policy: LMPolicy
    optimization: Optimization
    processes: PartialState
    num_timesteps: int
    num_updates: int
    log: dict[str, float]
    history: list[dict[str, float]]
    _span: tuple[int, int]  # num_timesteps at the start and at the goal of `learn`
    _skips_in_a_row: int

    @abstractmethod
    def _origin(self) -> dict[str, Any]:
        """Return what makes this agent this agent, as JSON; its settings under "settings"."""

    @abstractmethod
    def _trained(self) -> dict[str, torch.nn.Module]:
        """Return all that learns, by name."""

    def checkpoint(
        self, folder: str | Path, keep: int = 2, data: Mapping[str, str] | None = None
    ) -> Path | None:
        """Write all that learning needs to go on bit for bit; see checkpoint.py.

        It holds trained weights, the optimizer, every random state, counters and the goal of
        `learn`. Environments have no state between two updates: each starts with a reset, seeded by
        agent and update. To be called from a callback, in all processes; the first one writes.

        Args:
            folder: of all checkpoints of a run.
            keep: how many to keep.
            data: hashes of what the run reads, for the manifest.

        Returns:
            The checkpoint; None in the other processes.

        Raises:
            OSError: it could not be written; earlier ones are untouched.
        """
        states = gather_object([random_states()])
        writes = self.processes.is_main_process
        weights = gathered_on_cpu(self._weights(), writes)
        optimizer = self.optimization.state(writes)
        place = None
        if self.processes.is_main_process:
            place = write_checkpoint(
                folder,
                self.num_updates,
                lambda path: self._write_state(path, weights, optimizer, states),
                self._identity(),
                keep,
                data,
            )
        self.processes.wait_for_everyone()
        return place

    def restore(self, folder: str | Path) -> bool:
        """Go on from the newest checkpoint in `folder`; False if there is none.

        This agent must be made as the one that wrote it was; `learn()` then goes on to its goal.

        Raises:
            CheckpointError: the checkpoint is damaged or of another run; this agent is unchanged.
        """
        found = checkpoints(folder)
        newest = gather_object([found[-1].name if found else "none"])
        if len(set(newest)) > 1:
            raise CheckpointError(
                f"The processes find different checkpoints in {folder} ({', '.join(newest)}): put "
                "the run folder on a file system that all machines share."
            )
        if not found:
            return False
        read_checkpoint(found[-1], self._identity())
        self._read_state(found[-1])
        return True

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree in; how much is read at a time is no part of it."""
        origin = self._origin()
        kept = {name: v for name, v in origin["settings"].items() if name != "token_budget"}
        frozen = [p for p in self.policy.model.parameters() if not p.requires_grad]
        return {
            **origin,
            "settings": kept,
            "num_processes": self.processes.num_processes,
            "frozen_weights": _sample_hash(frozen),
        }

    def _write_state(
        self,
        path: Path,
        weights: dict[str, torch.Tensor],
        optimizer: tuple[dict[str, torch.Tensor], dict[str, Any]],
        states: list[dict[str, Any]],
    ) -> None:
        save_file(weights, path / "model.safetensors")
        tensors, counters = optimizer
        save_file(tensors, path / "optimizer.safetensors")
        state = {
            "num_timesteps": self.num_timesteps,
            "num_updates": self.num_updates,
            "span": self._span,
            "skips_in_a_row": self._skips_in_a_row,
            "log": self.log,
            "history": self.history,
            "policy_seeds": self.policy.num_seeds_spawned,
            "optimizer": counters,
            "random_states": states,
        }
        (path / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")

    def _read_state(self, path: Path) -> None:
        weights, own = load_file(path / "model.safetensors"), self._weights()
        for name in sorted(weights.keys() | own.keys()):
            there, here = _kind_of_tensor(weights.get(name)), _kind_of_tensor(own.get(name))
            if there != here:
                raise CheckpointError(
                    f"{path} is a checkpoint of another model: {name} is {there} there and {here} "
                    "here. Choose another run folder, or the model that it was made with."
                )
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(spread_like(weights[name], tensor))
        self.optimization.restore(load_file(path / "optimizer.safetensors"), state["optimizer"])
        self.num_timesteps, self.num_updates = state["num_timesteps"], state["num_updates"]
        self._span = tuple(state["span"])
        self._skips_in_a_row = state["skips_in_a_row"]
        self.log, self.history = state["log"], state["history"]
        self.policy.num_seeds_spawned = state["policy_seeds"]
        restore_random_states(state["random_states"][self.processes.process_index])

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return all trained tensors by name."""
        return {
            f"{module}.{name}": parameter.detach()
            for module, trained in self._trained().items()
            for name, parameter in trained.named_parameters()
            if parameter.requires_grad
        }


def _sample_hash(tensors: Sequence[torch.Tensor]) -> str:
    """Return a hash of some numbers of each tensor: tells other weights, reads little."""
    digest = sha256()
    for tensor in tensors:
        flat = gathered(tensor.detach()).flatten()
        digest.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16] if tensors else ""


def _kind_of_tensor(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
