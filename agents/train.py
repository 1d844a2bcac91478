"""Train one agent into a run folder: metrics as it learns, the agent at the end.

ppg train --domain therapy --credit kstep:3
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import gymnasium as gym

from .compare import ENV_ID
from .loading import load_policy
from .ppg import PPGAgent
from .runs import RunFolder


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, for how long."""

    domain: str = "chatting"
    """Domain of PersonaDialogue-v0."""
    credit: str = "kstep:3"
    """Which rewards a turn answers for: full, greedy, kstep:K, segment, segment:N, discounted:G."""
    model: str = "nano"
    """The language model to start from: "nano", a folder, or a Hugging Face name."""
    run: str = "runs/train"
    """Run folder, new or empty."""
    total_timesteps: int = 10_240
    """Turns to learn from (1 timestep = 1 turn)."""
    episodes: int = 64
    """Dialogues an update."""
    group_size: int = 8
    """Dialogues that share persona, opening and partner seed."""
    learning_rate: float = 3e-4
    """Of AdamW at the start; falls linearly."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the initial model."""
    personas: str = "train"
    """A split of the bundled personas, or the path of a persona file."""
    max_new_tokens: int | None = None
    """Longest line in tokens; None = 32 for nano, 64 otherwise."""
    max_turns: int = 8
    """Agent turns in a dialogue."""
    noise: float = 0.1
    """How often the scripted partner is distracted, a probability."""
    seed: int = 0
    """Seeds dialogues and sampling."""


def train(c: TrainConfig, progress_bar: bool = True) -> PPGAgent:
    """Train an agent; it is saved in RUN/agent, also when learning is interrupted by Ctrl-C."""
    envs = gym.make_vec(
        ENV_ID,
        num_envs=c.episodes,
        domain=c.domain,
        personas=c.personas,
        max_turns=c.max_turns,
        noise=c.noise,
    )
    agent = PPGAgent(
        load_policy(c.model, max_new_tokens=c.max_new_tokens, seed=c.seed),
        envs,
        c.credit,
        learning_rate=c.learning_rate,
        lr_schedule="linear",
        group_size=c.group_size,
        kl_coef=c.kl_coef,
        seed=c.seed,
    )
    folder = RunFolder(c.run, {name: v for name, v in asdict(c).items() if name != "run"})
    if folder.result is not None:
        raise FileExistsError(f"{c.run} holds a finished run; choose another folder.")
    folder.restart()
    try:
        agent.learn(
            c.total_timesteps,
            callback=lambda learner: folder.log(learner.log),
            progress_bar=progress_bar,
        )
    finally:
        if agent.num_updates:
            agent.save(folder.agent)
    folder.finish({"num_timesteps": agent.num_timesteps, "last": agent.log})
    return agent
