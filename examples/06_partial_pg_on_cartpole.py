"""Partial policy gradients outside dialogue: how many rewards must a step of CartPole answer for?

    python examples/06_partial_pg_on_cartpole.py --credits kstep:1 kstep:5 kstep:20 full

Every reward of CartPole is 1 until the pole falls, so the next reward alone teaches nothing: what
counts is how long it stands. agents.sb3.PartialPG is a Stable-Baselines3 algorithm; saving,
callbacks, VecNormalize and the rest work as they do there.
"""

import argparse
import time

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from agents.sb3 import PartialPG

LIMIT = {"max_episode_steps": 200}


def main() -> None:
    """Learn with each credit from the same number of steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--credits", nargs="+", default=["kstep:1", "kstep:5", "kstep:20", "full"])
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for credit in options.credits:
        envs = make_vec_env("CartPole-v1", n_envs=4, seed=options.seed, env_kwargs=LIMIT)
        agent = PartialPG(
            "MlpPolicy",
            envs,
            credit=credit,
            n_steps=1024,  # holds several of the longest episodes
            learning_rate=3e-3,
            seed=options.seed,
            device="cpu",
        )
        started = time.perf_counter()
        agent.learn(options.steps)
        speed = agent.num_timesteps / (time.perf_counter() - started)
        held_out = make_vec_env("CartPole-v1", n_envs=8, seed=1_000, env_kwargs=LIMIT)
        mean, spread = evaluate_policy(agent, held_out, n_eval_episodes=32, deterministic=False)
        shown = f"{mean:5.0f} +- {spread:3.0f} of {LIMIT['max_episode_steps']}"
        print(f"{credit:10s} {shown}   {speed:,.0f} steps/s", flush=True)


if __name__ == "__main__":
    main()
