"""The actor-critic baseline: PPO with one value and one advantage a turn.

    agent = PPOAgent("nano", envs, seed=0).learn(total_timesteps=10_000)

A critic reads the model's last hidden state before a turn and predicts the rewards to come;
generalized advantage estimation over turns takes the place of credit matrix and group baseline.
Source: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from .credit import generalized_advantages
from .lm_policy import LMPolicy
from .loading import load_policy
from .optimization import Optimization
from .ppg import MicroBatch, PPGAgent, read_agent_settings
from .rollout import RolloutBatch
from .scoring import Scores, microbatches

_CRITIC = "critic.safetensors"


class PPOAgent(PPGAgent):
    """Learns with clipped ratios, several epochs and a learned value; interface as `PPGAgent`.

    Args:
        policy, env, settings: as for `PPGAgent`, whose `credit`, `baseline` and `scale` do not
            apply.
        gamma: discount of later rewards.
        gae_lambda: 0 trusts the critic, 1 the rewards.
        vf_coef: weight of half the critic's squared error, summed over a dialogue's turns.
        critic_learning_rate: of the critic's own weights.
        share_hidden: let the critic's error move the language model, too.
        normalize_advantage: centre the batch's advantages and divide them by their standard
            deviation.
        n_epochs: passes over each batch of dialogues.
        ratio_level: "token", as PPO for language models has it, or "turn".
        group_size: 1, since the critic is the baseline; a larger one gives the very dialogues that
            a PPGAgent with the same seed learns from.
    """

    def __init__(
        self,
        policy: str | Path | LMPolicy,
        env: gym.vector.VectorEnv[Any, Any, Any] | None,
        *,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        vf_coef: float = 0.5,
        critic_learning_rate: float = 3e-3,
        share_hidden: bool = False,
        normalize_advantage: bool = True,
        n_epochs: int = 2,
        ratio_level: str = "token",
        group_size: int = 1,
        **settings: Any,
    ) -> None:
        generalized_advantages([[0.0]], [[0.0]], gamma=gamma, gae_lambda=gae_lambda)  # checks both
        self._critic_learning_rate = critic_learning_rate
        super().__init__(
            policy,
            env,
            "full",
            **{
                "baseline": "none",
                "n_epochs": n_epochs,
                "ratio_level": ratio_level,
                "group_size": group_size,
                **settings,
            },
        )
        self.settings |= {
            "gamma": gamma,
            "gae_lambda": gae_lambda,
            "vf_coef": vf_coef,
            "critic_learning_rate": critic_learning_rate,
            "share_hidden": share_hidden,
            "normalize_advantage": normalize_advantage,
        }
        self._values: tuple[RolloutBatch, np.ndarray] | None = None
        self._target_BT = self._weight_BT = np.zeros((0, 0))

    def credited(self, batch: RolloutBatch) -> np.ndarray:
        """Return advantage_BT by generalized advantage estimation over turns."""
        return generalized_advantages(
            batch.reward_BT,
            self.values(batch),
            batch.alive_BT,
            gamma=self.settings["gamma"],
            gae_lambda=self.settings["gae_lambda"],
        )

    def values(self, batch: RolloutBatch) -> np.ndarray:
        """Return value_BT: the critic's estimate of the rewards from each turn on; 0 if no turn."""
        if self._values is not None and self._values[0] is batch:
            return self._values[1]
        tape = batch.tape
        assert tape is not None
        value_BT = np.zeros(batch.reward_BT.shape)
        with self.whole_model(), torch.no_grad():
            for rows in microbatches(tape.length_S, self.settings["token_budget"]):
                micro = self._micro_batch(tape, rows, value_BT, 1)
                scores = self.policy.scores(micro.token_sL, micro.turn_sL, hidden=True)
                value_N, place = self._values_of(scores, micro)
                value_BT[place] = value_N.double().cpu().numpy()
        self._values = (batch, value_BT)
        return value_BT

    def learn_offline(self, log: Any, **settings: Any) -> Self:
        """Refuse: a critic learns what the policy that acts will earn, and a log is of another."""
        raise ValueError(
            "PPOAgent learns from its own dialogues only; learn from logs with PPGAgent and a "
            "credit, such as PPGAgent(policy, None, 'kstep:3').learn_offline(log)."
        )

    def update(self, batch: RolloutBatch, advantage_BT: np.ndarray) -> dict[str, float]:
        """Learn from one batch: policy and critic, `n_epochs` times."""
        scored_BT = batch.alive_BT & ~np.isnan(batch.reward_BT)
        self._target_BT = advantage_BT + self.values(batch)
        self._weight_BT = scored_BT.astype(float)
        if self.settings["normalize_advantage"]:
            advantage_BT = self._normalized(advantage_BT, scored_BT)
        measured = super().update(batch, np.where(scored_BT, advantage_BT, 0.0))
        self._values = None
        return measured

    def loss_of(self, scores: Scores, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the policy's loss plus the critic's."""
        loss, sums = super().loss_of(scores, micro)
        value_N, place = self._values_of(scores, micro)
        target_N, weight_N = (
            torch.as_tensor(array_BT[place], dtype=torch.float32, device=value_N.device)
            for array_BT in (self._target_BT, self._weight_BT)
        )
        error = (weight_N * (value_N - target_N) ** 2).sum() / (2 * micro.num_episodes)
        return loss + self.settings["vf_coef"] * error, {**sums, "value_loss": error.item()}

    def scores(self, micro: MicroBatch) -> Scores:
        """Return what the policy's loss needs, and the critic's inputs."""
        return self.policy.scores(
            micro.token_sL, micro.turn_sL, entropy=self.settings["ent_coef"] != 0, hidden=True
        )

    def _values_of(
        self, scores: Scores, micro: MicroBatch
    ) -> tuple[torch.Tensor, tuple[np.ndarray, np.ndarray]]:
        """Return the values before the turns of these sequences, and their (dialogues, turns)."""
        row_N, column_N = scores.at
        turn_N = micro.turn_sL[row_N, column_N]
        first_N = micro.turn_sL[row_N, column_N - 1] != turn_N
        if scores.hidden_NH is None:  # nothing was said
            return turn_N.float(), (np.zeros(0, dtype=int),) * 2
        hidden_NH = scores.hidden_NH[first_N].float()
        if not self.settings["share_hidden"]:
            hidden_NH = hidden_NH.detach()
        rows = row_N[first_N].cpu().numpy()
        return self.critic(hidden_NH)[:, 0], (micro.episode_s[rows], turn_N[first_N].cpu().numpy())

    def _normalized(self, advantage_BT: np.ndarray, scored_BT: np.ndarray) -> np.ndarray:
        """Return the advantages centred and scaled over the turns of all processes."""
        own = advantage_BT[scored_BT]
        parts = [own] if self.processes.num_processes == 1 else gather_object([own])
        everyone = np.concatenate(parts)
        if len(everyone) == 0:
            return advantage_BT
        return (advantage_BT - everyone.mean()) / (everyone.std() or 1.0)

    def _make_optimization(self) -> Optimization:
        width = int(self.policy.network.config.hidden_size)
        self.critic = torch.nn.Linear(width, 1).to(self.policy.device)
        torch.nn.init.zeros_(self.critic.weight)
        torch.nn.init.zeros_(self.critic.bias)
        return super()._make_optimization()

    def _trained(self) -> dict[str, torch.nn.Module]:
        return {**super()._trained(), "critic": self.critic}

    def _learning_rates(self) -> list[float]:
        return [*super()._learning_rates(), self._critic_learning_rate]

    def save(self, path: str | Path) -> None:
        """Write model, tokenizer, critic and settings to the folder `path`."""
        super().save(path)
        if self.processes.is_main_process:
            save_file(self.critic.state_dict(), Path(path) / _CRITIC)

    @classmethod
    def load(
        cls, path: str | Path, env: gym.vector.VectorEnv[Any, Any, Any] | None = None
    ) -> PPOAgent:
        """Return the agent saved in `path`; the optimizer starts afresh.

        Raises:
            FileNotFoundError: if the folder holds no saved agent.
            ValueError: if it holds an agent of another kind.
        """
        record = read_agent_settings(path, cls.__name__)
        fixed = ("baseline", "scale", "divide_by_std")
        settings = {name: v for name, v in record["settings"].items() if name not in fixed}
        agent = cls(load_policy(path, seed=record["seed"]), env, seed=record["seed"], **settings)
        agent.critic.load_state_dict(load_file(Path(path) / _CRITIC))
        agent.num_timesteps, agent.num_updates = record["num_timesteps"], record["num_updates"]
        return agent
