"""The validation loss: what it is by hand, and that it falls when the agent gets better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_offline import offline_agent, sampled_log, small_log, story_log, two_letter_policy
from test_reading import chat_of, told
from tiny_models import plain_logprobs

from agents import PPGAgent
from agents.batching import LogReader
from agents.lm_policy import LMPolicy
from agents.offline_settings import OfflineSettings
from agents.reading import read_dialogues
from agents.validation import Validation
from agents.weighting import TurnWeights, survey


def turn_sums(policy: LMPolicy, log: Sequence[Any]) -> list[list[float]]:
    """Return log pi(a_t | h_t) of each dialogue's turns, by plain forward passes."""
    tape = read_dialogues(policy, log)
    logprob_SL = plain_logprobs(policy, tape)
    return [
        [float(logprob_SL[b][tape.turn_SL[b] == turn].sum()) for turn in range(t.num_turns)]
        for b, t in enumerate(log)
    ]


def by_hand(
    changes: Sequence[Sequence[float]], returns: Sequence[Sequence[float]], most: float
) -> float:
    """Return the loss of dialogues whose lines changed by these log-ratios and earned that."""
    change_N, tenth = np.concatenate(changes), sum(map(len, changes)) // 10
    middle = sorted(change_N)[tenth : len(change_N) - tenth]
    total = 0.0
    for row, earned in zip(changes, returns, strict=True):
        for u, change in enumerate(row):
            mean = np.mean([other[u] for other in returns if len(other) > u])
            total += min(math.exp(change - np.mean(middle)), most) * (earned[u] - mean)
    return -total / len(change_N)


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "log_mean", "batch_mean", "group_mean"])
def test_the_loss_is_what_it_says_by_hand(baseline: str) -> None:
    train = [replace(t, group=i // 2) for i, t in enumerate(small_log(6))]
    held_out = [replace(t, group=i // 2) for i, t in enumerate(small_log(12, 20))]
    returns = [[sum(t.rewards[u : u + 2]) for u in range(t.num_turns)] for t in held_out]
    if baseline in ("batch_mean", "group_mean"):  # batches of two are groups of two
        pairs = [returns[i : i + 2] for i in range(0, 12, 2)]
        returns = [
            [r - np.mean([row[u] for row in pair if len(row) > u]) for u, r in enumerate(rows)]
            for pair in pairs
            for rows in pair
        ]
    agent = offline_agent("kstep:2", scale="none", token_budget=200, learning_rate=3e-4)
    before, seen = turn_sums(agent.policy, held_out), []

    def note(learner: PPGAgent) -> None:
        if "offline/validation_loss" in learner.log:
            now = turn_sums(learner.policy, held_out)
            changes = [np.subtract(a, b).tolist() for a, b in zip(now, before, strict=True)]
            assert np.ptp(np.concatenate(changes)) > 0.5
            seen.append(by_hand(changes, returns, 1.3))

    agent.learn_offline(
        train,
        validation=held_out,
        epochs=2,
        batch_size=2,
        max_importance=1.3,
        baseline=baseline,
        max_weight=0.3,  # bounds weights, not advantages
        callback=note,
    )
    found = [row.get("offline/validation_loss") for row in agent.history]
    assert [value is None for value in found] == [True, True, False] * 2
    assert [found[2], found[5]] == pytest.approx(seen, rel=1e-3, abs=1e-4)
    assert max(map(abs, seen)) > 0.01


def test_with_importance_weights_the_policy_that_spoke_is_compared_with() -> None:
    log = sampled_log(8)
    less = [[[x - 0.2 * b for x in line] for line in t.logprobs] for b, t in enumerate(log)]
    held_out = [replace(t, logprobs=each) for t, each in zip(log[4:], less[4:], strict=True)]
    agent = offline_agent("greedy", scale="none", learning_rate=0.0)
    agent.learn_offline(log[:4], validation=held_out, importance=True, max_importance=9.0)
    scored = [[r is not None for r in t.rewards] for t in held_out]
    changes = [
        [0.2 * (4 + b) * len(ids) for ids, kept in zip(t.token_ids, row, strict=True) if kept]
        for b, (t, row) in enumerate(zip(held_out, scored, strict=True))
    ]
    # Turn 1 is unscorable in all of them, so that places among the scored ones are the same.
    returns = [[r for r in t.rewards if r is not None] for t in held_out]
    expected = by_hand(changes, returns, 9.0)
    assert agent.log["offline/validation_loss"] == pytest.approx(expected, rel=1e-3)
    plain = offline_agent("greedy", scale="none", learning_rate=0.0)
    plain.learn_offline(log[:4], validation=held_out)
    assert plain.log["offline/validation_loss"] == pytest.approx(0.0, abs=1e-5)


def test_the_loss_of_imitation_is_that_of_its_lines() -> None:
    train, held_out = small_log(8), small_log(6, 30)
    best = np.sort([np.mean(t.rewards) for t in train])[-4]
    chosen = {
        "sft": [1.0] * 6,
        "filtered": [float(np.mean(t.rewards) >= best) for t in held_out],
    }
    assert 0 < sum(chosen["filtered"]) < 6
    for method, weight_B in chosen.items():
        agent = offline_agent()
        agent.learn_offline(train, validation=held_out, method=method, top_share=0.5)
        sums = [sum(turns) for turns in turn_sums(agent.policy, held_out)]
        expected = -np.dot(weight_B, sums) / 6
        assert agent.log["offline/validation_loss"] == pytest.approx(expected, rel=1e-4)
    assert agent.offline_loss(held_out, method="sft") == pytest.approx(-sum(sums) / 6, rel=1e-4)


def test_validation_is_weighted_by_the_matrix_of_the_longest_dialogue_of_both_logs() -> None:
    # Full over three turns has a mean window of 2, whichever log has the three.
    long = [
        replace(told(chat_of(["No."] * 3)), rewards=(i, 0.5, i), persona=f"l{i}") for i in (0, 1)
    ]
    short = [replace(told(chat_of(["So."])), rewards=(i,), persona=f"s{i}") for i in (0, 1)]
    for train, held_out in ((long, short), (short, long)):
        weights = offline_agent()._plan(train, held_out, OfflineSettings()).weights
        assert weights.of(short).tolist() == [[0, 0, 0], [0.5, 0, 0]]
        assert weights.of(long).tolist() == [[0.25, 0.25, 0], [1.25, 0.75, 0.5]]


def test_a_turn_of_which_the_log_has_no_mean_does_not_count() -> None:
    long = [replace(told(chat_of(["No."] * 2)), rewards=(1.0, 1.0))]
    short = [replace(told(chat_of(["So."])), rewards=(0.25,))]
    settings = OfflineSettings(baseline="log_mean")
    weights = TurnWeights(settings, np.eye(2), survey(short))
    assert weights.counts(long).tolist() == [[True, False]]
    assert weights.unclipped(long)[0, 0] == 0.75


# --- what it says ---------------------------------------------------------------------------------


class Changing:
    """Turn log-probabilities that are set by hand: one line a dialogue, all -3 at the start."""

    def __init__(self, *rewards: float) -> None:
        self.log = [
            replace(told(chat_of([f"No {i}."])), rewards=(each,), persona=f"p{i}")
            for i, each in enumerate(rewards)
        ]
        self.change_N = np.zeros(len(rewards))
        settings = OfflineSettings(batch_size=len(rewards))
        weights = TurnWeights(settings, np.eye(1), survey(self.log))
        self.watch = Validation(LogReader(self.log), settings, weights, self)

    def __call__(self, batch: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        logprob_BT = -3.0 + self.change_N[:, None]
        return logprob_BT, np.full_like(logprob_BT, np.nan)

    def loss(self, *changes: float) -> float:
        self.change_N = np.array(changes)
        return self.watch.measure()["offline/validation_loss"]


def test_the_loss_falls_where_better_lines_gain_and_rises_where_they_lose() -> None:
    model = Changing(0.0, 0.25, 0.75, 1.0)
    assert model.loss(0, 0, 0, 0) == 0.0
    falling = [model.loss(-x, 0, 0, x) for x in (0.0, 0.1, 0.5, 1.0)]
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))
    assert model.loss(1, 0, 0, -1) > 0


def test_what_all_lines_share_is_no_progress() -> None:
    # Likelier all of them: the log's style was learned. Less likely: the agent is more certain.
    model = Changing(0.0, 0.25, 0.75, 1.0)
    for shift in (-40.0, -2.0, 0.0, 3.0, 60.0):
        assert model.loss(*[shift] * 4) == pytest.approx(0.0, abs=1e-9)
        assert model.loss(shift - 1, shift, shift, shift + 1) == pytest.approx(
            model.loss(-1, 0, 0, 1)
        )


@pytest.mark.parametrize("drift", [-1e4, 1e4])
def test_one_line_cannot_outweigh_the_others(drift: float) -> None:
    rewards = [i % 2 for i in range(20)]
    better = [0.5 * reward for reward in rewards]
    model = Changing(*rewards)
    usual = model.loss(*better)
    for worst in (0, 1):
        changes = [drift if i == worst else change for i, change in enumerate(better)]
        assert usual - 0.2 < model.loss(*changes) < usual + 0.2
        assert model.loss(*changes) < 0  # and is seen all the same


def test_the_loss_falls_while_an_agent_earns_more_and_their_likelihood_does_not() -> None:
    # One line of three tokens of the policy that can be listed: what it earns is a sum.
    policy, rng = two_letter_policy(), np.random.default_rng(0)
    lines = list(itertools.product((0, 1), repeat=3))
    reward_N = np.array([sum(line) for line in lines]) / 3
    ids = torch.tensor([[1, 1, *line] for line in lines])
    own = torch.arange(5)[None] >= 2

    def chance_N() -> np.ndarray:
        logprob_NL = policy.logprobs(ids, torch.where(own, 0, -1).expand(8, -1))
        return logprob_NL[:, 2:].sum(1).exp().detach().numpy()

    start_N = chance_N()
    assert start_N.sum() == pytest.approx(1.0) and start_N.min() > 0.005
    drawn = rng.choice(8, 400, p=start_N / start_N.sum())
    log = [story_log((lines[n],), [reward_N[n]], persona=f"p{i}") for i, n in enumerate(drawn)]
    agent = PPGAgent(policy, None, "greedy", scale="none", learning_rate=0.001, seed=0)
    earned, weighted = [start_N @ reward_N], [agent.offline_loss(log[200:])]

    def note(learner: PPGAgent) -> None:
        if "offline/validation_loss" in learner.log:
            earned.append(chance_N() @ reward_N)
            weighted.append(learner.offline_loss(log[200:]))

    agent.learn_offline(
        log[:200], validation=log[200:], epochs=5, baseline="log_mean", callback=note, patience=2
    )
    losses = [v for row in agent.history if (v := row.get("offline/validation_loss")) is not None]
    print(losses, earned, weighted)
    assert len(losses) == 5 and earned[-1] > earned[0] + 0.1
    assert all(later > earlier for earlier, later in itertools.pairwise(earned))
    assert all(later < earlier for earlier, later in itertools.pairwise([0.0, *losses]))
    assert int(np.argmin(weighted[1:])) == 0  # the epoch that patience would have gone back to
    assert agent.log["offline/best_epoch"] == 5
