"""What test_offline.py lets two processes learn from a log, and lets one process learn to compare.

accelerate launch --multi_gpu --num_processes 2 --main_process_port 0
tests/two_offline_processes.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import tiny_policy

from agents import PPGAgent
from agents.sharding import gathered

SCENARIOS: dict[str, dict[str, Any]] = {
    # Seven dialogues: the second process has one less in each step, in the last one none.
    "baseline": {"baseline": "leave_one_out", "min_weight": None, "sft_coef": 2.0, "batch_size": 3},
    "importance": {"importance": True, "max_importance": 2.0, "epochs": 2, "batch_size": 4},
    "early stop": {"method": "sft", "epochs": 9, "batch_size": 7, "patience": 1},
    "no room": {"batch_size": 2, "epochs": 4},
    # Each holds half of the model, so that one without a dialogue has to read along.
    "sharded": {"sft_coef": 0.5, "batch_size": 3},
}


def learn(
    scenario: str, folder: Path, shard: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Learn from the folder's log; return weights and first moments, and the history."""
    policy = tiny_policy()
    if scenario == "no room":
        policy.network.context_length = 60  # some dialogues have no line that fits
    settings = dict(SCENARIOS[scenario])
    agent = PPGAgent(
        policy,
        None,
        "kstep:2",
        learning_rate=0.01 if scenario == "early stop" else 1e-3,
        kl_coef=0.1 if scenario in ("importance", "sharded") else 0.0,
        shard=shard and scenario == "sharded",
        max_grad_norm=1e9,
        token_budget=400,
        seed=1,
    )
    first: dict[str, torch.Tensor] = {}

    def note(learner: PPGAgent) -> None:
        if learner.num_updates == 1:
            tensors, _ = learner.optimization.state()
            if scenario != "sharded":  # parameters come in another order there
                first.update({k: v.clone() for k, v in tensors.items() if k.endswith("exp_avg")})

    agent.learn_offline(
        folder / "log.jsonl", validation=folder / "held_out.jsonl", callback=note, **settings
    )
    weights = {n: gathered(p.detach()) for n, p in agent.policy.model.named_parameters()}
    return {**weights, **first}, {
        "history": agent.history,
        "processes": agent.processes.num_processes,
    }


def main(folder: Path) -> None:
    """Learn all scenarios and write what came of it."""
    rank = int(os.environ["RANK"])
    for scenario in SCENARIOS:
        own = folder / f"rank {rank}" / scenario
        own.mkdir(parents=True)
        tensors, record = learn(scenario, folder, shard=True)
        save_file(tensors, own / "tensors.safetensors")
        (own / "record.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
