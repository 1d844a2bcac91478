"""Learning from logged dialogues: the same credits, the same gradient step, no environment.

    agent = KStepAgent("nano", env=None, k=3, seed=0)
    agent.learn_offline("logs.jsonl.gz", epochs=3, validation="held_out.jsonl.gz")

    maximise  (1/B) sum_b sum_t w[b,t] log pi(a_t | h_t),   w = partial return of the logged rewards

That is the policy gradient only where the policy that learns is the one that spoke. With rewards in
[0, 1] it is a lower bound of the return up to constants; weights below 0 make it unbounded, so they
are clipped or need an anchor. Where the log tells how likely a line was, the weight of a turn can
be multiplied with the importance ratio pi_now(a_t|h_t) / pi_then(a_t|h_t), clipped; it corrects for
the turn itself and not for the turns that led to it.
"""

from __future__ import annotations

import copy
import difflib
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from gymnasium.vector import SyncVectorEnv
from tqdm.auto import tqdm

from .credit import Credit, advantages, credit_weights, partial_returns
from .lm_policy import LMPolicy, Reference
from .logs import LogError, Trajectory, read_log, refuse_leaks
from .losses import kl_to_reference, policy_gradient_loss, turn_logprobs
from .optimization import Optimization, Step
from .reading import read_dialogues, usable_ids
from .rollout import RolloutBatch
from .scoring import microbatches
from .tape import Tape

Log = str | Path | Sequence[Trajectory]
"""A file of agents.logs, read anew in every epoch, or trajectories in memory."""


@dataclass(frozen=True)
class OfflineSettings:
    """How to learn from logs."""

    method: Literal["ppg", "sft", "filtered"] = "ppg"
    """Weights: "ppg" partial returns; "sft" 1 for every line; "filtered" 1 for the lines of the
    best dialogues, else 0 (filtered behaviour cloning)."""
    epochs: int = 1
    """Passes over the log."""
    max_steps: int | None = None
    """Gradient steps after which learning ends, in the midst of an epoch if need be; the learning
    rate's schedule ends with them. None = those of all epochs."""
    batch_size: int = 32
    """Dialogues in a gradient step, over all processes."""
    baseline: str = "none"
    """Subtracted from partial returns: "none", "log_mean" (of each turn, over the log), or over the
    gradient step "batch_mean", "leave_one_out", "group_mean". With the last two, dialogues of a
    group that follow each other in the log stay together; let groups divide batch_size."""
    min_weight: float | None = 0.0
    """Smaller weights are raised to it; None, or a number below 0, leaves negative ones, which need
    an anchor."""
    max_weight: float | None = None
    """Larger weights are lowered to it; None = none are."""
    importance: bool = False
    """Multiply weights with importance ratios; needs logged log-probabilities."""
    max_importance: float = 5.0
    """Larger ratios are lowered to it."""
    min_ess: float = 0.1
    """Warn once when the effective sample size falls below this share of a step's turns."""
    sft_coef: float = 0.0
    """Weight of the plain log-likelihood of all logged lines: an anchor, where no weight is more
    negative than this is positive."""
    top_share: float = 0.25
    """Of the dialogues with a score, by mean reward, that "filtered" imitates; rounded up, and all
    that are as good as the last of them."""
    patience: int | None = None
    """Epochs without a better validation loss after which learning stops; None = all epochs."""
    shuffle: int = 1024
    """Dialogues in memory from which the next one is drawn; 0 = the log's order."""
    tokenise_again: bool = False
    """Use texts where logged ids belong to another tokenizer, instead of refusing."""

    def __post_init__(self) -> None:
        if self.method not in ("ppg", "sft", "filtered"):
            raise ValueError(f"method is 'ppg', 'sft' or 'filtered', got {self.method!r}.")
        known = ("none", "log_mean", "batch_mean", "leave_one_out", "group_mean")
        if self.baseline not in known:
            raise ValueError(f"Unknown baseline {self.baseline!r}; there are {', '.join(known)}.")
        whole = {"epochs": 1, "batch_size": 1, "max_steps": 1, "patience": 1, "shuffle": 0}
        for name, least in whole.items():
            number = getattr(self, name)
            if number is None and name in ("max_steps", "patience"):
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, got {number!r}."
                )
        low = -math.inf if self.min_weight is None else self.min_weight
        high = math.inf if self.max_weight is None else self.max_weight
        if not low <= high:
            raise ValueError(
                "min_weight must not be above max_weight, got "
                f"{self.min_weight} and {self.max_weight}."
            )
        if not 0 < self.top_share <= 1 or not 0 <= self.min_ess <= 1:
            raise ValueError(
                f"top_share and min_ess are shares, got {self.top_share} and {self.min_ess}."
            )
        if not self.max_importance > 0 or not self.sft_coef >= 0:
            raise ValueError(
                "max_importance must be positive and sft_coef not negative, got "
                f"{self.max_importance} and {self.sft_coef}."
            )


@dataclass(frozen=True)
class _Best:
    """The epoch with the lowest validation loss, and what it left."""

    epoch: int
    loss: float
    weights: dict[str, torch.Tensor]
    optimizer: tuple[dict[str, torch.Tensor], dict[str, Any]]


class LearnsOffline(ABC):
    """Gives an agent `learn_offline`."""

    policy: LMPolicy
    credit: Credit
    settings: dict[str, Any]
    seed: int
    processes: PartialState
    optimization: Optimization
    num_timesteps: int
    num_updates: int
    log: dict[str, float]
    history: list[dict[str, float]]
    env: Any
    _reference: Reference | None
    _layers: list[Any]
    _skips_in_a_row: int

    @abstractmethod
    def _set_learning_rate(self, remaining: float) -> None:
        """Set the step size when a share `remaining` of learning is still to come."""

    @abstractmethod
    def _most(self, number: int) -> int:
        """Return the largest such number of all processes where they must keep step."""

    @abstractmethod
    def _stop_if_diverged(self, batch: RolloutBatch) -> None:
        """Raise if too many gradients in a row were no use; the error holds the batch."""

    def check_offline(self, log: Log, validation: Log | None = None, **settings: Any) -> None:
        """Check that `learn_offline` can learn from a log; reads it once and changes nothing.

        Raises:
            LogError, TypeError, ValueError: as `learn_offline`.
        """
        self._checked(log, validation, settings)

    def learn_offline(
        self,
        log: Log,
        *,
        validation: Log | None = None,
        callback: Callable[[Any], bool | None] | None = None,
        progress_bar: bool = False,
        **settings: Any,
    ) -> Self:
        """Learn from logged dialogues with this agent's credit.

        Every gradient step appends a row to `history`; the last of an epoch also has
        `offline/validation_loss`. With `patience` the weights of the best epoch are kept. Of the
        agent's own settings count those of the gradient step (learning_rate, lr_schedule, kl_coef,
        max_grad_norm, skip_grad_norm, max_skips, token_budget) and `scale`; the others are about
        playing.

        Args:
            log: a log file (streamed: it may be larger than memory) or trajectories.
            validation: of other personas; checked for leaks.
            callback: called after every gradient step; returning False stops.
            progress_bar: show one.
            settings: fields of OfflineSettings.

        Raises:
            LogError: the log cannot be used, or shares personas or dialogues with `validation`.
            TypeError: an unknown setting, or a log that can be read only once.
            ValueError: settings that do not fit each other or the log.
            DivergedError: `max_skips` gradients in a row were no use; holds the batch.
        """
        how, facts, watched = self._checked(log, validation, settings)
        best: _Best | None = None
        steps_an_epoch = -(-facts.num_dialogues // how.batch_size)
        steps, done, going_on = how.epochs * steps_an_epoch, 0, True
        steps = steps if how.max_steps is None else min(steps, how.max_steps)
        shown = progress_bar and self.processes.is_main_process
        with tqdm(total=steps, unit="step", disable=not shown) as bar:
            for epoch in range(how.epochs):
                dropped = 1.0
                for batch in _batches(_in_order(log, how, [self.seed, epoch]), how.batch_size):
                    self._set_learning_rate(1.0 - done / steps)
                    read, tape = self._offline_step(batch, how, facts, epoch)
                    done += 1
                    dropped = min(dropped, self.log["offline/dropped_turns"])
                    if done % steps_an_epoch == 0:
                        self._refuse_unread(dropped)
                        if validation is not None and watched is not None:
                            self.log["offline/validation_loss"] = self._loss(
                                validation, how, watched
                            )
                        if how.patience is not None:
                            best = self._better(best, self.log["offline/validation_loss"], epoch)
                    bar.update()
                    bar.set_postfix(loss=f"{self.log['train/policy_loss']:.3f}")
                    going_on = callback is None or callback(self) is not False
                    going_on = going_on and done < steps
                    if not going_on:
                        break
                    if self._skips_in_a_row >= self.settings["max_skips"]:
                        self._stop_if_diverged(_as_rollouts(read, tape, facts.num_turns))
                if best is not None and how.patience is not None:
                    going_on = going_on and epoch - best.epoch < how.patience
                if not going_on:
                    break
        if best is not None:
            self._go_back(best)
        return self

    def _checked(
        self, log: Log, validation: Log | None, settings: dict[str, Any]
    ) -> tuple[OfflineSettings, _Facts, _Facts | None]:
        """Return the settings and what the logs told; refuse what cannot be learned from."""
        how = _settings(settings)
        facts = self._survey(log, how)
        watched = None if validation is None else self._survey(validation, how)
        self._refuse_unusable(how, facts, watched)
        if validation is not None:
            refuse_leaks(_stream(log), _stream(validation))
        return how, facts, watched

    def _better(self, best: _Best | None, loss: float, epoch: int) -> _Best:
        """Return the best epoch so far, with the weights it left."""
        loss = math.inf if math.isnan(loss) else loss
        if best is not None and loss >= best.loss:
            return best
        weights = {name: value.detach().clone() for name, value in self._learned().items()}
        tensors, numbers = self.optimization.state()
        masters = {name: value.detach().clone() for name, value in tensors.items()}
        return _Best(epoch, loss, weights, (masters, copy.deepcopy(numbers)))

    @torch.no_grad()
    def _go_back(self, best: _Best) -> None:
        for name, value in self._learned().items():
            value.copy_(best.weights[name])
        self.optimization.restore(*best.optimizer)

    def offline_loss(self, log: Log, how: OfflineSettings | None = None) -> float:
        """Return -(1/B) sum_b sum_t w[b,t] log pi(a_t|h_t) of a log, without baseline and anchor.

        Args:
            log: whose dialogues; all processes read all of them.
            how: the method, and how weights are clipped.
        """
        how = how or OfflineSettings()
        return self._loss(log, how, self._survey(log, how))

    @torch.no_grad()
    def _loss(self, log: Log, how: OfflineSettings, facts: _Facts) -> float:
        """Return the loss of a log that has been surveyed."""
        total, number = 0.0, 0
        for batch in _batches(_stream(log), how.batch_size):
            weight_BT = self._offline_weights(batch, how, facts, baseline=False)
            tape = read_dialogues(self.policy, batch, how.tokenise_again)
            for rows in microbatches(tape.length_S, self.settings["token_budget"]):
                token_sL, turn_sL = self._tensors(tape, rows, tape.token_SL, tape.turn_SL)
                total += policy_gradient_loss(
                    self.policy.scores(token_sL, turn_sL).logprob_SL,
                    _tensor(weight_BT[tape.episode_S[rows]], self.policy),
                    turn_sL,
                    num_episodes=1,
                ).item()
            number += len(batch)
        return total / number

    def _offline_step(
        self, batch: Sequence[Trajectory], how: OfflineSettings, facts: _Facts, epoch: int
    ) -> tuple[list[Trajectory], Tape]:
        """Take one gradient step along these dialogues; return the share that was read here."""
        started = time.perf_counter()
        weight_BT = self._offline_weights(batch, how, facts)
        share = range(self.processes.process_index, len(batch), self.processes.num_processes)
        # Sharded, all have to read something: without a share of its own one reads for nothing.
        mine = list(share) or ([0] if self._layers else [])
        read = [batch[b] for b in mine]
        tape = read_dialogues(self.policy, read, how.tokenise_again)
        sums: dict[str, float] = defaultdict(float)
        log_ratios: list[float] = []
        self.optimization.forget()
        parts = list(microbatches(tape.length_S, self.settings["token_budget"]))
        most = self._most(len(parts))
        if most and not parts:
            raise ValueError(
                "No dialogue of this process fits the model's context; sharded, some must."
            )
        for number in range(most):
            rows = parts[min(number, len(parts) - 1)]
            loss, measured, ratios = self._offline_rows(
                tape, rows, weight_BT[mine], how, len(batch)
            )
            if number >= len(parts) or not len(share):
                self.optimization.backward(0.0 * loss)
                continue
            self.optimization.backward(loss)
            log_ratios += ratios
            for name, value in measured.items():
                sums[name] += value
        if self.processes.num_processes > 1:
            everybody = gather_object([dict(sums)])
            names = {name for each in everybody for name in each}
            added = {name: sum(each.get(name, 0.0) for each in everybody) for name in names}
            sums = defaultdict(float, added)
            log_ratios = gather_object(log_ratios)
        # Without a line to learn from the optimizer would go on by its momentum.
        step = self.optimization.step() if sums["turns"] else Step(0.0, skipped=False)
        self._skips_in_a_row = self._skips_in_a_row + 1 if step.skipped else 0

        self.num_updates += 1
        turns = sum(trajectory.num_turns for trajectory in batch)
        self.num_timesteps += turns
        seconds = time.perf_counter() - started
        self.log = {
            "time/total_timesteps": self.num_timesteps,
            "train/policy_loss": sums["policy_loss"],
            "train/grad_norm": step.grad_norm,
            "train/skipped_steps": float(self.optimization.num_skipped),
            "offline/epoch": epoch + 1,
            "offline/weight_mean": float(weight_BT.sum()) / turns,
            "offline/dropped_turns": 1.0 - sums["turns"] / turns,
            "time/update_seconds": seconds,
            "time/tokens_per_second": sums["tokens"] / seconds,
        }
        if self._reference is not None:
            self.log["train/kl"] = sums["kl"]
        if how.sft_coef:
            self.log["train/sft_loss"] = sums["sft_loss"]
        if how.importance:
            self.log["offline/ess"] = effective_share(log_ratios)
            self._warn_of_collapse(self.log["offline/ess"], how)
        self.history.append(self.log)
        return read, tape

    def _offline_rows(
        self,
        tape: Tape,
        rows: np.ndarray,
        weight_BT: np.ndarray,
        how: OfflineSettings,
        num_episodes: int,
    ) -> tuple[torch.Tensor, dict[str, float], list[float]]:
        """Return the loss of some token sequences, sums to report, their turns' log-ratios."""
        token_sL, turn_sL, old_sL = self._tensors(
            tape, rows, tape.token_SL, tape.turn_SL, tape.old_logprob_SL
        )
        weight_sT = _tensor(weight_BT[tape.episode_S[rows]], self.policy)
        logprob_sL, spoken_sL = self.policy.scores(token_sL, turn_sL).logprob_SL, turn_sL >= 0
        num_turns, log_ratios = weight_sT.shape[1], list[float]()
        spoken_sT = turn_logprobs(spoken_sL.to(logprob_sL.dtype), turn_sL, num_turns) > 0
        sums = {"tokens": float(tape.length_S[rows].sum()), "turns": float(spoken_sT.sum())}
        if how.importance:
            change_sL = torch.where(spoken_sL, logprob_sL.detach() - old_sL, 0.0)
            log_ratio_sT = turn_logprobs(change_sL, turn_sL, num_turns)
            log_ratios = log_ratio_sT[spoken_sT].tolist()
            ratio_sT = log_ratio_sT.clamp(max=math.log(how.max_importance)).exp()
            weight_sT = weight_sT * ratio_sT
        loss = policy_gradient_loss(logprob_sL, weight_sT, turn_sL, num_episodes=num_episodes)
        sums["policy_loss"] = loss.item()
        if how.sft_coef:
            ones_sT = torch.ones_like(weight_sT)
            sft = policy_gradient_loss(logprob_sL, ones_sT, turn_sL, num_episodes=num_episodes)
            sums["sft_loss"] = sft.item()
            loss = loss + how.sft_coef * sft
        if self._reference is not None:
            reference_sL = self._reference.logprobs(token_sL, spoken_sL)
            kl = kl_to_reference(logprob_sL, reference_sL, spoken_sL, num_episodes=num_episodes)
            sums["kl"] = kl.item()
            loss = loss + self.settings["kl_coef"] * kl
        return loss, sums, log_ratios

    def _tensors(self, tape: Tape, rows: np.ndarray, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Return these rows up to the longest, on the model's device."""
        longest = int(tape.length_S[rows].max())
        return [torch.as_tensor(a[rows, :longest], device=self.policy.device) for a in arrays]

    # -- weights -----------------------------------------------------------------------------------

    def _weights_of(self, num_turns: int) -> np.ndarray:
        """Return the credit's matrix for dialogues of so many turns, scaled as online."""
        plain = None if self.env is None else self.env.unwrapped
        if isinstance(plain, SyncVectorEnv):
            plain = plain.envs[0].unwrapped
        longest = max(num_turns, int(getattr(plain, "max_turns", 0)))
        phases = getattr(plain, "phase_boundaries", None)
        return credit_weights(self.credit, longest, phases, scale=self.settings["scale"])[
            :num_turns, :num_turns
        ]

    def _offline_weights(
        self,
        batch: Sequence[Trajectory],
        how: OfflineSettings,
        facts: _Facts,
        baseline: bool = True,
    ) -> np.ndarray:
        """Return weight_BT, 0 for turns that did not take place or that nobody could score."""
        reward_BT, alive_BT = _rewards(batch, facts.num_turns)
        scorable_BT = ~np.isnan(reward_BT)
        if how.method != "ppg":
            chosen_BT = alive_BT
            if how.method == "filtered":
                means = np.array([_mean_reward(trajectory) for trajectory in batch])
                chosen_BT = alive_BT & (means >= facts.threshold)[:, None]
            return chosen_BT.astype(np.float64)
        return_BT = partial_returns(reward_BT, facts.weight_TT, alive_BT)
        name = how.baseline if baseline else "none"
        if name == "log_mean":
            return_BT, name = return_BT - facts.mean_return_T, "none"
        weight_BT = advantages(
            return_BT,
            baseline=name,
            group_B=_group_numbers(batch),
            alive_BT=alive_BT,
            scorable_BT=scorable_BT,
        )
        clipped_BT = (
            np.clip(weight_BT, how.min_weight, how.max_weight)
            if (how.min_weight is not None or how.max_weight is not None)
            else weight_BT
        )
        return np.where(alive_BT & scorable_BT, clipped_BT, 0.0)

    def _survey(self, log: Log, how: OfflineSettings) -> _Facts:
        """Read the log once; what is kept of a dialogue is a few numbers."""
        rewards: list[np.ndarray] = []
        domains: set[str] = set()
        groups: dict[tuple[str, Any], int] = defaultdict(int)
        without_logprobs = None
        for number, trajectory in enumerate(_stream(log)):
            if not isinstance(trajectory, Trajectory):
                raise TypeError(
                    f"A log holds what agents.logs reads, got a {type(trajectory).__name__}; make "
                    "it with parse_trajectory, those of a dataset with from_dataset."
                )
            ids = usable_ids(self.policy, trajectory, how.tokenise_again)
            rewards.append(trajectory.reward_T.astype(np.float32))
            domains.add(trajectory.domain)
            groups[_group_key(number, trajectory)] += 1
            if without_logprobs is None and (ids is None or trajectory.logprobs is None):
                without_logprobs = trajectory.persona
        if not rewards:
            raise LogError("The log holds no trajectories.")
        num_turns = max(map(len, rewards))
        weight_TT = self._weights_of(num_turns)
        scored = np.concatenate(rewards)
        mean_return_T, lowest_weight = _bounds(rewards, weight_TT, how.baseline)
        return _Facts(
            num_dialogues=len(rewards),
            num_turns=num_turns,
            num_scored=int((~np.isnan(scored)).sum()),
            domains=frozenset(domains - {""}),
            has_groups=any(number > 1 for number in groups.values()),
            without_logprobs=without_logprobs,
            weight_TT=weight_TT,
            mean_return_T=mean_return_T,
            lowest_weight=lowest_weight,
            threshold=_threshold(rewards, how.top_share),
        )

    def _refuse_unusable(self, how: OfflineSettings, facts: _Facts, watched: _Facts | None) -> None:
        """Refuse what cannot be learned from, before anything is; `watched`: validation data."""
        domains = facts.domains | (watched.domains if watched is not None else frozenset())
        if len(domains) > 1:
            raise LogError(
                f"The logs mix the domains {', '.join(sorted(domains))}; learn from one, or "
                "write a log of each."
            )
        for which, found in (("log", facts), ("validation log", watched)):
            if found is not None and found.num_scored == 0 and how.method != "sft":
                raise LogError(
                    f"No turn of the {which} has a reward; score it first (ppg rejudge), or "
                    "imitate it with method='sft'."
                )
        if how.importance and facts.without_logprobs is not None:
            raise LogError(
                f"importance=True needs logged log-probabilities, and a dialogue of persona "
                f"{facts.without_logprobs!r} has none; learn without, or log them (ppg train does)."
            )
        if how.patience is not None and (watched is None or self._layers):
            raise ValueError(
                f"patience={how.patience} needs validation data to watch, and a model that is not "
                "sharded."
            )
        if how.baseline in ("leave_one_out", "group_mean") and not facts.has_groups:
            raise LogError(
                f"baseline={how.baseline!r} needs several dialogues a group, and the log has none; "
                "use 'batch_mean' or 'log_mean'."
            )
        self._refuse_unanchored(how, facts.lowest_weight)

    def _refuse_unanchored(self, how: OfflineSettings, lowest: float) -> None:
        if how.min_weight is not None:
            lowest = max(lowest, how.min_weight)
        anchored = self._reference is not None or how.sft_coef >= -lowest - 1e-6
        if how.method == "ppg" and not anchored:
            raise ValueError(
                f"min_weight={how.min_weight} leaves weights down to {lowest:.3g}, and a "
                "negatively weighted likelihood has no bound: the model would be driven to say "
                "anything else. Anchor it with kl_coef, or with an sft_coef that outweighs them "
                f"(now {how.sft_coef:g}), or clip weights with min_weight=0."
            )

    def _refuse_unread(self, dropped: float) -> None:
        if dropped < 1.0:
            return
        raise LogError(
            f"No line of the log fits the context of {self.policy.name} "
            f"({self.policy.network.context_length} tokens): use a model with a longer context."
        )

    def _warn_of_collapse(self, share: float, how: OfflineSettings) -> None:
        if share >= how.min_ess or any("offline/ess_warned" in row for row in self.history):
            return
        self.log["offline/ess_warned"] = 1.0
        warnings.warn(
            f"The effective sample size of the importance weights fell to {share:.1%} of the "
            f"turns (update {self.num_updates}): few of them carry the gradient, because the "
            "policy has moved away from the one that spoke. Learn for fewer epochs, lower the "
            "learning rate or max_importance, or anchor with kl_coef.",
            stacklevel=3,
        )

    def _learned(self) -> dict[str, torch.Tensor]:
        """Return the parameters that learn, by name."""
        parameters = self.policy.model.named_parameters()
        return {name: value for name, value in parameters if value.requires_grad}


def effective_share(log_ratios: Sequence[float]) -> float:
    """Return the effective sample size of importance ratios as a share of their number.

        (sum w)^2 / sum w^2 / n,   1 if all are alike, 1/n if one outweighs all others

    Source: Kong, A note on importance sampling using standardized weights, 1992.
    """
    if not len(log_ratios):
        return 1.0
    log_N = np.asarray(log_ratios, dtype=np.float64)
    ratio_N = np.exp(log_N - log_N.max())
    return float(ratio_N.sum() ** 2 / (ratio_N**2).sum() / len(ratio_N))


# ---- the log, one pass at a time -----------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What one pass over the log tells."""

    num_dialogues: int
    num_turns: int
    """Agent turns of the longest dialogue: T."""
    num_scored: int
    """Turns with a reward."""
    domains: frozenset[str]
    """Those that are told."""
    has_groups: bool
    without_logprobs: str | None
    """Persona of a dialogue whose log-probabilities are not known; None if all are."""
    weight_TT: np.ndarray
    mean_return_T: np.ndarray
    lowest_weight: float
    """The most negative weight that a turn can get, 0 if none can, before weights are clipped."""
    threshold: float
    """Mean reward that the best dialogues reach, for filtered behaviour cloning."""


def _bounds(
    rewards: Sequence[np.ndarray], weight_TT: np.ndarray, baseline: str
) -> tuple[np.ndarray, float]:
    """Return (mean partial return of each turn over the log, the lowest weight that can come)."""
    num_turns = len(weight_TT)
    total_T, count_T = np.zeros(num_turns), np.zeros(num_turns)
    low_T, high_T = np.full(num_turns, np.inf), np.full(num_turns, -np.inf)
    for reward_T in rewards:
        t = len(reward_T)
        return_1T = partial_returns(reward_T[None].astype(np.float64), weight_TT[:t, :t])
        turns = np.flatnonzero(~np.isnan(reward_T))
        return_t = return_1T[0, turns]
        total_T[turns] += return_t
        count_T[turns] += 1
        low_T[turns] = np.minimum(low_T[turns], return_t)
        high_T[turns] = np.maximum(high_T[turns], return_t)
    mean_T = total_T / np.maximum(1, count_T)
    known_T = count_T > 0
    if baseline == "none":
        lowest_T = low_T
    elif baseline == "log_mean":
        lowest_T = low_T - mean_T
    else:  # all others of the step may have had the highest return
        lowest_T = low_T - high_T
    return mean_T, float(lowest_T.min(initial=0.0, where=known_T))


def _threshold(rewards: Sequence[np.ndarray], top_share: float) -> float:
    """Return the mean reward of the last dialogue that belongs to the best share; NaN if none."""
    means = np.sort([mean for mean in map(_mean, rewards) if not np.isnan(mean)])
    number = max(1, math.ceil(top_share * len(means) - 1e-9))
    return float(means[-number]) if len(means) else float("nan")


def _settings(given: dict[str, Any]) -> OfflineSettings:
    known = [field.name for field in fields(OfflineSettings)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"Unknown setting {name!r}.{hint} There are {', '.join(known)}.")
    return OfflineSettings(**given)


def _stream(log: Log) -> Iterator[Trajectory]:
    if isinstance(log, str | Path):
        return read_log(log)
    if isinstance(log, Iterator):
        raise TypeError(
            f"A log is read once an epoch and once before; a {type(log).__name__} can be read only "
            "once. Give the file's path, or list(...) of it."
        )
    return iter(log)


def _in_order(log: Log, how: OfflineSettings, seed: Sequence[int]) -> Iterator[Trajectory]:
    """Yield the log's dialogues in the order of one epoch."""
    together = how.baseline in ("leave_one_out", "group_mean")
    return _shuffled(_units(_stream(log), together, how.batch_size), how.shuffle, seed)


def _units(
    trajectories: Iterable[Trajectory], together: bool, longest: int
) -> Iterator[list[Trajectory]]:
    """Yield what is shuffled as one: a dialogue; `together`, those of a group side by side."""

    def unit(numbered: tuple[int, Trajectory]) -> tuple[str, Any]:
        number, trajectory = numbered
        return _group_key(number, trajectory) if together else ("", number)

    for _, group in groupby(enumerate(trajectories), unit):
        yield from _batches((trajectory for _, trajectory in group), longest)


def _shuffled(
    units: Iterable[list[Trajectory]], size: int, seed: Sequence[int]
) -> Iterator[Trajectory]:
    """Yield all, each unit drawn from `size` dialogues held in memory; 0 keeps the order."""
    rng, held, number = np.random.default_rng(list(seed)), [], 0
    for unit in units:
        held.append(unit)
        number += len(unit)
        while number > size:
            taken = _taken(held, rng) if size else held.pop()
            number -= len(taken)
            yield from taken
    while held:
        yield from _taken(held, rng)


def _taken(held: list[list[Trajectory]], rng: np.random.Generator) -> list[Trajectory]:
    i = int(rng.integers(len(held)))
    held[i], held[-1] = held[-1], held[i]
    return held.pop()


def _batches(trajectories: Iterable[Trajectory], size: int) -> Iterator[list[Trajectory]]:
    batch: list[Trajectory] = []
    for trajectory in trajectories:
        batch.append(trajectory)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _group_key(number: int, trajectory: Trajectory) -> tuple[str, Any]:
    """Return what tells a group; a dialogue that tells none is one by itself."""
    group = trajectory.group
    return ("", number) if group is None else (type(group).__name__, group)


def _group_numbers(batch: Sequence[Trajectory]) -> np.ndarray:
    """Return group_B, numbered as they come."""
    numbers: dict[tuple[str, Any], int] = {}
    keys = [_group_key(b, trajectory) for b, trajectory in enumerate(batch)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _as_rollouts(batch: Sequence[Trajectory], tape: Tape, num_turns: int) -> RolloutBatch:
    """Return logged dialogues as a rollout would have, for inspection."""
    reward_BT, alive_BT = _rewards(batch, num_turns)
    none_B = np.zeros(len(batch), dtype=bool)
    return RolloutBatch(
        reward_BT=reward_BT,
        alive_BT=alive_BT,
        group_B=_group_numbers(batch),
        cut_BT=np.zeros_like(alive_BT),
        truncated_B=none_B,
        overflow_B=none_B,
        part_BT={},
        transcripts=[trajectory.messages for trajectory in batch],
        boundaries=None,
        seconds=0.0,
        tape=tape,
        personas=tuple(trajectory.persona for trajectory in batch),
        domains=tuple(trajectory.domain for trajectory in batch),
    )


def _rewards(batch: Sequence[Trajectory], num_turns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (reward_BT, alive_BT): rewards, NaN where unscorable, 0 where there was no turn."""
    reward_BT = np.zeros((len(batch), num_turns))
    alive_BT = np.zeros((len(batch), num_turns), dtype=bool)
    for b, trajectory in enumerate(batch):
        reward_BT[b, : trajectory.num_turns] = trajectory.reward_T
        alive_BT[b, : trajectory.num_turns] = True
    return reward_BT, alive_BT


def _mean_reward(trajectory: Trajectory) -> float:
    """Return the mean reward of a dialogue's scored turns; NaN, which is above nothing, if none."""
    return _mean(trajectory.reward_T.astype(np.float32))


def _mean(reward_T: np.ndarray) -> float:
    scored = reward_T[~np.isnan(reward_T)]
    return float(scored.mean()) if len(scored) else float("nan")


def _tensor(weight_sT: np.ndarray, policy: LMPolicy) -> torch.Tensor:
    return torch.as_tensor(weight_sT.astype(np.float32), device=policy.device)
