"""Partial policy gradients as a Stable-Baselines3 algorithm, for any Gymnasium environment.

    envs = make_vec_env("CartPole-v1", n_envs=8)
    PartialPG("MlpPolicy", envs, credit="kstep:20", seed=0).learn(100_000)

Every update takes one gradient step along

    (1/N) sum_n A_n grad log pi(a_n | s_n),   A = partial return - baseline

over the N steps of a rollout (n_steps in each parallel environment). A = 0 where it was not certain
beforehand that the rollout would hold all rewards that the step answers for. With full credit and a
discount this is REINFORCE with reward-to-go; with a value baseline and bootstrapping it is A2C with
gae_lambda = 1.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv

from .credit import Credit, leave_one_out, parse_credit
from .fragments import TO_THE_END, CreditMatrix, FragmentReturns, fragment_returns

Baseline = Literal["leave_one_out", "value", "none"]


class PartialPG(OnPolicyAlgorithm):
    """Policy gradient in which each step answers for a subset of the later rewards.

    Source: "Partial Policy Gradients for RL in LLMs", arXiv 2603.06138.

    Args:
        policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a class of actor-critic policies.
        env: an environment, a VecEnv, or a registered id.
        credit: which rewards a step answers for, by name ("kstep:5", "full", ...) or as one of
            agents.credit. Turns are the steps of an episode.
        baseline: "leave_one_out": mean return of the other episodes of the rollout at the same
            turn, for many parallel environments (with no other, the advantage is 0); "value": a
            learned value function; "none".
        bootstrap: what becomes of a step some of whose rewards lie beyond the end of the rollout.
            False: it is dropped, and time limits (truncation) are ends. Of kstep:K the last K - 1
            steps of a rollout go, of full all episodes that could last beyond its end. True: the
            value function stands for what follows the rollout or a time limit, which needs
            baseline="value" and a credit whose rest is the same for all steps (full, discounted,
            segment, greedy).
        longest_episode: steps that no episode exceeds, for bootstrap=False; None: the environment's
            time limit, if it has one. If there is no bound, steps that answer for everything to
            come count whenever their episode ends in time, which favours short episodes; that is
            warned of.
        boundaries: first turns of the segments, for credit="segment".
        learning_rate: of the policy's optimizer, a number or a function of the remaining progress.
        n_steps: steps of a rollout in each environment.
        gamma: discount factor, on top of the credit.
        ent_coef, vf_coef: weights of the entropy bonus and of the value loss.
        max_grad_norm: gradients are scaled down to this norm.
        normalize_advantage: to mean 0 and deviation 1 over the rollout; the gradient is then no
            longer the one above.
        use_sde, sde_sample_freq, stats_window_size, tensorboard_log, policy_kwargs, verbose, seed,
            device: as of every Stable-Baselines3 algorithm.

    Raises:
        ValueError: settings that do not fit each other, or actions that the policy cannot take.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        credit: str | Credit = "full",
        baseline: Baseline = "leave_one_out",
        bootstrap: bool = False,
        boundaries: tuple[int, ...] | None = None,
        longest_episode: int | None = None,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 128,
        gamma: float = 1.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        normalize_advantage: bool = False,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        env = maybe_make_env(env, verbose)
        _refuse_text(env)
        self.credit = _as_credit(credit)
        self.baseline, self.bootstrap, self.boundaries = baseline, bootstrap, boundaries
        self.longest_episode = longest_episode
        self._longest = longest_episode
        self._turn_E = np.zeros(0, dtype=np.int64)
        self.normalize_advantage = normalize_advantage
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=1.0,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._refuse_unusable()
        super()._setup_model()
        self.rollout_buffer.compute_returns_and_advantage = self._credit_rollout  # type: ignore[method-assign]
        self._cut_value_NE = np.zeros((0, 0))
        if len(self._turn_E) != self.n_envs:
            self._turn_E = np.zeros(self.n_envs, dtype=np.int64)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_matrix", "_cut_value_NE"]

    def _refuse_unusable(self) -> None:
        self.credit = _as_credit(self.credit)  # what is handed to load comes here as it is
        longest = self.longest_episode
        if longest is not None and (not isinstance(longest, int) or longest < 1):
            raise ValueError(f"longest_episode is a number of steps, at least 1, got {longest!r}.")
        if self.baseline not in get_args(Baseline):
            raise ValueError(
                f"Unknown baseline {self.baseline!r}; there are {', '.join(get_args(Baseline))}."
            )
        self._matrix = CreditMatrix(self.credit, self.gamma, self.boundaries)
        self._matrix.over(0)  # what the credit lacks shows now
        if not self.bootstrap:
            self._check_that_rollouts_hold_enough()
        elif self.baseline != "value":
            raise ValueError(
                f"bootstrap=True needs a value function: baseline='value', got {self.baseline!r}."
            )
        elif not self._matrix.has_one_tail:
            raise ValueError(
                f"With {self.credit.name} steps answer for different parts of what follows a cut, "
                "or for what was before it, and one value cannot stand for all of them: "
                "bootstrap=False drops such steps."
            )

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Go on in another environment, as in Stable-Baselines3."""
        before = self.env, self._longest
        super().set_env(env, force_reset)
        try:
            if not self.bootstrap:
                self._check_that_rollouts_hold_enough()
        except ValueError:
            self.env, self._longest = before
            raise

    def _check_that_rollouts_hold_enough(self) -> None:
        longest = _time_limit(self.env) if self.longest_episode is None else self.longest_episode
        self._longest = longest
        ahead = self._matrix.ahead(self.n_steps)
        ahead = ahead if longest is None else min(ahead, longest)
        if self.env is not None and ahead == TO_THE_END:
            _tell(
                f"{self.credit.name} answers for everything until its episode's end, and no bound "
                "on episodes is known: only those that end before the rollout does count, which "
                "favours short ones. Say longest_episode=..., or bootstrap."
            )
        elif self.env is not None and ahead > self.n_steps:
            raise ValueError(
                f"{self.credit.name} looks {ahead} rewards ahead, a rollout has n_steps="
                f"{self.n_steps} of each environment, which need not hold them. Raise n_steps (to "
                "several times as many), take a credit that looks less far ahead, or "
                "bootstrap=True with baseline='value', where the credit allows that."
            )

    # -- rollouts ----------------------------------------------------------------------------------

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Fill the buffer; its returns and advantages are the credit's, NaN = not complete."""
        self._cut_value_NE = np.full((n_rollout_steps, env.num_envs), np.nan)
        self._step = 0
        going_on = False
        try:
            going_on = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        finally:
            if not going_on:  # stopped in the midst of a rollout: whoever goes on begins anew
                self._last_obs = None
        return going_on

    def _credit_rollout(self, last_values: torch.Tensor, dones: np.ndarray) -> None:
        """Set returns and advantages of the full buffer, in the place of the buffer's own way."""
        buffer, ends_E = self.rollout_buffer, np.asarray(dones, dtype=bool)
        start_NE = buffer.episode_starts.astype(bool)
        end_NE = np.concatenate([start_NE[1:], ends_E[None]])
        if self.bootstrap:
            value_E = last_values.flatten().cpu().numpy()
            self._cut_value_NE[-1, ~ends_E] = value_E[~ends_E]
            end_NE &= np.isnan(self._cut_value_NE)
        found = fragment_returns(
            buffer.rewards,
            start_NE,
            end_NE,
            self._turn_E,
            self._matrix,
            self._cut_value_NE if self.bootstrap else None,
            None if self.bootstrap else self._longest,
        )
        self._turn_E = found.turn_NE[-1] + 1
        buffer.returns = found.return_NE.astype(np.float32)
        buffer.advantages = self._advantages(found, buffer.values)

    def _update_info_buffer(
        self, infos: list[dict[str, Any]], dones: np.ndarray | None = None
    ) -> None:
        """Note time limits, so that their value is not added to a single reward.

        The base class would add it to the last reward of the episode, which is right if every step
        answers for that reward and for all that follows, and wrong for partial credit.
        """
        super()._update_info_buffer(infos, dones)
        for e, info in enumerate(infos):
            if info.get("TimeLimit.truncated", False):
                if self.bootstrap and "terminal_observation" in info:
                    last_observation, _ = self.policy.obs_to_tensor(info["terminal_observation"])
                    with torch.no_grad():
                        value = self.policy.predict_values(last_observation).item()
                    self._cut_value_NE[self._step, e] = value
                info["TimeLimit.truncated"] = False
        self._step += 1

    def _advantages(self, found: FragmentReturns, value_NE: np.ndarray) -> np.ndarray:
        """Return advantage_NE, NaN where a step is not complete."""
        advantage_NE = found.return_NE.copy()
        if self.baseline == "value":
            advantage_NE -= value_NE
        elif self.baseline == "leave_one_out":
            complete_NE = found.complete_NE
            return_M, turn_M = found.return_NE[complete_NE], found.turn_NE[complete_NE]
            if len(return_M):
                # Steps at the same turn are of different episodes, hence independent. Steps at
                # other turns may be of the same one, so that they are no baseline for who is alone.
                _, which_M, number = np.unique(turn_M, return_inverse=True, return_counts=True)
                alone_M = number[which_M] < 2
                if alone_M.all():
                    _tell(
                        "No step of this rollout has another episode to compare with, so nothing "
                        "is learned from it: make more environments (make_vec_env(..., n_envs=8)), "
                        "raise n_steps, or take baseline='value'."
                    )
                advantage_M = leave_one_out(return_M[:, None], turn_M)[:, 0]
                advantage_NE[complete_NE] = np.where(alone_M, 0.0, advantage_M)
        return advantage_NE.astype(np.float32)

    # -- learning ----------------------------------------------------------------------------------

    def train(self) -> None:
        """Take one gradient step over the complete steps of the rollout."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        (batch,) = self.rollout_buffer.get(batch_size=None)
        complete_M = ~torch.isnan(batch.advantages)
        share = complete_M.float().mean().item()
        self.logger.record("train/complete_steps", share)
        if share < 0.5:
            _tell(
                f"Less than half of a rollout's steps count for {self.credit.name}, the others "
                f"might have been cut: raise n_steps={self.n_steps}, take a credit that looks less "
                "far ahead, or bootstrap. (train/complete_steps is the share.)"
            )
        if not share:
            return
        actions = batch.actions.long().flatten() if self._is_discrete else batch.actions
        observations = batch.observations
        if isinstance(observations, dict):
            chosen: Any = {name: value[complete_M] for name, value in observations.items()}
        else:
            chosen = observations[complete_M]
        value_M, logprob_M, entropy_M = self.policy.evaluate_actions(chosen, actions[complete_M])
        advantage_M, return_M = batch.advantages[complete_M], batch.returns[complete_M]
        if self.normalize_advantage and len(advantage_M) > 1:
            advantage_M = (advantage_M - advantage_M.mean()) / (advantage_M.std() + 1e-8)
        # By all steps: how many count may depend on how the episodes went.
        policy_loss = -(advantage_M * logprob_M).sum() / len(complete_M)
        entropy = -logprob_M.mean() if entropy_M is None else entropy_M.mean()
        loss = policy_loss - self.ent_coef * entropy
        if self.baseline == "value":
            value_loss = torch.nn.functional.mse_loss(value_M.flatten(), return_M)
            loss = loss + self.vf_coef * value_loss
        self.policy.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()
        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/policy_loss", policy_loss.item())
        self.logger.record("train/entropy_loss", -entropy.item())
        self.logger.record("train/grad_norm", norm.item())
        if self.baseline == "value":
            self.logger.record("train/value_loss", value_loss.item())
            explained = explained_variance(
                value_M.detach().flatten().cpu().numpy(), return_M.cpu().numpy()
            )
            self.logger.record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", torch.exp(self.policy.log_std).mean().item())

    @property
    def _is_discrete(self) -> bool:
        return isinstance(self.action_space, spaces.Discrete)


def _as_credit(credit: Any) -> Credit:
    if isinstance(credit, str):
        return parse_credit(credit)
    if not callable(getattr(credit, "weights", None)):
        raise ValueError(
            f"credit is a name such as 'kstep:5' or a credit of agents.credit, got {credit!r}."
        )
    return credit


def _tell(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _time_limit(env: VecEnv | None) -> int | None:
    """Return the time limit that no environment exceeds; None if one has none."""
    name = "_max_episode_steps"  # of gymnasium.wrappers.TimeLimit
    if env is None or not env.has_attr(name):
        return None
    limits = env.get_attr(name)
    return max(limits) if all(limits) else None


def _refuse_text(env: GymEnv | None) -> None:
    known = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    if env is not None and not (
        isinstance(env.action_space, known)
        and isinstance(env.observation_space, (*known, spaces.Dict))
    ):
        raise ValueError(
            f"Stable-Baselines3 has no policy for observations of {env.observation_space} and "
            f"actions of {env.action_space}. For dialogues as text wrap the environment: "
            "EmbeddedObservation(DiscreteReply(env)), both of ppg_env."
        )
