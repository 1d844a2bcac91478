"""Partial policy gradients: agents that differ only in which rewards a turn answers for.

    envs = gym.make_vec("PersonaDialogue-v0", num_envs=64, domain="therapy")
    agent = KStepAgent("nano", envs, k=3, seed=0).learn(total_timesteps=10_000)

`learn` is the whole algorithm: collect dialogues with the current policy, credit rewards to turns,
one policy-gradient step. Source: "Partial Policy Gradients for RL in LLMs", arXiv 2603.06138.
"""

from __future__ import annotations

import copy
import difflib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from tqdm.auto import tqdm

from .credit import (
    Credit,
    FullPlanning,
    Greedy,
    KStep,
    Segment,
    Subset,
    advantages,
    credit_weights,
    parse_credit,
    partial_returns,
)
from .lm_policy import Conversation, LMPolicy, microbatches
from .losses import kl_to_reference, policy_gradient_loss
from .policy import Messages
from .rollout import RolloutBatch, collect_rollouts

NANO = Path(__file__).parent / "nano"
"""Folder of the bundled tiny language model."""

Callback = Callable[["PPGAgent"], "bool | None"]
"""Called after every update with the agent; returning False stops learning."""

_SETTINGS = "ppg_agent.json"


class PPGAgent:
    """Learns online with any credit matrix; learn, predict, save and load as in Stable-Baselines3.

    An update plays one dialogue in every slot of `env` and takes one step along

        (1/B) sum_b sum_t A[b,t] grad log pi(a_t | h_t),   A = partial return - leave-one-out
        baseline.

    Args:
        policy: an LMPolicy, "nano" (the bundled model), or the folder or name of a Hugging Face
            model.
        env: a vector environment of dialogues, from gym.make_vec; None for acting only.
        credit: which rewards a turn answers for: a Credit, or text such as "kstep:3".
        learning_rate: of AdamW, at the start of `learn`.
        lr_schedule: "constant", or "linear": falls to a twentieth over the call of `learn`.
        adam_eps: AdamW's epsilon. Large, so that parameters with next to no gradient rest: with
            1e-8 the tiny model's grammar wore away while its rewards rose.
        group_size: dialogues that share persona, opening and partner seed, and are each other's
            baseline; divides env.num_envs.
        baseline: see credit.advantages.
        scale: see credit.credit_weights; "mean_window" keeps step sizes of policy classes
            comparable.
        kl_coef: weight of the KL divergence to the initial model, 0 = none.
        max_grad_norm: the gradient's norm is clipped to it.
        token_budget: tokens in one forward and backward pass, padding included.
        seed: of dialogues and of the agent's sampling.

    Attributes:
        num_timesteps: turns learned from so far.
        num_updates: gradient steps taken so far.
        log: latest measurements, keys as in Stable-Baselines3.
        history: all of them, one dict an update.
    """

    def __init__(
        self,
        policy: str | Path | LMPolicy,
        env: gym.vector.VectorEnv[Any, Any, Any] | None,
        credit: Credit | str = "full",
        *,
        learning_rate: float = 3e-4,
        lr_schedule: str = "constant",
        adam_eps: float = 1e-4,
        group_size: int = 8,
        baseline: str = "leave_one_out",
        scale: str = "mean_window",
        kl_coef: float = 0.0,
        max_grad_norm: float = 1.0,
        token_budget: int = 4096,
        seed: int | None = None,
    ) -> None:
        if lr_schedule not in ("constant", "linear"):
            raise ValueError(f"lr_schedule is 'constant' or 'linear', got {lr_schedule!r}.")
        self.credit = parse_credit(credit) if isinstance(credit, str) else credit
        credit_weights(Greedy(), 1, scale=scale)  # refuse an unknown scale or baseline here
        advantages(np.zeros((2, 1)), baseline=baseline, group_B=np.zeros(2, dtype=int))
        self.env = _checked_env(env, group_size, baseline)
        self.seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) if seed is None else seed
        self.policy = (
            policy if isinstance(policy, LMPolicy) else load_policy(policy, seed=self.seed)
        )
        self.settings: dict[str, Any] = {
            "learning_rate": learning_rate,
            "lr_schedule": lr_schedule,
            "adam_eps": adam_eps,
            "group_size": group_size,
            "baseline": baseline,
            "scale": scale,
            "kl_coef": kl_coef,
            "max_grad_norm": max_grad_norm,
            "token_budget": token_budget,
        }
        self.optimizer = torch.optim.AdamW(
            self.policy.model.parameters(), lr=learning_rate, eps=adam_eps, weight_decay=0.0
        )
        self._reference = copy.deepcopy(self.policy) if kl_coef else None
        self.num_timesteps = self.num_updates = 0
        self.log: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def learn(
        self, total_timesteps: int, callback: Callback | None = None, progress_bar: bool = False
    ) -> Self:
        """Learn from at least `total_timesteps` further turns (1 timestep = 1 turn).

        Raises:
            ValueError: without an environment, or if the model's context holds no reply at all.
        """
        if self.env is None:
            raise ValueError("This agent has no environment to learn in; set agent.env first.")
        goal = self.num_timesteps + total_timesteps
        with tqdm(total=total_timesteps, unit="turn", disable=not progress_bar) as bar:
            while self.num_timesteps < goal:
                batch = self.collect()
                if batch.num_turns == 0:
                    raise ValueError(
                        f"No dialogue leaves room for a reply in the context of "
                        f"{self.policy.name}: use a model with a longer context."
                    )
                advantage_BT = self.credited(batch)
                self._set_learning_rate((goal - self.num_timesteps) / total_timesteps)
                measured = self.update(batch, advantage_BT)
                self._record(batch, measured)
                bar.update(batch.num_turns)
                bar.set_postfix(reward=f"{self.log['rollout/turn_rew_mean']:.3f}")
                if callback is not None and callback(self) is False:
                    break
        return self

    def _set_learning_rate(self, remaining: float) -> None:
        """Set the step size when a share `remaining` in (0, 1] of the turns is still to come."""
        linear = self.settings["lr_schedule"] == "linear"
        share = max(0.05, remaining) if linear else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["learning_rate"] * share

    def collect(self) -> RolloutBatch:
        """Play one dialogue in every slot with the current policy; seeded by agent and update."""
        assert self.env is not None
        grouped = _has_groups(self.env)
        group_size = self.settings["group_size"]
        seed = int(np.random.SeedSequence([self.seed, self.num_updates]).generate_state(1)[0])
        return collect_rollouts(
            self.env,
            self.policy,
            seed=seed,
            options={"group_size": group_size} if grouped else None,
        )

    def credited(self, batch: RolloutBatch) -> np.ndarray:
        """Return advantage_BT: each turn's partial return minus its baseline."""
        num_turns = batch.reward_BT.shape[1]
        longest = max(num_turns, _max_turns(self.env))
        weight_TT = credit_weights(
            self.credit, longest, batch.boundaries, scale=self.settings["scale"]
        )[:num_turns, :num_turns]
        return_BT = partial_returns(batch.reward_BT, weight_TT, batch.alive_BT)
        return advantages(
            return_BT,
            baseline=self.settings["baseline"],
            group_B=batch.group_B,
            alive_BT=batch.alive_BT,
            scorable_BT=~np.isnan(batch.reward_BT),
        )

    def update(self, batch: RolloutBatch, advantage_BT: np.ndarray) -> dict[str, float]:
        """Take one gradient step; each dialogue is read once, as one sequence.

        Returns:
            policy loss, KL to the initial model (if asked for) and norm of the gradient.
        """
        assert batch.token_BL is not None and batch.length_B is not None
        started = time.perf_counter()
        num_episodes = len(batch.group_B)
        loss_sum = kl_sum = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for row_b in microbatches(batch.length_B, self.settings["token_budget"]):
            longest = int(batch.length_B[row_b].max())
            token_BL = torch.as_tensor(batch.token_BL[row_b, :longest], device=self.policy.device)
            turn_BL = torch.as_tensor(batch.turn_BL[row_b, :longest], device=self.policy.device)  # type: ignore[index]
            advantage_bT = torch.as_tensor(
                advantage_BT[row_b], dtype=torch.float32, device=self.policy.device
            )
            logprob_BL = self.policy.logprobs(token_BL, turn_BL)
            loss = policy_gradient_loss(
                logprob_BL, advantage_bT, turn_BL, num_episodes=num_episodes
            )
            loss_sum += loss.item()
            if self._reference is not None:
                with torch.no_grad():
                    reference_BL = self._reference.logprobs(token_BL, turn_BL)
                kl = kl_to_reference(
                    logprob_BL, reference_BL, turn_BL >= 0, num_episodes=num_episodes
                )
                kl_sum += kl.item()
                loss = loss + self.settings["kl_coef"] * kl
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.model.parameters(), self.settings["max_grad_norm"]
        )
        self.optimizer.step()
        measured = {
            "train/policy_loss": loss_sum,
            "train/grad_norm": float(norm),
            "time/update_seconds": time.perf_counter() - started,
        }
        return measured if self._reference is None else {**measured, "train/kl": kl_sum}

    def _record(self, batch: RolloutBatch, measured: dict[str, float]) -> None:
        self.num_updates += 1
        self.num_timesteps += batch.num_turns
        reward_BT = np.where(batch.alive_BT, batch.reward_BT, np.nan)
        seconds = batch.seconds + measured["time/update_seconds"]
        self.log = {
            "time/total_timesteps": self.num_timesteps,
            "rollout/ep_rew_mean": float(np.nansum(reward_BT, axis=1).mean()),
            "rollout/turn_rew_mean": _mean(reward_BT),
            "rollout/cut_rate": float(batch.cut_BT[batch.alive_BT].mean()),
            "judge/unscorable_rate": float(np.isnan(batch.reward_BT[batch.alive_BT]).mean()),
            **measured,
            "time/rollout_seconds": batch.seconds,
            "time/tokens_per_second": batch.num_tokens / seconds,
        }
        if "well_formed" in batch.part_BT:
            formed_BT = batch.part_BT["well_formed"][batch.alive_BT]
            self.log["judge/degenerate_rate"] = 1.0 - _mean(formed_BT)
        self.history.append(self.log)

    def predict(
        self, observation: Messages | Sequence[Messages], deterministic: bool = False
    ) -> tuple[Any, None]:
        """Return (line, None) for one observation, or (lines, None) for a sequence of them."""
        if observation and not isinstance(observation[0], dict):
            return self.policy.predict_batch(observation, deterministic), None  # type: ignore[arg-type]
        return self.policy.predict(observation, deterministic)  # type: ignore[arg-type]

    def begin(self, batch_size: int, rngs: Sequence[np.random.Generator]) -> Conversation:
        """Speak for many dialogues at once, as `collect_rollouts` and `evaluate_policy` ask for."""
        return self.policy.begin(batch_size, rngs)

    def save(self, path: str | Path) -> None:
        """Write model, tokenizer and settings to the folder `path`; weights as safetensors.

        transformers.AutoModelForCausalLM.from_pretrained(path) reads the model as it is.
        """
        folder = Path(path)
        self.policy.save(folder)
        record = {
            "credit": self.credit.matrix if isinstance(self.credit, Subset) else str(self.credit),
            "seed": self.seed,
            "num_timesteps": self.num_timesteps,
            "num_updates": self.num_updates,
            "max_new_tokens": self.policy.max_new_tokens,
            "temperature": self.policy.temperature,
            "settings": self.settings,
        }
        (folder / _SETTINGS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, path: str | Path, env: gym.vector.VectorEnv[Any, Any, Any] | None = None
    ) -> PPGAgent:
        """Return the agent saved in `path`; the optimizer starts afresh.

        With a KL coefficient, the model as saved is the reference from here on.

        Raises:
            FileNotFoundError: if the folder holds no saved agent.
        """
        file = Path(path) / _SETTINGS
        if not file.exists():
            raise FileNotFoundError(
                f"{path} holds no saved agent ({_SETTINGS} is missing); PPGAgent.save writes one. "
                "A plain Hugging Face model becomes an agent with PPGAgent(path, env, credit=...)."
            )
        record = json.loads(file.read_text(encoding="utf-8"))
        policy = LMPolicy.from_pretrained(
            path,
            max_new_tokens=record["max_new_tokens"],
            temperature=record["temperature"],
            seed=record["seed"],
        )
        credit = record["credit"]
        agent = PPGAgent(
            policy,
            env,
            credit if isinstance(credit, str) else Subset(credit),
            seed=record["seed"],
            **record["settings"],
        )
        agent.num_timesteps, agent.num_updates = record["num_timesteps"], record["num_updates"]
        return agent


class FullPlanningAgent(PPGAgent):
    """Every turn answers for all later rewards: the policy gradient."""

    def __init__(self, policy: str | Path | LMPolicy, env: Any, **settings: Any) -> None:
        super().__init__(policy, env, FullPlanning(), **settings)


class GreedyAgent(PPGAgent):
    """Every turn answers for its own reward only."""

    def __init__(self, policy: str | Path | LMPolicy, env: Any, **settings: Any) -> None:
        super().__init__(policy, env, Greedy(), **settings)


class KStepAgent(PPGAgent):
    """Every turn answers for its own and the next k - 1 rewards."""

    def __init__(self, policy: str | Path | LMPolicy, env: Any, k: int, **settings: Any) -> None:
        super().__init__(policy, env, KStep(k), **settings)


class SegmentAgent(PPGAgent):
    """Every turn answers for the rewards to the end of its segment (default: the env's phases)."""

    def __init__(
        self,
        policy: str | Path | LMPolicy,
        env: Any,
        length: int | None = None,
        boundaries: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        cuts = None if boundaries is None else tuple(boundaries)
        super().__init__(policy, env, Segment(length=length, boundaries=cuts), **settings)


def load_policy(
    policy: str | Path, max_new_tokens: int | None = None, seed: int | None = None
) -> LMPolicy:
    """Return the LMPolicy of "nano", or of the folder or name of a Hugging Face model.

    A saved agent speaks with its own longest line and temperature.

    Raises:
        ValueError: if there is no such model; says what there is and suggests the nearest.
    """
    check_model_name(policy)
    saved = Path(policy) / _SETTINGS
    if saved.exists():
        record = json.loads(saved.read_text(encoding="utf-8"))
        longest, temperature = record["max_new_tokens"], record["temperature"]
    else:
        longest, temperature = (32 if str(policy) == "nano" else 64), 1.0
    return LMPolicy.from_pretrained(
        NANO if str(policy) == "nano" else policy,
        max_new_tokens=longest if max_new_tokens is None else max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


def check_model_name(policy: str | Path) -> None:
    """Refuse what can be neither "nano" nor a folder nor a Hugging Face name; loads nothing.

    A slip such as "nanoo" is refused here: asking Hugging Face for it takes long, offline a minute.

    Raises:
        ValueError: says what there is and suggests the nearest.
    """
    name = str(policy)
    if name == "nano" or Path(policy).is_dir():
        return
    near = difflib.get_close_matches(name, ["nano"], n=1)
    is_path = isinstance(policy, Path) or name.count("/") > 1 or name.startswith((".", "/", "~"))
    if near or is_path or name.startswith("runs/"):
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown agent or model {name!r}.{hint} There are 'nano' (bundled), folders such as "
            "runs/train/agent (written by ppg train and PPGAgent.save; this one does not exist), "
            "and Hugging Face names such as 'org/model'."
        )


def _checked_env(env: Any, group_size: int, baseline: str) -> Any:
    if env is None:
        return None
    if not isinstance(env, gym.vector.VectorEnv):
        raise TypeError(
            f"env is a vector environment, got {type(env).__name__}; make one with "
            'gym.make_vec("PersonaDialogue-v0", num_envs=64, domain=...).'
        )
    if group_size < 1 or env.num_envs % group_size:
        raise ValueError(f"group_size must divide num_envs={env.num_envs}, got {group_size}.")
    if baseline == "leave_one_out" and env.num_envs == 1:
        raise ValueError(
            "A leave-one-out baseline needs peers: use an env with num_envs > 1 or baseline='none'."
        )
    return env


def _max_turns(env: gym.vector.VectorEnv[Any, Any, Any] | None) -> int:
    """Return how many turns a dialogue of `env` can have, 0 where it does not tell."""
    plain: Any = None if env is None else env.unwrapped
    if isinstance(plain, gym.vector.SyncVectorEnv):
        plain = plain.envs[0].unwrapped
    return int(getattr(plain, "max_turns", 0))


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is not NaN; NaN if nothing is."""
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if len(scored) else float("nan")


def _has_groups(env: gym.vector.VectorEnv[Any, Any, Any]) -> bool:
    """Return whether reset takes a group size; Gymnasium's own wrappers of N envs do not."""
    native = (gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv)
    return not isinstance(env.unwrapped, native)
