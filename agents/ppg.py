"""Partial policy gradients: agents that differ only in which rewards a turn answers for.

    envs = gym.make_vec("PersonaDialogue-v0", num_envs=64, domain="therapy")
    agent = KStepAgent("nano", envs, k=3, seed=0).learn(total_timesteps=10_000)

`learn` is the whole algorithm: collect dialogues with the current policy, credit rewards to turns,
one policy-gradient step. Under `accelerate launch` every process does so with its own slots and the
gradients are summed. Source: "Partial Policy Gradients for RL in LLMs", arXiv 2603.06138.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .conversation import Conversation
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
from .lm_policy import LMPolicy, Reference
from .loading import AGENT_SETTINGS, load_policy
from .losses import clip_fraction, clipped_loss, kl_to_reference, policy_gradient_loss
from .offline import LearnsOffline
from .optimization import Optimization, all_processes
from .policy import Messages
from .resume import Resumable
from .rollout import RolloutBatch, collect_rollouts, join_batches
from .scoring import Scores, microbatches
from .sharding import gathered_on_cpu, shard_layers, whole_layers
from .tape import Tape

Callback = Callable[["PPGAgent"], "bool | None"]
"""Called after every update with the agent; returning False stops learning."""


class DivergedError(RuntimeError):
    """Learning was stopped: too many gradients in a row were not finite or far too large."""

    def __init__(self, message: str, batch: RolloutBatch) -> None:
        super().__init__(message)
        self.batch = batch


@dataclass(frozen=True)
class MicroBatch:
    """s token sequences of one forward and backward pass, as tensors on the model's device."""

    token_sL: torch.Tensor
    turn_sL: torch.Tensor
    old_logprob_sL: torch.Tensor
    advantage_sT: torch.Tensor
    episode_s: np.ndarray
    """The dialogue of each sequence."""
    num_episodes: int
    """Dialogues of the whole gradient step, those of other processes included."""


class PPGAgent(Resumable, LearnsOffline):
    """Learns online with any credit matrix; learn, predict, save and load as in Stable-Baselines3.

    `checkpoint` and `restore`, from resume.py, let a run stop and go on.

    An update plays one dialogue in every slot of `env` and takes one step along

        (1/B) sum_b sum_t A[b,t] grad log pi(a_t | h_t),   A = partial return - leave-one-out
        baseline.

    With several epochs or minibatches it takes more steps, along the clipped objective of PPO with
    the same advantages.

    Args:
        policy: an LMPolicy, "nano" (the bundled model), or the folder or name of a Hugging Face
            model.
        env: a vector environment of dialogues, from gym.make_vec; None for acting only. Under
            `accelerate launch` each process has its own, all of one size.
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
        divide_by_std: divide advantages by their standard deviation, as GRPO does; see
            credit.advantages.
        n_epochs: passes over each batch of dialogues.
        batch_size: dialogues in a gradient step, in each process; None = all slots.
        clip_range: of the importance ratio, where a batch gives more than one step.
        ratio_level: "turn": one ratio an utterance; "token": one a token. See losses.clipped_loss.
        ent_coef: weight of the entropy of the agent's token distributions, summed over a dialogue.
        kl_coef: weight of the KL divergence to the initial model (with an adapter: to the model
            without it), 0 = none.
        max_grad_norm: the gradient's norm is clipped to it.
        skip_grad_norm: a gradient above this norm, or not finite, is skipped and counted.
        max_skips: so many skipped in a row stop learning.
        token_budget: tokens in one forward and backward pass, padding included.
        shard: spread layers, gradients and optimizer over all processes; see sharding.py. Speak
            and save inside `whole_model` or through this agent's methods, in all processes.
        seed: of dialogues and of the agent's sampling.

    Attributes:
        num_timesteps: turns learned from so far, over all processes.
        num_updates: batches of dialogues learned from so far.
        log: latest measurements, keys as in Stable-Baselines3 (docs/metrics.md).
        history: all of them, one dict an update.
        batch: the dialogues of the latest update, those of this process.
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
        divide_by_std: bool = False,
        n_epochs: int = 1,
        batch_size: int | None = None,
        clip_range: float = 0.2,
        ratio_level: str = "turn",
        ent_coef: float = 0.0,
        kl_coef: float = 0.0,
        max_grad_norm: float = 1.0,
        skip_grad_norm: float = 1e4,
        max_skips: int = 3,
        token_budget: int = 4096,
        shard: bool = False,
        seed: int | None = None,
    ) -> None:
        _refuse_unknown("lr_schedule", lr_schedule, ("constant", "linear"))
        _refuse_unknown("ratio_level", ratio_level, ("turn", "token"))
        _refuse_below_one(
            n_epochs=n_epochs, batch_size=batch_size, max_skips=max_skips, token_budget=token_budget
        )
        _refuse_unless(learning_rate >= 0, "learning_rate must not be negative", learning_rate)
        _refuse_unless(kl_coef >= 0, "kl_coef must not be negative", kl_coef)
        _refuse_unless(clip_range > 0, "clip_range must be positive", clip_range)
        _refuse_unless(max_grad_norm > 0, "max_grad_norm must be positive", max_grad_norm)
        _refuse_unless(skip_grad_norm > 0, "skip_grad_norm must be positive", skip_grad_norm)
        self.credit = parse_credit(credit) if isinstance(credit, str) else credit
        credit_weights(Greedy(), 1, scale=scale)  # refuse an unknown scale or baseline here
        advantages(np.zeros((2, 1)), baseline=baseline, group_B=np.zeros(2, dtype=int))
        self.env = _checked_env(env, group_size, baseline)
        self.processes = all_processes()
        self.seed = self._common_seed() if seed is None else seed
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
            "divide_by_std": divide_by_std,
            "n_epochs": n_epochs,
            "batch_size": batch_size,
            "clip_range": clip_range,
            "ratio_level": ratio_level,
            "ent_coef": ent_coef,
            "kl_coef": kl_coef,
            "max_grad_norm": max_grad_norm,
            "skip_grad_norm": skip_grad_norm,
            "max_skips": max_skips,
            "token_budget": token_budget,
        }
        self._reference = Reference(self.policy) if kl_coef else None
        self._layers = self._shard() if shard else []
        self.optimization = self._make_optimization()
        self._span = (0, 0)  # num_timesteps at the start and at the goal of `learn`
        self._skips_in_a_row = 0
        self.num_timesteps = self.num_updates = 0
        self.log: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.batch: RolloutBatch | None = None

    # -- the loop ----------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int | None = None,
        callback: Callback | None = None,
        progress_bar: bool = False,
    ) -> Self:
        """Learn from at least `total_timesteps` further turns (1 timestep = 1 turn).

        Args:
            total_timesteps: None goes on to the goal of the `learn` that a checkpoint interrupted.
            callback: called after every update.
            progress_bar: show one.

        Raises:
            ValueError: without an environment, if the model's context holds no reply at all, or if
                the policy samples from a restricted support.
            MemoryError: the device's memory is used up; says what to lower.
            DivergedError: `max_skips` gradients in a row were no use; holds the batch.
        """
        env = self._ready_to_learn()
        if total_timesteps is not None:
            self._span = (self.num_timesteps, self.num_timesteps + total_timesteps)
        start, goal = self._span
        if total_timesteps is None and goal == 0:
            raise ValueError("Say how much to learn: total_timesteps is needed for a new agent.")
        shown = progress_bar and self.processes.is_main_process
        with tqdm(
            total=goal - start,
            initial=self.num_timesteps - start,
            unit="turn",
            disable=not shown,
        ) as bar:
            while self.num_timesteps < goal:
                with self._memory_explained(env):
                    batch = self.collect()
                    advantage_BT = self.credited(batch)
                    self._set_learning_rate((goal - self.num_timesteps) / (goal - start))
                    measured = self.update(batch, advantage_BT)
                before = self.num_timesteps
                self._record(self._whole(batch), measured)
                self.batch = batch
                bar.update(self.num_timesteps - before)
                bar.set_postfix(reward=f"{self.log['rollout/turn_rew_mean']:.3f}")
                if callback is not None and callback(self) is False:
                    break
                self._stop_if_diverged(batch)
        return self

    def collect(self) -> RolloutBatch:
        """Play one dialogue in every slot with the current policy; seeded by agent and update.

        Raises:
            ValueError: if no dialogue of any process leaves room for a reply.
        """
        assert self.env is not None
        grouped = _has_groups(self.env)
        seed = int(np.random.SeedSequence([self.seed, self.num_updates]).generate_state(1)[0])
        with self.whole_model():
            batch = collect_rollouts(
                self.env,
                self.policy,
                seed=seed,
                options={"group_size": self.settings["group_size"]} if grouped else None,
                first_slot=self.processes.process_index * self.env.num_envs,
            )
        if self._whole(batch).num_turns == 0:
            raise ValueError(
                f"No dialogue leaves room for a reply in the context of {self.policy.name}: use a "
                "model with a longer context."
            )
        return batch

    def credited(self, batch: RolloutBatch) -> np.ndarray:
        """Return advantage_BT: each turn's partial return minus its baseline.

        Peers in other processes count as those in this one do.
        """
        whole = self._whole(batch)
        num_turns = whole.reward_BT.shape[1]
        longest = max(num_turns, _max_turns(self.env))
        weight_TT = credit_weights(
            self.credit, longest, whole.boundaries, scale=self.settings["scale"]
        )[:num_turns, :num_turns]
        return_BT = partial_returns(whole.reward_BT, weight_TT, whole.alive_BT)
        advantage_BT = advantages(
            return_BT,
            baseline=self.settings["baseline"],
            group_B=whole.group_B,
            alive_BT=whole.alive_BT,
            scorable_BT=~np.isnan(whole.reward_BT),
            divide_by_std=self.settings["divide_by_std"],
        )
        return self._own(advantage_BT, batch)

    def update(self, batch: RolloutBatch, advantage_BT: np.ndarray) -> dict[str, float]:
        """Learn from one batch; in each epoch every token sequence is read once.

        Returns:
            losses and gradient norm, means over the gradient steps.
        """
        started = time.perf_counter()
        sums: dict[str, float] = defaultdict(float)
        for epoch in range(self.settings["n_epochs"]):
            for dialogues in self._minibatches(len(batch.group_B), epoch):
                _add(sums, self._gradient_step(batch, advantage_BT, dialogues))
        if self.processes.num_processes > 1:
            sums = _added(gather_object([dict(sums)]))
        steps = sums.pop("steps")
        tokens, ratios = max(1, sums.pop("tokens", 0)), sums.pop("ratios", 0)
        measured = {
            "train/policy_loss": sums.get("policy_loss", 0.0) / steps,
            "train/grad_norm": sums["grad_norm"] / steps,
            "train/approx_kl": sums.get("approx_kl", 0.0) / tokens,
            "train/skipped_steps": float(self.optimization.num_skipped),
            "time/update_seconds": time.perf_counter() - started,
        }
        if not self._one_step_per_batch:
            measured["train/clip_fraction"] = sums.get("clipped", 0) / max(1, ratios)
        for name in ("kl", "entropy", "value_loss"):
            if name in sums:
                measured[f"train/{name}"] = sums[name] / steps
        return measured

    def _gradient_step(
        self, batch: RolloutBatch, advantage_BT: np.ndarray, dialogues: np.ndarray
    ) -> dict[str, float]:
        tape = batch.tape
        assert tape is not None
        processes = self.processes.num_processes
        sequences = np.flatnonzero(np.isin(tape.episode_S, dialogues))
        sums: dict[str, float] = defaultdict(float, steps=1 / processes)
        self.optimization.forget()
        parts = list(microbatches(tape.length_S[sequences], self.settings["token_budget"]))
        most = self._most(len(parts))
        if most and not parts:
            raise ValueError(
                "No dialogue of this process leaves room for a reply; sharded, all must have some."
            )
        for number in range(most):
            rows = sequences[parts[min(number, len(parts) - 1)]]
            micro = self._micro_batch(tape, rows, advantage_BT, len(dialogues) * processes)
            loss, measured = self.loss(micro)
            if number >= len(parts):  # keeps step with processes that have more to read
                self.optimization.backward(0.0 * loss)
                continue
            self.optimization.backward(loss)
            _add(sums, measured)
        step = self.optimization.step()
        sums["grad_norm"] += step.grad_norm / processes
        self._skips_in_a_row = self._skips_in_a_row + 1 if step.skipped else 0
        return sums

    def loss(self, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Return what is to be minimised on these sequences, and sums to report."""
        return self.loss_of(self.scores(micro), micro)

    def loss_of(self, scores: Scores, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of sequences that have been scored, and sums to report."""
        policy_loss = self._policy_loss(scores, micro)
        loss, spoken_sL = policy_loss, micro.turn_sL >= 0
        drift_sL = torch.where(spoken_sL, scores.logprob_SL - micro.old_logprob_sL, 0.0).detach()
        sums: dict[str, float] = {
            "policy_loss": policy_loss.item(),
            "approx_kl": (torch.expm1(drift_sL) - drift_sL).sum().item(),
            "tokens": int(spoken_sL.sum()),
        }
        if not self._one_step_per_batch:
            sums["clipped"], sums["ratios"] = clip_fraction(
                *self._ratio_inputs(scores, micro), **self._ratio_settings
            )
        if self._reference is not None:
            reference_sL = self._reference.logprobs(micro.token_sL, spoken_sL)
            kl = kl_to_reference(
                scores.logprob_SL, reference_sL, spoken_sL, num_episodes=micro.num_episodes
            )
            sums["kl"] = kl.item()
            loss = loss + self.settings["kl_coef"] * kl
        if scores.entropy_SL is not None:
            entropy = scores.entropy_SL.sum() / micro.num_episodes
            sums["entropy"] = entropy.item()
            loss = loss - self.settings["ent_coef"] * entropy
        return loss, sums

    def scores(self, micro: MicroBatch) -> Scores:
        """Return log-probabilities of the agent's tokens, and entropies if they have a weight."""
        return self.policy.scores(
            micro.token_sL, micro.turn_sL, entropy=self.settings["ent_coef"] != 0
        )

    def _policy_loss(self, scores: Scores, micro: MicroBatch) -> torch.Tensor:
        if self._one_step_per_batch:  # all ratios are 1
            return policy_gradient_loss(
                scores.logprob_SL,
                micro.advantage_sT,
                micro.turn_sL,
                num_episodes=micro.num_episodes,
            )
        return clipped_loss(
            *self._ratio_inputs(scores, micro),
            **self._ratio_settings,
            num_episodes=micro.num_episodes,
        )

    @staticmethod
    def _ratio_inputs(scores: Scores, micro: MicroBatch) -> tuple[torch.Tensor, ...]:
        return scores.logprob_SL, micro.old_logprob_sL, micro.turn_sL, micro.advantage_sT

    @property
    def _ratio_settings(self) -> dict[str, Any]:
        return {"clip_range": self.settings["clip_range"], "level": self.settings["ratio_level"]}

    @property
    def _one_step_per_batch(self) -> bool:
        return self.settings["n_epochs"] == 1 and self.settings["batch_size"] is None

    def _minibatches(self, num_dialogues: int, epoch: int) -> list[np.ndarray]:
        """Return the dialogues of each gradient step, shuffled where there are several steps."""
        size = self.settings["batch_size"] or num_dialogues
        if size >= num_dialogues:
            return [np.arange(num_dialogues)]
        shuffled = np.random.default_rng([self.seed, self.num_updates, epoch])
        return np.split(shuffled.permutation(num_dialogues), range(size, num_dialogues, size))

    def _micro_batch(
        self, tape: Tape, rows: np.ndarray, advantage_BT: np.ndarray, num_episodes: int
    ) -> MicroBatch:
        longest, device = int(tape.length_S[rows].max()), self.policy.device

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(array, device=device)

        return MicroBatch(
            token_sL=tensor(tape.token_SL[rows, :longest]),
            turn_sL=tensor(tape.turn_SL[rows, :longest]),
            old_logprob_sL=tensor(tape.old_logprob_SL[rows, :longest]),
            advantage_sT=tensor(advantage_BT[tape.episode_S[rows]].astype(np.float32)),
            episode_s=tape.episode_S[rows],
            num_episodes=num_episodes,
        )

    def _make_optimization(self) -> Optimization:
        return Optimization(
            [list(module.parameters()) for module in self._trained().values()],
            self._learning_rates(),
            adam_eps=self.settings["adam_eps"],
            max_grad_norm=self.settings["max_grad_norm"],
            skip_grad_norm=self.settings["skip_grad_norm"],
            processes=self.processes,
        )

    def _trained(self) -> dict[str, torch.nn.Module]:
        """Return all that learns, by name."""
        return {"model": self.policy.model}

    def _learning_rates(self) -> list[float]:
        """Return the learning rate of each of `_trained`."""
        return [self.settings["learning_rate"]]

    def _set_learning_rate(self, remaining: float) -> None:
        """Set the step size when a share `remaining` in (0, 1] of the turns is still to come."""
        linear = self.settings["lr_schedule"] == "linear"
        self.optimization.scale_learning_rates(max(0.05, remaining) if linear else 1.0)

    def _ready_to_learn(self) -> gym.vector.VectorEnv[Any, Any, Any]:
        if self.env is None:
            raise ValueError("This agent has no environment to learn in; set agent.env first.")
        if not self.policy.sampler.full_support:
            raise ValueError(
                f"This policy samples with top_k={self.policy.sampler.top_k} and "
                f"top_p={self.policy.sampler.top_p}, so what it says does not come from the "
                "softmax that training differentiates; learn with top_k=0, top_p=1 and restrict "
                "sampling afterwards."
            )
        return self.env

    # -- several processes -------------------------------------------------------------------------

    def _whole(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the dialogues of all processes; of several, without tokens and texts."""
        if self.processes.num_processes == 1:
            return batch
        batches = gather_object([replace(batch, tape=None, transcripts=[])])
        sizes = [len(each.group_B) for each in batches]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"The processes have {sizes} slots; give each an env of the same num_envs."
            )
        return join_batches(batches)

    def _common_seed(self) -> int:
        """Return a seed of chance, the first process's for all."""
        return int(gather_object([int(np.random.SeedSequence().generate_state(1)[0])])[0])

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Put a sharded model together on every device, to speak or to look at; else do nothing."""
        with whole_layers(self._layers):
            yield

    def _shard(self) -> list[Any]:
        """Shard the model and its reference; what is probed once is probed before."""
        network = self.policy.network
        _ = network.split, network.serves_cache
        layers = shard_layers(network.model, self.processes.num_processes)
        if self._reference is not None and not self.policy.has_adapter:
            _ = self._reference.network.split
            shard_layers(self._reference.network.model, self.processes.num_processes)
        return layers

    def _most(self, number: int) -> int:
        """Return the largest such number of all processes where they must keep step, else this."""
        return max(gather_object([number])) if self._layers else number

    def _own(self, value_BT: np.ndarray, batch: RolloutBatch) -> np.ndarray:
        """Return this process's part of an array over all dialogues."""
        size = len(batch.group_B)
        first = self.processes.process_index * size
        return value_BT[first : first + size, : batch.reward_BT.shape[1]]

    # -- when something goes wrong -----------------------------------------------------------------

    @contextmanager
    def _memory_explained(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            known = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not known and "can't allocate memory" not in str(error):
                raise
            what = (str(error) or type(error).__name__).splitlines()[0]
            raise MemoryError(
                f"Out of memory on {self.policy.device} in update {self.num_updates + 1} "
                f"({what}). In this order: lower token_budget (now "
                f"{self.settings['token_budget']}), turn gradient_checkpointing on, train a LoRA "
                f"adapter (lora_rank), use fewer slots (num_envs, now {env.num_envs}) or shorter "
                f"lines (max_new_tokens, now {self.policy.max_new_tokens}). The last checkpoint, "
                "if there is one, is untouched."
            ) from error

    def _stop_if_diverged(self, batch: RolloutBatch) -> None:
        if self._skips_in_a_row < self.settings["max_skips"]:
            return
        raise DivergedError(
            f"{self._skips_in_a_row} gradients in a row were not finite or larger than "
            f"skip_grad_norm={self.settings['skip_grad_norm']:g} (last norm "
            f"{self.log['train/grad_norm']:g}, update {self.num_updates}). Lower learning_rate "
            f"(now {self.settings['learning_rate']:g}), use dtype float32, or look at the rewards "
            "of the batch.",
            batch,
        )

    # -- reports -----------------------------------------------------------------------------------

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
            "rollout/overflow_rate": float(batch.overflow_B.mean()),
            "judge/unscorable_rate": batch.unscorable_rate,
            **measured,
            "time/rollout_seconds": batch.seconds,
            "time/tokens_per_second": batch.num_tokens / seconds,
        }
        if "well_formed" in batch.part_BT:
            formed_BT = batch.part_BT["well_formed"][batch.alive_BT]
            self.log["judge/degenerate_rate"] = 1.0 - _mean(formed_BT)
        if "parsed" in batch.part_BT:
            self.log["judge/parse_rate"] = _mean(batch.part_BT["parsed"][batch.alive_BT])
        self.history.append(self.log)

    # -- acting ------------------------------------------------------------------------------------

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

    # -- the trained agent on disk -----------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write model, tokenizer and settings to the folder `path`; weights as safetensors.

        transformers.AutoModelForCausalLM.from_pretrained(path) reads the model as it is, peft an
        adapter. Under `accelerate launch` only the first process writes.
        """
        weights = None
        if self._layers:
            weights = gathered_on_cpu(
                self.policy.model.state_dict(), self.processes.is_main_process
            )
        if not self.processes.is_main_process:
            return
        folder = Path(path)
        self.policy.save(folder, weights)
        record = {
            **self._origin(),
            "num_timesteps": self.num_timesteps,
            "num_updates": self.num_updates,
        }
        (folder / AGENT_SETTINGS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, path: str | Path, env: gym.vector.VectorEnv[Any, Any, Any] | None = None
    ) -> PPGAgent:
        """Return the agent saved in `path`; the optimizer starts afresh.

        It is a PPGAgent also if it was saved by a named class: that is a PPGAgent with a credit.
        With a KL coefficient, the model as saved is the reference from here on; with an adapter, as
        ever, the model without it.

        Raises:
            FileNotFoundError: if the folder holds no saved agent.
            ValueError: if it holds an agent of another kind.
        """
        record = read_agent_settings(path, _kind_of(cls))
        credit = record["credit"]
        agent = PPGAgent(
            load_policy(path, seed=record["seed"]),
            env,
            credit if isinstance(credit, str) else Subset(credit),
            seed=record["seed"],
            **record["settings"],
        )
        agent.num_timesteps, agent.num_updates = record["num_timesteps"], record["num_updates"]
        return agent

    def _origin(self) -> dict[str, Any]:
        """Return what makes this agent this agent, as JSON."""
        credit = self.credit.matrix if isinstance(self.credit, Subset) else str(self.credit)
        return {
            "agent": _kind_of(type(self)),
            "credit": credit,
            "seed": self.seed,
            "max_new_tokens": self.policy.max_new_tokens,
            "temperature": self.policy.temperature,
            "settings": self.settings,
            **({"sharded": True} if self._layers else {}),
        }


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


def read_agent_settings(path: str | Path, kind: str) -> dict[str, Any]:
    """Return the settings of a saved agent of this kind.

    Raises:
        FileNotFoundError: if the folder holds no saved agent.
        ValueError: if it holds an agent of another kind.
    """
    file = Path(path) / AGENT_SETTINGS
    if not file.exists():
        raise FileNotFoundError(
            f"{path} holds no saved agent ({AGENT_SETTINGS} is missing); {kind}.save writes one. A "
            f"plain Hugging Face model becomes an agent with {kind}(path, env, ...)."
        )
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if record["agent"] != kind:
        raise ValueError(f"{path} holds a {record['agent']}; load it with {record['agent']}.load.")
    return record


def _kind_of(agent: type) -> str:
    """Return the class that loads the agent: the named ones are a PPGAgent with a credit."""
    own = [cls.__name__ for cls in agent.__mro__ if "load" in vars(cls)]
    return own[0]


def _refuse_unknown(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {' or '.join(map(repr, known))}, got {value!r}.")


def _refuse_unless(right: bool, rule: str, value: float) -> None:
    if not right:
        raise ValueError(f"{rule}, got {value}.")


def _refuse_below_one(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        _add(total, part)
    return total


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
