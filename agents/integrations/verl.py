"""Partial credit on verl's clusters: advantage estimators and an agent loop that plays dialogues.

Importing this module registers `ppg_greedy`, `ppg_kstep`, `ppg_segment` and `ppg_full` with verl's
`register_adv_est`, and the agent loop `ppg_dialogue`. All of verl's processes import it if it is
named in an environment variable:

    VERL_USE_EXTERNAL_MODULES=agents.integrations.verl python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=ppg_kstep +algorithm.ppg.k=3 ...

A whole command is in examples/verl_partial_credit.sh; see docs/engines.md.
"""

from __future__ import annotations

import math
from typing import Any
from uuid import uuid4

import gymnasium as gym
import torch

from .dialogue_tokens import DialogueTokens, LineReader
from .verl_estimators import ESTIMATORS

try:
    from verl.experimental.agent_loop.agent_loop import (
        AgentLoopBase,
        AgentLoopMetrics,
        AgentLoopOutput,
        register,
    )
    from verl.trainer.ppo.core_algos import register_adv_est
    from verl.utils.profiler import simple_timer
except ImportError as error:
    raise ImportError(
        f"verl is not there, or not whole ({error}). It has its own pins, so give it an "
        'environment of its own: pip install -e ".[verl]"'
    ) from error

for _estimator in ESTIMATORS:
    register_adv_est(_estimator.name)(_estimator)


class TurnRewardsOutput(AgentLoopOutput):
    """A dialogue whose turns have rewards of their own; verl's has one reward, on the last token.

    `verl.trainer.ppo.v1` reads it through `as_dict`; the trainer before it (`trainer.use_v1=False`)
    does not and would see the sum alone.
    """

    turn_rewards: list[float]
    """Reward of each turn; a turn is a run of ones in `response_mask`."""

    def as_dict(self) -> dict[str, Any]:
        """Return verl's fields, with each turn's reward on the turn's last token."""
        fields: dict[str, Any] = super().as_dict()
        rewards = fields.pop("turn_rewards")
        said = fields["response_mask"]
        ends = torch.nonzero(said * (1 - torch.nn.functional.pad(said[1:], (0, 1))))[:, 0]
        if len(ends) != len(rewards):
            raise ValueError(
                f"The response mask has {len(ends)} turns (runs of ones), but there are "
                f"{len(rewards)} rewards; give one a turn."
            )
        fields["rm_scores"] = torch.zeros(len(said), dtype=torch.float32)
        fields["rm_scores"][ends] = torch.tensor(rewards, dtype=torch.float32)
        return fields


@register("ppg_dialogue")
class DialogueAgentLoop(AgentLoopBase):
    """Plays one dialogue of a Gymnasium environment of chat messages with verl's own servers.

    The data set's rows stand for groups: `extra_info["seed"]` seeds the environment, so the
    `rollout.n` dialogues of a row share persona, opening and partner seed. Their prompts are not
    read.

    Args:
        env: what `gym.make` takes.
        env_settings: keyword arguments of `gym.make`, for instance {"domain": "therapy",
            "unscorable_reward": 0.0}.
        max_new_tokens: longest line in tokens. A dialogue stops where no such line is sure to fit
            into `rollout.response_length`.
    """

    def __init__(
        self,
        *args: Any,
        env: str = "ppg_env:PersonaDialogue-v0",
        env_settings: dict[str, Any] | None = None,
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.env = gym.make(env, **dict(env_settings or {}))
        self.max_new_tokens = max_new_tokens
        self.reader = LineReader(self.tokenizer, "verl")

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> TurnRewardsOutput:
        """Play the dialogue of a row of the data set.

        Raises:
            ValueError: the row has no seed, the prompt is longer than `rollout.prompt_length`, or a
                reward is not finite.
        """
        messages, _ = await self._in_thread(self.env.reset, seed=_seed(row))
        tokens = DialogueTokens(self.reader)
        rewards: list[float] = []
        metrics: dict[str, Any] = {}
        extra_fields: dict[str, Any] = {}
        settings = {
            **sampling_params,
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": sorted(self.reader.end_ids),
        }
        request_id = uuid4().hex  # the same for all turns, so that a server can keep its cache
        over = False
        while not over and self._fits(tokens, unread := tokens.unread(messages)):
            tokens.read(unread)
            with simple_timer("generate_sequences", metrics):
                line = await self.server_manager.generate(
                    request_id=request_id, prompt_ids=list(tokens.ids), sampling_params=settings
                )
            extra_fields = {**line.extra_fields, **_first_version(extra_fields)}
            text = tokens.say(list(line.token_ids), line.log_probs)
            messages, reward, terminated, truncated, _ = await self._in_thread(self.env.step, text)
            rewards.append(_finite(float(reward), len(rewards)))
            over = terminated or truncated

        said = slice(tokens.prompt_length, None)
        return TurnRewardsOutput(
            prompt_ids=tokens.ids[: tokens.prompt_length],
            response_ids=tokens.ids[said],
            response_mask=[int(turn >= 0) for turn in tokens.turns[said]],
            response_logprobs=tokens.logprobs[said] if line.log_probs else None,
            reward_score=sum(rewards),
            turn_rewards=rewards,
            num_turns=2 * len(rewards),
            metrics=AgentLoopMetrics(**metrics),
            extra_fields={**extra_fields, "turn_scores": rewards, "tool_rewards": []},
        )

    def _fits(self, tokens: DialogueTokens, unread: list[int]) -> bool:
        """Return whether a line is sure to fit after these tokens."""
        if tokens.num_turns > 0:
            response = len(tokens.ids) - tokens.prompt_length + len(unread)
            return bool(response + self.max_new_tokens <= self.rollout_config.response_length)
        if len(unread) > self.rollout_config.prompt_length:
            raise ValueError(
                f"The first prompt has {len(unread)} tokens, more than rollout.prompt_length="
                f"{self.rollout_config.prompt_length}; raise data.max_prompt_length."
            )
        if self.max_new_tokens > self.rollout_config.response_length:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} is more than rollout.response_length="
                f"{self.rollout_config.response_length}, which holds a whole dialogue; raise "
                "data.max_response_length."
            )
        return True

    async def _in_thread(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Let other dialogues go on while a partner or judge is waited for."""
        return await self.loop.run_in_executor(None, lambda: function(*args, **kwargs))


def _seed(row: dict[str, Any]) -> int:
    extra_info = row.get("extra_info") or {}
    if "seed" not in extra_info:
        raise ValueError(
            f"A row of the data set needs extra_info['seed'], an integer; got {extra_info!r:.80}"
        )
    return int(extra_info["seed"])


def _finite(reward: float, turn: int) -> float:
    if not math.isfinite(reward):
        raise ValueError(
            f"The reward of turn {turn} is {reward}. verl knows no unscorable turns: give them a "
            "fixed reward with env_settings={'unscorable_reward': 0.0}."
        )
    return reward


def _first_version(extra_fields: dict[str, Any]) -> dict[str, Any]:
    """Return the version of the weights at the dialogue's start, if one is known."""
    name = "min_global_steps"
    return {name: extra_fields[name]} if name in extra_fields else {}
