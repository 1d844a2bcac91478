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
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .credit import Credit, advantages, credit_weights, partial_returns
from .lm_policy import LMPolicy, Reference
from .logs import LogError, Trajectory, read_log, refuse_leaks
from .losses import kl_to_reference, policy_gradient_loss, turn_logprobs
from .optimization import Optimization
from .reading import read_dialogues
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
    batch_size: int = 32
    """Dialogues in a gradient step, over all processes."""
    baseline: str = "none"
    """Subtracted from partial returns: "none", "log_mean" (of each turn, over the log), or over the
    gradient step "batch_mean", "leave_one_out", "group_mean" (groups: the log's)."""
    min_weight: float | None = 0.0
    """Smaller weights are raised to it; None leaves negative ones, which needs an anchor."""
    max_weight: float | None = None
    """Larger weights are lowered to it; None = none are."""
    importance: bool = False
    """Multiply weights with importance ratios; needs logged log-probabilities."""
    max_importance: float = 5.0
    """Larger ratios are lowered to it."""
    min_ess: float = 0.1
    """Warn once when the effective sample size falls below this share of a step's turns."""
    sft_coef: float = 0.0
    """Weight of the plain log-likelihood of all logged lines, an anchor."""
    top_share: float = 0.25
    """Of the dialogues, by mean reward, that "filtered" imitates."""
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
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}.")
        if not 0 < self.top_share <= 1 or not 0 <= self.min_ess <= 1:
            raise ValueError(
                f"top_share and min_ess are shares, got {self.top_share} and {self.min_ess}."
            )
        if self.max_importance <= 0 or self.sft_coef < 0 or self.shuffle < 0:
            raise ValueError(
                "max_importance must be positive, sft_coef and shuffle not negative, got "
                f"{self.max_importance}, {self.sft_coef} and {self.shuffle}."
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

    @abstractmethod
    def _set_learning_rate(self, remaining: float) -> None:
        """Set the step size when a share `remaining` of learning is still to come."""

    @abstractmethod
    def _most(self, number: int) -> int:
        """Return the largest such number of all processes where they must keep step."""

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
        `offline/validation_loss`. With `patience` the weights of the best epoch are kept.

        Args:
            log: a log file (streamed: it may be larger than memory) or trajectories.
            validation: of other personas; checked for leaks.
            callback: called after every gradient step; returning False stops.
            progress_bar: show one.
            settings: fields of OfflineSettings.

        Raises:
            LogError: the log cannot be used, or shares personas or dialogues with `validation`.
            ValueError: settings that do not fit each other or the log.
        """
        how = OfflineSettings(**settings)
        facts = _survey(log, self._weights_of, how)
        self._refuse_unusable(how, facts, validation)
        if validation is not None:
            refuse_leaks(_stream(log), _stream(validation))
        best: _Best | None = None
        steps_an_epoch = -(-facts.num_dialogues // how.batch_size)
        steps, done, going_on = how.epochs * steps_an_epoch, 0, True
        shown = progress_bar and self.processes.is_main_process
        with tqdm(total=steps, unit="step", disable=not shown) as bar:
            for epoch in range(how.epochs):
                order = _shuffled(_stream(log), how.shuffle, [self.seed, epoch])
                for batch in _batches(order, how.batch_size):
                    self._set_learning_rate(1.0 - done / steps)
                    self._offline_step(batch, how, facts, epoch)
                    done += 1
                    if validation is not None and done % steps_an_epoch == 0:
                        self.log["offline/validation_loss"] = self.offline_loss(validation, how)
                    bar.update()
                    bar.set_postfix(loss=f"{self.log['train/policy_loss']:.3f}")
                    going_on = callback is None or callback(self) is not False
                    if not going_on:
                        break
                if going_on and how.patience is not None:
                    best = self._better(best, self.log["offline/validation_loss"], epoch)
                    going_on = epoch - best.epoch < how.patience
                if not going_on:
                    break
        if best is not None:
            self._go_back(best)
        return self

    def _better(self, best: _Best | None, loss: float, epoch: int) -> _Best:
        """Return the best epoch so far, with the weights it left."""
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

    @torch.no_grad()
    def offline_loss(self, log: Log, how: OfflineSettings | None = None) -> float:
        """Return -(1/B) sum_b sum_t w[b,t] log pi(a_t|h_t) of a log, without baseline and anchor.

        Args:
            log: whose dialogues; all processes read all of them.
            how: the method, and how weights are clipped.
        """
        how = how or OfflineSettings()
        facts = _survey(log, self._weights_of, how)
        total, number = 0.0, 0
        for batch in _batches(_stream(log), how.batch_size):
            weight_BT = self._offline_weights(batch, how, facts, baseline=False)
            tape = read_dialogues(self.policy, batch, how.tokenise_again).tape
            for rows in microbatches(tape.length_S, self.settings["token_budget"]):
                scores = self.policy.scores(tape.token_SL[rows], tape.turn_SL[rows])
                total += policy_gradient_loss(
                    scores.logprob_SL,
                    _tensor(weight_BT[tape.episode_S[rows]], self.policy),
                    torch.as_tensor(tape.turn_SL[rows], device=self.policy.device),
                    num_episodes=1,
                ).item()
            number += len(batch)
        return total / number

    def _offline_step(
        self, batch: Sequence[Trajectory], how: OfflineSettings, facts: _Facts, epoch: int
    ) -> None:
        """Take one gradient step along these dialogues, of which each process reads its share."""
        started = time.perf_counter()
        weight_BT = self._offline_weights(batch, how, facts)
        mine = np.arange(self.processes.process_index, len(batch), self.processes.num_processes)
        if not len(mine) and self._layers:  # sharded, all have to read something
            mine, weight_BT = np.zeros(1, dtype=int), np.zeros_like(weight_BT)
        reading = read_dialogues(self.policy, [batch[b] for b in mine], how.tokenise_again)
        if how.importance and not reading.has_logprobs_B.all():
            missing = batch[mine[np.flatnonzero(~reading.has_logprobs_B)[0]]]
            raise LogError(
                f"importance=True needs logged log-probabilities, and the dialogue of persona "
                f"{missing.persona!r} has none; learn without, or log them (ppg train does)."
            )
        sums: dict[str, float] = defaultdict(float)
        log_ratios: list[float] = []
        self.optimization.forget()
        parts = list(microbatches(reading.tape.length_S, self.settings["token_budget"]))
        most = self._most(len(parts))
        for number in range(most):
            rows = parts[min(number, len(parts) - 1)]
            loss = self._offline_rows(
                reading.tape, rows, weight_BT[mine], how, len(batch), sums, log_ratios
            )
            self.optimization.backward(loss if number < len(parts) else 0.0 * loss)
        step = self.optimization.step()
        if self.processes.num_processes > 1:
            everybody = gather_object([dict(sums)])
            sums = {name: sum(each.get(name, 0.0) for each in everybody) for name in everybody[0]}
            log_ratios = gather_object(log_ratios)

        self.num_updates += 1
        turns = sum(trajectory.num_turns for trajectory in batch)
        self.num_timesteps += turns
        tokens = int(reading.tape.length_S.sum())
        seconds = time.perf_counter() - started
        self.log = {
            "time/total_timesteps": self.num_timesteps,
            "train/policy_loss": sums["policy_loss"],
            "train/grad_norm": step.grad_norm,
            "train/skipped_steps": float(self.optimization.num_skipped),
            "offline/epoch": epoch + 1,
            "offline/weight_mean": float(weight_BT.sum()) / turns,
            "offline/dropped_turns": turns_without_tokens(reading.tape, batch, mine),
            "time/update_seconds": seconds,
            "time/tokens_per_second": tokens / seconds,
        }
        for name in ("kl", "sft_loss"):
            if name in sums:
                self.log[f"train/{name}"] = sums[name]
        if how.importance:
            self.log["offline/ess"] = effective_share(log_ratios)
            self._warn_of_collapse(self.log["offline/ess"], how)
        self.history.append(self.log)

    def _offline_rows(
        self,
        tape: Tape,
        rows: np.ndarray,
        weight_BT: np.ndarray,
        how: OfflineSettings,
        num_episodes: int,
        sums: dict[str, float],
        log_ratios: list[float],
    ) -> torch.Tensor:
        """Return the loss of some token sequences; add what to report to the last two."""
        device, longest = self.policy.device, int(tape.length_S[rows].max())
        token_sL = torch.as_tensor(tape.token_SL[rows, :longest], device=device)
        turn_sL = torch.as_tensor(tape.turn_SL[rows, :longest], device=device)
        weight_sT = _tensor(weight_BT[tape.episode_S[rows]], self.policy)
        logprob_sL = self.policy.scores(token_sL, turn_sL).logprob_SL
        if how.importance:
            old_sL = torch.as_tensor(tape.old_logprob_SL[rows, :longest], device=device)
            num_turns = weight_sT.shape[1]
            change_sL = torch.where(turn_sL >= 0, logprob_sL.detach() - old_sL, 0.0)
            log_ratio_sT = turn_logprobs(change_sL, turn_sL, num_turns)
            spoken_sT = turn_logprobs(torch.ones_like(change_sL), turn_sL, num_turns) > 0
            log_ratios += log_ratio_sT[spoken_sT].tolist()
            ratio_sT = log_ratio_sT.clamp(max=math.log(how.max_importance)).exp()
            weight_sT = weight_sT * ratio_sT
        loss = policy_gradient_loss(logprob_sL, weight_sT, turn_sL, num_episodes=num_episodes)
        sums["policy_loss"] += loss.item()
        if how.sft_coef:
            ones_sT = torch.ones_like(weight_sT)
            sft = policy_gradient_loss(logprob_sL, ones_sT, turn_sL, num_episodes=num_episodes)
            sums["sft_loss"] += sft.item()
            loss = loss + how.sft_coef * sft
        if self._reference is not None:
            spoken_sL = turn_sL >= 0
            reference_sL = self._reference.logprobs(token_sL, spoken_sL)
            kl = kl_to_reference(logprob_sL, reference_sL, spoken_sL, num_episodes=num_episodes)
            sums["kl"] += kl.item()
            loss = loss + self.settings["kl_coef"] * kl
        return loss

    # -- weights -----------------------------------------------------------------------------------

    def _weights_of(self, num_turns: int) -> np.ndarray:
        """Return the credit's matrix for dialogues of so many turns, scaled as online."""
        plain = None if self.env is None else self.env.unwrapped
        phases = getattr(plain, "phase_boundaries", None)
        boundaries = None if phases is None else [turn for turn in phases if turn < num_turns]
        return credit_weights(self.credit, num_turns, boundaries, scale=self.settings["scale"])

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
        groups = None
        if name in ("leave_one_out", "group_mean"):
            ids = [str(trajectory.group) for trajectory in batch]
            groups = np.unique(ids, return_inverse=True)[1]
        weight_BT = advantages(
            return_BT, baseline=name, group_B=groups, alive_BT=alive_BT, scorable_BT=scorable_BT
        )
        clipped_BT = (
            np.clip(weight_BT, how.min_weight, how.max_weight)
            if (how.min_weight is not None or how.max_weight is not None)
            else weight_BT
        )
        return np.where(alive_BT & scorable_BT, clipped_BT, 0.0)

    def _refuse_unusable(self, how: OfflineSettings, facts: _Facts, validation: Log | None) -> None:
        if len(facts.domains) > 1:
            raise LogError(
                f"The log mixes the domains {', '.join(sorted(facts.domains))}; learn from one, or "
                "write a log of each."
            )
        if facts.num_scored == 0 and how.method != "sft":
            raise LogError(
                "No turn of the log has a reward; score it first (ppg rejudge), or imitate it with "
                "method='sft'."
            )
        anchored = how.sft_coef > 0 or self._reference is not None
        can_be_negative = how.baseline != "none" or facts.lowest_reward < 0
        if how.method == "ppg" and how.min_weight is None and can_be_negative and not anchored:
            raise ValueError(
                "min_weight=None leaves negative weights, and a negatively weighted likelihood has "
                "no bound: the model would be driven to say anything else. Anchor it with kl_coef "
                "or sft_coef, or clip weights with min_weight=0."
            )
        if how.patience is not None and (validation is None or self._layers):
            raise ValueError(
                "patience needs validation data to watch, and a model that is not sharded."
            )
        if how.baseline in ("leave_one_out", "group_mean") and not facts.has_groups:
            raise LogError(
                f"baseline={how.baseline!r} needs several dialogues a group, and the log has none; "
                "use 'batch_mean' or 'log_mean'."
            )

    def _warn_of_collapse(self, share: float, how: OfflineSettings) -> None:
        warned = any("offline/ess_warned" in row for row in self.history)
        if share >= how.min_ess or warned:
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


def turns_without_tokens(tape: Tape, batch: Sequence[Trajectory], mine: np.ndarray) -> float:
    """Return the share of turns that the model's context had no room for."""
    expected = sum(batch[b].num_turns for b in mine)
    pairs = zip(tape.episode_S, tape.turn_SL, strict=True)
    read = sum(len(np.unique(turn_L[turn_L >= 0])) for _, turn_L in pairs)
    return 1.0 - read / max(1, expected)


# ---- the log, one pass at a time -----------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What one pass over the log tells."""

    num_dialogues: int
    num_turns: int
    """Agent turns of the longest dialogue: T."""
    num_scored: int
    """Turns with a reward."""
    lowest_reward: float
    domains: frozenset[str]
    has_groups: bool
    weight_TT: np.ndarray
    mean_return_T: np.ndarray
    threshold: float
    """Mean reward that the best dialogues reach, for filtered behaviour cloning."""


def _survey(log: Log, weights_of: Callable[[int], np.ndarray], how: OfflineSettings) -> _Facts:
    """Read the log once; what is kept of a dialogue is a few numbers."""
    rewards: list[np.ndarray] = []
    domains: set[str] = set()
    groups: dict[str, int] = defaultdict(int)
    for trajectory in _stream(log):
        rewards.append(trajectory.reward_T.astype(np.float32))
        domains.add(trajectory.domain)
        if trajectory.group is not None:
            groups[str(trajectory.group)] += 1
    if not rewards:
        raise LogError("The log holds no trajectories.")
    num_turns = max(map(len, rewards))
    weight_TT = weights_of(num_turns)
    scored = np.concatenate(rewards)
    scored = scored[~np.isnan(scored)]
    total_T, count_T = np.zeros(num_turns), np.zeros(num_turns)
    if how.baseline == "log_mean":
        for reward_T in rewards:
            t = len(reward_T)
            return_1T = partial_returns(reward_T[None].astype(np.float64), weight_TT[:t, :t])
            counted_T = ~np.isnan(reward_T)
            total_T[:t] += np.where(counted_T, return_1T[0], 0.0)
            count_T[:t] += counted_T
    means = np.array([_mean(reward_T) for reward_T in rewards])
    known = means[~np.isnan(means)]
    threshold = float(np.quantile(known, 1 - how.top_share)) if len(known) else float("nan")
    return _Facts(
        num_dialogues=len(rewards),
        num_turns=num_turns,
        num_scored=len(scored),
        lowest_reward=float(scored.min(initial=0.0)),
        domains=frozenset(domains),
        has_groups=any(number > 1 for number in groups.values()),
        weight_TT=weight_TT,
        mean_return_T=total_T / np.maximum(1, count_T),
        threshold=threshold,
    )


def _stream(log: Log) -> Iterator[Trajectory]:
    return read_log(log) if isinstance(log, str | Path) else iter(log)


def _shuffled(
    trajectories: Iterable[Trajectory], size: int, seed: Sequence[int]
) -> Iterator[Trajectory]:
    """Yield all, each drawn from `size` of them held in memory; 0 keeps the order."""
    rng, held = np.random.default_rng(list(seed)), []
    for trajectory in trajectories:
        held.append(trajectory)
        if len(held) > size:
            yield _taken(held, rng) if size else held.pop()
    while held:
        yield _taken(held, rng)


def _taken(held: list[Trajectory], rng: np.random.Generator) -> Trajectory:
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
