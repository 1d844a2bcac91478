"""Single turns after logged histories: which are spoken, how they are scored, what is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from speakers import honest
from test_reading import chat_of, logged, told
from tiny_models import tiny_policy

import ppg_env
from agents import ScriptedPolicy, evaluate_steps, write_log
from agents.evaluate import StepEvaluation
from agents.policy import Messages
from agents.rollout import collect_rollouts
from agents.statistics import bootstrap_mean
from ppg_env.dialogue import Transcript, Verdict
from ppg_env.judges import RuleJudge
from ppg_env.rejudge import last_line

LINES = ["I like tea.", "I have a dog.", "That is a good question.", "No, I never did."]


def worlds(num_envs: int = 4, **settings: Any) -> Any:
    settings = {"domain": "chatting", "personas": "test", "max_turns": 4, **settings}
    return gym.make_vec("PersonaDialogue-v0", num_envs=num_envs, **settings)


def played(number: int = 5, seed: int = 3, max_turns: int = 3) -> list[Any]:
    """Return logged dialogues of held-out personas, two of each."""
    envs = worlds(number, max_turns=max_turns)
    ids = envs.unwrapped.persona_ids
    options = {"persona": [ids[i // 2] for i in range(number)]}
    return logged(collect_rollouts(envs, ScriptedPolicy(LINES), seed=seed, options=options))


class Noted:
    """Says how much it has heard, and remembers what."""

    def __init__(self) -> None:
        self.heard: list[list[dict[str, str]]] = []

    def predict(self, observation: Messages, deterministic: bool = False) -> tuple[str, None]:
        self.heard.append([dict(message) for message in observation])
        lines = sum(message["role"] == "assistant" for message in observation)
        return f"I like tea and I have heard {lines} lines of mine.", None


def assert_equal(found: StepEvaluation, expected: StepEvaluation) -> None:
    assert (str(found.reward), str(found.logged)) == (str(expected.reward), str(expected.logged))
    np.testing.assert_array_equal(found.reward_T, expected.reward_T)
    assert found.persona_reward == expected.persona_reward
    assert found.num_steps == expected.num_steps


# --- what is spoken -------------------------------------------------------------------------------


def test_every_logged_history_is_gone_on_from_exactly_as_it_was() -> None:
    log, policy = played(), Noted()
    found = evaluate_steps(worlds(3), policy, log)
    histories = [t.history(turn) for t in log for turn in range(t.num_turns)]
    assert policy.heard[: len(histories)] == histories
    assert found.num_steps == len(histories) == sum(t.num_turns for t in log) == 15
    texts = {p.id: p.text for p in ppg_env.bundled_personas("chatting", "test")}
    assert all(texts[t.persona] in t.history(0)[0]["content"] for t in log)


@pytest.mark.parametrize("number", [3, 40])
def test_without_an_environment_a_judge_scores_the_same_lines_alike(number: int) -> None:
    log, policies = played(number), (Noted(), Noted())
    judge = RuleJudge(ppg_env.get_domain("chatting"))
    score = last_line(judge, "chatting", ppg_env.bundled_personas("chatting"))
    alone = evaluate_steps(None, policies[0], log, score=score)
    assert_equal(alone, evaluate_steps(worlds(4), policies[1], log))
    histories = [t.history(turn) for t in log for turn in range(t.num_turns)]
    assert policies[0].heard[: len(histories)] == histories


def test_a_language_model_is_scored_alike_without_an_environment() -> None:
    log = played(30)  # 90 turns: more than are spoken at once
    judge = RuleJudge(ppg_env.get_domain("chatting"))
    score = last_line(judge, "chatting", ppg_env.bundled_personas("chatting"))
    policy = tiny_policy(max_new_tokens=6)
    alone = evaluate_steps(None, policy, log, score=score, seed=5)
    assert_equal(alone, evaluate_steps(worlds(64), policy, log, seed=5))


def test_dialogues_of_nobodys_domain_are_scored_by_a_function() -> None:
    log = [
        told(chat_of(["I swim.", "Yes."]), persona="a", ticket=7),
        told(chat_of(["No.", "Perhaps."], system=False), group=3),
    ]
    seen: list[Any] = []

    def score(records: Sequence[Any]) -> list[float | None]:
        seen.extend(records)
        return [None if "No." in str(r["messages"]) else len(r["messages"]) / 10 for r in records]

    found = evaluate_steps(None, ScriptedPolicy(["Hm."]), log, score=score)
    assert [r["messages"][-1] for r in seen] == [{"role": "assistant", "content": "Hm."}] * 4
    assert [r["messages"][:-1] for r in seen] == [d.history(t) for d in log for t in (0, 1)]
    assert [r["persona"] for r in seen] == ["a", "a", "", ""] and seen[0]["ticket"] == 7
    assert found.persona_reward == pytest.approx({"a": 0.4, "group 3": 0.2})
    assert found.num_steps == 4
    strangers = [told(chat_of(["No."], system=False)) for _ in range(3)]
    alone = evaluate_steps(None, ScriptedPolicy(["Hm."]), strangers, score=lambda r: [1.0] * len(r))
    assert len(alone.persona_reward) == 3


@pytest.mark.parametrize("case", ["neither", "both", "too few"])
def test_who_scores_must_be_clear(case: str) -> None:
    envs = worlds(2) if case == "both" else None
    score = None if case == "neither" else (lambda records: [1.0] * (len(records) - 1))
    message = "returned 8 values for 9" if case == "too few" else "Who scores the lines"
    with pytest.raises(ValueError, match=message):
        evaluate_steps(envs, ScriptedPolicy(["Hm."]), played(3), score=score)


def test_the_system_message_is_the_environments_whatever_the_log_has() -> None:
    log = played(2)
    bare = [replace(t, messages=t.messages[1:]) for t in log]
    policies = Noted(), Noted()
    found = [
        evaluate_steps(worlds(2), policy, each)
        for policy, each in zip(policies, (log, bare), strict=True)
    ]
    assert policies[0].heard == policies[1].heard
    assert_equal(*found)


def test_a_step_is_one_of_the_single_environment() -> None:
    log, seed = played(), 11
    env = gym.make("PersonaDialogue-v0", domain="chatting", personas="test", max_turns=4).unwrapped
    rewards: dict[str, list[float]] = {}
    by_turn: dict[int, list[float]] = {}
    lines: dict[str, str] = {}
    for trajectory in log:
        for turn in range(trajectory.num_turns):
            options = {"persona": trajectory.persona, "history": trajectory.history(turn)}
            observation, _ = env.reset(seed=seed + len(lines), options=options)
            line = honest(env, np.random.default_rng(turn)) if len(lines) % 3 else "Hm."
            lines[str(observation)] = line
            reward = float(env.step(line)[1])
            rewards.setdefault(trajectory.persona, []).append(reward)
            by_turn.setdefault(turn, []).append(reward)
    found = evaluate_steps(
        worlds(4), ScriptedPolicy(lambda observation: lines[str(observation)]), log, seed=seed
    )
    means = {persona: np.mean(each) for persona, each in rewards.items()}
    assert len(set(np.concatenate(list(rewards.values())))) > 1
    assert found.persona_reward == pytest.approx(means)
    expected = bootstrap_mean(np.array([means[name] for name in sorted(means)]), seed)
    assert str(found.reward) == str(expected)
    np.testing.assert_allclose(found.reward_T, [np.mean(by_turn[t]) for t in range(3)])


def test_the_logged_rewards_of_the_same_turns_are_told_beside_it() -> None:
    log = played()
    scored = [replace(t, rewards=(0.25, None, i / 4)) for i, t in enumerate(log)]
    found = evaluate_steps(worlds(4), Noted(), scored)
    by_persona: dict[str, list[float]] = {}
    for trajectory in scored:
        known = [r for r in trajectory.rewards if r is not None]
        by_persona.setdefault(trajectory.persona, []).extend(known)
    means = [np.mean(by_persona[name]) for name in sorted(by_persona)]
    assert found.logged.mean == pytest.approx(np.mean(means))
    assert found.logged.low < found.logged.mean < found.logged.high


def test_the_logged_rewards_are_those_of_turns_that_count() -> None:
    # The judge cannot tell after two lines, so what was logged there is in no mean either.
    scored = [replace(t, rewards=(0.5, 0.0, 1.0)) for t in played(4)]
    found = evaluate_steps(worlds(3, judge=Choosy()), Noted(), scored)
    assert (found.logged.mean, found.reward.mean) == (0.75, 0.625)


def test_a_log_may_be_a_file(tmp_path: Path) -> None:
    log = played()
    write_log(tmp_path / "log.jsonl.gz", log)
    for path in (tmp_path / "log.jsonl.gz", str(tmp_path / "log.jsonl.gz")):
        found = evaluate_steps(worlds(3), Noted(), path)
        assert_equal(found, evaluate_steps(worlds(3), Noted(), iter(log)))


def test_the_turn_that_the_agent_began_with_is_left_out() -> None:
    begun = played(1)[0]
    chat = [begun.messages[0], *begun.messages[2:]]
    assert [m["role"] for m in chat[:2]] == ["system", "assistant"]
    first = told(chat[:2], persona=begun.persona)
    policy = Noted()
    found = evaluate_steps(worlds(2), policy, [first, begun])
    assert found.num_steps == 3
    with pytest.raises(ValueError, match="no logged turn to go on from"):
        evaluate_steps(worlds(2), policy, [first])
    with pytest.raises(ValueError, match="no logged turn to go on from"):
        evaluate_steps(worlds(2), policy, [])


def test_later_turns_of_a_dialogue_that_the_agent_began_are_gone_on_from() -> None:
    begun = played(1)[0]
    chat = [begun.messages[0], *begun.messages[2:]]
    found = evaluate_steps(worlds(2), Noted(), [told(chat, persona=begun.persona)])
    assert found.num_steps == 2


# --- what is counted ------------------------------------------------------------------------------


class ByLength:
    """Scores a line by its length."""

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Verdict]:
        lines = [transcript.turns[-1] for transcript in transcripts]
        return [Verdict(len(line.partner + line.agent) % 7 / 10, {}, "") for line in lines]


@pytest.mark.parametrize("num_envs", [1, 2, 4, 7, 15, 20])
def test_the_number_of_slots_and_their_padding_change_nothing(num_envs: int) -> None:
    log = played()
    for policy in (Noted(), tiny_policy(max_new_tokens=5)):
        found, expected = (
            evaluate_steps(worlds(number, judge=ByLength()), policy, log, seed=5)
            for number in (num_envs, 3)
        )
        assert_equal(found, expected)
        assert found.num_steps == 15 and len(set(found.persona_reward.values())) > 1


class Choosy:
    """Scores by what was said, and cannot tell after two lines of the agent."""

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Verdict]:
        return [self._verdict(transcript) for transcript in transcripts]

    @staticmethod
    def _verdict(transcript: Transcript) -> Verdict:
        turn = len(transcript.turns) - 1
        reward = None if turn == 1 else (0.25 if turn == 0 else 1.0)
        return Verdict(reward, {}, "")


def test_turns_that_nobody_can_score_are_left_out() -> None:
    log = played(4)
    found = evaluate_steps(worlds(3, judge=Choosy()), Noted(), log)
    assert found.reward_T[[0, 2]].tolist() == [0.25, 1.0] and math.isnan(found.reward_T[1])
    assert set(found.persona_reward.values()) == {0.625}
    assert found.reward.mean == found.reward.low == found.reward.high == 0.625
    # A persona without any score is in no mean.
    short = [replace(log[0], persona=log[2].persona), *log[:2]]
    only = [t for t in short if t.persona == log[0].persona]
    found = evaluate_steps(worlds(3, judge=Choosy()), Noted(), only)
    assert math.isnan(found.reward.low)


def test_the_same_seed_gives_the_same_lines_and_another_seed_others() -> None:
    log, said = played(4), []

    class Spoken(type(worlds(1).unwrapped)):  # type: ignore[misc]
        def step(self, actions: Any) -> Any:
            said[-1] += list(actions)
            return super().step(actions)

    for seed in (1, 1, 2):
        said.append([])
        envs = Spoken(num_envs=4, domain="chatting", personas="test", max_turns=4)
        evaluate_steps(envs, tiny_policy(max_new_tokens=5), log, seed=seed)
    assert said[0] == said[1] != said[2]
    for policy_seed in (1, 2):
        said.append([])
        envs = Spoken(num_envs=4, domain="chatting", personas="test", max_turns=4)
        policy = tiny_policy(max_new_tokens=5, seed=policy_seed)
        evaluate_steps(envs, policy, log, seed=policy_seed, deterministic=True)
    assert said[3] == said[4]


# --- what is refused ------------------------------------------------------------------------------


def test_a_persona_that_the_environment_does_not_know_is_refused_with_the_nearest() -> None:
    log = played(3)
    for persona, hint in ((f"{log[0].persona}x", f"Did you mean '{log[0].persona}'"), ("", "The")):
        told_so = rf"Unknown persona id '{persona}' in dialogue 3\. {hint}.*personas='all'.*file"
        with pytest.raises(ValueError, match=told_so):
            evaluate_steps(worlds(2), Noted(), [*log[:2], replace(log[2], persona=persona)])


def test_dialogues_longer_than_the_environments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"history already has 2 agent turns.*max_turns=2"):
        evaluate_steps(worlds(2, max_turns=2), Noted(), played(1))


def test_a_turn_without_room_in_the_models_context_is_left_out() -> None:
    policy = tiny_policy(max_new_tokens=5)
    policy.network.context_length = 20
    found = evaluate_steps(worlds(2), policy, played(1))
    assert math.isnan(found.reward.mean) and math.isnan(found.logged.mean)
    assert found.num_steps == 0
