"""A language model learns persona dialogue with TRL's GRPOTrainer and a credit for each turn.

    pip install -e ".[trl]"
    python examples/trl_partial_credit.py --steps 2        # the bundled tiny model, a CPU will do
    accelerate launch examples/trl_partial_credit.py --model Qwen/Qwen2.5-0.5B-Instruct

Two machines with 8 GPUs each, the same command on both with RANK 0 and 1 (and
`--use_deepspeed` or `--use_fsdp`, with their settings, as for any script of Accelerate's):

    accelerate launch --config_file examples/accelerate_two_machines.yaml --machine_rank RANK \\
        examples/trl_partial_credit.py --model Qwen/Qwen2.5-7B-Instruct --lora --vllm

What is exact and what is not: docs/engines.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

import agents
from agents.integrations.trl import PartialCreditTrainer

NANO = str(Path(agents.__file__).parent / "nano")

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=NANO, help="a folder, or a name on Hugging Face")
parser.add_argument("--domain", default="therapy")
parser.add_argument("--credit", default="kstep:3", help="greedy, kstep:3, segment:2, full, ...")
parser.add_argument("--steps", type=int, default=100, help="batches of dialogues")
parser.add_argument("--dialogues", type=int, default=16, help="a process plays in a batch")
parser.add_argument("--learning-rate", type=float, default=1e-5)
parser.add_argument("--lora", action="store_true", help="train an adapter of PEFT's")
parser.add_argument("--vllm", action="store_true", help="generate with vLLM in the same process")
parser.add_argument("--out", default="runs/trl")
options = parser.parse_args()

peft_config = None
if options.lora:
    from peft import LoraConfig

    peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")

trainer = PartialCreditTrainer(
    AutoModelForCausalLM.from_pretrained(options.model),
    processing_class=AutoTokenizer.from_pretrained(options.model),
    envs=gym.make_vec(
        "ppg_env:PersonaDialogue-v0", num_envs=options.dialogues, domain=options.domain
    ),
    credit=options.credit,
    peft_config=peft_config,
    args=GRPOConfig(
        options.out,
        per_device_train_batch_size=options.dialogues,
        num_generations=8,  # dialogues in a group
        max_completion_length=32,  # tokens in a line
        loss_type="dr_grpo",  # the policy gradient, divided by max_completion_length
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        use_vllm=options.vllm,
        vllm_mode="colocate",
        logging_steps=1,
        report_to="none",
    ),
)
trainer.train()
trainer.save_model(options.out)
print(f"{options.out} now holds the model; ppg evaluate reads it.")
