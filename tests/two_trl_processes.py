"""What test_trl_integration.py lets two processes train with TRL.

accelerate launch --multi_gpu --num_processes 2 tests/two_trl_processes.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_worlds import EchoDialogues
from trl import GRPOConfig

from agents.integrations.trl import PartialCreditTrainer
from agents.integrations.trl_rollout import DialogueRollout

SLOTS, GROUP, LINE, TURNS, CREDIT = 4, 2, 6, 4, "kstep:2"


class FirstIsShort(EchoDialogues):
    """In the first process dialogues have two turns, in the others up to `TURNS`."""

    def __init__(self, short: bool) -> None:
        super().__init__(SLOTS, max_turns=2 if short else TURNS)
        self.seeds: list[Any] = []

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        """Start all dialogues and write their seed down."""
        self.seeds.append(seed)
        return super().reset(seed=seed, options=options)


def main(folder: Path) -> None:
    """Train for two steps and write what reached each process's loss."""
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=SLOTS,
        num_generations=GROUP,
        max_completion_length=LINE,
        max_steps=2,
        learning_rate=1e-2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    rank = args.process_index
    envs = FirstIsShort(short=rank == 0)
    rollout = DialogueRollout(envs)
    records: list[dict[str, Any]] = []

    asked: list[int] = []

    class Watched(PartialCreditTrainer):
        """Writes down what is generated, what reaches the loss, and the rewards."""

        def _generate_single_turn(self, prompt_ids: list[Any], *rest: Any, **more: Any) -> Any:
            asked.append(len(prompt_ids))
            return super()._generate_single_turn(prompt_ids, *rest, **more)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            batch = rollout.batch
            assert batch is not None
            records.append(
                {
                    "advantages": inputs["advantages"].clone(),
                    "mask": inputs["completion_mask"] * inputs["tool_mask"],
                    "rewards": torch.as_tensor(batch.reward_BT),
                    "alive": torch.as_tensor(batch.alive_BT),
                    "openings": [
                        chat[0]["content"] + chat[1]["content"] for chat in batch.transcripts
                    ],
                }
            )
            return super().compute_loss(model, inputs, *rest, **more)

    trainer = Watched(
        tiny_model("llama"),
        rollout_func=rollout,
        credit=CREDIT,
        baseline="batch_mean",
        max_turns=TURNS,
        args=args,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    weights = {name: value.detach().cpu() for name, value in trainer.model.state_dict().items()}
    found = {"records": records, "weights": weights, "seeds": envs.seeds, "asked": asked}
    torch.save(found, folder / f"rank {rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
