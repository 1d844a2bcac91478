"""PPOAgent: advantages from a critic, clipped ratios over several epochs, all else as PPGAgent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from tiny_models import tiny_policy
from tiny_worlds import EchoDialogue, EchoDialogues

from agents import Discounted, PPGAgent, PPOAgent, generalized_advantages, partial_returns
from agents.losses import policy_gradient_loss
from agents.ppg import MicroBatch
from agents.tape import Tape

# --- generalized advantages -----------------------------------------------------------------------

NAN = math.nan


def episodes(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return reward_BT, value_BT and alive_BT of six episodes that end at different turns."""
    rng = np.random.default_rng(seed)
    reward_BT, value_BT = rng.normal(size=(2, 6, 5))
    length_B = rng.integers(1, 6, size=6)
    alive_BT = np.arange(5) < length_B[:, None]
    return np.where(alive_BT, reward_BT, 0.0), value_BT, alive_BT


def test_a_small_case_by_hand() -> None:
    # Errors: 3 - 2 = 1, then 2 + 0.9 * 2 - 1 = 2.8, then 1 + 0.9 * 1 - 0.5 = 1.4.
    found = generalized_advantages([[1, 2, 3]], [[0.5, 1, 2]], gamma=0.9, gae_lambda=0.8)
    np.testing.assert_allclose(found, [[1.4 + 0.72 * 3.52, 2.8 + 0.72 * 1, 1.0]], rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_each_advantage_is_its_error_and_a_share_of_the_next_advantage(
    gamma: float, gae_lambda: float, seed: int
) -> None:
    reward_BT, value_BT, alive_BT = episodes(seed)
    found = generalized_advantages(
        reward_BT, value_BT, alive_BT, gamma=gamma, gae_lambda=gae_lambda
    )
    expected_BT = np.zeros((6, 6))
    for b, t in itertools.product(range(6), reversed(range(5))):
        if alive_BT[b, t]:
            lives_on = t + 1 < 5 and alive_BT[b, t + 1]
            next_value = value_BT[b, t + 1] if lives_on else 0.0
            error = reward_BT[b, t] + gamma * next_value - value_BT[b, t]
            expected_BT[b, t] = error + gamma * gae_lambda * expected_BT[b, t + 1]
    np.testing.assert_allclose(found, expected_BT[:, :5], atol=1e-12)


def test_with_both_ones_it_is_the_full_return_minus_the_value() -> None:
    reward_BT, value_BT, alive_BT = episodes(7)
    found = generalized_advantages(reward_BT, value_BT, alive_BT, gamma=1.0, gae_lambda=1.0)
    return_BT = reward_BT[:, ::-1].cumsum(axis=1)[:, ::-1]
    np.testing.assert_allclose(found, np.where(alive_BT, return_BT - value_BT, 0.0), atol=1e-12)


def test_without_a_critic_it_is_the_discounted_return() -> None:
    reward_BT, _, alive_BT = episodes(7)
    found = generalized_advantages(reward_BT, np.zeros((6, 5)), alive_BT, gamma=0.8, gae_lambda=1.0)
    weight_TT = Discounted(0.8).weights(5)
    np.testing.assert_allclose(found, partial_returns(reward_BT, weight_TT, alive_BT), atol=1e-12)


def test_lambda_zero_is_the_error_of_one_step() -> None:
    found = generalized_advantages([[1, 2, 3]], [[0.5, 1, 2]], gamma=1.0, gae_lambda=0.0)
    np.testing.assert_allclose(found, [[1 + 1 - 0.5, 2 + 2 - 1, 3 - 2]])


def test_a_critic_that_is_right_leaves_no_advantage() -> None:
    reward_BT, _, alive_BT = episodes(3)
    value_BT = reward_BT[:, ::-1].cumsum(axis=1)[:, ::-1]
    for gae_lambda in (0.0, 0.5, 1.0):
        found = generalized_advantages(reward_BT, value_BT, alive_BT, gae_lambda=gae_lambda)
        np.testing.assert_allclose(found, 0.0, atol=1e-12)


def test_what_stands_after_the_end_does_not_count() -> None:
    alive_BT = [[True, True, False]]
    plain = generalized_advantages([[1, 2, 0]], [[0.5, 1, 0]], alive_BT)
    other = generalized_advantages([[1, 2, 9]], [[0.5, 1, 7]], alive_BT)
    np.testing.assert_array_equal(other, plain)
    np.testing.assert_array_equal(plain[:, :2], generalized_advantages([[1, 2]], [[0.5, 1]]))
    assert plain[0, 2] == 0.0


def test_an_unscorable_reward_counts_as_nothing() -> None:
    found = generalized_advantages([[1, NAN, 3]], [[0.5, 1, 2]])
    np.testing.assert_array_equal(found, generalized_advantages([[1, 0, 3]], [[0.5, 1, 2]]))


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
@pytest.mark.parametrize("number", [-0.1, 1.1, NAN])
def test_a_discount_outside_its_range_is_refused(name: str, number: float) -> None:
    message = rf"{name} must lie in \[0, 1\], got {number}"
    with pytest.raises(ValueError, match=message):
        generalized_advantages([[1.0]], [[0.0]], **{name: number})
    with pytest.raises(ValueError, match=message):
        PPOAgent(tiny_policy(), None, **{name: number})


def test_values_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"value_BT has shape \(1, 3\), but .* \(1, 2\)"):
        generalized_advantages([[1, 2]], [[1, 2, 3]])


def test_an_episode_cannot_come_to_life_again() -> None:
    with pytest.raises(ValueError):
        generalized_advantages([[1, 2, 3]], [[1, 2, 3]], [[True, False, True]])


# --- the agent's loss -----------------------------------------------------------------------------


def echo_agent(policy: Any = None, **settings: Any) -> PPOAgent:
    settings = {"seed": 0, **settings}
    return PPOAgent(tiny_policy() if policy is None else policy, EchoDialogues(8), **settings)


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def weights_of(agent: PPGAgent) -> torch.Tensor:
    return flat(agent.policy.model.parameters())


def gradients_of(module: torch.nn.Module) -> torch.Tensor:
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters())


class Watch:
    """Notes what an agent does in each gradient step."""

    def __init__(self, agent: PPOAgent) -> None:
        self.model_gradients: list[torch.Tensor] = []
        self.critic_gradients: list[torch.Tensor] = []
        self.dialogues: list[list[int]] = [[]]
        self.advantages: list[torch.Tensor] = []
        self.agent, self.step, self.loss = agent, agent.optimization.step, agent.loss
        agent.optimization.step = self.note_step  # type: ignore[method-assign]
        agent.loss = self.note_loss  # type: ignore[method-assign]

    def note_loss(self, micro: MicroBatch) -> Any:
        self.dialogues[-1] += micro.episode_s.tolist()
        self.advantages.append(micro.advantage_sT)
        return self.loss(micro)

    def note_step(self) -> Any:
        self.model_gradients.append(gradients_of(self.agent.policy.model))
        self.critic_gradients.append(gradients_of(self.agent.critic))
        self.dialogues.append([])
        return self.step()

    def steps(self) -> list[list[int]]:
        """Return the dialogues of each step."""
        assert self.dialogues[-1] == []
        return self.dialogues[:-1]


@pytest.mark.parametrize("level", ["token", "turn"])
def test_the_first_step_follows_the_plain_policy_gradient(level: str) -> None:
    # All ratios are 1 there, so nothing is clipped.
    agent = echo_agent(
        n_epochs=2, ratio_level=level, normalize_advantage=False, max_grad_norm=math.inf
    )
    batch = agent.collect()
    advantage_BT = agent.credited(batch)
    watch = Watch(agent)
    agent.update(batch, advantage_BT)

    policy, tape = tiny_policy(), batch.tape
    scored_BT = batch.alive_BT & ~np.isnan(batch.reward_BT)
    policy_gradient_loss(
        policy.logprobs(tape.token_SL, tape.turn_SL),
        torch.as_tensor(np.where(scored_BT, advantage_BT, 0.0), dtype=torch.float32),
        torch.as_tensor(tape.turn_SL),
    ).backward()
    expected = gradients_of(policy.model)
    assert float(expected.norm()) > 0.1
    assert len(watch.model_gradients) == 2
    torch.testing.assert_close(
        watch.model_gradients[0], expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )
    second = watch.model_gradients[1]  # the ratios have moved
    assert float((second - expected).norm()) > 0.01 * float(expected.norm())


def test_the_critics_error_moves_the_language_model_only_where_that_is_asked_for() -> None:
    found = {}
    for share, vf_coef in itertools.product((False, True), (0.0, 10.0)):
        agent = echo_agent(share_hidden=share, vf_coef=vf_coef, max_grad_norm=math.inf, n_epochs=1)
        with torch.no_grad():
            agent.critic.weight.fill_(0.1)  # with 0 no error would reach the model
        batch, watch = agent.collect(), Watch(agent)
        agent.update(batch, agent.credited(batch))
        found[share, vf_coef] = watch.model_gradients[0]
        assert (float(watch.critic_gradients[0].norm()) > 0.01) == (vf_coef > 0)
    assert float(found[False, 0.0].norm()) > 0.1
    assert torch.equal(found[False, 10.0], found[False, 0.0])
    assert torch.equal(found[True, 0.0], found[False, 0.0])
    difference = float((found[True, 10.0] - found[True, 0.0]).norm())
    assert difference > 0.01 * float(found[True, 0.0].norm())


def test_advantages_are_centred_and_scaled_over_the_turns_that_could_be_scored() -> None:
    agent = echo_agent()
    batch = agent.collect()
    raw_BT, watch = agent.credited(batch), Watch(agent)
    agent.update(batch, raw_BT)
    scored_BT = batch.alive_BT & ~np.isnan(batch.reward_BT)
    assert 0 < scored_BT.sum() < batch.alive_BT.sum() < scored_BT.size
    used_BT = np.zeros(scored_BT.shape, dtype=np.float32)
    for episode, row in zip(watch.dialogues[0], torch.cat(watch.advantages[:1]), strict=True):
        used_BT[episode] = row.numpy()
    expected = (raw_BT[scored_BT] - raw_BT[scored_BT].mean()) / raw_BT[scored_BT].std()
    np.testing.assert_allclose(used_BT[scored_BT], expected, rtol=1e-5)
    assert (used_BT[~scored_BT] == 0).all()


def one_sequence_a_turn(tape: Tape) -> Tape:
    """Return the same dialogues with a sequence for each turn, ending with that turn's line."""
    rows = [
        (s, turn, int(np.flatnonzero(tape.turn_SL[s] == turn)[-1]) + 1)
        for s in range(len(tape.length_S))
        for turn in range(int(tape.turn_SL[s].max()) + 1)
    ]
    source = np.array([s for s, _, _ in rows])
    length_S = np.array([length for _, _, length in rows])
    column_L = np.arange(tape.token_SL.shape[1])
    turn_SL = tape.turn_SL[source]
    own_SL = turn_SL == np.array([turn for _, turn, _ in rows])[:, None]
    return replace(
        tape,
        token_SL=np.where(column_L < length_S[:, None], tape.token_SL[source], 0),
        turn_SL=np.where(own_SL, turn_SL, -1),
        old_logprob_SL=np.where(own_SL, tape.old_logprob_SL[source], 0.0).astype(np.float32),
        length_S=length_S,
        episode_S=tape.episode_S[source],
    )


@pytest.mark.parametrize("level", ["token", "turn"])
def test_a_sequence_a_turn_gives_the_same_values_and_the_same_update(level: str) -> None:
    ends, values, logs = [], [], []
    batch = echo_agent().collect()
    split = replace(batch, tape=one_sequence_a_turn(batch.tape))
    assert len(split.tape.length_S) == batch.num_turns > 8
    for form in (batch, split):
        agent = echo_agent(n_epochs=3, batch_size=4, ratio_level=level, learning_rate=1e-3)
        with torch.no_grad():
            agent.critic.weight.copy_(torch.linspace(-0.1, 0.1, 32))
        values.append(agent.values(form))
        logs.append(agent.update(form, agent.credited(form)))
        ends.append(torch.cat([weights_of(agent), flat(agent.critic.parameters())]))
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    assert np.abs(values[0]).max() > 0.1
    assert (values[0][~batch.alive_BT] == 0).all()
    moved = ends[0] - torch.cat(
        [weights_of(echo_agent()), torch.linspace(-0.1, 0.1, 32), torch.zeros(1)]
    )
    assert float((ends[1] - ends[0]).norm()) < 0.01 * float(moved.norm())
    for name in ("train/policy_loss", "train/value_loss", "train/grad_norm", "train/clip_fraction"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3, abs=1e-4), name


def test_a_policy_that_starts_a_sequence_each_turn_learns_too() -> None:
    agent = echo_agent(tiny_policy(sequences="turn")).learn(1)
    assert all(math.isfinite(value) for value in agent.log.values())
    assert agent.log["train/value_loss"] > 0


# --- the critic -----------------------------------------------------------------------------------


class Steady(EchoDialogue):
    """Three turns; each earns 1."""

    def reset(self, **kwargs: Any) -> Any:
        found = super().reset(**kwargs)
        self.num_turns = 3
        return found

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        messages, _, over, cut, info = super().step(action)
        return messages, 1.0, over, cut, info


@pytest.mark.parametrize(("gamma", "expected"), [(0.0, [1, 1, 1]), (1.0, [3, 2, 1])])
def test_the_critic_learns_what_is_still_to_come(gamma: float, expected: list[float]) -> None:
    policy, envs = tiny_policy(max_new_tokens=3), SyncVectorEnv([Steady] * 4)
    agent = PPOAgent(
        policy, envs, gamma=gamma, critic_learning_rate=0.03, learning_rate=0.0, n_epochs=60, seed=0
    )
    batch = agent.collect()
    assert (agent.values(batch) == 0).all()  # it starts without an opinion
    measured = [agent.update(batch, agent.credited(batch)) for _ in range(3)]
    np.testing.assert_allclose(agent.values(batch), [expected] * 4, atol=0.2)
    assert measured[-1]["train/value_loss"] < 0.1 * measured[0]["train/value_loss"]


def test_the_value_loss_is_half_the_squared_error_summed_over_a_dialogues_turns() -> None:
    agent = echo_agent(n_epochs=1, gae_lambda=1.0)
    batch = agent.collect()
    measured = agent.update(batch, agent.credited(batch))
    reward_BT = np.nan_to_num(batch.reward_BT)
    return_BT = reward_BT[:, ::-1].cumsum(axis=1)[:, ::-1]
    scored_BT = batch.alive_BT & ~np.isnan(batch.reward_BT)
    expected = (return_BT[scored_BT] ** 2).sum() / 2 / 8  # the critic says 0 at first
    assert measured["train/value_loss"] == pytest.approx(expected, rel=1e-5)


# --- epochs and minibatches -----------------------------------------------------------------------


def minibatches(seed: int, batch_size: int | None, updates: int = 2) -> list[list[int]]:
    agent = echo_agent(seed=seed, n_epochs=3, batch_size=batch_size)
    watch = Watch(agent)
    agent.learn(10_000, lambda learner: learner.num_updates < updates)
    return watch.steps()


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [3, 3, 2]), (4, [4, 4]), (8, [8])])
def test_every_epoch_reads_every_dialogue_once(batch_size: int, sizes: list[int]) -> None:
    steps = minibatches(0, batch_size)
    assert [len(step) for step in steps] == sizes * 3 * 2
    for first in range(0, len(steps), len(sizes)):
        epoch = list(itertools.chain(*steps[first : first + len(sizes)]))
        assert sorted(epoch) == list(range(8))


def test_the_order_changes_from_epoch_to_epoch_and_follows_from_the_seed() -> None:
    def sets(steps: list[list[int]]) -> list[frozenset[int]]:
        return [frozenset(step) for step in steps]

    steps = sets(minibatches(0, 4))
    assert steps == sets(minibatches(0, 4))
    assert steps != sets(minibatches(1, 4))
    assert len(set(steps)) > 6  # 12 minibatches of 3 epochs and 2 updates


def test_a_minibatch_of_everything_is_no_minibatch() -> None:
    ends = [weights_of(echo_agent(n_epochs=2, batch_size=size).learn(1)) for size in (None, 8, 100)]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], weights_of(echo_agent(n_epochs=2, batch_size=4).learn(1)))


@pytest.mark.parametrize("name", ["n_epochs", "batch_size"])
def test_less_than_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        echo_agent(**{name: 0})


# --- what it shares with PPGAgent -----------------------------------------------------------------


def test_the_same_seed_gives_the_dialogues_and_counts_of_a_ppg_agent() -> None:
    rows = []
    for kind in (PPGAgent, PPOAgent):
        agent = kind(tiny_policy(), EchoDialogues(8), group_size=4, learning_rate=0.0, seed=5)
        agent.learn(60)
        assert agent.num_timesteps == agent.log["time/total_timesteps"] >= 60
        keys = ("time/total_timesteps", "rollout/ep_rew_mean", "rollout/cut_rate")
        rows.append([[row[key] for key in keys] for row in agent.history])
    assert rows[0] == rows[1] and len(rows[0]) > 1


def test_epochs_do_not_count_as_timesteps() -> None:
    counts = [echo_agent(n_epochs=number).learn(1).num_timesteps for number in (1, 5)]
    assert counts[0] == counts[1]


def test_it_learns_the_same_bit_for_bit_from_the_same_seed() -> None:
    ends = [weights_of(echo_agent(seed=seed, batch_size=4).learn(60)) for seed in (0, 0, 1)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_early_ends_and_unscorable_turns_flow_through() -> None:
    agent = echo_agent(kl_coef=0.1, ent_coef=0.01).learn(60)
    assert torch.isfinite(weights_of(agent)).all()
    for row in agent.history:
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["judge/unscorable_rate"] < 1
        assert 0 <= row["train/clip_fraction"] <= 1


class Silent(EchoDialogue):
    """No turn can be scored."""

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        messages, _, over, cut, info = super().step(action)
        return messages, math.nan, over, cut, info


def test_a_batch_without_any_score_teaches_neither_policy_nor_critic() -> None:
    agent = PPOAgent(tiny_policy(), SyncVectorEnv([Silent] * 4), seed=0)
    start = weights_of(agent)
    agent.learn(1)
    assert torch.equal(weights_of(agent), start)
    assert (flat(agent.critic.parameters()) == 0).all()


class Even(EchoDialogue):
    """A line that begins with a letter of even code earns 1."""

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        messages, _, over, cut, info = super().step(action)
        return messages, float(ord(action[0]) % 2 == 0), over, cut, info


def test_it_learns_what_is_rewarded() -> None:
    agent = PPOAgent(
        tiny_policy(max_new_tokens=1),
        SyncVectorEnv([Even] * 16),
        learning_rate=3e-3,
        n_epochs=4,
        seed=0,
    )
    assert agent.collect().reward_BT.mean() < 0.5
    agent.learn(15 * 16 * 3)
    assert agent.log["rollout/turn_rew_mean"] > 0.9


# --- keeping --------------------------------------------------------------------------------------


def test_a_saved_agent_is_the_same_agent_when_loaded(tmp_path: Path) -> None:
    agent = echo_agent(gamma=0.9, vf_coef=0.3, batch_size=4, share_hidden=True).learn(20)
    agent.save(tmp_path)
    loaded = PPOAgent.load(tmp_path, EchoDialogues(8))
    assert isinstance(loaded, PPOAgent)
    assert torch.equal(weights_of(loaded), weights_of(agent))
    assert (loaded.settings, loaded.seed) == (agent.settings, 0)
    assert (loaded.num_timesteps, loaded.num_updates) == (agent.num_timesteps, agent.num_updates)
    batch = agent.collect()
    assert np.abs(agent.values(batch)).max() > 0
    np.testing.assert_array_equal(loaded.values(batch), agent.values(batch))
    assert loaded.learn(1).num_updates == agent.num_updates + 1


def test_values_are_those_of_the_batch_at_hand() -> None:
    agent = echo_agent().learn(20)
    first, second = agent.collect(), replace(agent.collect())
    before = agent.values(first)
    assert (agent.values(second) == before).all()
    agent.update(first, agent.credited(first))
    assert (agent.values(first) != before).any()  # the critic has learned since


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (lambda: echo_agent(), PPGAgent, r"holds a PPOAgent; load it with PPOAgent\.load"),
        (
            lambda: PPGAgent(tiny_policy(), None, seed=0),
            PPOAgent,
            r"holds a PPGAgent; load it with PPGAgent\.load",
        ),
    ],
    ids=["ppo as ppg", "ppg as ppo"],
)
def test_an_agent_of_the_other_kind_is_refused(
    make: Callable[[], PPGAgent], wrong: type[PPGAgent], message: str, tmp_path: Path
) -> None:
    make().save(tmp_path)
    with pytest.raises(ValueError, match=message):
        wrong.load(tmp_path)


def test_a_folder_without_an_agent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no saved agent.*PPOAgent\.save writes one"):
        PPOAgent.load(tmp_path)
