"""Stable-Baselines3's PPO learns a dialogue as a menu of acts, and comes near the exact optimum.

    python examples/05_sb3_on_dialogue.py --domain education --steps 30000

The agent chooses what to do (answer, evade, go deep ...), the environment speaks it in the
persona's words, and the observation is the dialogue as a vector of hashed words. What the best
policy earns is computed exactly by dynamic programming on the process of acts.
"""

import argparse
import time

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

import ppg_env
from ppg_env import ActProcess, DiscreteReply, EmbeddedObservation

TURNS, NOISE = 8, 0.1


def make(domain: str, personas: str) -> gym.Env:
    """Return the environment for learners of numbers."""
    settings = {"domain": domain, "personas": personas, "max_turns": TURNS, "noise": NOISE}
    env = gym.make("PersonaDialogue-v0", **settings)
    return EmbeddedObservation(DiscreteReply(env))


def optimum(domain: str, personas: str) -> float:
    """Return the best mean reward per turn, averaged over the personas."""
    world = ppg_env.get_domain(domain)
    best = [
        ActProcess(dynamics, TURNS, NOISE).optimal_value()
        for dynamics in map(world.dynamics, ppg_env.bundled_personas(domain, personas))
    ]
    return float(np.mean(best))


def evaluate(agent: PPO, env: gym.Env, dialogues: int) -> float:
    """Return the mean reward per turn of the most likely acts."""
    rewards = []
    for seed in range(dialogues):
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            act, _ = agent.predict(observation, deterministic=True)
            observation, reward, over, _, _ = env.step(act)
            rewards.append(reward)
    return float(np.mean(rewards))


def main() -> None:
    """Learn with training personas, evaluate with others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--domain", default="education", choices=["chatting", "education", "therapy"]
    )
    parser.add_argument("--steps", type=int, default=30_000, help="therapy needs about 200,000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    envs = make_vec_env(lambda: make(options.domain, "train"), n_envs=16, seed=options.seed)
    agent = PPO(
        "MlpPolicy",
        envs,
        learning_rate=lambda remaining: 1e-3 * remaining,
        n_steps=128,
        batch_size=512,
        n_epochs=8,
        gamma=1.0,
        ent_coef=0.005,
        seed=options.seed,
        device="cpu",
    )
    held_out, best = make(options.domain, "test"), optimum(options.domain, "test")
    before, started = evaluate(agent, held_out, 200), time.perf_counter()
    agent.learn(options.steps)
    seconds = time.perf_counter() - started
    after = evaluate(agent, held_out, 400)
    print(f"{options.domain}: {agent.num_timesteps:,} steps in {seconds:.0f} s")
    print(f"reward per turn on held-out personas {before:.3f} -> {after:.3f}")
    print(f"exact optimum {best:.3f}, share {after / best:.3f}")


if __name__ == "__main__":
    main()
