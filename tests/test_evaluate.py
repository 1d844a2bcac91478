"""Evaluation: intervals that cover, personas that were asked for, nothing shared with training."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tiny_models import tiny_policy

import ppg_env
from agents import PPGAgent, RandomPolicy, ScriptedPolicy, evaluate_policy
from agents.evaluate import Evaluation
from agents.policy import Messages
from agents.statistics import Estimate, bootstrap_mean, drift_slopes, paired_difference

LINES = ["I like tea.", "I have a dog.", "That is a good question.", "No, I never did."]


def worlds(num_envs: int = 4, **settings: Any) -> gym.vector.VectorEnv:
    settings = {"domain": "chatting", "personas": "test", "max_turns": 3, **settings}
    return gym.make_vec("PersonaDialogue-v0", num_envs=num_envs, **settings)


def ids(envs: gym.vector.VectorEnv, number: int) -> list[str]:
    return list(envs.unwrapped.persona_ids[:number])


def evaluated(num_envs: int = 4, number: int = 6, **settings: Any) -> Evaluation:
    envs = worlds(num_envs)
    return evaluate_policy(envs, ScriptedPolicy(LINES), personas=ids(envs, number), **settings)


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(draw: str) -> None:
    rng = np.random.default_rng(0)
    truth = {"normal": 0.0, "exponential": 1.0}[draw]
    covered = []
    for number in range(300):
        found = bootstrap_mean(getattr(rng, draw)(size=60), seed=number)
        covered.append(found.low <= truth <= found.high)
    # Percentile intervals of 60 values cover a little less than 95 %; 300 trials: sd 1.3 points.
    assert 0.90 <= np.mean(covered) <= 0.985


def test_intervals_are_as_wide_as_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(size=200)
    found = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    wider = bootstrap_mean(values, level=0.99)
    assert wider.low < found.low < found.mean < found.high < wider.high


def test_intervals_depend_on_the_seed_alone() -> None:
    values = np.arange(9.0)
    assert bootstrap_mean(values, 3) == bootstrap_mean(values, 3)
    assert bootstrap_mean(values, 3) != bootstrap_mean(values, 4)


def test_values_that_are_missing_are_left_out_and_one_value_has_no_interval() -> None:
    with_gaps = bootstrap_mean(np.array([1.0, math.nan, 3.0, math.nan]))
    assert with_gaps == bootstrap_mean(np.array([1.0, 3.0]))
    lone = bootstrap_mean(np.array([math.nan, 2.0]))
    assert lone.mean == 2.0 and math.isnan(lone.low) and math.isnan(lone.high)
    assert math.isnan(bootstrap_mean(np.array([math.nan])).mean)


def test_an_estimate_reads_as_a_mean_with_its_interval() -> None:
    estimate = Estimate(0.4123, 0.3911, 0.4333)
    assert str(estimate) == f"{estimate}" == "0.412 [0.391, 0.433]"
    assert f"{estimate:+.1f}" == "+0.4 [+0.4, +0.4]"


def test_pairing_takes_the_personas_both_have_and_is_narrower_than_comparing_means() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(size=80)
    first = {f"p{i}": value + 0.1 for i, value in enumerate(base)}
    second = {f"p{i}": value + 0.01 * rng.normal() for i, value in enumerate(base)}
    found = paired_difference({**first, "only here": 99.0}, {**second, "only there": -99.0})
    assert found.mean == pytest.approx(0.1, abs=0.01)
    assert 0.09 < found.low < found.high < 0.11
    reverse = paired_difference(second, first)
    assert reverse.mean == pytest.approx(0.0 - paired_difference(first, second).mean)


def test_evaluations_without_a_common_persona_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="share no persona"):
        paired_difference({"a": 1.0}, {"b": 1.0})


# --- drift ----------------------------------------------------------------------------------------


def test_drift_is_the_least_squares_slope_of_the_scored_turns() -> None:
    rng = np.random.default_rng(3)
    reward_ET = rng.random((40, 8))
    reward_ET[rng.random((40, 8)) < 0.3] = math.nan
    slope_E = drift_slopes(reward_ET)
    for reward_T, slope in zip(reward_ET, slope_E, strict=True):
        turn_n = np.flatnonzero(~np.isnan(reward_T))
        assert len(turn_n) >= 2
        assert slope == pytest.approx(np.polyfit(turn_n, reward_T[turn_n], 1)[0], abs=1e-12)


def test_drift_of_a_falling_dialogue_is_negative_and_of_one_turn_unknown() -> None:
    slope_E = drift_slopes(np.array([[0.9, 0.7, 0.5], [0.3, 0.3, 0.3], [0.3, math.nan, math.nan]]))
    assert slope_E[:2].tolist() == pytest.approx([-0.2, 0.0])
    assert math.isnan(slope_E[2])


# --- who is evaluated -----------------------------------------------------------------------------


def test_the_personas_are_those_asked_for() -> None:
    envs = worlds()
    wanted = [ids(envs, 9)[i] for i in (8, 2, 5)]
    found = evaluate_policy(envs, ScriptedPolicy(LINES), personas=wanted)
    texts = {p.id: p.text for p in ppg_env.bundled_personas("chatting", "test")}
    assert set(found.persona_reward) == set(wanted)
    assert len(found.transcripts) == len(found.transcript_rewards) == 3  # one slot was padding
    for name, transcript in zip(wanted, found.transcripts, strict=True):
        assert texts[name] in transcript[0]["content"]


def test_all_held_out_personas_take_part_unless_told_otherwise() -> None:
    envs = worlds(num_envs=32, max_turns=1)
    found = evaluate_policy(envs, ScriptedPolicy(LINES))
    assert set(found.persona_reward) == set(envs.unwrapped.persona_ids)
    assert len(found.transcripts) == len(found.persona_reward) >= 40


@pytest.mark.parametrize("num_envs", [1, 4, 5, 12, 20])
def test_the_number_of_slots_and_its_padding_change_nothing(num_envs: int) -> None:
    found, expected = (
        evaluated(num_envs, episodes_per_persona=2),
        evaluated(3, episodes_per_persona=2),
    )
    assert found.transcripts == expected.transcripts
    assert str(found.metrics) == str(expected.metrics)  # equal, NaN included
    assert found.persona_reward == expected.persona_reward


def test_episodes_of_a_persona_differ_and_are_averaged_first() -> None:
    found = evaluated(number=2, episodes_per_persona=3)
    assert len(found.transcripts) == 6
    assert len({transcript[1]["content"] for transcript in found.transcripts[0::2]}) > 1
    means = [np.mean([np.mean(r) for r in found.transcript_rewards[p::2]]) for p in (0, 1)]
    assert sorted(found.persona_reward.values()) == pytest.approx(sorted(means))
    assert found.metrics["reward"].mean == pytest.approx(np.mean(means))


# --- what is measured -----------------------------------------------------------------------------


def test_metrics_agree_with_the_rewards_of_the_transcripts() -> None:
    found = evaluated()
    reward_ET = np.array(found.transcript_rewards)
    assert reward_ET.shape == (6, 3)
    np.testing.assert_allclose(found.reward_T, reward_ET.mean(axis=0))
    assert found.metrics["reward"].mean == pytest.approx(reward_ET.mean())
    assert found.metrics["drift"].mean == pytest.approx(drift_slopes(reward_ET).mean())
    assert {"prompt_to_line", "line_to_line", "degenerate_rate"} < set(found.metrics)
    assert found.num_tokens == 0 and found.seconds > 0
    assert np.isnan(found.metrics.pop("prompt_to_line_drift").mean)  # one checkable line, no slope
    for estimate in found.metrics.values():
        assert estimate.low <= estimate.mean <= estimate.high


def test_saying_the_same_again_and_again_is_degenerate() -> None:
    envs = worlds()
    found = evaluate_policy(envs, ScriptedPolicy(["I like tea."]), personas=ids(envs, 4))
    assert found.metrics["degenerate_rate"].mean == pytest.approx(2 / 3)


class OnlyPredict:
    """The least that an agent can be."""

    def predict(self, observation: Messages, deterministic: bool = False) -> tuple[str, None]:
        return f"I heard {len(observation)} messages.", None


@pytest.mark.parametrize(
    "policy",
    [OnlyPredict(), RandomPolicy(LINES, seed=0), tiny_policy()],
    ids=lambda p: type(p).__name__,
)
def test_whatever_can_predict_can_be_evaluated(policy: Any) -> None:
    envs = worlds()
    found = evaluate_policy(envs, policy, personas=ids(envs, 5))
    assert len(found.persona_reward) == 5
    assert all(len(rewards) == 3 for rewards in found.transcript_rewards)


# --- repeatable and apart -------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_evaluation_and_another_seed_another() -> None:
    def said(seed: int) -> Any:
        envs = worlds()
        agent = PPGAgent(tiny_policy(seed=None), None)
        return evaluate_policy(envs, agent, personas=ids(envs, 5), seed=seed).transcripts

    assert said(1) == said(1)
    assert said(1) != said(2)


def test_the_same_seed_meets_every_policy_with_the_same_partner() -> None:
    envs = worlds()
    openings = [
        [t[1]["content"] for t in evaluate_policy(envs, policy, personas=ids(envs, 6)).transcripts]
        for policy in (OnlyPredict(), ScriptedPolicy(LINES))
    ]
    assert openings[0] == openings[1]


def test_deterministic_lines_do_not_depend_on_the_agents_own_seed() -> None:
    envs = worlds()
    said = [
        evaluate_policy(envs, policy, personas=ids(envs, 4), deterministic=True).transcripts
        for policy in (tiny_policy(seed=0), tiny_policy(seed=1))
    ]
    assert said[0] == said[1]


def test_evaluating_leaves_the_training_environment_untouched() -> None:
    training = worlds(personas="train")
    observations, _ = training.reset(seed=5)
    before = training.unwrapped.state()
    evaluated()
    assert training.unwrapped.state() == before
    after = training.step(["I like tea."] * 4)[0]
    fresh = worlds(personas="train")
    assert fresh.reset(seed=5)[0] == observations
    assert fresh.step(["I like tea."] * 4)[0] == after


def test_nothing_to_evaluate_on_is_an_error() -> None:
    envs = worlds()
    with pytest.raises(ValueError, match="Nothing to evaluate: 0 personas"):
        evaluate_policy(envs, OnlyPredict(), personas=[])
    with pytest.raises(ValueError, match="0 episodes each"):
        evaluate_policy(envs, OnlyPredict(), episodes_per_persona=0)


def test_an_unknown_persona_is_refused_with_the_nearest() -> None:
    envs = worlds()
    known = ids(envs, 1)[0]
    with pytest.raises(ValueError, match=f"Unknown persona id '{known}x'. Nearest:.*{known}"):
        evaluate_policy(envs, OnlyPredict(), personas=[f"{known}x"])
