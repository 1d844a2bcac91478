"""What the data-size curve says an endless log teaches: speakers' habits, and what they earn."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents import ScriptedPolicy, collect_rollouts, load_policy
from benchmarks.offline_curve import endless, habits
from ppg_env import DOMAINS, ActProcess, bundled_personas


def played(policy: Any, domain: str, number: int = 8) -> Any:
    envs = gym.make_vec("PersonaDialogue-v0", num_envs=number, domain=domain, personas="train")
    return collect_rollouts(envs, policy, seed=0)


@pytest.mark.parametrize("domain", ["chatting", "education", "therapy"])
def test_who_always_evades_has_that_habit_and_teaches_nothing(domain: str) -> None:
    records = played(
        ScriptedPolicy([f"That is hard to say, {i}." for i in range(8)]), domain
    ).records()
    process = ActProcess(DOMAINS[domain].dynamics(bundled_personas(domain)[0]))
    spoke_TSA = habits(records, domain, [process])
    np.testing.assert_allclose(spoke_TSA[:, :, process.acts.index("evade")], 1.0)
    assert spoke_TSA.shape == process.uniform_policy().shape
    assert endless(records, domain, ["greedy", "full", "sft"]) == pytest.approx(
        {"greedy": 0.0, "full": 0.0, "sft": 0.0}
    )


@pytest.mark.parametrize("domain", ["chatting", "education", "therapy"])
def test_the_habits_of_the_bundled_model_earn_what_it_does_and_teach_more(domain: str) -> None:
    batch = played(load_policy("nano", seed=0), domain, 64)
    found = endless(batch.records(), domain, ["greedy", "kstep:3", "sft"])
    earned = float(batch.reward_BT[batch.alive_BT].mean())
    assert found["sft"] == pytest.approx(earned, abs=0.03)  # its standard error is about .01
    assert min(found["greedy"], found["kstep:3"]) > earned + 0.1
