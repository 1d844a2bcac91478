"""The bundled tiny model: small, able to copy, and wrong in ways that are worth repairing."""

from __future__ import annotations

from functools import cache

import gymnasium as gym
import numpy as np
import pytest

from agents import evaluate_policy
from agents.evaluate import Evaluation
from agents.loading import NANO, load_policy
from ppg_env import DOMAINS, bundled_personas

CASES = [(domain, deterministic) for domain in DOMAINS for deterministic in (False, True)]


@cache
def found(domain: str, deterministic: bool) -> Evaluation:
    envs = gym.make_vec("PersonaDialogue-v0", num_envs=60, domain=domain, personas="test")
    policy = load_policy("nano", seed=0)
    return evaluate_policy(
        envs, policy, episodes_per_persona=4, seed=10_000, deterministic=deterministic
    )


def test_its_files_are_small_and_no_pickles() -> None:
    files = [path for path in NANO.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md", ".py"}


@pytest.mark.slow
@pytest.mark.parametrize(("domain", "deterministic"), CASES)
def test_its_consistency_is_clearly_below_one(domain: str, deterministic: bool) -> None:
    assert found(domain, deterministic).metrics["prompt_to_line"].high < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("domain", "deterministic"), CASES)
def test_its_consistency_falls_over_the_turns(domain: str, deterministic: bool) -> None:
    assert found(domain, deterministic).metrics["prompt_to_line_drift"].high < 0


@pytest.mark.slow
@pytest.mark.parametrize(("domain", "deterministic"), CASES)
def test_it_copies_facts_far_above_chance_where_nobody_tempts_it(
    domain: str, deterministic: bool
) -> None:
    world = DOMAINS[domain]
    personas = {world.system_prompt(p): p for p in bundled_personas(domain, "test")}
    true = total = 0
    for messages in found(domain, deterministic).transcripts:
        persona = personas[messages[0]["content"]]
        lines = [message["content"] for message in messages[1:]]
        for partner, agent in zip(lines[::2], lines[1::2], strict=False):
            presumed = world.lexicon.read(partner).about_listener
            if all(persona.facts.get(c.attribute) == c.value for c in presumed):
                understood = world.interpret(persona, partner, agent)
                true += len(understood.true_claims)
                total += len(understood.true_claims) + len(understood.false_claims)
    assert total > 100
    assert true / total > 0.8  # by chance about one in ten


@pytest.mark.slow
def test_it_yields_to_leading_questions_more_at_the_end_than_at_the_start() -> None:
    for domain in DOMAINS:
        consistency_T = found(domain, False).part_T["prompt_to_line"]
        assert np.nanmean(consistency_T[:3]) > np.nanmean(consistency_T[-3:]) + 0.1
