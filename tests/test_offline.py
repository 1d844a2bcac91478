"""Learning from logs: exact where it should be, weighted as said, one pass at a time.

Exactness is shown on a real (tiny) language model with two tokens, so that all that can be said in
three turns can be listed, as in test_ppg.py.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from safetensors.torch import load_file
from test_ppg import (
    CREDITS,
    ENDING,
    ENDLESS,
    DoublePolicy,
    LeafPolicy,
    Standstill,
    Story,
    T,
    assert_equal,
    flat,
    reward,
    stories,
    weights_of,
)
from test_processes import launch, timeless
from test_reading import chat_of, logged, several_sequences, told
from test_train import spoil_gradients
from tiny_models import CHATML, REWRITING, letter_tokenizer, plain_logprobs, tiny_policy
from tiny_worlds import EchoDialogue, EchoDialogues
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from two_offline_processes import SCENARIOS, learn

from agents import PPGAgent, PPOAgent, batching, credit_weights, partial_returns
from agents.batching import LogReader
from agents.credit import (
    Credit,
    Discounted,
    FullPlanning,
    Greedy,
    KStep,
    Segment,
    Subset,
    parse_credit,
)
from agents.lm_policy import LMPolicy, Reference, add_lora
from agents.logs import LogError, LoggedDialogue, parse_dialogue, read_log, write_log
from agents.offline_settings import OfflineSettings
from agents.ppg import DivergedError
from agents.reading import read_dialogues
from agents.scoring import microbatches
from agents.validation import Validation
from agents.weighting import TurnWeights, effective_share, survey
from ppg_env import DOMAINS, ActProcess, bundled_personas
from ppg_env.process import turn_value

# --- a dialogue small enough to list --------------------------------------------------------------

# Contents and nothing between them: every letter but the end token's is one token, an "a" or not.
BARE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PHASES = (0, 1)
CHATTER = bundled_personas("chatting")[0]


def two_letter_policy(kind: type[LMPolicy] = DoublePolicy, seed: int = 1) -> LMPolicy:
    small = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2, **small, bos_token_id=None, eos_token_id=0))
    tokenizer = letter_tokenizer("a", BARE, end="b")
    return kind(model.double() if kind is DoublePolicy else model, tokenizer)


def answer(line: Sequence[int]) -> str:
    return "a" * (1 + sum(line) % 2)


def story_log(said: Story, rewards: Sequence[float | None] | None = None, **more: Any) -> Any:
    """Return the logged dialogue in which these lines were said."""
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]
    for line in said:
        chat += [
            {"role": "assistant", "content": "a" * sum(line) or "..."},
            {"role": "user", "content": answer(line)},
        ]
    if rewards is None:
        rewards = [reward(said[: t + 1]) for t in range(len(said))]
    more = {
        "messages": chat[:-1],
        "rewards": list(rewards),
        "token_ids": [list(line) for line in said],
        "tokenizer": two_letter_policy().tokenizer_fingerprint,
        **more,
    }
    return parse_dialogue(json.loads(json.dumps(more)))


@cache
def rows_of(world: str, num_turns: int = T) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return token_NL, turn_NL and reward_NT of all stories, written by hand."""
    told_stories = known_stories(world, num_turns)
    token_NL = np.zeros((len(told_stories), 24), dtype=np.int64)
    turn_NL, reward_NT = np.full_like(token_NL, -1), np.zeros((len(told_stories), num_turns))
    for n, said in enumerate(told_stories):
        tokens, turns = [1, 1], [-1, -1]
        for turn, line in enumerate(said):
            heard = len(answer(line))
            tokens += [*line, *[1] * heard]
            turns += [turn] * len(line) + [-1] * heard
            reward_NT[n, turn] = reward(said[: turn + 1])
        token_NL[n, : len(tokens)], turn_NL[n, : len(turns)] = tokens, turns
    return token_NL, turn_NL, reward_NT


def known_stories(world: str, num_turns: int) -> list[Story]:
    return list(dict.fromkeys(said[:num_turns] for said in stories(world)))


def chances(policy: LMPolicy, world: str, num_turns: int = T) -> Tensor:
    """probability_NT of each story's turns; 1 for turns after its end. Differentiable."""
    token_NL, turn_NL, _ = rows_of(world, num_turns)
    logprob_NL = policy.logprobs(torch.as_tensor(token_NL), torch.as_tensor(turn_NL))
    spoken_TNL = torch.as_tensor(turn_NL) == torch.arange(num_turns)[:, None, None]
    return (logprob_NL * spoken_TNL).sum(-1).exp().T


def partial_gradient(
    policy: LMPolicy, world: str, weight_TT: np.ndarray, num_turns: int = T
) -> Tensor:
    """sum_t sum_u W[t,u] dE[r_u] / d(parameters, as far as they act in turn t)."""
    parameters = list(policy.model.parameters())
    reward_NT = torch.tensor(rows_of(world, num_turns)[2])
    probability_NT = chances(policy, world, num_turns)
    total = torch.zeros(())
    for turn in range(num_turns):
        varies_T = torch.arange(num_turns) == turn
        chance_N = torch.where(varies_T, probability_NT, probability_NT.detach()).prod(1)
        value = chance_N @ (reward_NT @ torch.tensor(weight_TT[turn]))
        total = total + flat(torch.autograd.grad(value, parameters, retain_graph=True))
    return total


def still_agent(policy: LMPolicy, credit: Credit | str = "full", **settings: Any) -> PPGAgent:
    """An agent that computes its gradient and then does not move."""
    settings = {"scale": "none", "max_grad_norm": math.inf, "seed": 0, **settings}
    env = settings.pop("env", None)
    agent = PPGAgent(policy, env, credit, **settings)
    if not settings.get("kl_coef"):
        agent._reference = Reference(policy)  # an anchor without a pull: any weight may be learned
        agent.settings["kl_coef"] = 0.0
    agent.optimization.adam = Standstill(policy.model.parameters(), lr=0.0)
    agent.optimization.adam.param_groups[0]["full_lr"] = 0.0
    return agent


def ascent(agent: PPGAgent, log: Sequence[Any], **settings: Any) -> Tensor:
    """The direction in which the agent would go, all dialogues in one step."""
    settings = {"batch_size": len(log), "shuffle": 0, "min_weight": None, **settings}
    agent.learn_offline(log, **settings)
    return -flat(agent.optimization.adam.gradients)


def expected_ascent(agent: PPGAgent, world: str, log: Sequence[Any], **settings: Any) -> Tensor:
    """E[ascent] over the stories, each a log of its own."""
    with torch.no_grad():
        chance_N = chances(agent.policy, world, log[0].num_turns if len(log) == 4 else T).prod(1)
    directions = [ascent(agent, [trajectory], **settings) for trajectory in log]
    return chance_N @ torch.stack(directions)


class Phased:
    """Knows when phases begin, and nothing else."""

    phase_boundaries = PHASES

    @property
    def unwrapped(self) -> Phased:
        return self


def with_phases(agent: PPGAgent) -> PPGAgent:
    agent.env = Phased()  # type: ignore[assignment]
    return agent


each_credit = pytest.mark.parametrize("credit", CREDITS, ids=str)


def test_the_listed_dialogues_are_read_as_they_were_written_by_hand() -> None:
    for world in (ENDLESS, ENDING):
        token_NL, turn_NL, _ = rows_of(world)
        tape = read_dialogues(two_letter_policy(), [story_log(said) for said in stories(world)])
        longest = tape.token_SL.shape[1]
        last_N = (turn_NL >= 0).cumsum(1).argmax(1)
        for n, last in enumerate(last_N):  # what the partner says last is not read
            assert tape.length_S[n] == last + 1 <= longest
            np.testing.assert_array_equal(tape.token_SL[n, : last + 1], token_NL[n, : last + 1])
            np.testing.assert_array_equal(tape.turn_SL[n, : last + 1], turn_NL[n, : last + 1])
        chance_N = chances(two_letter_policy(), world).prod(1).detach()
        assert float(chance_N.sum()) == pytest.approx(1, abs=1e-12)
        assert float(chance_N.min()) > 1e-4


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [ENDLESS, ENDING])
@each_credit
def test_where_the_logs_come_from_the_policy_the_expected_gradient_is_the_partial_gradient(
    credit: Credit, world: str
) -> None:
    policy = two_letter_policy()
    agent = with_phases(still_agent(policy, credit))
    exact = partial_gradient(policy, world, credit_weights(credit, T, PHASES))
    log = [story_log(said) for said in stories(world)]
    assert_equal(expected_ascent(agent, world, log), exact)


@cache
def chatter_and_log() -> tuple[ActProcess, np.ndarray, list[LoggedDialogue], np.ndarray]:
    """Return a process, who spoke there, 10,000 logged dialogues, and their (t, s, a)."""
    process, rng = (
        ActProcess(DOMAINS["chatting"].dynamics(CHATTER), 4, 0.1),
        np.random.default_rng(3),
    )
    policy_TSA = rng.dirichlet(np.ones(len(process.acts)), process.uniform_policy().shape[:2])
    log, place_NT3, messages = [], [], chat_of(["Well."] * 4)
    for _ in range(10_000):
        memory, rewards, places = process.dynamics.start, [], []
        for t in range(process.num_turns):
            heeds = bool(rng.random() >= process.noise)
            s = process.states.index((memory, heeds))
            a = int(rng.choice(len(process.acts), p=policy_TSA[t, s]))
            rewards.append(turn_value(process.dynamics, memory, process.acts[a], heeds))
            places.append((t, s, a))
            memory = process.dynamics.advance(memory, process.acts[a])
        log.append(LoggedDialogue(messages, tuple(rewards)))
        place_NT3.append(places)
    return process, policy_TSA, log, np.array(place_NT3)


@pytest.mark.parametrize("credit", ["greedy", "kstep:2", "segment:2", "full"])
def test_the_weights_of_a_long_log_teach_what_the_process_of_acts_says(credit: str) -> None:
    process, policy_TSA, log, place_NT3 = chatter_and_log()
    weight_TT = credit_weights(parse_credit(credit), 4)
    weights = TurnWeights(OfflineSettings(baseline="log_mean"), weight_TT, survey(log))
    total_TSA, visits_TSA = np.zeros_like(policy_TSA), np.zeros_like(policy_TSA)
    places = tuple(place_NT3.reshape(-1, 3).T)
    np.add.at(total_TSA, places, weights.of(log).ravel())
    np.add.at(visits_TSA, places, 1.0)
    often_TS = visits_TSA.sum(axis=2) > 2_000
    assert often_TS.sum() >= 5
    found_TSA = total_TSA / np.maximum(total_TSA.sum(axis=2, keepdims=True), 1e-9)
    expected_TSA = process.learned_from_log(policy_TSA, np.sign(weight_TT))
    np.testing.assert_allclose(found_TSA[often_TS], expected_TSA[often_TS], atol=0.05)


def test_logs_of_another_policy_give_another_gradient() -> None:
    policy = two_letter_policy()
    agent, log = still_agent(policy), [story_log(said) for said in stories(ENDLESS)]
    exact = partial_gradient(policy, ENDLESS, FullPlanning().weights(T))
    with torch.no_grad():
        chance_N = chances(two_letter_policy(seed=5), ENDLESS).prod(1)
    found = chance_N @ torch.stack([ascent(agent, [trajectory]) for trajectory in log])
    assert (found - exact).abs().max() > 0.01


def test_importance_weights_make_one_turn_of_another_policy_exact() -> None:
    policy, other = two_letter_policy(), two_letter_policy(seed=5)
    agent, log, behaviour = still_agent(policy), [], []
    lines = list(itertools.product((0, 1), repeat=2))
    prompt = [1, 1]

    def line_logprobs(who: LMPolicy, line: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *line]])
        return who.logprobs(ids, torch.tensor([[-1, -1, 0, 0]]))[0, 2:]

    for line in lines:
        logprobs = line_logprobs(other, line).detach()
        behaviour.append(math.exp(float(logprobs.sum())))
        log.append(story_log((line,), logprobs=[logprobs.tolist()]))
    value = sum(line_logprobs(policy, line).sum().exp() * reward((line,)) for line in lines)
    exact = flat(torch.autograd.grad(value, list(policy.model.parameters())))
    settings = {"importance": True, "max_importance": 1e9, "min_ess": 0.0}
    directions = torch.stack([ascent(agent, [each], **settings) for each in log])
    found = torch.tensor(behaviour, dtype=torch.float64) @ directions
    assert_equal(found, exact, 1e-6)  # logged log-probabilities are kept in float32
    plain = torch.stack([ascent(agent, [each]) for each in log])
    assert (torch.tensor(behaviour, dtype=torch.float64) @ plain - exact).abs().max() > 1e-3


@several_sequences
@pytest.mark.parametrize("template", [CHATML, REWRITING], ids=["appends", "rewrites"])
@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "group_mean", "batch_mean"])
@pytest.mark.parametrize("credit", ["full", "kstep:2", "segment", "trajectory"])
def test_a_step_from_the_log_of_a_batch_is_the_step_from_the_batch(
    credit: str, baseline: str, template: str
) -> None:
    # Early ends, unscorable turns and cut lines; baselines over the same dialogues; as scaled.
    envs = EchoDialogues(6, max_turns=3)
    policy = tiny_policy(template=template)
    settings: dict[str, Any] = {"env": envs, "scale": "mean_window", "group_size": 2}
    agent = still_agent(policy, credit, **settings, baseline=baseline)
    batch = agent.collect()
    assert np.isnan(batch.reward_BT).any() and not batch.alive_BT.all()
    agent.update(batch, agent.credited(batch))
    online = flat(agent.optimization.adam.gradients)
    found = -ascent(agent, logged(batch), baseline=baseline)
    scale = float(online.abs().max())
    torch.testing.assert_close(found, online, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "same",
    [
        (KStep(1), Greedy(), Segment(length=1), Discounted(0.0), Subset(np.eye(T))),
        (KStep(T), FullPlanning(), Segment(length=T), Discounted(1.0), Segment(boundaries=[0])),
        (Segment(), Segment(boundaries=PHASES), "segment:0,1"),
    ],
    ids=["greedy", "full", "phases"],
)
def test_equal_credits_take_identical_steps(same: Sequence[Credit | str]) -> None:
    log = [story_log(said) for said in stories(ENDING)]
    found = [ascent(with_phases(still_agent(two_letter_policy(), each)), log) for each in same]
    assert all(torch.equal(each, found[0]) for each in found)
    other = ascent(still_agent(two_letter_policy(), KStep(2)), log)
    assert not torch.allclose(other, found[0])


def by_hand(policy: LMPolicy, log: Sequence[Any], weights: Callable[[int, int], float]) -> Tensor:
    """grad of sum_b sum_t w(t, T_b) log pi(a_t|h_t), by transformers' own loss on labels."""
    parameters = list(policy.model.parameters())
    total = torch.zeros(())
    for trajectory in log:
        tape = read_dialogues(policy, [trajectory])
        ids = torch.as_tensor(tape.token_SL)
        for turn in range(trajectory.num_turns):
            own = torch.as_tensor(tape.turn_SL) == turn
            labels = torch.where(own, ids, -100)
            nll = policy.model(input_ids=ids, labels=labels).loss * own.sum()
            total = total - weights(turn, trajectory.num_turns) * nll
    return flat(torch.autograd.grad(total, parameters))


def test_ones_with_full_credit_are_weighted_imitation() -> None:
    policy = two_letter_policy()
    log = [story_log(said, [1.0] * len(said)) for said in stories(ENDING)]
    exact = by_hand(policy, log, lambda turn, turns: turns - turn) / len(log)
    assert_equal(ascent(still_agent(policy, "full"), log), exact, 1e-6)
    once = by_hand(policy, log, lambda turn, turns: 1.0) / len(log)
    assert_equal(ascent(still_agent(policy, "greedy"), log), once, 1e-6)


def test_imitation_is_the_plain_loss_of_transformers() -> None:
    policy = two_letter_policy()
    log = [story_log(said) for said in stories(ENDING)]
    exact = by_hand(policy, log, lambda turn, turns: 1.0) / len(log)
    for credit in ("greedy", "full"):
        assert_equal(ascent(still_agent(policy, credit), log, method="sft"), exact, 1e-6)
    unscored = [replace(t, rewards=(None,) * t.num_turns) for t in log]
    assert_equal(ascent(still_agent(policy), unscored, method="sft"), exact, 1e-6)


@pytest.mark.parametrize(("top_share", "number"), [(0.25, 2), (0.3, 3), (1.0, 7), (0.001, 1)])
def test_filtered_imitation_is_imitation_of_the_best_dialogues(
    top_share: float, number: int
) -> None:
    policy = two_letter_policy()
    log = [story_log(said) for said in stories(ENDING)]
    log[3] = replace(log[3], rewards=(None,) * log[3].num_turns)  # nobody knows how good it was
    means = [np.nanmean(t.reward_T) if n != 3 else -1 for n, t in enumerate(log)]
    assert len(set(means)) == len(log) == 8
    best = [log[n] for n in np.argsort(means)[::-1][:number]]
    exact = ascent(still_agent(policy), best, method="sft") * number / len(log)
    found = ascent(still_agent(policy), log, method="filtered", top_share=top_share)
    assert_equal(found, exact, 1e-6)


# --- weights --------------------------------------------------------------------------------------

ALL = ((0,), (0, 1), (1,))
NONE = None


def weights_used(log: Sequence[Any], credit: str = "full", **settings: Any) -> np.ndarray:
    """Return weight_BT that the gradient step gave the turns, read off the loss's gradient."""
    policy = two_letter_policy(LeafPolicy)
    agent = still_agent(policy, credit, token_budget=10**6)
    if not settings.pop("anchored", True):
        agent._reference = None
    settings = {"batch_size": len(log), "shuffle": 0, "min_weight": None, **settings}
    agent.learn_offline(log, **settings)
    tape = read_dialogues(policy, log)
    (rows,) = microbatches(tape.length_S, 10**6)
    grad_sL = policy.leaf_SL.grad.numpy()
    weight_BT = np.zeros((len(log), max(t.num_turns for t in log)))
    for grad_L, row in zip(grad_sL, rows, strict=True):
        turn_L = tape.turn_SL[row]
        assert (grad_L[turn_L < 0] == 0).all()
        for turn in range(log[row].num_turns):
            own = -len(log) * grad_L[turn_L == turn]
            assert np.ptp(own) < 1e-6
            weight_BT[row, turn] = own[0]
    return weight_BT


def rewarded(*rewards: float | None, group: int | str | None = None, **more: Any) -> Any:
    return story_log(ALL[: len(rewards)], rewards, group=group, **more)


UNEVEN = (
    rewarded(1.0, 0.5, 0.25, group=1),
    rewarded(0.0, 1.0, group=1),
    rewarded(0.5, NONE, 0.0, group="1"),
    rewarded(0.25, 0.75, 1.0),
)
# Full partial returns: [1.75, .75, .25], [1, 1], [.5, -, 0], [2, 1.75, 1].
HAND = {
    "none": [[1.75, 0.75, 0.25], [1, 1, 0], [0.5, 0, 0], [2, 1.75, 1]],
    "batch_mean": [
        [1.75 - 5.25 / 4, 0.75 - 3.5 / 3, 0.25 - 1.25 / 3],
        [1 - 5.25 / 4, 1 - 3.5 / 3, 0],
        [0.5 - 5.25 / 4, 0, -1.25 / 3],
        [2 - 5.25 / 4, 1.75 - 3.5 / 3, 1 - 1.25 / 3],
    ],
    # Alone in its group a dialogue is compared with those of the other groups.
    "leave_one_out": [
        [1.75 - 1, 0.75 - 1, 0.25 - 1 / 2],
        [1 - 1.75, 1 - 0.75, 0],
        [0.5 - 4.75 / 3, 0, -1.25 / 2],
        [2 - 3.25 / 3, 1.75 - 1.75 / 2, 1 - 0.25 / 2],
    ],
    "group_mean": [
        [1.75 - 1.375, 0.75 - 0.875, 0],
        [1 - 1.375, 1 - 0.875, 0],
        [0, 0, 0],
        [0, 0, 0],
    ],
}
HAND["log_mean"] = HAND["batch_mean"]  # one step is the whole log


@pytest.mark.parametrize("baseline", HAND)
def test_baselines_are_those_of_a_sum_by_hand(baseline: str) -> None:
    # Dialogues of different lengths, one unscorable turn, groups 1 and "1", one without a group.
    np.testing.assert_allclose(weights_used(UNEVEN, baseline=baseline), HAND[baseline], atol=1e-6)


def test_the_mean_over_the_log_is_not_that_over_the_step() -> None:
    with pytest.raises(
        LogError, match=r"Nothing can be learned.*\[0, 0\] with baseline='log_mean'"
    ):
        weights_used(UNEVEN[:1], "full", baseline="log_mean")
    policy, seen = two_letter_policy(LeafPolicy), []
    agent = still_agent(policy)

    def note(learner: PPGAgent) -> None:
        grad_L = policy.leaf_SL.grad[0]
        seen.append(-float(grad_L[grad_L != 0][0]))

    agent.learn_offline(
        UNEVEN, callback=note, batch_size=1, shuffle=0, min_weight=None, baseline="log_mean"
    )
    np.testing.assert_allclose(seen, [row[0] for row in HAND["log_mean"]], atol=1e-6)


def test_unscorable_turns_carry_no_gradient_and_are_in_nobodys_baseline() -> None:
    pair = [rewarded(0.5, NONE, 1.0, group=1), rewarded(1.0, 0.5, 0.0, group=1)]
    expected = {
        "none": [[1.5, 0, 1], [1.5, 0.5, 0]],
        "leave_one_out": [[0, 0, 1], [0, 0, -1]],  # nobody to compare the second turn with
        "group_mean": [[0, 0, 0.5], [0, 0, -0.5]],
        "log_mean": [[0, 0, 0.5], [0, 0, -0.5]],
    }
    for baseline, weights in expected.items():
        np.testing.assert_allclose(weights_used(pair, baseline=baseline), weights, atol=1e-6)


def test_weights_are_raised_and_lowered_to_their_bounds() -> None:
    free = np.array(HAND["batch_mean"])
    scored = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 1], [1, 1, 1]], dtype=bool)
    for low, high in ((0.0, None), (None, 0.3), (-0.2, 0.4), (0.1, 0.1), (0.25, 0.5)):
        found = weights_used(UNEVEN, baseline="batch_mean", min_weight=low, max_weight=high)
        expected = np.clip(free, -np.inf if low is None else low, np.inf if high is None else high)
        np.testing.assert_allclose(found, np.where(scored, expected, 0.0), atol=1e-6)
    assert OfflineSettings().min_weight == 0.0


def test_negative_rewards_are_raised_to_no_weight_by_default() -> None:
    log = [rewarded(-0.5, 1.0, -1.0), rewarded(0.25)]
    found = weights_used(log, "greedy", min_weight=OfflineSettings().min_weight)
    np.testing.assert_allclose(found, [[0, 1, 0], [0.25, 0, 0]], atol=1e-7)


def test_importance_ratios_multiply_weights_and_are_held_down() -> None:
    # The leaf's tokens have log-probability -1 each; those of the log are what they are.
    log = [
        rewarded(1.0, 1.0, logprobs=[[-2.0], [-1.0, -1.5]]),
        rewarded(1.0, 0.5, logprobs=[[-0.25], [-9.0, -9.0]]),
    ]
    found = weights_used(log, "greedy", importance=True, max_importance=4.0)
    expected = [[math.e, math.exp(0.5)], [math.exp(-0.75), 0.5 * 4.0]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("credit", CREDITS, ids=str)
def test_weights_are_the_partial_returns_of_the_credit(credit: Credit) -> None:
    policy = two_letter_policy(LeafPolicy)
    agent = with_phases(still_agent(policy, credit, token_budget=10**6))
    ascending = [rewarded(0.5, 0.25, 1.0)]
    agent.learn_offline(ascending, min_weight=None)
    weight_TT = credit_weights(credit, T, PHASES)
    (expected_T,) = partial_returns([[0.5, 0.25, 1.0]], weight_TT)
    turn_L = read_dialogues(policy, ascending).turn_SL[0]
    found = -policy.leaf_SL.grad[0].numpy()
    np.testing.assert_allclose(found, np.where(turn_L >= 0, expected_T[turn_L], 0), atol=1e-6)


# --- negative weights -----------------------------------------------------------------------------

NEGATIVE: list[tuple[str, Any, dict[str, Any], float]] = [
    # what, the log's rewards, settings, the most negative weight that can come
    ("none", [[-0.5, 0.25], [1.0]], {}, -0.5),
    ("log mean", [[1.0, 1.0], [0.0, 0.5]], {"baseline": "log_mean"}, -0.5),
    ("batch mean", [[1.0, 1.0], [0.0, 0.5]], {"baseline": "batch_mean"}, -1.0),
    ("clipped", [[-0.5, 0.25], [1.0]], {"min_weight": -0.25}, -0.25),
]


@pytest.mark.parametrize(("rewards", "settings", "lowest"), [row[1:] for row in NEGATIVE])
def test_negative_weights_without_an_anchor_are_refused(
    rewards: Any, settings: dict[str, Any], lowest: float
) -> None:
    log = [rewarded(*each) for each in rewards]
    settings = {"min_weight": None, **settings}
    agent = PPGAgent(two_letter_policy(), None, "greedy", scale="none")
    told_so = rf"leaves weights down to {lowest:.3g}, .*no bound.*kl_coef.*min_weight=0"
    for sft_coef in (0.0, -lowest - 0.01):
        with pytest.raises(ValueError, match=told_so):
            agent.learn_offline(log, sft_coef=sft_coef, **settings)
    assert agent.num_updates == 0
    agent.learn_offline(log, sft_coef=-lowest, **settings)
    tied = PPGAgent(two_letter_policy(), None, "greedy", scale="none", kl_coef=0.1)
    tied.learn_offline(log, **settings)
    PPGAgent(two_letter_policy(), None, "greedy").learn_offline(log, **settings | {"min_weight": 0})


def test_a_matrix_with_negative_entries_can_give_negative_weights() -> None:
    credit = Subset([[1.0, -1.0], [0.0, 1.0]])
    agent = PPGAgent(two_letter_policy(), None, credit, scale="none")
    with pytest.raises(ValueError, match=r"leaves weights down to -0\.5, "):
        agent.learn_offline([rewarded(0.5, 1.0)], min_weight=None)
    agent.learn_offline([rewarded(1.0, 0.5)], min_weight=None)  # this log has no such turn
    agent.learn_offline([rewarded(0.5, 1.0)], min_weight=None, method="sft")


# --- what is refused, before anything is learned --------------------------------------------------


def small_log(number: int = 6, first: int = 0, scored: bool = True, **more: Any) -> list[Any]:
    """Return text dialogues of one to three turns, each of a persona of its own."""
    log = []
    for i in range(first, first + number):
        turns = range(1 + i % 3)
        lines = [f"{('I like tea.', 'No.', 'My dog does.')[(i + t) % 3]} {i}" for t in turns]
        rewards = tuple((i * 7 + t * 3) % 11 / 10 if scored else None for t in turns)
        known = {"persona": f"p{i}", "rewards": rewards, "domain": "chatting", **more}
        log.append(replace(told(chat_of(lines, system=False)), **known))
    return log


def sampled_log(number: int = 6, seed: int = 3, **more: Any) -> list[Any]:
    """Return dialogues of the tiny model with their ids and log-probabilities."""
    policy = tiny_policy()
    batch = PPGAgent(policy, EchoDialogues(number), group_size=2, seed=seed).collect()
    return [
        replace(trajectory, **{"persona": f"s{b}", "domain": "chatting", **more})
        for b, trajectory in enumerate(logged(batch))
    ]


def with_ids(log: Sequence[Any], token: int) -> list[Any]:
    """Return the dialogues with another token in the place of each line's first."""
    return [
        replace(t, token_ids=[[token, *ids[1:]] for ids in t.token_ids], logprobs=None) for t in log
    ]


def rewarded_text(reward: float, persona: str) -> Any:
    return replace(told(chat_of(["No."])), rewards=(reward,), persona=persona)


OTHER = {"persona": "other"}
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "two domains": (
        lambda: [*small_log(2), *small_log(2, 2, domain="therapy")],
        {},
        LogError,
        "mix the domains chatting, therapy; learn from one",
    ),
    "validation of another domain": (
        small_log,
        {"validation": small_log(2, 9, domain="therapy")},
        LogError,
        "mix the domains chatting, therapy",
    ),
    "no rewards": (
        lambda: small_log(2, scored=False),
        {},
        LogError,
        r"No turn of the log has a reward; score it first \(ppg rejudge\).*method='sft'",
    ),
    "no rewards to filter by": (
        lambda: small_log(2, scored=False),
        {"method": "filtered"},
        LogError,
        "No turn of the log has a reward",
    ),
    "no rewards in the validation": (
        small_log,
        {"validation": small_log(1, 9, scored=False)},
        LogError,
        "No turn of the validation log has a reward",
    ),
    "no groups": (
        small_log,
        {"baseline": "group_mean"},
        LogError,
        "baseline='group_mean' needs dialogues of a group that follow.*'batch_mean' or 'log_mean'",
    ),
    "groups of one": (
        lambda: [replace(t, group=i) for i, t in enumerate(small_log())],
        {"baseline": "leave_one_out"},
        LogError,
        "baseline='leave_one_out' needs .*the log has no such two",
    ),
    "groups that do not stand together": (
        lambda: [replace(t, group=i % 3) for i, t in enumerate(small_log(12))],
        {"baseline": "group_mean"},
        LogError,
        "the log has no such two",
    ),
    "steps of one dialogue": (
        lambda: [replace(t, group=i // 2) for i, t in enumerate(small_log())],
        {"baseline": "leave_one_out", "batch_size": 1},
        LogError,
        "a batch_size above 1; .*or batch_size=1",
    ),
    "no groups in the validation": (
        lambda: [replace(t, group=i // 2) for i, t in enumerate(small_log())],
        {"baseline": "group_mean", "validation": small_log(2, 9)},
        LogError,
        "the validation log has no such two",
    ),
    "importance of texts": (
        lambda: [*sampled_log(), *small_log(1)],
        {"importance": True},
        LogError,
        r"^the log, dialogue 7: importance=True needs .*learn without, or log them \(ppg train",
    ),
    "importance of ids alone": (
        lambda: sampled_log(logprobs=None),
        {"importance": True},
        LogError,
        "^the log, dialogue 1: importance=True needs logged log-probabilities",
    ),
    "importance of what is tokenised again": (
        lambda: [*sampled_log(), *sampled_log(2, tokenizer="f00d", **OTHER)],
        {"importance": True, "tokenise_again": True},
        LogError,
        "^the log, dialogue 7: importance=True needs logged log-probabilities",
    ),
    "ids of another tokenizer": (
        lambda: [*small_log(5), *sampled_log(2, tokenizer="f00d")],
        {},
        LogError,
        "^the log, dialogue 6: logged as ids of the tokenizer f00d.*tokenise_again",
    ),
    "ids beyond the vocabulary": (
        lambda: [*small_log(1), *with_ids(sampled_log(2), 999)],
        {},
        LogError,
        r"^the log, dialogue 2: token id 999, and \S+ knows 320 tokens",
    ),
    "ids that say something else": (
        lambda: [*small_log(1), *with_ids(sampled_log(2), 65)],
        {},
        LogError,
        "^the log, dialogue 2: the ids of line 0 say '.*', the log has '.*tokenise_again",
    ),
    "half a character": (
        lambda: [*small_log(2), told(chat_of(["Tea \ud83d"]))],
        {},
        LogError,
        "^the log, dialogue 3: a line of 'assistant' holds half a character",
    ),
    "validation in ids of another tokenizer": (
        small_log,
        {"validation": sampled_log(2, tokenizer="f00d")},
        LogError,
        "^the validation log, dialogue 1: .* tokenizer f00d",
    ),
    "patience without validation": (
        small_log,
        {"patience": 2},
        ValueError,
        "patience=2 needs validation data to watch",
    ),
    "leaks": (
        small_log,
        {"validation": small_log(2, 5)},
        LogError,
        "Training and test data share the persona 'p5'; split by persona",
    ),
    "no dialogues": (list, {}, LogError, "^the log holds no dialogues"),
    "no validation dialogues": (
        small_log,
        {"validation": []},
        LogError,
        "^the validation log holds no dialogues",
    ),
    "one dialogue": (lambda: small_log()[0], {}, TypeError, "got a LoggedDialogue; give list"),
    "no log": (lambda: None, {}, TypeError, "got a NoneType"),
    "an iterator": (
        lambda: iter(small_log()),
        {},
        TypeError,
        r"path of a file or a list of dialogues.*got a list_iterator; give list\(\.\.\.\) of it",
    ),
    "a generator of validation dialogues": (
        small_log,
        {"validation": (t for t in small_log(2, 9))},
        TypeError,
        "which can be read more than once, got a generator",
    ),
    "rows of a dataset": (
        lambda: [t.record() for t in small_log()],
        {},
        TypeError,
        "got a dict; make it with parse_dialogue, those of a dataset with from_dataset",
    ),
    "a misspelt setting": (
        small_log,
        {"max_wieght": 1.0},
        TypeError,
        r"Unknown setting 'max_wieght'\. Did you mean 'max_weight'\? There are method, epochs,",
    ),
    "a method": (
        small_log,
        {"method": "dpo"},
        ValueError,
        "Unknown method 'dpo'; there are ppg, sft, filt",
    ),
    "a baseline": (
        small_log,
        {"baseline": "value"},
        ValueError,
        "Unknown baseline 'value'; there are none, log_mean, batch_mean, leave_one_out, group_mean",
    ),
    **{
        f"{name}={value}": (
            small_log,
            {name: value},
            ValueError,
            f"{name} must be a whole number of at least {least}, got {value}",
        )
        for name, value, least in (
            ("epochs", 0, 1),
            ("epochs", 1.5, 1),
            ("batch_size", 0, 1),
            ("batch_size", 2.0, 1),
            ("batch_size", None, 1),
            ("patience", 0, 1),
            ("shuffle", -1, 0),
            ("shuffle", True, 0),
        )
    },
    **{
        f"{name}={value!r}": (
            small_log,
            {name: value},
            ValueError,
            f"{name} must be a finite number{bounds}, got {value!r}",
        )
        for name, value, bounds in (
            ("top_share", 1.5, r" in \[0, 1\]"),
            ("top_share", math.nan, r" in \[0, 1\]"),
            ("min_ess", -0.1, r" in \[0, 1\]"),
            ("min_ess", True, r" in \[0, 1\]"),
            ("sft_coef", -1.0, " of at least 0"),
            ("sft_coef", math.inf, " of at least 0"),
            ("max_importance", math.inf, " of at least 0"),
            ("min_weight", math.nan, " or None"),
            ("min_weight", -math.inf, " or None"),
            ("min_weight", "0", " or None"),
            ("max_weight", math.inf, " or None"),
        )
    },
    "no share": (small_log, {"top_share": 0.0}, ValueError, "must not be 0"),
    "no importance at all": (small_log, {"max_importance": 0.0}, ValueError, "must not be 0"),
    "bounds that cross": (
        small_log,
        {"max_weight": -1.0},
        ValueError,
        "min_weight must not be above max_weight, got 0.0 and -1.0",
    ),
    "a baseline of imitation": (
        small_log,
        {"method": "sft", "baseline": "log_mean"},
        ValueError,
        "method='sft' imitates lines, .* leave out baseline='log_mean' and importance=False",
    ),
    "importance of imitation": (
        small_log,
        {"method": "filtered", "importance": True},
        ValueError,
        "method='filtered' imitates lines",
    ),
    "no weight but 0": (
        small_log,
        {"max_weight": 0.0},
        LogError,
        r"Nothing can be learned from the log: .*min_weight=0\.0, max_weight=0\.0.* lie in \[0, ",
    ),
    "rewards of 0": (
        lambda: [replace(t, rewards=[0] * t.num_turns) for t in small_log()],
        {},
        LogError,
        r"every turn's weight is 0.* lie in \[0, 0\] with baseline='none'",
    ),
    "rewards that are all alike": (
        lambda: [rewarded_text(0.75, f"p{i}") for i in range(4)],
        {"baseline": "log_mean"},
        LogError,
        r"every turn's weight is 0.*Take a log whose rewards differ",
    ),
    "none of the best in the validation": (
        lambda: [rewarded_text(0.25, "p"), rewarded_text(0.75, "q")],
        {"method": "filtered", "validation": [rewarded_text(0.5, "r")]},
        LogError,
        r"the validation log cannot tell .*none of its dialogues is among the best \(top_share=0",
    ),
    "validation rewards that are all alike": (
        lambda: [rewarded_text(0.25, "p"), rewarded_text(0.75, "q")],
        {"validation": [rewarded_text(0.5, "r"), rewarded_text(0.5, "s")]},
        LogError,
        "the validation log cannot tell whether .*in no turn did two of its dialogues earn diff",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learned_from_is_refused_and_nothing_has_changed(case: str) -> None:
    make_log, settings, kind, message = REFUSED[case]
    agent = PPGAgent(tiny_policy(), None, seed=0)
    start, spawned = weights_of(agent), agent.policy.num_seeds_spawned
    with pytest.raises(kind, match=message):
        agent.learn_offline(make_log(), **{"epochs": 2, **settings})
    assert torch.equal(weights_of(agent), start)
    assert not agent.history and agent.num_updates == agent.num_timesteps == 0
    assert agent.policy.num_seeds_spawned == spawned and not agent.optimization.adam.state


def test_credits_that_do_not_cover_the_log_or_its_validation_are_refused_at_once() -> None:
    agent = PPGAgent(tiny_policy(), None, Subset(np.eye(2)), seed=0)
    with pytest.raises(ValueError, match="covers 2 turns but 3 are needed"):
        agent.learn_offline(small_log(3))
    with pytest.raises(ValueError, match="covers 2 turns but 3 are needed"):
        agent.learn_offline(small_log(2), validation=small_log(1, 8))
    with pytest.raises(ValueError, match=r"no environment with phases.*segment:N"):
        PPGAgent(tiny_policy(), None, "segment").learn_offline(small_log(2))
    assert not agent.history


def test_a_log_whose_every_line_is_too_long_is_refused() -> None:
    policy = tiny_policy()
    policy.network.context_length = 60
    short, long = small_log(2), [told(chat_of(["I like tea, rain and dogs. " * 9]))]
    for log, validation, name in (
        (long, None, "the log"),
        (short, long, "the validation log"),
    ):
        agent = PPGAgent(policy, None, seed=0)
        start = weights_of(agent)
        with pytest.raises(LogError, match=rf"No line of {name} fits the context .*\(60 tokens\)"):
            agent.check_offline(log, validation)
        with pytest.raises(LogError, match=rf"No line of {name} fits the context"):
            agent.learn_offline(log, validation=validation)
        assert torch.equal(weights_of(agent), start)
    agent.learn_offline(short, validation=[*long, *small_log(6, 9)])
    assert 0 < agent.log["offline/validation_dropped_turns"] < 1


def test_phases_are_those_of_dialogues_as_long_as_the_logged_ones() -> None:
    log = [replace(told(chat_of(["No.", "So.", "I."])), rewards=(1.0, 1.0, 1.0))]
    for turns in (2, 6):
        env = SyncVectorEnv([lambda turns=turns: EchoDialogue(turns)] * 2)
        agent = PPGAgent(tiny_policy(), env, "segment", scale="none", group_size=2, seed=0)
        told_so = rf"of {turns} turns, .*longest logged one has 3: .*max_turns=3, .*segment:N"
        with pytest.raises(ValueError, match=told_so):
            agent.learn_offline(log)
    for env in (SyncVectorEnv([lambda: EchoDialogue(3)] * 2), EchoDialogues(2, max_turns=3)):
        agent = PPGAgent(tiny_policy(), env, "segment", scale="none", group_size=2, seed=0)
        assert agent.learn_offline(log).log["offline/weight_mean"] == pytest.approx(4 / 3)
    fixed = PPGAgent(tiny_policy(), None, "segment:2", scale="none", seed=0)
    assert fixed.learn_offline(log).log["offline/weight_mean"] == pytest.approx(4 / 3)


def test_a_scale_is_that_of_the_longest_logged_dialogue_whatever_the_environments_are() -> None:
    log = [replace(told(chat_of(["No.", "So."])), rewards=(1.0, 1.0))]
    for env in (None, EchoDialogues(2), SyncVectorEnv([lambda: EchoDialogue(6)] * 2)):
        agent = PPGAgent(tiny_policy(), env, "full", group_size=2, seed=0).learn_offline(log)
        assert agent.log["offline/weight_mean"] == pytest.approx(1.0)


def test_lines_without_room_are_dropped_and_their_rewards_still_count() -> None:
    policy = tiny_policy()
    log = [told(chat_of(["I like tea.", "No.", "So."])), told(chat_of(["Tea."]))]
    log = [replace(log[0], rewards=(0.5, 0.25, 1.0)), replace(log[1], rewards=(1.0,))]
    whole = read_dialogues(policy, log)
    policy.network.context_length = int(whole.length_S[0]) - 1
    agent = PPGAgent(policy, None, "full", scale="none", seed=0)
    with pytest.warns(UserWarning, match="25% of the logged turns lie beyond the context"):
        agent.learn_offline(log)
    assert agent.log["offline/dropped_turns"] == pytest.approx(1 / 4)
    assert agent.num_timesteps == 4
    loss = -(plain_logprobs(tiny_policy(), whole) * weights_on(whole, [[1.75, 1.25, 0], [1]])).sum()
    assert agent.log["train/policy_loss"] == pytest.approx(loss / 2, rel=1e-4)


def weights_on(tape: Any, weights: Sequence[Sequence[float]]) -> np.ndarray:
    """Return weight_SL: each token's turn's."""
    found = np.zeros(tape.turn_SL.shape)
    for s, l in zip(*np.nonzero(tape.turn_SL >= 0), strict=True):  # noqa: E741
        found[s, l] = weights[tape.episode_S[s]][tape.turn_SL[s, l]]
    return found


def test_an_unknown_domain_is_no_other_domain() -> None:
    log = [*small_log(2), *small_log(2, 2, domain="")]
    assert PPGAgent(tiny_policy(), None, seed=0).learn_offline(log).num_updates == 1


def test_an_actor_critic_does_not_learn_from_logs() -> None:
    with pytest.raises(ValueError, match=r"own dialogues only; .*PPGAgent\(policy, None, 'kstep"):
        PPOAgent(tiny_policy(), None).learn_offline(small_log())


# --- the loop -------------------------------------------------------------------------------------


def offline_agent(credit: str = "full", kind: str = "llama", **settings: Any) -> PPGAgent:
    settings = {"seed": 0, "learning_rate": 1e-3, **settings}
    return PPGAgent(tiny_policy(kind), None, credit, **settings)


def orders(monkeypatch: pytest.MonkeyPatch, log: Any, **settings: Any) -> list[list[str]]:
    """Return the personas of each gradient step."""
    seen: list[list[str]] = []
    seed = settings.pop("seed", 0)

    step = PPGAgent._offline_step

    def spy(agent: PPGAgent, batch: Sequence[Any], *more: Any) -> Any:
        seen.append([dialogue.persona for dialogue in batch])
        return step(agent, batch, *more)

    with monkeypatch.context() as patch:
        patch.setattr(PPGAgent, "_offline_step", spy)
        offline_agent(seed=seed).learn_offline(log, **settings)
    return seen


def joined(steps: Sequence[Sequence[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(steps))


def test_each_epoch_reads_each_dialogue_once_in_an_order_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = small_log(11)
    names = [trajectory.persona for trajectory in log]
    for shuffle in (1, 4, 1024):
        settings: dict[str, Any] = {"epochs": 3, "batch_size": 4, "shuffle": shuffle}
        steps = orders(monkeypatch, log, **settings)
        assert [len(step) for step in steps] == [4, 4, 3] * 3
        epochs = [joined(steps[i : i + 3]) for i in (0, 3, 6)]
        assert all(sorted(epoch) == sorted(names) for epoch in epochs)
        assert len({tuple(epoch) for epoch in [names, *epochs]}) == 4
        assert orders(monkeypatch, log, **settings) == steps
        assert orders(monkeypatch, log, seed=1, **settings) != steps
        # Nothing comes earlier than the buffer lets it.
        for epoch in epochs:
            assert all(names.index(name) <= place + shuffle for place, name in enumerate(epoch))
    in_order = orders(monkeypatch, log, epochs=2, batch_size=4, shuffle=0)
    assert joined(in_order) == names * 2


def test_a_shuffled_order_is_about_uniform() -> None:
    places = np.zeros((6, 6))
    units = [[each] for each in small_log(6)]
    for seed in range(600):
        for place, each in enumerate(batching.shuffled(units, 6, [seed])):
            places[int(each.persona[1:]), place] += 1
    assert (np.abs(places / 600 - 1 / 6) < 0.07).all()  # sd 0.015


def test_groups_that_stand_together_are_compared_with_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = [replace(each, group=i // 3) for i, each in enumerate(small_log(24))]
    for baseline in ("group_mean", "leave_one_out"):
        steps = orders(monkeypatch, log, baseline=baseline, batch_size=6, epochs=2)
        assert [len(step) for step in steps] == [6] * 8
        groups = [[int(name[1:]) // 3 for name in step] for step in steps]
        assert all(step[:3] == step[:1] * 3 and step[3:] == step[3:4] * 3 for step in groups)
        assert sorted(joined(groups[:4])) == sorted(joined(groups[4:]))
        assert groups[:4] != groups[4:]
    loose = orders(monkeypatch, log, baseline="batch_mean", batch_size=6)
    assert any(len({int(name[1:]) // 3 for name in step}) > 2 for step in loose)
    # However large a group is, it is not held in memory.
    one = [replace(each, group="g") for each in log]
    assert max(map(len, batching.units(one, True, 5))) == 5


def test_a_log_larger_than_memory_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(tmp_path / "log.jsonl.gz", small_log(120))
    alive = most = number = 0

    def forget() -> None:
        nonlocal alive
        alive -= 1

    def counting(path: Path) -> Any:
        nonlocal alive, most, number
        for trajectory in read_log(path):
            weakref.finalize(trajectory, forget)
            alive, number = alive + 1, number + 1
            most = max(most, alive)
            yield trajectory
            del trajectory

    monkeypatch.setattr(batching, "read_log", counting)
    agent = offline_agent()
    write_log(tmp_path / "other.jsonl", small_log(60, 200))
    agent.learn_offline(
        tmp_path / "log.jsonl.gz",
        validation=tmp_path / "other.jsonl",
        epochs=2,
        batch_size=4,
        shuffle=8,
    )
    # Surveyed, checked for leaks, and each epoch; validation once more before learning.
    assert number == 120 * (2 + 2) + 60 * (2 + 3)
    assert 8 < most <= 8 + 2 * 4 + 2
    assert agent.num_updates == 60


def test_a_log_is_learned_from_alike_as_a_file_zipped_or_in_memory(tmp_path: Path) -> None:
    log = sampled_log()
    ends = [weights_of(offline_agent().learn_offline(log, batch_size=2))]
    for name in ("log.jsonl", "log.jsonl.gz"):
        write_log(tmp_path / name, log)
        for path in (tmp_path / name, str(tmp_path / name)):
            ends.append(weights_of(offline_agent().learn_offline(path, batch_size=2)))
    assert all(torch.equal(end, ends[0]) for end in ends)
    assert not torch.equal(ends[0], weights_of(offline_agent()))


@several_sequences
@pytest.mark.parametrize("token_budget", [1, 150, 500])
@pytest.mark.parametrize("template", [CHATML, REWRITING], ids=["appends", "rewrites"])
def test_microbatches_do_not_change_the_gradient(template: str, token_budget: int) -> None:
    log, found = sampled_log(8), []
    for budget in (10**6, token_budget):
        agent = still_agent(
            tiny_policy(template=template), "kstep:2", token_budget=budget, kl_coef=0.1
        )
        settings = {"sft_coef": 0.5, "importance": True}
        found.append((ascent(agent, log, **settings), agent.log))
    scale = float(found[0][0].abs().max())
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6 * scale)
    for key, value in found[0][1].items():
        if not key.startswith("time/"):
            assert found[1][1][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_no_pass_is_larger_than_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    log, policy = small_log(12), tiny_policy()
    sizes: list[int] = []
    scores = LMPolicy.scores

    def spy(self: LMPolicy, token_SL: Any, *more: Any, **extras: Any) -> Any:
        sizes.append(token_SL.shape[0] * token_SL.shape[1])
        return scores(self, token_SL, *more, **extras)

    monkeypatch.setattr(LMPolicy, "scores", spy)
    agent = PPGAgent(policy, None, token_budget=200, seed=0)
    agent.learn_offline(log, validation=small_log(12, 30))
    assert max(sizes) <= 200 and len(sizes) > 8


def test_bookkeeping_counts_epochs_turns_and_updates() -> None:
    log = small_log(7)
    turns = sum(t.num_turns for t in log)
    rows: list[dict[str, float]] = []
    agent = offline_agent()
    agent.learn_offline(log, epochs=2, batch_size=3, callback=lambda a: rows.append(a.log))
    assert rows == agent.history and len(rows) == agent.num_updates == 6
    assert [row["offline/epoch"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert agent.num_timesteps == rows[-1]["time/total_timesteps"] == 2 * turns
    assert all(math.isfinite(value) for row in rows for value in row.values())
    weights = credit_weights(FullPlanning(), 3, scale="mean_window")
    total = sum(
        float(partial_returns([t.reward_T], weights[: t.num_turns, : t.num_turns]).sum())
        for t in log
    )
    whole = offline_agent().learn_offline(log)
    assert whole.log["offline/weight_mean"] == pytest.approx(total / turns)
    assert whole.log["offline/dropped_turns"] == 0.0
    assert agent.learn_offline(log).num_updates == 7  # and goes on counting


def test_learning_can_go_on_in_an_environment() -> None:
    agent = offline_agent(group_size=4).learn_offline(small_log(4))
    agent.env = EchoDialogues(8)
    agent.learn(1)
    assert agent.num_updates == 2 and "rollout/ep_rew_mean" in agent.log


# --- validation -----------------------------------------------------------------------------------


def loss_by_hand(policy: LMPolicy, log: Sequence[Any], weights: Sequence[Sequence[float]]) -> float:
    tape = read_dialogues(policy, log)
    total = (plain_logprobs(policy, tape) * weights_on(tape, weights)).sum()
    return float(-total / len(log))


def snapshot(agent: PPGAgent) -> dict[str, Tensor]:
    tensors, _ = agent.optimization.state()
    named = {f"weight {name}": p.detach() for name, p in agent.policy.model.named_parameters()}
    return {name: value.clone() for name, value in {**named, **tensors}.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_learning_stops_without_progress_and_goes_back_to_the_best_epoch(
    dtype: torch.dtype, adapter: bool
) -> None:
    policy = tiny_policy()
    if adapter:
        add_lora(policy.model, 4, seed=0)
    policy.model.to(dtype)
    rate = 0.003 if adapter else 0.001
    agent = PPGAgent(policy, None, "full", learning_rate=rate, seed=0)
    ends: list[dict[str, Tensor]] = []

    def note(learner: PPGAgent) -> None:
        if "offline/validation_loss" in learner.log:
            ends.append(snapshot(learner))

    agent.learn_offline(
        small_log(6),
        validation=small_log(6, 30),
        epochs=40,
        batch_size=3,
        patience=2,
        callback=note,
    )
    losses = [v for row in agent.history if (v := row.get("offline/validation_loss")) is not None]
    best = int(np.argmin(losses))
    assert best > 0 and len(losses) == best + 3 < 40
    assert agent.log["offline/best_epoch"] == best + 1
    found = snapshot(agent)
    assert found.keys() == ends[best].keys()
    for name, value in ends[best].items():
        assert torch.equal(found[name], value), name
    assert any(not torch.equal(found[name], ends[-1][name]) for name in found)
    masters = [name for name in found if name.startswith("master.")]
    assert bool(masters) == (dtype == torch.bfloat16)
    agent.learn_offline(small_log(2))  # and can go on from there
    assert torch.isfinite(weights_of(agent)).all()


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([9.0, 2.0, math.nan, 3.0], 1),  # what is no number is never the best
        ([9.0, 2.0, math.nan, 1.5, 3.0, 3.0], 3),
        ([9.0, math.nan, 2.0, 3.0, 3.0], 2),
        ([math.nan, 2.0, 3.0, 3.0], 1),
        ([9.0, 2.0, 2.0, 2.0], 1),  # as good as the best is no progress
        ([2.0, 2.0, 3.0], 0),
        ([-1.0, 0.0, -0.5], 0),
    ],
)
def test_the_best_epoch_is_the_first_with_the_lowest_loss_and_may_be_the_start(
    losses: list[float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, given = offline_agent(), iter(losses)
    ends = [weights_of(agent)]
    monkeypatch.setattr(Validation, "_loss", lambda *_: next(given))
    with warnings.catch_warnings(record=True) as told_of:
        warnings.simplefilter("always")
        agent.learn_offline(
            small_log(3),
            validation=small_log(2, 9),
            epochs=9,
            patience=2,
            callback=lambda a: ends.append(weights_of(a)),
        )
    assert len(ends) == len(losses)
    assert agent.log["offline/best_epoch"] == best
    assert torch.equal(weights_of(agent), ends[best])
    assert sum("before it learned" in str(w.message) for w in told_of) == (best == 0)


@pytest.mark.parametrize("settings", [{}, {"baseline": "log_mean"}, {"method": "sft"}])
def test_the_loss_before_learning_is_what_a_still_agent_is_measured_at(settings: Any) -> None:
    agent, held_out = offline_agent(), small_log(6, 30)
    plan = agent._plan(small_log(6), held_out, OfflineSettings.of(settings))
    watch = Validation(
        LogReader(held_out),
        plan.settings,
        plan.weights,
        lambda batch: agent._turn_logprobs(batch, plan.settings),
    )
    assert watch.loss_before == watch.measure()["offline/validation_loss"]
    assert (abs(watch.loss_before) < 1e-6) == (plan.settings.method == "ppg")


def test_a_step_in_which_no_turn_has_a_weight_moves_nothing() -> None:
    """Neither by the gradient, which is 0, nor by the momentum of the steps before."""
    scored, unscored = told(chat_of(["I do.", "No."])), told(chat_of(["No.", "I do."]))
    unscored = replace(unscored, rewards=(None, None))
    # A turn with a weight that nobody can read, because it lies beyond the context.
    unread = replace(told(chat_of(["No.", "I like tea. " * 30])), rewards=(None, 1.0))
    for second, settings, moves in (
        (unscored, {}, False),
        (unscored, {"sft_coef": 0.1}, True),
        (unread, {}, False),
        (scored, {}, True),
    ):
        policy = tiny_policy()
        policy.network.context_length = 150
        agent = PPGAgent(policy, None, "greedy", learning_rate=0.01, seed=0)
        ends: list[Tensor] = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*beyond the context")
            agent.learn_offline(
                [scored, second],
                batch_size=1,
                shuffle=0,
                callback=lambda a, ends=ends: ends.append(weights_of(a)),
                **settings,
            )
        assert len(ends) == 2
        assert torch.equal(ends[0], ends[1]) != moves


def test_without_a_measurement_there_is_no_best_epoch_to_go_back_to() -> None:
    agent, ends = offline_agent(), []

    def stop(a: PPGAgent) -> bool:
        ends.append(weights_of(a))
        return len(ends) < 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn_offline(
            small_log(8), validation=small_log(6, 30), batch_size=2, patience=2, callback=stop
        )
    assert torch.equal(weights_of(agent), ends[1])


def test_where_every_step_was_skipped_that_is_what_is_said() -> None:
    agent = offline_agent(skip_grad_norm=1e-9, max_skips=99)
    with pytest.warns(UserWarning, match="Nothing was learned: all 4 gradients") as told_of:
        agent.learn_offline(
            small_log(8), validation=small_log(6, 30), epochs=2, batch_size=4, patience=5
        )
    assert not any("before it learned" in str(w.message) for w in told_of)


def test_all_epochs_without_patience_keep_the_last_weights() -> None:
    agent, ends = offline_agent(learning_rate=0.01), []
    agent.learn_offline(
        small_log(6),
        validation=small_log(3, 30),
        epochs=25,
        callback=lambda a: ends.append(weights_of(a)),
    )
    losses = [row["offline/validation_loss"] for row in agent.history]
    assert np.argmin(losses) < 24, losses
    assert torch.equal(weights_of(agent), ends[-1])


def test_a_number_of_steps_ends_learning_and_is_measured_like_an_epoch() -> None:
    agent = offline_agent(lr_schedule="linear")
    agent.learn_offline(
        small_log(8), validation=small_log(6, 30), epochs=5, batch_size=3, max_steps=5, patience=9
    )
    measured = ["offline/validation_loss" in row for row in agent.history]
    assert measured == [False, False, True, False, True]
    assert agent.log["offline/epoch"] == 2 and agent.log["offline/best_epoch"] in (1, 2)
    assert offline_agent().learn_offline(small_log(3), max_steps=9).num_updates == 1


def test_dialogues_of_a_group_that_are_never_in_one_step_teach_nothing_and_that_is_said() -> None:
    log = [replace(t, group=(i + 1) // 2) for i, t in enumerate(small_log(6))]
    settings = {"baseline": "group_mean", "shuffle": 0}
    agent = offline_agent()
    start = weights_of(agent)
    with pytest.raises(LogError, match=r"every turn's weight is 0.*baseline='group_mean'"):
        agent.learn_offline(log, batch_size=2, **settings)
    assert torch.equal(weights_of(agent), start)
    with pytest.warns(UserWarning, match=r"33% of the dialogues had no other.*learned nothing"):
        agent.learn_offline(log, batch_size=3, **settings)
    assert not torch.equal(weights_of(agent), start)
    with pytest.warns(UserWarning, match="compared them with dialogues of other groups"):
        agent.learn_offline(log, batch_size=3, baseline="leave_one_out", shuffle=0)
    pairs = [replace(t, group=i // 2) for i, t in enumerate(small_log(6))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn_offline(pairs, batch_size=4, **settings)


def test_steps_that_were_all_skipped_are_no_silent_success() -> None:
    agent = offline_agent()
    spoil_gradients(agent, math.nan, {1, 2})
    with pytest.warns(UserWarning, match=r"Nothing was learned: all 2 gradients were skipped.*nan"):
        agent.learn_offline(small_log(8), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn_offline(small_log(8), batch_size=4)
        spoil_gradients(agent, math.nan, {1})
        agent.learn_offline(small_log(8), batch_size=4)


@pytest.mark.parametrize(
    "change", ["grows", "shrinks", "gets longer", "gets shorter", "evens out", "other rewards"]
)
@pytest.mark.parametrize("which", ["log", "validation log"])
def test_a_log_that_changes_while_it_is_learned_from_is_refused(
    which: str, change: str, tmp_path: Path
) -> None:
    logs = {"log": small_log(8), "validation log": small_log(6, 30)}
    paths = {name: tmp_path / f"{name}.jsonl" for name in logs}
    for name, log in logs.items():
        write_log(paths[name], log)
    longer = told(chat_of([f"So {i}." for i in range(4)]), persona="longer")
    pairs = [each for each in small_log(24, 60) if each.num_turns == 2]
    changed = {
        "grows": [*logs[which], *small_log(2, 60)],
        "shrinks": logs[which][:-1],
        "gets longer": [longer, *logs[which][1:]],
        "gets shorter": [*logs[which][:-1], small_log(1, 60)[0]],
        "evens out": [*pairs[:7], small_log(1, 60)[0]] if which == "log" else pairs[:6],
        "other rewards": [replace(d, rewards=(0.9,) * d.num_turns) for d in logs[which]],
    }[change]
    turns = [sum(t.num_turns for t in each) for each in (logs[which], changed)]
    assert (turns[0] != turns[1]) == (change not in ("evens out", "other rewards"))

    def note(agent: PPGAgent) -> None:
        if agent.num_updates == 3:
            write_log(paths[which], changed)

    with pytest.raises(LogError, match=rf"{which}\.jsonl has changed while it was read"):
        offline_agent().learn_offline(
            paths["log"], validation=paths["validation log"], epochs=3, batch_size=4, callback=note
        )


def test_a_list_that_changes_meanwhile_is_learned_from_as_it_was() -> None:
    log, held_out = small_log(8), small_log(6, 30)

    def spoil(_: PPGAgent) -> None:
        log[:], held_out[:] = log[:1], []

    settings = {"epochs": 3, "batch_size": 4}
    spoiled = offline_agent().learn_offline(log, validation=held_out, callback=spoil, **settings)
    log, held_out = small_log(8), small_log(6, 30)
    expected = offline_agent().learn_offline(log, validation=held_out, **settings)
    assert torch.equal(weights_of(spoiled), weights_of(expected))


class Shelf(Sequence[Any]):
    """Dialogues that are fetched when they are read."""

    def __init__(self, dialogues: Sequence[Any]) -> None:
        self.dialogues = dialogues

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, i: Any) -> Any:
        return self.dialogues[i]


def test_a_sequence_that_evens_out_while_it_is_learned_from_is_refused() -> None:
    """It has as many dialogues and turns as before, and its longest dialogue is shorter."""
    shelf = Shelf(small_log(8))
    pairs = [each for each in small_log(24, 60) if each.num_turns == 2]

    def note(agent: PPGAgent) -> None:
        if agent.num_updates == 2:  # the end of a pass
            shelf.dialogues = [*pairs[:7], small_log(1, 60)[0]]

    with pytest.raises(LogError, match="the log has changed while it was read"):
        offline_agent().learn_offline(shelf, epochs=3, batch_size=4, callback=note)


def test_a_callback_can_stop_learning() -> None:
    log = small_log(8)
    agent = offline_agent().learn_offline(
        log, epochs=3, batch_size=3, callback=lambda a: a.num_updates < 4
    )
    assert agent.num_updates == 4 and agent.log["offline/epoch"] == 2
    # Stopped at the end of an epoch that was the best so far, it is the one that is kept.
    ends: list[Tensor] = []

    def until_the_second(a: PPGAgent) -> bool:
        ends.append(weights_of(a))
        return a.num_updates < 2

    agent = offline_agent(learning_rate=1e-4)
    agent.learn_offline(
        log, validation=small_log(3, 30), epochs=9, patience=5, callback=until_the_second
    )
    losses = [row["offline/validation_loss"] for row in agent.history]
    assert losses[1] < losses[0]
    assert torch.equal(weights_of(agent), ends[1])


# --- anchors, effective sample size ---------------------------------------------------------------


def test_anchors_pull_as_computed_by_hand() -> None:
    log = sampled_log(4)
    settings = {"kl_coef": 0.3, "learning_rate": 1e-2, "scale": "none"}
    agent = PPGAgent(tiny_policy(), None, "greedy", seed=0, **settings)
    agent.learn_offline(log, sft_coef=0.2)  # one step away from the reference
    assert agent.history[0]["train/kl"] == pytest.approx(0.0, abs=1e-5)

    policy, before = agent.policy, tiny_policy()
    tape = read_dialogues(policy, log)
    own = torch.as_tensor(tape.turn_SL >= 0)
    ids, turn_SL = torch.as_tensor(tape.token_SL), torch.as_tensor(tape.turn_SL)
    weight_SL = torch.as_tensor(
        weights_on(tape, [[max(0.0, r or 0.0) for r in t.rewards] for t in log])
    )
    logprob_SL = policy.logprobs(ids, turn_SL)
    with torch.no_grad():
        gap_SL = before.logprobs(ids, turn_SL) - logprob_SL
    kl = torch.where(own, (before.logprobs(ids, turn_SL).detach() - logprob_SL), 0.0)
    kl = (kl.exp() - 1 - kl)[own].sum() / 4
    sft = -logprob_SL[own].sum() / 4
    loss = -(weight_SL * logprob_SL).sum() / 4  # 0 where the agent did not speak
    exact = torch.autograd.grad(
        loss + 0.3 * kl + 0.2 * sft, list(policy.model.parameters()), allow_unused=True
    )
    assert float(gap_SL[own].abs().max()) > 0.01

    frozen = Standstill(policy.model.parameters(), lr=0.0)
    frozen.param_groups[0]["full_lr"] = 0.0
    agent.optimization.adam = frozen
    agent.settings["max_grad_norm"] = agent.optimization._max_grad_norm = math.inf
    agent.learn_offline(log, sft_coef=0.2)
    found = flat(frozen.gradients)
    scale = float(found.abs().max())
    torch.testing.assert_close(found, flat(exact), rtol=1e-3, atol=1e-5 * scale)
    assert agent.log["train/policy_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert agent.log["train/kl"] == pytest.approx(kl.item(), rel=1e-3)
    assert agent.log["train/sft_loss"] == pytest.approx(sft.item(), rel=1e-4)


def test_an_anchor_holds_the_agent_back() -> None:
    log, moved = small_log(6), []
    tape = read_dialogues(tiny_policy(), log)
    own = tape.turn_SL >= 0
    start_SL = tiny_policy().logprobs(tape.token_SL, tape.turn_SL).detach().numpy()
    for kl_coef in (0.0, 10.0):
        agent = offline_agent(kl_coef=kl_coef, learning_rate=1e-2).learn_offline(log, epochs=9)
        now_SL = agent.policy.logprobs(tape.token_SL, tape.turn_SL).detach().numpy()
        moved.append(np.abs(now_SL - start_SL)[own].mean())
    assert moved[1] < 0.5 * moved[0]


def test_the_effective_sample_size_is_that_of_a_sum_by_hand() -> None:
    ratios = np.array([1.0, 2.0, 0.5, 8.0])
    expected = ratios.sum() ** 2 / (ratios**2).sum() / 4
    assert effective_share(np.log(ratios)) == pytest.approx(expected)
    assert effective_share(np.log(ratios) + 700.0) == pytest.approx(expected)
    assert effective_share([-900.0] * 5) == pytest.approx(1.0)
    assert effective_share([0.0, -800.0]) == pytest.approx(0.5)
    assert effective_share([]) == 1.0
    # Of the turns that a step has, scored or not, before ratios are held down.
    log = [
        rewarded(1.0, None, logprobs=[[-2.0], [-1.0, -1.5]]),
        rewarded(1.0, logprobs=[[-0.25]]),
    ]
    agent = still_agent(two_letter_policy(LeafPolicy), token_budget=10**6)
    with pytest.warns(UserWarning, match="effective sample size"):
        agent.learn_offline(log, importance=True, max_importance=1.1, min_ess=0.9, min_weight=None)
    assert agent.log["offline/ess"] == pytest.approx(effective_share([1.0, 0.5, -0.75]), rel=1e-5)
    clipped = effective_share([math.log(1.1), math.log(1.1), -0.75])
    assert agent.log["offline/ess_clipped"] == pytest.approx(clipped, rel=1e-5)


def test_a_collapse_is_warned_of_once() -> None:
    log, agent = sampled_log(4), offline_agent(learning_rate=0.05)
    with pytest.warns(UserWarning) as told_of:
        agent.learn_offline(log, importance=True, epochs=6, min_ess=0.9)
    (warning,) = [w for w in told_of if "effective sample size" in str(w.message)]
    shares = [row["offline/ess"] for row in agent.history]
    assert shares[0] == pytest.approx(1.0, abs=1e-4)  # the policy that spoke
    collapsed = [number for number, share in enumerate(shares, start=1) if share < 0.9]
    assert len(collapsed) > 1
    first = f"fell to {shares[collapsed[0] - 1]:.1%} of the turns (update {collapsed[0]})"
    assert first in str(warning.message) and "kl_coef" in str(warning.message)
    with pytest.warns(UserWarning, match="effective sample size"):  # once in each learning
        agent.learn_offline(log, importance=True, min_ess=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offline_agent().learn_offline(log, importance=True, min_ess=0.9)


# --- the gradient step ----------------------------------------------------------------------------


def test_the_learning_rate_falls_over_all_steps_if_asked_to() -> None:
    for schedule, expected in (
        ("linear", [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("constant", [1.0] * 6),
    ):
        agent, rates = offline_agent(lr_schedule=schedule), list[float]()

        def note(learner: PPGAgent, rates: list[float] = rates) -> None:
            rates.append(learner.optimization.adam.param_groups[0]["lr"])

        agent.learn_offline(small_log(7), epochs=2, batch_size=3, callback=note)
        np.testing.assert_allclose(rates, 1e-3 * np.array(expected))


def test_useless_gradients_are_skipped_and_too_many_in_a_row_stop_learning() -> None:
    log, ends = small_log(8), [weights_of(offline_agent())]
    agent = offline_agent(max_skips=2)
    spoil_gradients(agent, math.nan, {2, 4, 5, 6})
    with pytest.raises(DivergedError) as caught:
        agent.learn_offline(
            log, epochs=9, batch_size=4, callback=lambda a: ends.append(weights_of(a))
        )
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(ends)]
    assert moved == [True, False, True, False, False]  # the one of update 2 stood alone
    assert [row["train/skipped_steps"] for row in agent.history] == [0, 1, 1, 2, 3]
    assert "2 gradients in a row were not finite" in str(caught.value)
    assert torch.isfinite(weights_of(agent)).all()
    batch = caught.value.batch
    lines = [[m["content"] for m in chat if m["role"] == "assistant"] for chat in batch.transcripts]
    by_persona = {trajectory.persona: trajectory for trajectory in log}
    for b, persona in enumerate(batch.personas):
        found = batch.reward_BT[b][batch.alive_BT[b]]
        assert (list(found), lines[b]) == (
            list(by_persona[persona].rewards),
            by_persona[persona].lines,
        )
    assert batch.num_turns > 0 and batch.tape is not None


def test_what_an_error_left_of_a_gradient_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, log, calls = offline_agent(token_budget=1), small_log(4), 0
    scores = agent.policy.scores

    def fail_at_the_third(*arguments: Any, **extras: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return scores(*arguments, **extras)

    with monkeypatch.context() as patch:
        patch.setattr(agent.policy, "scores", fail_at_the_third)
        with pytest.raises(MemoryError):
            agent.learn_offline(log)
    whole = offline_agent(token_budget=1).learn_offline(log)
    assert torch.equal(weights_of(agent.learn_offline(log)), weights_of(whole))


def test_an_adapter_learns_from_logs_and_its_base_model_is_the_anchor() -> None:
    policy = tiny_policy()
    add_lora(policy.model, 2, seed=0)
    frozen = [p.clone() for p in policy.model.parameters() if not p.requires_grad]
    own = [p.clone() for p in policy.model.parameters() if p.requires_grad]
    agent = PPGAgent(policy, None, learning_rate=0.01, kl_coef=0.1, seed=0)
    agent.learn_offline(small_log(4), epochs=2)
    assert agent.history[0]["train/kl"] == pytest.approx(0.0, abs=1e-5)
    assert agent.history[1]["train/kl"] > 1e-6
    parameters = list(policy.model.parameters())
    still = [p for p in parameters if not p.requires_grad]
    assert all(torch.equal(p, q) for p, q in zip(still, frozen, strict=True))
    moved = [p for p in parameters if p.requires_grad]
    assert any(not torch.equal(p, q) for p, q in zip(moved, own, strict=True))


@pytest.mark.parametrize("credit", ["greedy", "kstep:2", "full"])
def test_the_loss_falls_on_a_small_log(credit: str) -> None:
    agent = PPGAgent("nano", None, credit, learning_rate=1e-3, seed=0)
    log = [replace(t, rewards=tuple(1 - 0.5 * r for r in t.rewards)) for t in small_log(6)]
    agent.learn_offline(log, epochs=6)
    losses = [row["train/policy_loss"] for row in agent.history]
    assert np.isfinite(losses).all()
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_the_progress_bar_counts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    offline_agent().learn_offline(small_log(2))
    assert capsys.readouterr().err == ""
    offline_agent().learn_offline(small_log(2), progress_bar=True)
    shown = capsys.readouterr().err
    assert "step" in shown and "loss=" in shown


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a log and what two processes learned from it."""
    folder = tmp_path_factory.mktemp("launched")
    log = [replace(t, group=i // 2) for i, t in enumerate(sampled_log(8))]
    write_log(folder / "log.jsonl", log[:7])
    held_out = [
        replace(t, group=i // 2, persona=f"held out {i}", dialogue=f"held out {i}")
        for i, t in enumerate(sampled_log(6, seed=8))
    ]
    write_log(folder / "held_out.jsonl", held_out)
    done = launch(str(Path(__file__).parent / "two_offline_processes.py"), str(folder), home=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_learn_from_a_log_as_one_does(scenario: str, launched: Path) -> None:
    alone, record = learn(scenario, launched)
    places = [launched / f"rank {rank}" / scenario for rank in (0, 1)]
    first, second = (load_file(place / "tensors.safetensors") for place in places)
    assert first.keys() == second.keys() == alone.keys()
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        # First moments are a tenth of the summed gradient; Adam moves weights by up to 1e-2.
        scale = 1.0 if "exp_avg" not in name else float(expected.abs().max())
        torch.testing.assert_close(first[name], expected, rtol=0, atol=2e-5 * scale)
    records = [json.loads((place / "record.json").read_text()) for place in places]
    assert [found["processes"] for found in records] == [2, 2] and record["processes"] == 1
    rows = [[timeless(row) for row in each["history"]] for each in (*records, record)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == len(rows[2])
    for found, wanted in zip(rows[0], rows[2], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    if scenario == "no room":
        assert any(row["offline/dropped_turns"] == 1.0 for row in rows[0])
        assert any(row["offline/dropped_turns"] < 1.0 for row in rows[0])
