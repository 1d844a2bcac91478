"""What test_processes.py lets two processes learn, and lets one process learn to compare.

accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 tests/two_processes.py FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import tiny_policy
from tiny_worlds import EchoDialogue, EchoDialogues

from agents import PPGAgent, PPOAgent
from agents.checkpoint import CheckpointError
from agents.conversation import Conversation
from agents.train import TrainConfig, train

NUM_SLOTS = 8
SCENARIOS: dict[str, dict[str, Any]] = {
    # So few tokens at a time that the two processes need different numbers of passes.
    "leave one out": {"credit": "full", "group_size": 2, "token_budget": 500},
    "batch mean": {"credit": "kstep:2", "group_size": 4, "baseline": "batch_mean"},
    "epochs": {"group_size": 2, "n_epochs": 3, "kl_coef": 0.1, "ent_coef": 0.01},
    "critic": {"n_epochs": 2, "critic_learning_rate": 1e-2},
}


class Uneven(EchoDialogue):
    """Ends early after some lines and leaves others without a score, by their length."""

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Say a line and hear the answer."""
        messages, _, over, cut, info = super().step(action)
        reward = float("nan") if len(action) % 5 == 1 else len(action) / 10
        return messages, reward, over or len(action) % 3 == 0, cut, info


class UnevenDialogues(EchoDialogues):
    """Several of them; their groups are numbered from 0 in each process."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs, max_turns=6)
        self.envs = [Uneven(max_turns=6) for _ in range(num_envs)]


def make_agent(scenario: str, num_slots: int) -> PPGAgent:
    """Return an agent with this process's share of the slots."""
    kind = PPOAgent if scenario == "critic" else PPGAgent
    settings = {"learning_rate": 1e-3, "max_grad_norm": 1e9, "seed": 1, **SCENARIOS[scenario]}
    return kind(tiny_policy(), UnevenDialogues(num_slots), **settings)


def learn(
    scenario: str, num_slots: int, folder: Path | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Learn from two batches; return weights and first moments, and what else is compared."""
    agent = make_agent(scenario, num_slots)
    passes, moments, loss, written = 0, {}, agent.loss, None

    def count(micro: Any) -> Any:
        nonlocal passes
        passes += 1
        return loss(micro)

    def note(learner: PPGAgent) -> bool:
        nonlocal written
        if learner.num_updates == 1:
            tensors, _ = learner.optimization.state()
            moments.update({k: v.clone() for k, v in tensors.items() if k.endswith("exp_avg")})
            if folder is not None:
                written = learner.checkpoint(folder / "checkpoints")
                learner.save(folder / "agent")
        return learner.num_updates < 2

    agent.loss = count  # type: ignore[method-assign]
    agent.learn(10_000, note)
    refusal = ""
    if folder is not None:
        try:
            make_agent(scenario, num_slots).restore(folder / "checkpoints")
        except CheckpointError as error:
            refusal = str(error)
    tensors = {name: p.detach() for name, p in agent.policy.model.named_parameters()}
    record = {
        "history": agent.history,
        "passes": passes,
        "wrote": written is not None,
        "processes": agent.processes.num_processes,
        "refusal": refusal,
    }
    return {**tensors, **moments}, record


def main(folder: Path) -> None:
    """Learn all scenarios, write what came of it; then train one run, or be killed in it."""
    rank = int(os.environ["RANK"])
    kill = folder / "kill"
    config = TrainConfig(**json.loads((folder / "config.json").read_text()))
    if kill.exists():
        if rank == 1:
            reply, left = Conversation.reply, int(kill.read_text())

            def reply_and_die(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return reply(*args, **kwargs)

            Conversation.reply = reply_and_die  # type: ignore[method-assign]
        train(config, progress_bar=False)
        return
    records = {}
    for scenario in SCENARIOS:
        own = folder / f"rank {rank}" / scenario
        own.mkdir(parents=True)
        tensors, records[scenario] = learn(scenario, NUM_SLOTS // 2, own)
        save_file(tensors, own / "tensors.safetensors")
    (folder / f"rank {rank}" / "records.json").write_text(json.dumps(records))
    train(config, progress_bar=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
