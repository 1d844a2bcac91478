"""A pilot: some dialogues of one model in one domain, and what their gradients tell.

    pilot = run_pilot(PilotConfig(domain="therapy", episodes=256))
    pilot.suggestions[0].verdict, pilot.diagnoses, pilot.dependence.strength_TT

Nothing is learned. `ppg suggest-k` is this on the command line; with --run its findings become part
of that comparison's report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from .diagnostics import (
    CreditDiagnosis,
    RewardDependence,
    caution,
    gradient_diagnostics,
    reward_dependence,
)
from .loading import load_policy
from .rollout import collect_rollouts
from .suggest import Suggestion, suggest_k
from .train import ENV_ID
from .turn_gradients import turn_gradients

FOLDER = "pilots"
"""Where a run folder keeps the findings of pilots."""


@dataclass(frozen=True)
class PilotConfig:
    """Whose gradients are measured, on how many dialogues."""

    domain: str = "chatting"
    """Domain of PersonaDialogue-v0."""
    agent: str = "nano"
    """Folder of a saved agent or model, a Hugging Face name, or "nano"."""
    episodes: int = 256
    """Dialogues of the pilot."""
    group_size: int = 8
    """Dialogues that share persona, opening and partner seed."""
    update_episodes: tuple[int, ...] = (64, 256, 1024)
    """Dialogues of the updates that are planned; an answer for each."""
    parameters: str = "auto"
    """Whose gradient: "lora", "last_block", "all"; "auto" = the adapter, or the last block."""
    max_turns: int = 8
    """Agent turns in a dialogue."""
    noise: float = 0.1
    """How often the scripted partner is distracted, a probability."""
    partner: str = "scripted"
    """Who speaks with the agent: "scripted", "openai:MODEL@URL", "hf:FOLDER"."""
    judge: str = "rules"
    """Who scores: "rules", "openai:MODEL@URL", "hf:FOLDER", "nli:FOLDER"."""
    seed: int = 0
    """Seeds dialogues and sampling."""
    run: str | None = None
    """Run folder of a comparison in whose report the findings shall appear."""

    def __post_init__(self) -> None:
        if self.group_size < 4 or self.episodes < 2 * self.group_size:
            raise ValueError(
                f"A pilot needs two groups of at least 4 dialogues, got episodes={self.episodes} "
                f"and group_size={self.group_size}."
            )
        if self.episodes % self.group_size:
            raise ValueError(
                f"episodes={self.episodes} must be a multiple of group_size={self.group_size}."
            )


@dataclass(frozen=True)
class Pilot:
    """What a pilot found."""

    config: PilotConfig
    mean_reward: float
    diagnoses: tuple[CreditDiagnosis, ...]
    suggestions: tuple[Suggestion, ...]
    dependence: RewardDependence


def run_pilot(c: PilotConfig, progress_bar: bool = False) -> Pilot:
    """Play the dialogues, measure their gradients, and keep the findings if a run is named.

    Raises:
        ValueError: unknown names; see `turn_gradients`, `reward_dependence`.
    """
    envs = gym.make_vec(
        ENV_ID,
        num_envs=c.episodes,
        domain=c.domain,
        max_turns=c.max_turns,
        noise=c.noise,
        partner=c.partner,
        judge=c.judge,
    )
    policy = load_policy(c.agent, seed=c.seed)
    batch = collect_rollouts(envs, policy, seed=c.seed, options={"group_size": c.group_size})
    gradients = turn_gradients(policy, batch, c.parameters, progress_bar=progress_bar)
    pilot = Pilot(
        config=c,
        mean_reward=float(np.nanmean(batch.reward_BT[batch.alive_BT])),
        diagnoses=tuple(gradient_diagnostics(gradients, seed=c.seed)),
        suggestions=tuple(suggest_k(gradients, c.update_episodes, seed=c.seed)),
        dependence=reward_dependence(gradients),
    )
    if c.run is not None:
        _write(pilot, Path(c.run) / FOLDER / _file_name(c))
    return pilot


def read_pilots(run: str | Path) -> list[Mapping[str, Any]]:
    """Return the findings that a run folder keeps, one object a pilot, as `run_pilot` wrote it.

    Raises:
        ValueError: a file cannot be read.
    """
    found = []
    for file in sorted((Path(run) / FOLDER).glob("*.json")):
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); remove it.") from error
    return found


def pilot_record(pilot: Pilot) -> dict[str, Any]:
    """Return the findings as a JSON object."""
    return {
        "config": asdict(pilot.config),
        "mean_reward": pilot.mean_reward,
        "diagnoses": [asdict(each) for each in pilot.diagnoses],
        "caution": caution(pilot.diagnoses),
        "suggestions": [{**asdict(s), "verdict": s.verdict} for s in pilot.suggestions],
        "dependence": {
            "strength_TT": pilot.dependence.strength_TT.tolist(),
            "lower": asdict(pilot.dependence.lower),
        },
    }


def _file_name(c: PilotConfig) -> str:
    """Return a name that tells pilots of other models and worlds apart."""
    agent = re.sub(r"\W+", "-", c.agent).strip("-")
    return f"{c.domain}-noise-{c.noise:g}-{c.max_turns}-turns-{agent}.json"


def _write(pilot: Pilot, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(pilot_record(pilot), indent=1), encoding="utf-8")
    draft.replace(file)
