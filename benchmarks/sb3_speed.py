"""Environment steps per CPU second: PartialPG beside Stable-Baselines3's A2C, in turns in one run.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.sb3_speed

Same environment, time limit of 20 steps, parallel environments and network. A2C runs with its own
n_steps=5 and with PartialPG's 128; PartialPG with three credits. The ratio of a round is to A2C of
that round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env

from agents.sb3 import PartialPG

NUM_ENVS = 8
CONTENDERS: dict[str, Callable[[Any], Any]] = {
    "A2C, n_steps=5": lambda env: A2C("MlpPolicy", env, device="cpu", seed=0),
    "A2C, n_steps=128": lambda env: A2C("MlpPolicy", env, n_steps=128, device="cpu", seed=0),
    "PartialPG kstep:5": lambda env: PartialPG("MlpPolicy", env, "kstep:5", device="cpu", seed=0),
    "PartialPG full": lambda env: PartialPG("MlpPolicy", env, "full", device="cpu", seed=0),
    "PartialPG full, value": lambda env: PartialPG(
        "MlpPolicy", env, "full", "value", True, device="cpu", seed=0
    ),
}


def steps_per_second(make: Callable[[Any], Any], env_id: str, steps: int) -> float:
    """Return environment steps per second of CPU time while learning."""
    agent = make(make_vec_env(env_id, NUM_ENVS, 0, env_kwargs={"max_episode_steps": 20}))
    started = time.process_time()
    agent.learn(steps)
    return float(agent.num_timesteps / (time.process_time() - started))


def main() -> None:
    """Measure in rounds and print medians with the range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=20_480)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    speed_CR = np.array(
        [
            [steps_per_second(make, options.env, options.steps) for make in CONTENDERS.values()]
            for _ in range(options.rounds)
        ]
    ).T
    print(f"| {options.env}, {NUM_ENVS} parallel | steps/s | to A2C, n_steps=5 | n_steps=128 |")
    print("|---|---|---|---|")
    for name, speed_R in zip(CONTENDERS, speed_CR, strict=True):
        ratios = [
            f"{np.median(ratio_R):.2f} ({ratio_R.min():.2f}-{ratio_R.max():.2f})"
            for ratio_R in (speed_R / speed_CR[0], speed_R / speed_CR[1])
        ]
        print(f"| {name} | {np.median(speed_R):,.0f} | {ratios[0]} | {ratios[1]} |")


if __name__ == "__main__":
    main()
