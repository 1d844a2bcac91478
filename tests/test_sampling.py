"""Drawing tokens: the softmax and nothing else, or the part of it that was asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    CHATML,
    assert_same_logprobs,
    generators,
    openings,
    play,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
)
from tiny_worlds import EchoDialogues
from transformers import GenerationConfig

from agents import PPGAgent, collect_rollouts
from agents.lm_policy import LMPolicy
from agents.sampling import sample_tokens

# Two tokens are equally likely, one is next to impossible.
LOGITS = torch.tensor([1.0, -2.0, 0.3, 2.2, -30.0, 0.3, -1.0])


def test_samples_follow_the_softmax() -> None:
    logit_V = torch.tensor([1.0, -2.0, 0.3, 2.2, -30.0, 0.0])
    number = 20_000
    token_n, logprob_n = sample_tokens(logit_V.repeat(number, 1), generators(3, number), 1.5)
    probability_V = (logit_V / 1.5).softmax(-1).double().numpy()
    count_V = np.bincount(token_n, minlength=6)
    chi_square = (((count_V - number * probability_V) ** 2) / (number * probability_V))[:4].sum()
    assert chi_square < 18.5  # 99.9 % point of 4 degrees of freedom
    assert count_V[4] == 0
    np.testing.assert_allclose(logprob_n, np.log(probability_V)[token_n], atol=1e-5)


def test_one_uniform_number_decides_each_token() -> None:
    logit_nV = torch.tensor([[0.0, 1.0, 2.0]]).repeat(50, 1)
    token_n, _ = sample_tokens(logit_nV, generators(0, 50))
    u_n = np.array([rng.random() for rng in generators(0, 50)])
    expected = np.searchsorted(logit_nV[0].double().softmax(-1).cumsum(-1).numpy(), u_n, "right")
    np.testing.assert_array_equal(token_n, expected)


# -- a restricted support --------------------------------------------------------------------------


class Uniform(np.random.Generator):
    """Gives one number that was chosen beforehand."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


def restricted(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Return the probabilities that are left, in plain Python: keep the head of the ranking."""
    weights = [math.exp(logit / temperature) for logit in logits]
    ranking = sorted(range(len(weights)), key=lambda v: -weights[v])
    ranking = ranking[:top_k] if top_k else ranking
    total = sum(weights[v] for v in ranking)
    kept, mass = [], 0.0
    for v in ranking:
        if mass >= top_p and top_p < 1:
            break
        kept.append(v)
        mass += weights[v] / total
    left = sum(weights[v] for v in kept)
    return [weights[v] / left if v in kept else 0.0 for v in range(len(weights))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 7, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
def test_a_restricted_draw_comes_from_the_head_of_the_ranking(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = (LOGITS + torch.linspace(0, 0.01, 7)).tolist()  # no ties
    probability_V = np.array(restricted(logits, temperature, top_k, top_p))
    # Numbers all over [0, 1), its ends included, show the whole support and no more.
    uniforms = np.append(np.linspace(0, 1, 400, endpoint=False), 1 - 1e-9)
    token_n, logprob_n = sample_tokens(
        torch.tensor(logits).repeat(len(uniforms), 1),
        [Uniform(u) for u in uniforms],
        temperature,
        top_k=top_k,
        top_p=top_p,
    )
    assert set(token_n) == set(np.flatnonzero(probability_V > 1 / 300)) | {token_n[-1]}
    assert (probability_V[token_n] > 0).all()
    np.testing.assert_allclose(logprob_n, np.log(probability_V[token_n]), atol=1e-5)
    inside = np.searchsorted(probability_V.cumsum(), uniforms[:-1], "right")
    assert (inside == token_n[:-1]).mean() > 0.99  # float32 and float64 round differently


def test_equally_likely_tokens_are_not_let_in_beyond_top_k() -> None:
    for top_k, allowed in ((3, [{3, 0, 2}, {3, 0, 5}]), (4, [{3, 0, 2, 5}])):
        token_n, _ = sample_tokens(LOGITS.repeat(2000, 1), generators(1, 2000), top_k=top_k)
        assert set(token_n.tolist()) in allowed


def test_top_p_stops_as_soon_as_it_is_reached() -> None:
    half_V = torch.tensor([0.0, 0.0])  # two tokens of exactly 1/2
    for top_p, number in ((0.5, 1), (0.51, 2)):
        token_n, _ = sample_tokens(half_V.repeat(50, 1), generators(1, 50), top_p=top_p)
        assert len(set(token_n.tolist())) == number


def test_a_policy_with_a_restricted_support_acts_within_it() -> None:
    policy = tiny_policy(top_k=3, top_p=0.9, temperature=1.3)
    conversation, _ = play(policy, [0, 1, 2])
    tape = conversation.tape()
    found = []
    for ids, turns, length in zip(tape.token_SL, tape.turn_SL, tape.length_S, strict=True):
        with torch.no_grad():
            logit_LV = policy.model(torch.as_tensor(ids[:length])[None]).logits[0]
        for place in np.flatnonzero(turns >= 0):
            left = restricted(logit_LV[place - 1].tolist(), 1.3, 3, 0.9)
            found.append(math.log(left[ids[place]]))  # no log of zero
    np.testing.assert_allclose(tape.old_logprob_SL[tape.action_mask_SL], found, atol=1e-4)
    assert len(found) > 60 and len(set(tape.token_SL[tape.action_mask_SL])) > 10


def test_the_only_token_of_top_1_is_the_most_likely_one() -> None:
    greedy, sampled = tiny_policy(), tiny_policy(top_k=1)
    chats = openings(4)
    assert sampled.predict_batch(chats) == greedy.predict_batch(chats, deterministic=True)
    tape = play(sampled, [0])[0].tape()
    np.testing.assert_allclose(tape.old_logprob_SL, 0.0, atol=1e-6)


@pytest.mark.parametrize("support", [{"top_k": 5}, {"top_p": 0.9}])
def test_a_restricted_support_acts_and_does_not_learn(support: dict[str, Any]) -> None:
    agent = PPGAgent(tiny_policy(**support), EchoDialogues(4), group_size=4, seed=0)
    before = [parameter.detach().clone() for parameter in agent.policy.model.parameters()]
    batch = collect_rollouts(agent.env, agent, seed=0)
    assert batch.num_turns >= 8 and agent.predict(openings(1)[0])[0]
    with pytest.raises(ValueError, match=r"top_k=\d and top_p=.*learn with top_k=0, top_p=1"):
        agent.learn(8)
    assert agent.num_updates == 0
    for parameter, start in zip(agent.policy.model.parameters(), before, strict=True):
        assert torch.equal(parameter, start)


def test_the_models_own_generation_settings_do_not_touch_what_is_drawn() -> None:
    plain, tuned = (
        LMPolicy(tiny_model("llama"), tiny_tokenizer(CHATML), max_new_tokens=12) for _ in range(2)
    )
    tuned.model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        temperature=0.1,
        repetition_penalty=5.0,
        max_new_tokens=2,
        bad_words_ids=[[v] for v in range(2, 100)],
        eos_token_id=1,
    )
    tape, tuned_tape = (play(policy, [0, 1, 2])[0].tape() for policy in (plain, tuned))
    np.testing.assert_array_equal(tape.token_SL, tuned_tape.token_SL)
    np.testing.assert_array_equal(tape.old_logprob_SL, tuned_tape.old_logprob_SL)
    assert_same_logprobs(tuned, tuned_tape)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0\.0.*deterministic=True"),
        ({"temperature": -1.0}, r"temperature must be positive, got -1\.0"),
        ({"temperature": math.nan}, "temperature must be positive, got nan"),
        ({"top_k": -1}, r"top_k is at least 0 \(0 = all tokens\).*got -1 and 1\.0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\], got 0 and 0\.0"),
        ({"top_p": 1.5}, r"top_p in \(0, 1\], got 0 and 1\.5"),
        ({"top_p": math.nan}, r"top_p in \(0, 1\], got 0 and nan"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_policy(**settings)
