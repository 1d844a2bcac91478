"""The agents: their own gradient is exact, they learn, and what they learned can be kept.

Exactness is shown on a real (tiny) Hugging Face model with a vocabulary of two tokens, so that all
that can be said in three turns can be listed. Its parameters are shared between turns, hence the
partial gradient is derived by letting the parameters vary in one turn's tokens at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny_models import CHATML, REWRITING, tiny_model, tiny_policy, tiny_tokenizer
from tiny_worlds import EchoDialogue, EchoDialogues
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import ppg_env  # noqa: F401  (registers PersonaDialogue-v0)
from agents import (
    Credit,
    Discounted,
    FullPlanning,
    FullPlanningAgent,
    Greedy,
    GreedyAgent,
    KStep,
    KStepAgent,
    PPGAgent,
    PPOAgent,
    Segment,
    SegmentAgent,
    Subset,
    Trajectory,
    collect_rollouts,
    credit_weights,
    evaluate_policy,
)
from agents.lm_policy import LMPolicy
from agents.loading import load_policy
from agents.rollout import RolloutBatch
from agents.scoring import Scores
from agents.tape import Tape

# --- a dialogue small enough to list --------------------------------------------------------------

T = 3
LINE_LENGTHS = (1, 2, 1)
ENDLESS, ENDING = "endless", "ending"
CREDITS = [
    FullPlanning(),
    Greedy(),
    KStep(2),
    Segment(length=2),
    Segment(),
    Discounted(0.5),
    Subset([[0.25, 0.0, -1.0], [0.0, 3.0, 0.5], [0.0, 0.0, 1.0]]),
    Trajectory(),
]
PHASES = (0, 1)
BASELINES = ("none", "leave_one_out", "group_mean", "batch_mean")

Story = tuple[tuple[int, ...], ...]
"""The lines of one episode, each a tuple of tokens."""


class DoublePolicy(LMPolicy):
    """The same model read in float64, in the plainest way."""

    def scores(self, token_SL: Any, turn_SL: Any, **extras: Any) -> Scores:
        logit_SLV = self.model(input_ids=token_SL).logits
        next_SL = logit_SLV.log_softmax(-1)[:, :-1].gather(-1, token_SL[:, 1:, None])[..., 0]
        return Scores(torch.nn.functional.pad(next_SL, (1, 0)), None, None, ())  # type: ignore[arg-type]


def two_token_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b")
    tokenizer.chat_template = CHATML
    return tokenizer


def two_token_policy(kind: type[LMPolicy] = DoublePolicy) -> LMPolicy:
    # GPT-2, since Llama's norms and rotations compute in float32 whatever the weights are.
    small = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.3}
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2, **small, bos_token_id=None, eos_token_id=1))
    return kind(model.double() if kind is DoublePolicy else model, two_token_tokenizer())


def is_over(world: str, said: Story) -> bool:
    return len(said) == T or (world == ENDING and said in {((1,),), ((0,), (1, 1))})


def reward(said: Story) -> float:
    """Fixed by all that was said; a multiple of 1/32, so that float32 holds it exactly."""
    rng = np.random.default_rng([len(said), *itertools.chain(*said)])
    return int(rng.integers(33)) / 32


@cache
def stories(world: str) -> tuple[Story, ...]:
    finished: list[Story] = []
    running: list[Story] = [()]
    while running:
        said = running.pop()
        for line in itertools.product((0, 1), repeat=LINE_LENGTHS[len(said)]):
            longer = (*said, line)
            (finished if is_over(world, longer) else running).append(longer)
    return tuple(finished)


def tokens_of(said: Story) -> tuple[list[int], list[int]]:
    """Return token_L and turn_L: a prompt, then lines and the partner's answers to them."""
    token_L, turn_L = [1, 0], [-1, -1]
    for turn, line in enumerate(said):
        token_L += [*line, sum(line) % 2, line[0]]
        turn_L += [turn] * len(line) + [-1, -1]
    return token_L, turn_L


def batch_of(episodes: Sequence[Story], group_B: Sequence[int]) -> RolloutBatch:
    """Write the batch that a rollout would have handed over."""
    size = len(episodes)
    records = [tokens_of(said) for said in episodes]
    length_B = np.array([len(token_L) for token_L, _ in records])
    token_BL = np.zeros((size, length_B.max()), dtype=np.int64)
    turn_BL = np.full_like(token_BL, -1)
    reward_BT, alive_BT = np.zeros((size, T)), np.zeros((size, T), dtype=bool)
    for b, (said, (token_L, turn_L)) in enumerate(zip(episodes, records, strict=True)):
        token_BL[b, : len(token_L)], turn_BL[b, : len(turn_L)] = token_L, turn_L
        alive_BT[b, : len(said)] = True
        reward_BT[b, : len(said)] = [reward(said[: t + 1]) for t in range(len(said))]
    return RolloutBatch(
        reward_BT=reward_BT,
        alive_BT=alive_BT,
        group_B=np.array(group_B),
        cut_BT=np.zeros_like(alive_BT),
        truncated_B=np.zeros(size, dtype=bool),
        overflow_B=np.zeros(size, dtype=bool),
        part_BT={},
        transcripts=[[] for _ in episodes],
        boundaries=PHASES,
        seconds=0.0,
        tape=Tape(
            token_SL=token_BL,
            turn_SL=turn_BL,
            old_logprob_SL=np.zeros(token_BL.shape, dtype=np.float32),
            length_S=length_B,
            episode_S=np.arange(size),
            cut_BT=np.zeros_like(alive_BT),
            truncated_B=np.zeros(size, dtype=bool),
        ),
    )


def turn_probabilities(policy: LMPolicy, world: str) -> Tensor:
    """probability_NT of each story's turns; 1 for turns after its end. Differentiable."""
    batch = batch_of(stories(world), range(len(stories(world))))
    turn_BL = torch.as_tensor(batch.tape.turn_SL)
    logprob_BL = policy.logprobs(torch.as_tensor(batch.tape.token_SL), turn_BL)
    spoken_TBL = turn_BL == torch.arange(T)[:, None, None]
    return (logprob_BL * spoken_TBL).sum(-1).exp().T


def flat(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients if g is not None])


def partial_gradient_by_turn(policy: LMPolicy, world: str, weight_TT: np.ndarray) -> Tensor:
    """[t] = sum_u W[t,u] dE[r_u] / d(parameters, as far as they act in turn t)."""
    parameters = list(policy.model.parameters())
    rows = batch_of(stories(world), range(len(stories(world))))
    reward_NT = torch.tensor(np.where(rows.alive_BT, rows.reward_BT, 0.0))
    probability_NT = turn_probabilities(policy, world)
    gradients = []
    for turn in range(T):
        varies_T = torch.arange(T) == turn
        chance_N = torch.where(varies_T, probability_NT, probability_NT.detach()).prod(1)
        value = chance_N @ (reward_NT @ torch.tensor(weight_TT[turn]))
        gradients.append(flat(torch.autograd.grad(value, parameters, retain_graph=True)))
    return torch.stack(gradients)


def exact_agent(policy: LMPolicy, credit: Credit, **settings: Any) -> PPGAgent:
    """An agent that computes its gradient and then does not move."""
    settings = {"scale": "none", "max_grad_norm": math.inf, "seed": 0, **settings}
    agent = PPGAgent(policy, None, credit, **settings)
    agent.optimization.adam = Standstill(policy.model.parameters(), lr=0.0)
    return agent


class Standstill(torch.optim.SGD):
    """Remembers the gradient that it was to follow."""

    def step(self, closure: Any = None) -> None:
        self.gradients = [parameter.grad for parameter in self.param_groups[0]["params"]]


def ascent(agent: PPGAgent, batch: RolloutBatch) -> Tensor:
    """The direction in which the agent would go."""
    agent.update(batch, agent.credited(batch))
    return -flat(agent.optimization.adam.gradients)


def expected_ascent(agent: PPGAgent, world: str, size: int) -> Tensor:
    """E[ascent] over all batches of `size` independent episodes of one group."""
    with torch.no_grad():
        chance_N = turn_probabilities(agent.policy, world).prod(1).tolist()
    total = torch.zeros(())
    for numbers in itertools.product(range(len(chance_N)), repeat=size):
        batch = batch_of([stories(world)[n] for n in numbers], [7] * size)
        total = total + math.prod(chance_N[n] for n in numbers) * ascent(agent, batch)
    return total


def shrinkage(policy: LMPolicy, world: str, baseline: str) -> Tensor:
    """factor_T that theory (credit.leave_one_out, credit.group_mean) predicts for a pair."""
    if baseline == "none":
        return torch.ones(T, dtype=torch.float64)
    with torch.no_grad():
        chance_N = turn_probabilities(policy, world).prod(1).double()
    alive_NT = batch_of(stories(world), range(len(stories(world)))).alive_BT
    alive_T = chance_N @ torch.tensor(alive_NT).double()
    return alive_T if baseline == "leave_one_out" else alive_T / 2


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, check_dtype=False)


each_credit = pytest.mark.parametrize("credit", CREDITS, ids=str)


def test_the_list_of_stories_is_complete() -> None:
    assert [len(stories(world)) for world in (ENDLESS, ENDING)] == [16, 8]
    for world in (ENDLESS, ENDING):
        chance_N = turn_probabilities(two_token_policy(), world).prod(1).detach()
        assert float(chance_N.sum()) == pytest.approx(1, abs=1e-14)
        assert float(chance_N.min()) > 1e-4


@pytest.mark.parametrize("world", [ENDLESS, ENDING])
@each_credit
def test_the_agents_expected_gradient_is_the_partial_gradient(credit: Credit, world: str) -> None:
    policy = two_token_policy()
    agent = exact_agent(policy, credit, baseline="none")
    weight_TT = credit_weights(credit, T, PHASES)
    exact = partial_gradient_by_turn(policy, world, weight_TT).sum(0)
    assert_equal(expected_ascent(agent, world, size=1), exact)


@pytest.mark.parametrize("baseline", BASELINES[1:])
@each_credit
def test_a_baseline_leaves_the_agents_expected_gradient_where_theory_says(
    credit: Credit, baseline: str
) -> None:
    # With early ends: turn t counts as often as the peer is there to be compared with.
    policy = two_token_policy()
    agent = exact_agent(policy, credit, baseline=baseline)
    by_turn = partial_gradient_by_turn(policy, ENDING, credit_weights(credit, T, PHASES))
    exact = shrinkage(policy, ENDING, baseline) @ by_turn
    assert_equal(expected_ascent(agent, ENDING, size=2), exact)


@pytest.mark.parametrize("credit", [FullPlanning(), KStep(2)], ids=str)
def test_leave_one_out_does_not_move_the_agents_gradient_while_all_live(credit: Credit) -> None:
    policy = two_token_policy()
    agent = exact_agent(policy, credit)
    exact = partial_gradient_by_turn(policy, ENDLESS, credit.weights(T)).sum(0)
    assert_equal(expected_ascent(agent, ENDLESS, size=2), exact)


@each_credit
def test_the_default_scale_divides_the_gradient_by_the_mean_window(credit: Credit) -> None:
    policy = two_token_policy()
    weight_TT = credit_weights(credit, T, PHASES)
    agent = exact_agent(policy, credit, baseline="none", scale="mean_window")
    exact = partial_gradient_by_turn(policy, ENDING, weight_TT).sum(0)
    # Only this one needs float32's tolerance: advantages of a scaled matrix are rounded to it.
    mean_window = np.abs(weight_TT).sum(axis=1).mean()
    assert_equal(expected_ascent(agent, ENDING, size=1), exact / mean_window, 1e-6)


def test_the_stock_policy_gives_the_same_gradient_in_single_precision() -> None:
    agent = exact_agent(two_token_policy(LMPolicy), KStep(2), baseline="none")
    policy = two_token_policy()
    exact = partial_gradient_by_turn(policy, ENDING, KStep(2).weights(T)).sum(0)
    assert_equal(expected_ascent(agent, ENDING, size=1), exact, 1e-5)


# --- what the loss touches ------------------------------------------------------------------------


class LeafPolicy(DoublePolicy):
    """Its log-probabilities are numbers of their own, so that each one's gradient can be read."""

    def scores(self, token_SL: Any, turn_SL: Any, **extras: Any) -> Scores:
        value_SL = torch.full(token_SL.shape, -1.0)
        value_SL[turn_SL < 0] = math.nan  # what others said must not even be looked at
        self.leaf_SL = value_SL.requires_grad_()
        return Scores(self.leaf_SL, None, None, ())  # type: ignore[arg-type]


def test_the_loss_touches_the_agents_tokens_and_no_others() -> None:
    policy = two_token_policy(LeafPolicy)
    agent = exact_agent(policy, FullPlanning())
    batch = batch_of([((0,), (0, 1), (1,)), ((1,), (1, 1), (0,))], [3, 3])
    advantage_BT = agent.credited(batch)
    measured = agent.update(batch, advantage_BT)

    expected_BL = np.zeros(batch.tape.turn_SL.shape)
    for b, place in zip(*np.nonzero(batch.tape.turn_SL >= 0), strict=True):
        expected_BL[b, place] = -advantage_BT[b, batch.tape.turn_SL[b, place]] / 2
    assert policy.leaf_SL.grad is not None
    np.testing.assert_allclose(policy.leaf_SL.grad.numpy(), expected_BL, rtol=1e-6)
    count_BT = np.stack([(batch.tape.turn_SL == turn).sum(axis=1) for turn in range(T)], axis=1)
    assert measured["train/policy_loss"] == pytest.approx((advantage_BT * count_BT).sum() / 2)


def test_what_is_written_in_the_padding_changes_nothing() -> None:
    agent = exact_agent(two_token_policy(), FullPlanning())
    batch = batch_of([((1,),), ((0,), (0, 1), (1,))], [3, 3])
    other = np.array(batch.tape.token_SL)
    other[0, batch.tape.length_S[0] :] = 1
    assert_equal(
        ascent(agent, replace(batch, tape=replace(batch.tape, token_SL=other))),
        ascent(agent, batch),
        1e-15,
    )


@pytest.mark.parametrize("token_budget", [1, 12, 25, 10_000])
def test_microbatches_do_not_change_the_gradient(token_budget: int) -> None:
    policy = two_token_policy()
    batch = batch_of(stories(ENDING), [0, 0, 0, 0, 1, 1, 1, 1])
    whole = ascent(exact_agent(policy, FullPlanning(), token_budget=10**6), batch)
    agent = exact_agent(policy, FullPlanning(), token_budget=token_budget)
    assert_equal(ascent(agent, batch), whole, 1e-15)


def test_every_dialogue_is_read_once_as_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = tiny_policy(), []
    agent = PPGAgent(policy, EchoDialogues(8), group_size=4, token_budget=1500, seed=0)
    batch = agent.collect()
    policy.network.split  # noqa: B018  (probes the model once)
    read = policy.model.model.forward

    def spy(*args: Any, **inputs: Any) -> Any:
        seen.append(len(inputs["input_ids"]))
        return read(*args, **inputs)

    monkeypatch.setattr(policy.model.model, "forward", spy)
    agent.update(batch, agent.credited(batch))
    assert sum(seen) == 8
    assert 1 < len(seen) < 8, seen


# --- learning: identities and bookkeeping ---------------------------------------------------------


def echo_agent(credit: Credit | str = "full", **settings: Any) -> PPGAgent:
    settings = {"group_size": 4, "seed": 0, **settings}
    return PPGAgent(tiny_policy(), EchoDialogues(8), credit, **settings)


def weights_of(agent: PPGAgent) -> Tensor:
    return flat([parameter.detach() for parameter in agent.policy.model.parameters()])


def test_learning_moves_the_model_and_the_same_seed_moves_it_bit_for_bit_alike() -> None:
    first, second, other = echo_agent(), echo_agent(), echo_agent(seed=1)
    start = weights_of(first)
    for agent in (first, second, other):
        agent.learn(40)
    assert first.num_updates >= 2
    assert not torch.equal(weights_of(first), start)
    assert torch.equal(weights_of(first), weights_of(second))
    assert not torch.equal(weights_of(first), weights_of(other))
    assert [row["train/policy_loss"] for row in first.history] == [
        row["train/policy_loss"] for row in second.history
    ]


@pytest.mark.parametrize(
    "same",
    [
        (KStep(1), Greedy(), Segment(length=1), Discounted(0.0), "greedy"),
        (KStep(4), FullPlanning(), Segment(length=4), Discounted(1.0), Segment(boundaries=[0])),
        (Segment(), Segment(boundaries=[0, 2]), Segment(length=2), "segment:0,2"),
    ],
    ids=["greedy", "full", "phases"],
)
def test_equal_credits_take_identical_steps(same: Sequence[Credit | str]) -> None:
    ends = [weights_of(echo_agent(credit).learn(40)) for credit in same]
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_different_credits_take_different_steps() -> None:
    credits = ("greedy", "kstep:2", "full", "segment")
    ends = [weights_of(echo_agent(credit).learn(20)) for credit in credits]
    for one, other in itertools.combinations(ends, 2):
        assert not torch.equal(one, other)


NAMED: list[tuple[Callable[..., PPGAgent], Credit]] = [
    (FullPlanningAgent, FullPlanning()),
    (GreedyAgent, Greedy()),
    (lambda *args, **settings: KStepAgent(*args, k=2, **settings), KStep(2)),
    (SegmentAgent, Segment()),
    (lambda *args, **settings: SegmentAgent(*args, length=3, **settings), Segment(length=3)),
    (
        lambda *args, **settings: SegmentAgent(*args, boundaries=[0, 1], **settings),
        Segment(boundaries=(0, 1)),
    ),
]


@pytest.mark.parametrize(("make", "credit"), NAMED, ids=[str(credit) for _, credit in NAMED])
def test_a_named_agent_is_the_general_agent_with_its_credit(
    make: Callable[..., PPGAgent], credit: Credit
) -> None:
    named = make(tiny_policy(), EchoDialogues(8), group_size=4, seed=0)
    assert named.credit == credit
    assert torch.equal(weights_of(named.learn(20)), weights_of(echo_agent(credit).learn(20)))


def test_timesteps_are_turns() -> None:
    turns = []
    agent = echo_agent()
    agent.learn(60, callback=lambda learner: turns.append(learner.num_timesteps))
    assert turns == [row["time/total_timesteps"] for row in agent.history]
    assert turns[-2] < 60 <= turns[-1]
    assert all(8 * 2 <= b - a <= 8 * 4 for a, b in itertools.pairwise([0, *turns]))
    agent.learn(1)
    assert agent.num_updates == len(turns) + 1


def test_a_callback_can_stop_learning() -> None:
    agent = echo_agent().learn(10_000, callback=lambda learner: learner.num_updates < 2)
    assert agent.num_updates == 2


def test_the_progress_bar_counts_turns(capsys: pytest.CaptureFixture[str]) -> None:
    echo_agent().learn(1)
    assert capsys.readouterr().err == ""
    echo_agent().learn(1, progress_bar=True)
    shown = capsys.readouterr().err
    assert "turn" in shown and "reward=" in shown


def test_early_ends_unscorable_turns_and_cut_lines_flow_through() -> None:
    agent = echo_agent().learn(40)
    batch = agent.collect()
    assert not batch.alive_BT.all() and np.isnan(batch.reward_BT).any() and batch.cut_BT.any()
    advantage_BT = agent.credited(batch)
    dead_BT = ~batch.alive_BT | np.isnan(batch.reward_BT)
    assert np.isfinite(advantage_BT).all() and (advantage_BT[dead_BT] == 0).all()
    assert torch.isfinite(weights_of(agent)).all()
    for row in agent.history:
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["judge/unscorable_rate"] < 1 and 0 < row["rollout/cut_rate"] <= 1
    assert agent.log is agent.history[-1]


class Unscorable(EchoDialogue):
    """No turn can be scored."""

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        messages, _, over, cut, info = super().step(action)
        return messages, math.nan, over, cut, info


def test_a_batch_without_any_score_teaches_nothing() -> None:
    agent = PPGAgent(tiny_policy(), SyncVectorEnv([Unscorable] * 4), group_size=2, seed=0)
    start = weights_of(agent)
    agent.learn(1)
    assert torch.equal(weights_of(agent), start)
    assert agent.log["judge/unscorable_rate"] == 1.0
    assert math.isnan(agent.log["rollout/turn_rew_mean"])


def test_a_context_too_short_for_any_reply_is_an_error_and_not_an_endless_loop() -> None:
    policy = LMPolicy(tiny_model("llama", max_position_embeddings=16), tiny_tokenizer())
    agent = PPGAgent(policy, EchoDialogues(4), group_size=2, seed=0)
    with pytest.raises(ValueError, match=r"room for a reply.*longer context"):
        agent.learn(10)


def test_the_scale_does_not_depend_on_how_long_the_sampled_dialogues_were() -> None:
    for envs in (
        gym.make_vec("PersonaDialogue-v0", num_envs=4, max_turns=8),
        SyncVectorEnv([lambda: gym.make("PersonaDialogue-v0", max_turns=8)] * 4),
    ):
        agent = PPGAgent(two_token_policy(), envs, "full", group_size=2, baseline="none", seed=0)
        batch = batch_of([((0,), (0, 1), (1,))] * 4, [0, 0, 1, 1])
        full_BT = agent.credited(batch)
        assert full_BT[0, 2] == pytest.approx(batch.reward_BT[0, 2] / 4.5)  # mean of 8, 7, ... 1


def test_advantages_can_be_divided_by_their_standard_deviation() -> None:
    batch = batch_of(stories(ENDING), [0, 0, 0, 0, 1, 1, 1, 1])
    plain = exact_agent(two_token_policy(), Trajectory()).credited(batch)
    scaled = exact_agent(two_token_policy(), Trajectory(), divide_by_std=True).credited(batch)
    np.testing.assert_allclose(scaled, plain / plain[batch.alive_BT].std())


def test_the_kl_to_the_initial_model_starts_at_zero_and_holds_the_agent_back() -> None:
    free, tied = echo_agent(), echo_agent(kl_coef=100.0)
    start = weights_of(free)
    free.learn(120)
    tied.learn(120)
    assert "train/kl" not in free.log
    assert tied.history[0]["train/kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(row["train/kl"] > 0 for row in tied.history[1:])
    batch = tied.collect()
    token_BL, turn_BL = torch.as_tensor(batch.tape.token_SL), torch.as_tensor(batch.tape.turn_SL)
    with torch.no_grad():
        initial_BL = tiny_policy().logprobs(token_BL, turn_BL)
        moved = [
            float((agent.policy.logprobs(token_BL, turn_BL) - initial_BL).abs().mean())
            for agent in (free, tied)
        ]
    assert moved[1] < moved[0]
    assert not torch.equal(weights_of(tied), start)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_gymnasiums_own_vector_environment_will_do(mode: AutoresetMode) -> None:
    envs = SyncVectorEnv([EchoDialogue] * 4, autoreset_mode=mode)
    agent = SegmentAgent(tiny_policy(), envs, group_size=4, seed=0).learn(20)
    assert agent.num_timesteps >= 20
    assert math.isfinite(agent.log["rollout/ep_rew_mean"])


def test_groups_reach_the_environment() -> None:
    batch = echo_agent(group_size=2).collect()
    assert batch.group_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    prompts = [
        transcript[0]["content"] + transcript[1]["content"] for transcript in batch.transcripts
    ]
    assert prompts[0::2] == prompts[1::2] and len(set(prompts)) > 1


def test_evaluating_between_updates_leaves_training_as_it_was() -> None:
    def look(agent: PPGAgent) -> None:
        envs = gym.make_vec("PersonaDialogue-v0", num_envs=2, max_turns=1, personas="test")
        found = evaluate_policy(envs, agent, personas=envs.unwrapped.persona_ids[:2], seed=3)
        assert len(found.transcripts) == 2

    assert torch.equal(
        weights_of(echo_agent().learn(40, callback=look)), weights_of(echo_agent().learn(40))
    )


# --- acting ---------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hello."}]


def test_predict_answers_one_observation_or_many() -> None:
    agent = PPGAgent(tiny_policy(), None)
    line, state = agent.predict(CHAT, deterministic=True)
    assert isinstance(line, str) and state is None
    lines, state = agent.predict([CHAT, CHAT], deterministic=True)
    assert lines == [line, line] and state is None
    assert agent.predict((CHAT,), deterministic=True)[0] == [line]


def test_an_agent_speaks_for_a_whole_batch_like_its_model() -> None:
    agent = echo_agent()
    rewards = [
        collect_rollouts(EchoDialogues(8), speaker, seed=4).reward_BT
        for speaker in (agent, agent.policy)
    ]
    np.testing.assert_array_equal(*rewards)


def test_the_seed_also_seeds_what_a_model_loaded_by_name_says(tiny_folder: Path) -> None:
    lines = [
        PPGAgent(str(tiny_folder), None, seed=seed).predict([CHAT] * 4)[0] for seed in (5, 5, 6)
    ]
    assert lines[0] == lines[1] != lines[2]


# --- keeping --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_policy().save(folder)
    return folder


def test_a_saved_agent_is_the_same_agent_when_loaded(tmp_path: Path) -> None:
    agent = echo_agent("kstep:2", learning_rate=1e-3, kl_coef=0.1).learn(20)
    agent.save(tmp_path / "agent")
    loaded = PPGAgent.load(tmp_path / "agent", EchoDialogues(8))

    assert torch.equal(weights_of(loaded), weights_of(agent))
    assert (loaded.credit, loaded.settings, loaded.seed) == (KStep(2), agent.settings, 0)
    assert loaded.num_timesteps == agent.num_timesteps and loaded.num_updates == agent.num_updates
    assert loaded.policy.max_new_tokens == agent.policy.max_new_tokens == 12
    observations = [CHAT, [*CHAT[:1], {"role": "user", "content": "Do you like tea?"}]]
    assert loaded.predict(observations, True) == agent.predict(observations, True)
    assert loaded.learn(1).num_updates == agent.num_updates + 1


@pytest.mark.parametrize("credit", CREDITS, ids=str)
def test_every_credit_survives_saving(credit: Credit, tmp_path: Path) -> None:
    PPGAgent(tiny_policy(temperature=0.7), None, credit, seed=3).save(tmp_path)
    loaded = PPGAgent.load(tmp_path)
    assert loaded.credit == credit
    assert loaded.policy.temperature == 0.7


def test_a_saved_agent_is_safetensors_only_and_plain_transformers_reads_it(tmp_path: Path) -> None:
    agent = echo_agent().learn(20)
    agent.save(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    token_1L = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(token_1L).logits, agent.policy.model(token_1L).logits)


# --- what is refused ------------------------------------------------------------------------------


def test_a_folder_without_an_agent_is_refused_with_the_way_to_make_one(tiny_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no saved agent.*PPGAgent\(path, env"):
        PPGAgent.load(tiny_folder)


@pytest.mark.parametrize("name", ["nanoo", "Nano", "nan"])
def test_a_misspelt_model_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}'\. Did you mean 'nano'\? There are 'nano'"):
        PPGAgent(name, None)


@pytest.mark.parametrize("folder", ["/nowhere/agent", "./nowhere", "runs/nowhere/agent"])
def test_a_folder_that_does_not_exist_is_not_asked_for_on_the_net(folder: str) -> None:
    with pytest.raises(ValueError, match=r"There are 'nano' .* this one does not exist"):
        load_policy(folder)


def test_a_model_folder_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no chat template.*set tokenizer\.chat_template"):
        PPGAgent(tmp_path, None)


def test_a_template_that_rewrites_the_past_is_learned_from_turn_by_turn() -> None:
    agent = PPGAgent(tiny_policy(template=REWRITING), EchoDialogues(4), group_size=2, seed=0)
    start = weights_of(agent)
    with pytest.warns(UserWarning, match="rewrites earlier turns"):
        agent.learn(1)
    assert not torch.equal(weights_of(agent), start)


def test_a_single_environment_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"EchoDialogue; make one with gym\.make_vec"):
        PPGAgent(tiny_policy(), EchoDialogue())  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [0, 3, 16])
def test_a_group_size_that_does_not_divide_the_slots_is_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"divide num_envs=8, got {group_size}"):
        echo_agent(group_size=group_size)


def test_a_lone_dialogue_cannot_be_its_own_baseline() -> None:
    with pytest.raises(ValueError, match=r"needs peers.*baseline='none'"):
        PPGAgent(tiny_policy(), EchoDialogues(1), group_size=1)
    assert PPGAgent(tiny_policy(), EchoDialogues(1), group_size=1, baseline="none", seed=0).learn(1)


def test_learning_without_an_environment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no environment.*agent\.env"):
        PPGAgent(tiny_policy(), None).learn(1)


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_fewer_than_one_step_is_refused(k: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=str(k)):
        KStepAgent(tiny_policy(), EchoDialogues(8), k=k)


@pytest.mark.parametrize("boundaries", [[0, 3, 2], [1, 2], [0, 0], []])
def test_boundaries_out_of_order_are_refused(boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match="boundaries"):
        SegmentAgent(tiny_policy(), EchoDialogues(8), boundaries=boundaries)


def test_a_matrix_that_is_not_causal_is_refused_with_its_entry() -> None:
    with pytest.raises(ValueError, match=r"before it"):
        PPGAgent(tiny_policy(), EchoDialogues(8), Subset([[1.0, 0.0], [0.5, 1.0]]))


def test_an_unknown_credit_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="kstep"):
        PPGAgent(tiny_policy(), EchoDialogues(8), "kstpe:3")


# --- learning something ---------------------------------------------------------------------------


class Bait(gym.vector.VectorEnv[Any, Any, Any]):
    """Two turns. An odd first line earns 0.4 at once, an even one 1.0 a turn later.

    A line is even or odd by the code of its first letter; the second line does not matter. The
    first turn's act is worth 0.4 to who looks at its own reward only, and 1.0 to who looks ahead.
    """

    phase_boundaries = (0, 1)
    max_turns = 2

    def __init__(self, num_envs: int) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.num_envs = num_envs

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.turn = 0
        self.even_B = np.zeros(self.num_envs, dtype=bool)
        self.chats: list[list[dict[str, str]]] = [list(CHAT) for _ in range(self.num_envs)]
        return tuple(self.chats), {"group_id": np.zeros(self.num_envs, dtype=int)}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self.turn == 0:
            self.even_B = np.array([ord(action[0]) % 2 == 0 for action in actions])
        reward_B = np.where(self.even_B, float(self.turn), 0.4 * (1 - self.turn))
        self.turn += 1
        for slot, action in enumerate(actions):
            lines = (action, "And?")
            self.chats[slot] = self.chats[slot] + [
                {"role": role, "content": line}
                for role, line in zip(("assistant", "user"), lines, strict=True)
            ]
        over_B = np.full(self.num_envs, self.turn == self.max_turns)
        return tuple(self.chats), reward_B, over_B, np.zeros_like(over_B), {}


def learned_share_of_even(credit: str) -> float:
    """How often the first line is even after 20 updates of 32 dialogues; a quarter before."""
    agent = PPGAgent(
        tiny_policy(max_new_tokens=1), Bait(32), credit, learning_rate=1e-2, group_size=32, seed=0
    )
    assert 0.1 < (agent.collect().reward_BT[:, 1] == 1.0).mean() < 0.5
    agent.learn(20 * 64)
    return float((agent.collect().reward_BT[:, 1] == 1.0).mean())


@pytest.mark.parametrize("credit", ["full", "kstep:2", "segment:2", "discounted:0.9", "trajectory"])
def test_who_looks_a_turn_ahead_leaves_the_bait(credit: str) -> None:
    assert learned_share_of_even(credit) > 0.9


@pytest.mark.parametrize("credit", ["greedy", "kstep:1", "segment", "discounted:0.1"])
def test_who_looks_at_the_own_reward_takes_the_bait(credit: str) -> None:
    assert learned_share_of_even(credit) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "domain"),
    [
        ("kstep:2", "chatting"),
        *itertools.product(("trajectory", "ppo"), ("chatting", "education", "therapy")),
    ],
)
def test_nano_learns_within_six_updates(method: str, domain: str) -> None:
    envs = gym.make_vec("PersonaDialogue-v0", num_envs=32, domain=domain, max_turns=4)
    settings: dict[str, Any] = {"learning_rate": 5e-4, "seed": 0}
    agent = (
        PPOAgent("nano", envs, **settings)
        if method == "ppo"
        else PPGAgent("nano", envs, method, **settings)
    )
    agent.learn(6 * 32 * 4)
    rewards = [row["rollout/turn_rew_mean"] for row in agent.history]
    assert np.mean(rewards[-3:]) > 1.3 * rewards[0]


def test_a_linear_schedule_ends_at_a_small_step_and_starts_at_the_full_one() -> None:
    steps: list[float] = []

    def note(agent: PPGAgent) -> None:
        steps.append(agent.optimization.adam.param_groups[0]["lr"])

    agent = echo_agent("greedy", learning_rate=1e-3, lr_schedule="linear")
    turns = agent.collect().num_turns
    agent.learn(4 * turns, callback=note)
    assert steps[0] == 1e-3
    assert all(later < earlier for earlier, later in itertools.pairwise(steps))
    with pytest.raises(ValueError, match="'constant' or 'linear', got 'cosine'"):
        echo_agent("greedy", lr_schedule="cosine")
