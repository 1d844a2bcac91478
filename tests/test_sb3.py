"""PartialPG: its gradient by hand, equality with A2C, and what every SB3 algorithm has to do."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit, TransformReward
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import (
    IdentityEnv,
    IdentityEnvBox,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
    SimpleMultiObsEnv,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from agents.credit import FullPlanning, KStep, Subset
from agents.sb3 import PartialPG
from benchmarks.sb3_speed import CONTENDERS, steps_per_second
from ppg_env import DiscreteReply, EmbeddedObservation, HashedWords


class Countdown(gym.Env[np.ndarray, int]):
    """Episodes of known lengths; the reward is the number of the step, or 10 times that."""

    observation_space = spaces.Box(0.0, 1.0, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int, factor: float = 1.0) -> None:
        self.length, self.factor, self.turn = length, factor, 0
        self.said: list[tuple[np.ndarray, int, float]] = []

    def observation(self) -> np.ndarray:
        return np.array([self.turn / 10, self.factor / 10, 1.0], dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.turn = 0
        return self.observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = self.factor * (self.turn + 1) * (1.0 + int(action))
        self.said.append((self.observation(), int(action), reward))
        self.turn += 1
        return self.observation(), reward, self.turn == self.length, False, {}


PLAIN: dict[str, Any] = {
    "max_grad_norm": 1e9,
    "learning_rate": 0.5,
    "device": "cpu",
    "seed": 0,
    "policy_kwargs": {"net_arch": [], "optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
}


def countdowns(*lengths: int) -> DummyVecEnv:
    return DummyVecEnv(
        [lambda n=n, e=e: Countdown(n, 10.0**e) for e, n in enumerate(lengths)]  # type: ignore[misc]
    )


def logits(agent: PartialPG, observation: np.ndarray) -> torch.Tensor:
    tensor = torch.as_tensor(observation)[None]
    return agent.policy.get_distribution(tensor).distribution.logits[0]


def gradient_by_hand(
    agent: PartialPG, steps: list[tuple[np.ndarray, int, float]]
) -> dict[str, torch.Tensor]:
    """Return -(1/N) sum A grad log pi over (observation, action, A), by parameter name."""
    for parameter in agent.policy.parameters():
        parameter.grad = None
    loss = -sum(weight * logits(agent, o)[a] for o, a, weight in steps)
    loss = loss / (agent.n_steps * agent.n_envs)
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in agent.policy.named_parameters()
        if parameter.grad is not None
    }


def one_update(agent: PartialPG) -> dict[str, torch.Tensor]:
    """Learn from one rollout; return how the parameters moved, in gradients."""
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    agent.learn(1)
    assert agent.num_timesteps == agent.n_steps * agent.n_envs
    return {name: (before[name] - p.detach()) / 0.5 for name, p in agent.policy.named_parameters()}


def assert_moved_along(moved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, change in moved.items():
        wanted = expected.get(name, torch.zeros_like(change))
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-4, msg=name)


# --- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_full_credit_is_reinforce_with_reward_to_go(gamma: float) -> None:
    """Two episodes of 4 steps in one rollout of 8, REINFORCE by hand."""
    env = countdowns(4)
    settings = {"baseline": "none", "gamma": gamma, "n_steps": 8, "longest_episode": 4, **PLAIN}
    agent, fresh = (PartialPG("MlpPolicy", env, **settings) for _ in range(2))
    moved = one_update(agent)
    said = env.envs[0].unwrapped.said
    steps = []
    for first in (0, 4):
        rewards = [reward for *_, reward in said[first : first + 4]]
        for t in range(4):
            observation, action, _ = said[first + t]
            to_go = sum(gamma ** (u - t) * rewards[u] for u in range(t, 4))
            steps.append((observation, action, to_go))
    assert_moved_along(moved, gradient_by_hand(fresh, steps))


def test_k_steps_drop_what_the_rollout_does_not_hold() -> None:
    """One unfinished episode: of 5 steps the last 2 of kstep:3 are not complete."""
    env = countdowns(100)
    agent = PartialPG("MlpPolicy", env, "kstep:3", "none", n_steps=5, **PLAIN)
    fresh = PartialPG("MlpPolicy", env, "kstep:3", "none", n_steps=5, **PLAIN)
    moved = one_update(agent)
    said = env.envs[0].unwrapped.said
    rewards = [reward for *_, reward in said]
    steps = [(o, a, sum(rewards[t : t + 3])) for t, (o, a, _) in enumerate(said[:3])]
    assert_moved_along(moved, gradient_by_hand(fresh, steps))


def test_leave_one_out_compares_episodes_at_the_same_turn() -> None:
    """Lengths 2 and 3 in rollouts of 3: turns 0, 1, 0 beside turns 0, 1, 2; greedy."""
    env = countdowns(2, 3)
    agent = PartialPG("MlpPolicy", env, "greedy", n_steps=3, **PLAIN)
    fresh = PartialPG("MlpPolicy", env, "greedy", n_steps=3, **PLAIN)
    moved = one_update(agent)
    first, second = (each.unwrapped.said for each in env.envs)
    zero = [first[0][2], first[2][2], second[0][2]]
    others = [(sum(zero) - own) / 2 for own in zero]
    weights = [
        (*first[0][:2], zero[0] - others[0]),
        (*first[2][:2], zero[1] - others[1]),
        (*second[0][:2], zero[2] - others[2]),
        (*first[1][:2], first[1][2] - second[1][2]),
        (*second[1][:2], second[1][2] - first[1][2]),
        (*second[2][:2], 0.0),  # nobody else was at turn 2
    ]
    assert_moved_along(moved, gradient_by_hand(fresh, weights))


def test_turns_are_counted_across_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An episode of 6 steps in rollouts of 4: segment:3 ends with its third step."""
    env = countdowns(6)
    agent = PartialPG("MlpPolicy", env, "segment:3", "none", n_steps=4, **PLAIN)
    seen: list[np.ndarray] = []
    train = agent.train
    monkeypatch.setattr(
        agent, "train", lambda: (seen.append(agent.rollout_buffer.returns[:, 0].copy()), train())
    )
    agent.learn(8)
    agent.learn(4, reset_num_timesteps=False)
    rewards = [reward for *_, reward in env.envs[0].unwrapped.said]
    first, second = sum(rewards[:3]), sum(rewards[3:6])
    np.testing.assert_allclose(seen[0], [first, sum(rewards[1:3]), rewards[2], np.nan], rtol=1e-6)
    assert seen[1][:2] == pytest.approx([second - rewards[3], rewards[5]])
    third = rewards[6:9]
    assert seen[1][2:].tolist() == pytest.approx([np.nan, np.nan], nan_ok=True)
    assert seen[2][0] == pytest.approx(third[2])


@pytest.mark.parametrize("limit", [7, 40])
def test_with_a_bootstrapped_value_full_credit_is_a2c(limit: int) -> None:
    """Same seeds, same parameters, bit for bit but for rounding; time limits included."""

    def envs() -> Any:
        return make_vec_env(
            lambda: gym.make("CartPole-v1", max_episode_steps=limit), n_envs=4, seed=3
        )

    settings: dict[str, Any] = {
        "n_steps": 16,
        "gamma": 0.97,
        "ent_coef": 0.01,
        "learning_rate": 1e-3,
        "seed": 5,
        "device": "cpu",
    }
    a2c = A2C("MlpPolicy", envs(), use_rms_prop=False, gae_lambda=1.0, **settings)
    start = [p.detach().clone() for p in a2c.policy.parameters()]
    a2c.learn(16 * 4 * 12)
    ours = PartialPG(
        "MlpPolicy",
        envs(),
        baseline="value",
        bootstrap=True,
        **settings,
    )
    ours.learn(16 * 4 * 12)
    for one, other, first in zip(
        a2c.policy.parameters(), ours.policy.parameters(), start, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert not torch.equal(one, first)


def test_a_time_limit_adds_nothing_to_a_single_reward() -> None:
    env = make_vec_env(lambda: gym.make("CartPole-v1", max_episode_steps=5), n_envs=2, seed=0)
    for bootstrap in (False, True):
        agent = PartialPG(
            "MlpPolicy", env, "greedy", "value", bootstrap, n_steps=16, gamma=0.9, device="cpu"
        )
        agent.learn(1)
        assert (agent.rollout_buffer.rewards == 1.0).all()
        assert (agent.rollout_buffer.returns == 1.0).all()


def test_without_bootstrapping_a_time_limit_is_the_end_and_with_it_it_is_not() -> None:
    env = make_vec_env(lambda: gym.make("CartPole-v1", max_episode_steps=4), n_envs=2, seed=0)
    ended = PartialPG("MlpPolicy", env, "full", "value", n_steps=4, device="cpu").learn(1)
    assert ended.rollout_buffer.returns[:4, 0].tolist() == [4, 3, 2, 1]
    cut = PartialPG(
        "MlpPolicy", env, "full", "value", True, n_steps=4, learning_rate=0.0, device="cpu"
    ).learn(1)
    rest = cut.rollout_buffer.returns[:4, 0] - [4, 3, 2, 1]
    np.testing.assert_allclose(rest, rest[0], rtol=1e-3)
    assert abs(rest[0]) > 1e-4  # the value of the last observation, of an untrained network


# --- learning -------------------------------------------------------------------------------------


IDENTITIES: dict[str, Any] = {
    "Discrete": lambda: IdentityEnv(3, ep_length=20),
    "Box": lambda: IdentityEnvBox(eps=0.5, ep_length=20),
    "MultiDiscrete": lambda: IdentityEnvMultiDiscrete(2, ep_length=20),
    "MultiBinary": lambda: IdentityEnvMultiBinary(2, ep_length=20),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_every_kind_of_action_is_learned(name: str) -> None:
    env = make_vec_env(IDENTITIES[name], n_envs=8, seed=0)
    agent = PartialPG(
        "MlpPolicy",
        env,
        "greedy",
        n_steps=40,
        learning_rate=0.03,
        ent_coef=0.0 if name == "Box" else 0.01,
        seed=0,
        device="cpu",
    )
    before, _ = evaluate_policy(agent, env, n_eval_episodes=10, warn=False)
    agent.learn(320 * 40)
    after, _ = evaluate_policy(agent, env, n_eval_episodes=10, warn=False)
    assert after > 18 > before, (before, after)


class Patience(gym.Env[np.ndarray, int]):
    """The first action ends the episode with 1, or goes on for 10 steps of 1 each."""

    observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.turn = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        over = self.turn == 0 and action == 0
        self.turn += 1
        return np.ones(1, dtype=np.float32), 1.0, over or self.turn == 10, False, {}


@pytest.mark.parametrize(
    ("credit", "settings", "patient"),
    [
        ("kstep:4", {"n_steps": 8}, True),
        ("full", {"n_steps": 40, "longest_episode": 10}, True),
        ("full", {"n_steps": 8, "baseline": "value", "bootstrap": True}, True),
        pytest.param(
            *("full", {"n_steps": 8, "baseline": "none"}, False),
            marks=pytest.mark.filterwarnings("ignore:.*favours short|Less than half of a rollout"),
        ),
    ],
)
def test_long_episodes_are_learned_unless_those_that_end_soon_are_picked(
    credit: str, settings: dict[str, Any], patient: bool
) -> None:
    """In the last case, which is warned of, only the impatient are ever seen to the end."""
    env = DummyVecEnv([Patience] * 8)
    agent = PartialPG(
        "MlpPolicy", env, credit, learning_rate=0.01, seed=0, device="cpu", **settings
    )
    agent.learn(150 * 8 * agent.n_steps)
    observation = torch.zeros((1, 1))
    chance = agent.policy.get_distribution(observation).distribution.probs[0, 1].item()
    assert (chance > 0.9) == patient and (chance < 0.1) != patient, chance


def test_dictionaries_of_observations_are_taken() -> None:
    env = make_vec_env(lambda: SimpleMultiObsEnv(random_start=False), n_envs=2, seed=0)
    agent = PartialPG("MultiInputPolicy", env, "kstep:2", "none", n_steps=16, device="cpu")
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(64)
    pairs = zip(before, agent.policy.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_the_same_seed_gives_the_same_agent() -> None:
    def parameters(seed: int) -> torch.Tensor:
        env = make_vec_env("CartPole-v1", n_envs=2, seed=seed)
        agent = PartialPG("MlpPolicy", env, "kstep:5", n_steps=64, seed=seed, device="cpu")
        agent.learn(512)
        return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])

    assert torch.equal(parameters(1), parameters(1))
    assert not torch.equal(parameters(1), parameters(2))


def test_a_value_baseline_explains_returns() -> None:
    env = countdowns(8, 8)
    agent = PartialPG(
        "MlpPolicy", env, "kstep:2", "value", n_steps=64, learning_rate=0.01, seed=0, device="cpu"
    )
    agent.set_logger(configure(None, []))
    agent.learn(128 * 150)
    assert agent.logger.name_to_value["train/explained_variance"] > 0.5


# --- as every algorithm of the library ------------------------------------------------------------


def test_a_saved_agent_says_the_same_and_goes_on_as_before(tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    agent = PartialPG("MlpPolicy", env, KStep(7), gamma=0.95, n_steps=32, seed=0, device="cpu")
    agent.learn(256)
    agent.save(tmp_path / "agent")
    loaded = PartialPG.load(tmp_path / "agent", env=env, device="cpu")
    assert loaded.credit == KStep(7) and loaded.num_timesteps == 256
    observations = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    said = [each.predict(observations, deterministic=True)[0] for each in (agent, loaded)]
    assert np.array_equal(*said)
    moved = []
    for each in (agent, loaded):
        each.set_random_seed(3)
        each.set_env(env, force_reset=True)
        env.seed(4)
        each.learn(128, reset_num_timesteps=False)
        moved.append(torch.cat([p.detach().flatten() for p in each.policy.parameters()]))
    assert torch.equal(*moved)
    with pytest.raises(ValueError, match="spaces do not match"):
        PartialPG.load(tmp_path / "agent", env=make_vec_env("Pendulum-v1", n_envs=2))


def test_time_limits_are_found_wherever_they_are() -> None:
    limited = DummyVecEnv([lambda: TimeLimit(Countdown(100), 10)])
    with pytest.raises(ValueError, match=r"full looks 10 rewards ahead, .* n_steps=8"):
        PartialPG("MlpPolicy", limited, "full", "none", n_steps=8, device="cpu")
    workers = SubprocVecEnv(
        [lambda: TransformReward(gym.make("CartPole-v1"), lambda r: r / 10)] * 2, "fork"
    )
    agent = PartialPG("MlpPolicy", workers, "kstep:5", n_steps=16, device="cpu").learn(32)
    assert agent._longest == 500
    workers.close()
    short = make_vec_env("CartPole-v1", 2, env_kwargs={"max_episode_steps": 9})
    agent = PartialPG("MlpPolicy", short, "full", n_steps=16, device="cpu").learn(32)
    with pytest.raises(ValueError, match="full looks 500 rewards ahead"):
        agent.set_env(make_vec_env("CartPole-v1", n_envs=2))
    assert agent._longest == 9 and agent.learn(32).num_timesteps == 32


def test_an_error_in_the_midst_of_a_rollout_leaves_nothing_behind() -> None:
    class Fails(Countdown):
        def step(self, action: int) -> Any:
            if len(self.said) == 13:
                self.said.append(self.said[-1])
                raise KeyboardInterrupt
            return super().step(action)

    env = DummyVecEnv([lambda: Fails(100)])
    agent = PartialPG("MlpPolicy", env, "segment:3", "none", n_steps=8, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        agent.learn(80)
    agent.learn(8, reset_num_timesteps=False)
    rewards = [reward for *_, reward in env.envs[0].unwrapped.said[14:]]
    assert agent.rollout_buffer.returns[0, 0] == pytest.approx(sum(rewards[:3]))


def test_an_agent_is_loaded_in_the_midst_of_episodes_and_with_other_settings(
    tmp_path: Path,
) -> None:
    env = countdowns(6, 9)
    agent = PartialPG("MlpPolicy", env, "segment:3", n_steps=8, device="cpu").learn(16)
    agent.save(tmp_path / "agent")
    goes_on = PartialPG.load(tmp_path / "agent", env=env, force_reset=False, device="cpu")
    assert goes_on._turn_E.tolist() == agent._turn_E.tolist() == [2, 8]
    other = PartialPG.load(tmp_path / "agent", env=countdowns(6), credit="kstep:2", device="cpu")
    assert other.credit == KStep(2) and other._turn_E.tolist() == [0]
    other.learn(8)
    with pytest.raises(ValueError, match=r"credit is a name .* got 3"):
        PartialPG.load(tmp_path / "agent", env=env, credit=3)
    assert PartialPG.load(tmp_path / "agent").predict(np.zeros(3, dtype=np.float32))[0] in (0, 1)


def test_callbacks_logger_and_normalisation(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2, seed=0))
    agent = PartialPG("MlpPolicy", env, "kstep:5", n_steps=64, seed=0, device="cpu")
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    held_out = VecNormalize(make_vec_env("CartPole-v1", seed=9), training=False)
    checks = [
        EvalCallback(held_out, eval_freq=64, n_eval_episodes=2, verbose=0, warn=False),
        CheckpointCallback(save_freq=64, save_path=str(tmp_path), name_prefix="step"),
    ]
    agent.learn(512, callback=checks)
    assert checks[0].last_mean_reward > 0
    assert {path.name for path in tmp_path.glob("step_*.zip")} == {
        f"step_{number}_steps.zip" for number in (128, 256, 384, 512)
    }
    agent.logger.close()
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"rollout/ep_rew_mean", "train/policy_loss", "train/complete_steps"} <= rows[-1].keys()
    shares = [float(row["train/complete_steps"]) for row in rows if row["train/complete_steps"]]
    assert len(shares) >= 3 and min(shares) > 0.8
    assert env.obs_rms.count > 100


def test_a_callback_stops_learning_and_whoever_goes_on_begins_a_new_episode() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 5

    env = countdowns(100)
    agent = PartialPG("MlpPolicy", env, "segment:3", "none", n_steps=6, device="cpu")
    agent.learn(10_000, callback=Stop())
    assert agent.num_timesteps == 5 and agent._n_updates == 0
    agent.learn(6, reset_num_timesteps=False)
    rewards = [reward for *_, reward in env.envs[0].unwrapped.said[5:]]
    by_hand = [sum(rewards[t : 3 * (t // 3) + 3]) for t in range(6)]
    assert agent.rollout_buffer.returns[:, 0].tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("kind", [PPO, A2C, DQN, PartialPG])
@pytest.mark.parametrize("domain", ["chatting", "education", "therapy"])
def test_algorithms_learn_from_dialogues_as_a_menu_of_acts(kind: Any, domain: str) -> None:
    def make() -> Any:
        env = gym.make("PersonaDialogue-v0", domain=domain, max_turns=4)
        return EmbeddedObservation(DiscreteReply(env), HashedWords(32))

    envs = make_vec_env(make, n_envs=4, seed=0)
    more: dict[str, Any] = {"learning_starts": 16} if kind is DQN else {"n_steps": 16}
    if kind is PartialPG:
        more["longest_episode"] = 4
    agent = kind("MlpPolicy", envs, seed=0, device="cpu", **more)
    before = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
    agent.learn(128)
    after = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    act, _ = agent.predict(envs.reset(), deterministic=True)
    assert all(envs.action_space.contains(each) for each in act)
    assert np.isfinite([info["r"] for info in agent.ep_info_buffer]).all()
    assert len(agent.ep_info_buffer) == 128 // 4


@pytest.mark.parametrize("name", CONTENDERS)
def test_the_speed_benchmark_runs(name: str) -> None:
    assert steps_per_second(CONTENDERS[name], "CartPole-v1", 1024) > 0


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"credit": "kstpe:3"}, "Did you mean 'kstep"),
        ({"credit": "kstep:65"}, r"kstep:65 looks 65 rewards ahead, .* n_steps=64"),
        ({"credit": "full"}, r"full looks 500 rewards ahead, .* n_steps=64"),
        ({"credit": Subset(np.triu(np.ones((80, 80))))}, r"looks 80 rewards ahead, .* n_steps=64"),
        ({"longest_episode": 0}, "longest_episode is a number of steps, at least 1, got 0"),
        ({"longest_episode": 2.5}, "at least 1, got 2.5"),
        ({"credit": "segment:0,100", "longest_episode": 200}, "looks 100 rewards ahead"),
        ({"credit": None}, "credit is a name such as 'kstep:5' or a credit .*, got None"),
        (
            {"credit": "trajectory", "bootstrap": True, "baseline": "value"},
            "or for what was before it, and one value cannot stand",
        ),
        ({"credit": "segment:65"}, r"segment:65 looks 65 rewards ahead"),
        ({"baseline": "mean"}, "Unknown baseline 'mean'; there are leave_one_out, value, none"),
        ({"bootstrap": True}, "bootstrap=True needs a value function: baseline='value'"),
        (
            {"credit": "kstep:3", "bootstrap": True, "baseline": "value"},
            "With kstep:3 steps answer for different parts of what follows a cut",
        ),
        ({"credit": "segment"}, r"Segment\(\) follows the episode's own phases"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1\.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    env = make_vec_env("CartPole-v1", n_envs=2)
    with pytest.raises(ValueError, match=message):
        PartialPG(
            "MlpPolicy", env, **{"credit": "kstep:5", "n_steps": 64, "device": "cpu", **settings}
        )


def test_one_environment_compares_its_own_episodes_and_says_if_there_is_one_only() -> None:
    def learn(length: int) -> bool:
        agent = PartialPG("MlpPolicy", countdowns(length), "greedy", n_steps=8, device="cpu")
        before = [p.detach().clone() for p in agent.policy.parameters()]
        agent.learn(8)
        return not all(map(torch.equal, before, agent.policy.parameters()))

    assert learn(4)
    with pytest.warns(UserWarning, match="No step .* has another episode to compare with"):
        assert not learn(100)


@pytest.mark.parametrize("env", ["ppg_env:PersonaDialogue-v0", "menu"])
def test_text_is_neither_action_nor_observation_and_the_remedy_is_named(env: str) -> None:
    made: Any = DiscreteReply(gym.make("ppg_env:PersonaDialogue-v0")) if env == "menu" else env
    with pytest.raises(ValueError, match=r"EmbeddedObservation\(DiscreteReply"):
        PartialPG("MlpPolicy", made, "greedy", "value", device="cpu")


def test_an_agent_of_discrete_actions_goes_on_with_no_continuous_ones(tmp_path: Path) -> None:
    menu = EmbeddedObservation(DiscreteReply(gym.make("PersonaDialogue-v0")), HashedWords(32))
    menu.reset(seed=0)
    with pytest.raises(ValueError, match=r"0\.5"):
        menu.step(np.array([0.5], dtype=np.float32))
    agent = PartialPG("MlpPolicy", "CartPole-v1", "greedy", device="cpu")
    with pytest.raises(ValueError, match="spaces do not match"):
        agent.set_env(make_vec_env("Pendulum-v1"))


def test_a_rollout_in_which_nothing_counts_is_told_and_changes_nothing() -> None:
    with pytest.warns(UserWarning, match="answers for everything until .* favours short ones"):
        agent = PartialPG("MlpPolicy", countdowns(99, 99), FullPlanning(), n_steps=8, device="cpu")
    before = [p.detach().clone() for p in agent.policy.parameters()]
    with pytest.warns(UserWarning, match=r"Less than half .* count for full.*n_steps=8"):
        agent.learn(16)
    assert all(map(torch.equal, before, agent.policy.parameters()))
    assert agent._n_updates == 0


def test_a_reward_that_is_no_number_stops_learning() -> None:
    class Broken(Countdown):
        def step(self, action: int) -> Any:
            observation, reward, *rest = super().step(action)
            return observation, np.nan if self.turn == 3 else reward, *rest

    env = DummyVecEnv([lambda: Broken(5), lambda: Broken(5)])
    with pytest.raises(ValueError, match=r"reward of step 2 in environment 0 is nan"):
        PartialPG("MlpPolicy", env, "greedy", n_steps=8, device="cpu").learn(16)


def test_a_matrix_smaller_than_the_episodes_is_refused() -> None:
    credit = Subset(np.triu(np.ones((4, 4))))
    agent = PartialPG("MlpPolicy", countdowns(4, 4), credit, n_steps=8, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn(16)
    agent = PartialPG("MlpPolicy", countdowns(6, 6), credit, n_steps=8, device="cpu")
    with pytest.raises(ValueError, match="This Subset covers 4 turns but 6 are needed"):
        agent.learn(16)
