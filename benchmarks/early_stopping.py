"""Does the validation loss tell when to stop? Beside it: the reward, and the objective's own loss.

    python -m benchmarks.early_stopping              # 10 minutes on one core

Two logs of chatting: the agent's own dialogues, and dialogues that it finds unlikely, because its
weights were spoiled by noise after they had been said. It learns from the training personas of the
log and is watched on the others; the reward is that of whole dialogues with 40 held-out personas.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import torch

import ppg_env  # noqa: F401  (registers PersonaDialogue-v0)
from agents import (
    PPGAgent,
    collect_rollouts,
    evaluate_policy,
    load_policy,
    parse_dialogue,
    split_by_persona,
)
from agents.logs import LoggedDialogue

ENV_ID = "PersonaDialogue-v0"
SHOWN = (0, 1, 2, 4, 8, 10, 16, 24)


def own_dialogues(number: int) -> tuple[list[LoggedDialogue], list[LoggedDialogue]]:
    """Return what the bundled model says untrained, split by persona."""
    envs: Any = gym.make_vec(ENV_ID, num_envs=50, domain="chatting", personas="train")
    policy, log = load_policy("nano", seed=0), []
    for start in range(0, number, 50):
        log += map(parse_dialogue, collect_rollouts(envs, policy, seed=1000 + start).records())
    return split_by_persona(log, test_share=0.2)


def spoil(policy: Any, share: float) -> None:
    """Add noise of `share` standard deviations to every weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(share * weight.std() * torch.randn(weight.shape, generator=generator))


def watched(name: str, policy: Any, learning_rate: float, epochs: int, share: float) -> list[str]:
    """Learn and return the rows of the table."""
    train, watch = own_dialogues(200)
    train = train[: int(share * len(train))]
    held_out: Any = gym.make_vec(ENV_ID, num_envs=40, domain="chatting", personas="test")
    people = held_out.unwrapped.persona_ids[:40]
    agent = PPGAgent(policy, None, "greedy", learning_rate=learning_rate, seed=0)
    rewards: dict[int, float] = {}
    losses: dict[int, float] = {0: 0.0}
    likelihoods: dict[int, float] = {}

    def note(learner: PPGAgent) -> None:
        epoch = int(learner.log["offline/epoch"]) if learner.history else 0
        if learner.history and "offline/validation_loss" not in learner.log:
            return
        losses[epoch] = learner.log.get("offline/validation_loss", 0.0)
        likelihoods[epoch] = learner.offline_loss(watch)
        if epoch in SHOWN:
            found = evaluate_policy(held_out, learner.policy, personas=people, seed=1)
            rewards[epoch] = found.metrics["reward"].mean

    note(agent)
    agent.learn_offline(train, validation=watch, epochs=epochs, baseline="log_mean", callback=note)
    shown = [epoch for epoch in SHOWN if epoch <= epochs]

    def row(title: str, values: dict[int, float], digits: int, kept: str = "") -> str:
        cells = [f"{values[epoch]:.{digits}f}" for epoch in shown]
        return f"| {name} | {title} | {' | '.join(cells)} | {kept} |"

    best, likeliest = (min(found, key=lambda e: found[e]) for found in (losses, likelihoods))
    heading = f"| | pass | {' | '.join(map(str, shown))} | lowest after |"
    return [
        heading,
        "|---" * (len(shown) + 3) + "|",
        row("reward", rewards, 3),
        row("validation loss", losses, 2, f"{best}"),
        row("-(1/B) sum w log pi, w = rewards", likelihoods, 1, f"{likeliest}"),
        "",
    ]


def main() -> None:
    """Print both tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    print("\n".join(watched("own log", load_policy("nano", seed=0), 3e-4, 10, 1.0)), flush=True)
    stranger = load_policy("nano", seed=0)
    spoil(stranger, 0.5)
    print("\n".join(watched("foreign log", stranger, 1e-3, 24, 0.2)), flush=True)


if __name__ == "__main__":
    main()
