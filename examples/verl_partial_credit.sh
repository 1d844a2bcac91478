#!/usr/bin/env bash
# A language model learns persona dialogue with kstep:3 on verl, on a Ray cluster of NNODES machines.
# Run in this repository's root, in an environment with pip install -e ".[verl]" and vLLM. With several
# machines the repository, the environment and RUN lie in a folder that all of them see by the same path.
#
#   head machine:    ray start --head --port=6379
#   other machines:  ray start --address=HEAD_ADDRESS:6379
#   head machine:    NNODES=2 GPUS=8 MODEL=Qwen/Qwen2.5-0.5B-Instruct bash examples/verl_partial_credit.sh
#
# More settings of verl go behind the command: bash examples/verl_partial_credit.sh trainer.save_freq=20
set -euo pipefail
: "${NNODES:=1}" "${GPUS:=8}" "${MODEL:=Qwen/Qwen2.5-0.5B-Instruct}" "${RUN:=runs/verl}"

# One row = one group of dialogues: the seed chooses persona, opening and partner.
mkdir -p "$RUN"
RUN=$(cd "$RUN" && pwd) # whoever reads the files may be on another machine, in another folder
python - "$RUN" <<'PYTHON'
import sys

import pandas

sets = (("train", "ppg_dialogue", 0, 100_000), ("test", "ppg_held_out", 1_000_000, 128))
for name, agent_loop, first, number in sets:
    pandas.DataFrame(
        {
            "prompt": [[{"role": "user", "content": "-"}]] * number,  # the environment makes them
            "agent_name": agent_loop,
            "data_source": "PersonaDialogue-v0",
            "reward_model": [{"style": "environment", "ground_truth": ""}] * number,
            "extra_info": [{"index": i, "seed": first + i} for i in range(number)],
        }
    ).to_parquet(f"{sys.argv[1]}/{name}.parquet")
PYTHON

modules=agents.integrations.verl # every process of the cluster imports it, which registers the estimators
export VERL_USE_EXTERNAL_MODULES=$modules

settings=(
    # which rewards a turn answers for
    algorithm.adv_estimator=ppg_kstep
    +algorithm.ppg.k=3
    +algorithm.ppg.scale=mean_window
    +algorithm.ppg.max_turns=8
    # one update a batch, summed over a dialogue's tokens: the policy gradient
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum
    data.train_batch_size=32
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.optim.lr=1e-6
    # dialogues
    actor_rollout_ref.rollout.agent.agent_loop_config_path=$PWD/examples/verl_dialogues.yaml
    data.max_prompt_length=1024
    data.max_response_length=2048
    data.train_files="$RUN/train.parquet"
    data.val_files="$RUN/test.parquet"
    # model and machines
    actor_rollout_ref.model.path="$MODEL"
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.actor.use_dynamic_bsz=true
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$GPUS"
    trainer.default_local_dir="$RUN/checkpoints"
    trainer.logger=[console,tensorboard]
    trainer.total_epochs=1
    trainer.save_freq=50
    trainer.test_freq=10
    +ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=$modules
)
exec python -m verl.trainer.main_ppo "${settings[@]}" "$@"
