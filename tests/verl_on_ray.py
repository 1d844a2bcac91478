"""What test_verl_integration.py lets verl do on a Ray cluster of one machine; prints it as JSON.

Dialogues go into verl's queue as its agent loops put them there, and verl's trainer, in an actor,
takes them out and computes advantages.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import ray
from omegaconf import OmegaConf

MASKS = [[1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1], [1, 0, 1, 1, 0, 1]]
REWARDS = [[0.5, 0.25, 1.0], [0.3, 0.9], [0.7], [0.1, 0.2, 0.4]]
UIDS = ["p", "p", "q", "q"]
KEYS = [f"{uid}_{session}_0" for session, uid in enumerate(UIDS)]
STORE = {"storage_backend": "SimpleStorage", "SimpleStorage": {"num_data_storage_units": 1}}
CONFIG = {
    "algorithm": {
        "adv_estimator": "ppg_kstep",
        "ppg": {"k": 2},
        "use_kl_in_reward": False,
        "gamma": 1.0,
        "lam": 1.0,
    },
    "actor_rollout_ref": {"rollout": {"n": 2}},
}


class Dialogues(list[str]):
    """The keys of a batch in verl's queue."""

    keys, partition_id = KEYS, "train"


@ray.remote
class Trainer:
    """The process in which verl's trainer computes advantages."""

    def agent_loop(self) -> str:
        """Return the class of our agent loop: this process was told to import it, no more."""
        import verl  # noqa: F401
        from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

        return str(_agent_loop_registry["ppg_dialogue"]["_target_"])

    def advantages(self) -> list[list[float]]:
        """Return the advantages of each dialogue's tokens."""
        import transfer_queue
        from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
        from verl.trainer.ppo.v1.trainer_base import PPOTrainer
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        from agents.integrations.verl import TurnRewardsOutput

        transfer_queue.init(OmegaConf.create({"backend": STORE}))
        fields: list[dict[str, Any]] = []
        for mask, rewards, uid in zip(MASKS, REWARDS, UIDS, strict=True):
            played = TurnRewardsOutput(
                prompt_ids=[5, 6],
                response_ids=[7] * len(mask),
                response_mask=mask,
                turn_rewards=rewards,
                reward_score=sum(rewards),
                metrics=AgentLoopMetrics(),
            )
            fields.append({**played.as_dict(), "uid": uid})
            del fields[-1]["metrics"]
        transfer_queue.kv_batch_put(
            keys=KEYS,
            fields=list_of_dict_to_tensordict(fields),
            tags=[{"status": "success"}] * len(KEYS),
            partition_id="train",
        )
        trainer: Any = SimpleNamespace(config=OmegaConf.create(CONFIG))
        PPOTrainer._compute_advantage(trainer, Dialogues(KEYS), {})
        found = transfer_queue.kv_batch_get(
            keys=KEYS, partition_id="train", select_fields=["advantages"]
        )
        return [row.tolist() for row in found["advantages"].unbind()]


def main() -> None:
    """Start a cluster, compute, stop it."""
    variables = {
        "VERL_USE_EXTERNAL_MODULES": "agents.integrations.verl",
        "PYTHONPATH": os.environ["PYTHONPATH"],
    }
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": variables})
    try:
        trainer = Trainer.remote()
        calls = {"agent_loop": trainer.agent_loop, "advantages": trainer.advantages}
        found = {name: ray.get(call.remote(), timeout=600) for name, call in calls.items()}
        print(json.dumps(found))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
