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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from gymnasium.vector import SyncVectorEnv
from tqdm.auto import tqdm

from .batching import Log, LogReader, batches, group_numbers, num_alone, shuffled, units
from .credit import Credit, Segment, credit_weights
from .lm_policy import LMPolicy, Reference
from .logs import LogError, LoggedDialogue
from .losses import kl_to_reference, policy_gradient_loss, turn_logprobs
from .offline_settings import OfflineSettings
from .optimization import Optimization, Step
from .reading import read_dialogues, refuse_unreadable, stored_ids
from .rollout import RolloutBatch
from .scoring import microbatches
from .splits import refuse_leaks
from .tape import Tape
from .validation import Validation
from .weighting import Survey, TurnWeights, effective_share, rewards_of, survey


@dataclass(frozen=True)
class _Plan:
    """What is learned from and how, checked."""

    settings: OfflineSettings
    log: LogReader
    validation: LogReader | None
    weights: TurnWeights
    num_turns: int
    """Of the longest dialogue of both logs."""
    steps_an_epoch: int

    @property
    def num_steps(self) -> int:
        """Gradient steps of all epochs, if nothing stops learning before."""
        steps = self.settings.epochs * self.steps_an_epoch
        return min(steps, self.settings.max_steps or steps)

    def steps(self, seed: int) -> Iterator[tuple[int, bool, list[LoggedDialogue]]]:
        """Yield (epoch, whether it ends here, dialogues) of each gradient step."""
        size, settings, done = self.settings.batch_size, self.settings, 0
        for epoch in range(1, settings.epochs + 1):
            each = units(self.log, settings.keeps_groups, size)
            in_order = shuffled(each, settings.shuffle, [seed, epoch - 1])
            for batch in batches(in_order, size):
                if done == self.num_steps:
                    return
                done += 1
                yield epoch, done % self.steps_an_epoch == 0 or done == self.num_steps, batch


@dataclass(frozen=True)
class _Best:
    """The epoch with the lowest validation loss, and what it left; 0 = before learning."""

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
    _collapse_warned: bool

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
        self._plan(log, validation, OfflineSettings.of(settings))

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
        `offline/validation_loss`, see validation.py. With `patience` the weights of the best epoch
        are kept, and `offline/best_epoch` tells which; 0 = those before learning, if no epoch was
        better. Of the agent's own settings count those of the gradient step (learning_rate,
        lr_schedule, kl_coef, max_grad_norm, skip_grad_norm, max_skips, token_budget) and `scale`;
        the others are about playing.

        Args:
            log: a log file (streamed: it may be larger than memory) or dialogues.
            validation: of other personas; checked for leaks.
            callback: called after every gradient step; returning False stops.
            progress_bar: show one.
            settings: fields of OfflineSettings.

        Raises:
            LogError: the log cannot be used, gives no turn a weight, shares personas or dialogues
                with `validation`, or changes while it is read.
            TypeError: an unknown setting, or a log that can be read only once.
            ValueError: settings that do not fit each other or the log.
            DivergedError: `max_skips` gradients in a row were no use; holds the batch.
        """
        plan = self._plan(log, validation, OfflineSettings.of(settings))
        watch = None
        if plan.validation is not None:
            watch = Validation(
                plan.validation,
                plan.settings,
                plan.weights,
                partial(self._turn_logprobs, settings=plan.settings),
            )
        patience, skipped_before = plan.settings.patience, self.optimization.num_skipped
        best: _Best | None = None
        if patience is not None and watch is not None:
            best = self._better(None, watch.loss_before, epoch=0)
        done, weighed, measured, self._collapse_warned = 0, False, False, False
        alone = total = 0  # dialogues without another of their group in their step
        shown = progress_bar and self.processes.is_main_process
        with tqdm(total=plan.num_steps, unit="step", disable=not shown) as bar:
            for epoch, ends, batch in plan.steps(self.seed):
                self._set_learning_rate(1.0 - done / plan.num_steps)
                weight_BT = plan.weights.of(batch)
                read, tape, carries_weight = self._offline_step(
                    batch, weight_BT, plan.settings, epoch
                )
                done, weighed = done + 1, weighed or carries_weight
                alone, total = alone + num_alone(batch), total + len(batch)
                if ends and not weighed:
                    raise LogError(_why_nothing_is_learned(plan))
                if ends and watch is not None:
                    self.log.update(watch.measure())
                    measured = True
                    if patience is not None:
                        best = self._better(best, self.log["offline/validation_loss"], epoch)
                        self.log["offline/best_epoch"] = best.epoch
                bar.update()
                bar.set_postfix(loss=f"{self.log['train/policy_loss']:.3f}")
                if callback is not None and callback(self) is False:
                    break
                if ends and best is not None and epoch - best.epoch >= (patience or math.inf):
                    break
                if self._skips_in_a_row >= self.settings["max_skips"]:
                    self._stop_if_diverged(_as_rollouts(read, tape, plan.num_turns))
        skipped = self.optimization.num_skipped - skipped_before
        if best is not None and measured:
            self._go_back(best)
            if best.epoch == 0 and skipped < done:
                _warn_of_no_better_epoch(best)
        self._warn_of_dropped_turns(done)
        if plan.settings.keeps_groups:
            _warn_of_lone_dialogues(alone / max(1, total), plan.settings)
        self._warn_if_all_skipped(skipped, done)
        return self

    def offline_loss(self, log: Log, **settings: Any) -> float:
        """Return the loss of the objective on a log, -(1/B) sum_b sum_t w[b,t] log pi(a_t|h_t).

        Without anchors and importance ratios. (The validation loss is another number.)

        Args:
            log: whose dialogues; all processes read all of them.
            settings: fields of OfflineSettings, as of `learn_offline`.
        """
        chosen, reader = OfflineSettings.of(settings), LogReader(log)
        found = survey(self._readable(reader, chosen))
        weights = TurnWeights(chosen, self._credit_matrix(found.num_turns), found)
        loss = 0.0
        for batch in batches(reader, chosen.batch_size):
            now_BT, _ = self._turn_logprobs(batch, chosen)
            loss -= float(np.nansum(weights.of(batch)[:, : now_BT.shape[1]] * now_BT))
        return loss / found.num_dialogues

    # -- before anything is learned ----------------------------------------------------------------

    def _plan(self, log: Log, validation: Log | None, settings: OfflineSettings) -> _Plan:
        """Read the logs once; refuse what cannot be learned from."""
        reader = LogReader(log)
        watched = None if validation is None else LogReader(validation, "validation log")
        found = survey(self._readable(reader, settings))
        held_out = None if watched is None else survey(self._readable(watched, settings))
        surveys = {reader.name: found}
        if watched is not None and held_out is not None:
            surveys[watched.name] = held_out
        longest = max(each.num_turns for each in surveys.values())
        weights = TurnWeights(settings, self._credit_matrix(longest), found)
        plan = _Plan(
            settings,
            reader,
            watched,
            weights,
            longest,
            steps_an_epoch=-(-found.num_dialogues // settings.batch_size),
        )
        self._refuse_unusable(plan, surveys)
        if watched is not None:
            refuse_leaks(reader, watched)
        return plan

    def _readable(self, log: LogReader, settings: OfflineSettings) -> Iterator[LoggedDialogue]:
        """Yield the dialogues, checked one by one that the policy can learn from them."""
        again, fits = settings.tokenise_again, False
        for number, dialogue in enumerate(log, start=1):
            place = f"{log.name}, dialogue {number}"
            refuse_unreadable(self.policy, dialogue, place, again)
            known = dialogue.logprobs is not None and stored_ids(self.policy, dialogue, again)
            if settings.importance and not known:
                raise LogError(
                    f"{place}: importance=True needs logged log-probabilities, and it has none; "
                    "learn without, or log them (ppg train does)."
                )
            fits = fits or len(read_dialogues(self.policy, [dialogue], again).length_S) > 0
            yield dialogue
        if not fits:
            raise LogError(
                f"No line of {log.name} fits the context of {self.policy.name} "
                f"({self.policy.network.context_length} tokens): use a model with a longer context."
            )

    def _credit_matrix(self, num_turns: int) -> np.ndarray:
        """Return the credit's matrix for dialogues of so many turns."""
        world = None if self.env is None else self.env.unwrapped
        if isinstance(world, SyncVectorEnv):
            world = world.envs[0].unwrapped
        phases, turns = getattr(world, "phase_boundaries", None), getattr(world, "max_turns", None)
        follows = isinstance(self.credit, Segment) and self.credit.name == "segment"
        if follows and phases is None:
            raise ValueError(
                "Segment() follows the phases of an environment's dialogues, and this agent has no "
                "environment with phases. Take segments of N turns, segment:N, say where they "
                "begin, segment:0,3,6, or give the agent one of the log's domain with "
                f"max_turns={num_turns}."
            )
        if follows and turns not in (None, num_turns):
            raise ValueError(
                f"Segment() follows the phases of the environment's dialogues, of {turns} turns, "
                f"and the longest logged one has {num_turns}: make the environment with "
                f"max_turns={num_turns}, or take segments of N turns, segment:N."
            )
        return credit_weights(self.credit, num_turns, phases, scale=self.settings["scale"])

    def _refuse_unusable(self, plan: _Plan, surveys: Mapping[str, Survey]) -> None:
        settings = plan.settings
        domains = frozenset[str]().union(*(found.domains for found in surveys.values()))
        if len(domains) > 1:
            raise LogError(
                f"The logs mix the domains {', '.join(sorted(domains))}; learn from one, or "
                "write a log of each."
            )
        for name, found in surveys.items():
            if found.num_scored == 0 and settings.method != "sft":
                raise LogError(
                    f"No turn of {name} has a reward; score it first (ppg rejudge), or imitate it "
                    "with method='sft'."
                )
            if settings.keeps_groups and not (found.has_groups and settings.batch_size > 1):
                raise LogError(
                    f"baseline={settings.baseline!r} needs dialogues of a group that follow each "
                    f"other, and a batch_size above 1; {name} has no such two, or batch_size="
                    f"{settings.batch_size}. Sort it by group, or use 'batch_mean' or 'log_mean'."
                )
        if settings.patience is not None and (plan.validation is None or self._layers):
            raise ValueError(
                f"patience={settings.patience} needs validation data to watch, and a model that is "
                "not sharded."
            )
        lowest, highest = plan.weights.lowest, plan.weights.highest
        if settings.method == "ppg" and not np.any(plan.weights.clipped([lowest, highest])):
            raise LogError(_why_nothing_is_learned(plan))
        self._refuse_unanchored(settings, lowest)

    # -- gradient steps ----------------------------------------------------------------------------

    def _offline_step(
        self,
        batch: Sequence[LoggedDialogue],
        weight_BT: np.ndarray,
        settings: OfflineSettings,
        epoch: int,
    ) -> tuple[list[LoggedDialogue], Tape, bool]:
        """Take one gradient step along these dialogues.

        Returns:
            (the share that was read here, it as a tape, whether a turn that anybody read has a
            weight).
        """
        started = time.perf_counter()
        share = range(self.processes.process_index, len(batch), self.processes.num_processes)
        # Sharded, all have to read something: without a share of its own one reads for nothing.
        mine = list(share) or ([0] if self._layers else [])
        read = [batch[b] for b in mine]
        tape = read_dialogues(self.policy, read, settings.tokenise_again)
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
                tape, rows, weight_BT[mine], settings, len(batch)
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
        # Where nothing pulls, the optimizer would go on by its momentum.
        anchored = self._reference is not None or settings.sft_coef > 0.0
        pulled = sums["turns"] and (anchored or sums["weight"])
        step = self.optimization.step() if pulled else Step(0.0, skipped=False)
        self._skips_in_a_row = self._skips_in_a_row + 1 if step.skipped else 0

        self.num_updates += 1
        turns = sum(dialogue.num_turns for dialogue in batch)
        self.num_timesteps += turns
        seconds = time.perf_counter() - started
        self.log = {
            "time/total_timesteps": self.num_timesteps,
            "train/policy_loss": sums["policy_loss"],
            "train/grad_norm": step.grad_norm,
            "train/skipped_steps": float(self.optimization.num_skipped),
            "offline/epoch": epoch,
            "offline/weight_mean": float(weight_BT.sum()) / turns,
            "offline/dropped_turns": 1.0 - sums["turns"] / turns,
            "time/update_seconds": seconds,
            "time/tokens_per_second": sums["tokens"] / seconds,
        }
        if self._reference is not None:
            self.log["train/kl"] = sums["kl"]
        if settings.sft_coef:
            self.log["train/sft_loss"] = sums["sft_loss"]
        if settings.importance:
            highest = math.log(settings.max_importance)
            clipped = [min(ratio, highest) for ratio in log_ratios]
            self.log["offline/ess"] = effective_share(log_ratios)
            self.log["offline/ess_clipped"] = effective_share(clipped)
            self._warn_of_collapse(self.log["offline/ess"], settings)
        self.history.append(self.log)
        return read, tape, sums["weight"] > 0.0

    def _offline_rows(
        self,
        tape: Tape,
        rows: np.ndarray,
        weight_BT: np.ndarray,
        settings: OfflineSettings,
        num_episodes: int,
    ) -> tuple[torch.Tensor, dict[str, float], list[float]]:
        """Return the loss of some token sequences, sums to report, their turns' log-ratios."""
        token_sL, turn_sL, old_sL = self._tensors(
            tape, rows, tape.token_SL, tape.turn_SL, tape.old_logprob_SL
        )
        weight_sT = _tensor(weight_BT[tape.episode_S[rows]], self.policy)
        logprob_sL, spoken_sL = self.policy.scores(token_sL, turn_sL).logprob_SL, turn_sL >= 0
        num_turns, log_ratios = weight_sT.shape[1], list[float]()
        spoken_sT = _spoken(turn_sL, num_turns)
        sums = {"tokens": float(tape.length_S[rows].sum()), "turns": float(spoken_sT.sum())}
        sums["weight"] = float(weight_sT[spoken_sT].abs().sum())
        if settings.importance:
            change_sL = torch.where(spoken_sL, logprob_sL.detach() - old_sL, 0.0)
            log_ratio_sT = turn_logprobs(change_sL, turn_sL, num_turns)
            log_ratios = log_ratio_sT[spoken_sT].tolist()
            ratio_sT = log_ratio_sT.clamp(max=math.log(settings.max_importance)).exp()
            weight_sT = weight_sT * ratio_sT
        loss = policy_gradient_loss(logprob_sL, weight_sT, turn_sL, num_episodes=num_episodes)
        sums["policy_loss"] = loss.item()
        if settings.sft_coef:
            ones_sT = torch.ones_like(weight_sT)
            sft = policy_gradient_loss(logprob_sL, ones_sT, turn_sL, num_episodes=num_episodes)
            sums["sft_loss"] = sft.item()
            loss = loss + settings.sft_coef * sft
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

    @torch.no_grad()
    def _turn_logprobs(
        self, batch: Sequence[LoggedDialogue], settings: OfflineSettings
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (now_BT, logged_BT), log pi(a_t|h_t) now and as logged; NaN for unread turns."""
        tape = read_dialogues(self.policy, batch, settings.tokenise_again)
        num_turns = max(dialogue.num_turns for dialogue in batch)
        now_BT, logged_BT = np.full((2, len(batch), num_turns), np.nan, dtype=np.float32)
        for rows in microbatches(tape.length_S, self.settings["token_budget"]):
            token_sL, turn_sL, old_sL = self._tensors(
                tape, rows, tape.token_SL, tape.turn_SL, tape.old_logprob_SL
            )
            logprob_sL = self.policy.scores(token_sL, turn_sL).logprob_SL
            row_N, turn_N = np.nonzero(_spoken(turn_sL, num_turns).cpu().numpy())
            for value_sL, found_BT in ((logprob_sL, now_BT), (old_sL, logged_BT)):
                value_sT = turn_logprobs(value_sL, turn_sL, num_turns).cpu().numpy()
                found_BT[tape.episode_S[rows][row_N], turn_N] = value_sT[row_N, turn_N]
        return now_BT, logged_BT

    # -- the best epoch, and what went wrong -------------------------------------------------------

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

    def _learned(self) -> dict[str, torch.Tensor]:
        """Return the parameters that learn, by name."""
        parameters = self.policy.model.named_parameters()
        return {name: value for name, value in parameters if value.requires_grad}

    def _refuse_unanchored(self, settings: OfflineSettings, lowest: float) -> None:
        if settings.min_weight is not None:
            lowest = max(lowest, settings.min_weight)
        anchored = self._reference is not None or settings.sft_coef >= -lowest - 1e-6
        if settings.method == "ppg" and not anchored:
            raise ValueError(
                f"min_weight={settings.min_weight} leaves weights down to {lowest:.3g}, and a "
                "negatively weighted likelihood has no bound: the model would be driven to say "
                "anything else. Anchor it with kl_coef, or with an sft_coef that outweighs them "
                f"(now {settings.sft_coef:g}), or clip weights with min_weight=0."
            )

    def _warn_of_collapse(self, share: float, settings: OfflineSettings) -> None:
        if share >= settings.min_ess or self._collapse_warned:
            return
        self._collapse_warned = True
        warnings.warn(
            f"The effective sample size of the importance ratios, before they are clipped, fell to "
            f"{share:.1%} of the turns (update {self.num_updates}): the policy has moved so far "
            "from the one that spoke that the log hardly tells what it would earn. Learn for fewer "
            "epochs or with a smaller learning rate, or anchor it with a larger kl_coef. "
            f"(max_importance={settings.max_importance:g} bounds what one turn weighs; "
            "offline/ess_clipped tells how many carry the gradient.)",
            stacklevel=3,
        )

    def _warn_of_dropped_turns(self, steps: int) -> None:
        shares = [row["offline/dropped_turns"] for row in self.history[-steps:]] if steps else []
        share = float(np.mean(shares)) if shares else 0.0
        if share > 0.05:
            warnings.warn(
                f"{share:.0%} of the logged turns lie beyond the context of {self.policy.name} "
                f"({self.policy.network.context_length} tokens) and were not learned from; use a "
                "model with a longer context.",
                stacklevel=3,
            )

    def _warn_if_all_skipped(self, skipped: int, steps: int) -> None:
        if steps and skipped == steps:
            warnings.warn(
                f"Nothing was learned: all {steps} gradients were skipped, not finite or above "
                f"skip_grad_norm={self.settings['skip_grad_norm']:g} (last norm "
                f"{self.log['train/grad_norm']:g}). Lower learning_rate, use dtype float32, or "
                "look at the rewards.",
                stacklevel=3,
            )


def _warn_of_lone_dialogues(share: float, settings: OfflineSettings) -> None:
    if share > 0.05:
        effect = "learned nothing from them"
        if settings.baseline == "leave_one_out":
            effect = "compared them with dialogues of other groups"
        warnings.warn(
            f"{share:.0%} of the dialogues had no other of their group in their gradient step, and "
            f"baseline={settings.baseline!r} {effect}. Let groups follow each other in the log and "
            f"divide batch_size={settings.batch_size}, or take 'log_mean'.",
            stacklevel=3,
        )


def _warn_of_no_better_epoch(best: _Best) -> None:
    warnings.warn(
        "No epoch had a lower validation loss than the agent had before it learned "
        f"({best.loss:.4g}), and it is what it was. Lower learning_rate, take more dialogues, or "
        "look whether both logs were scored alike.",
        stacklevel=3,
    )


def _why_nothing_is_learned(plan: _Plan) -> str:
    settings, weights = plan.settings, plan.weights
    return (
        f"Nothing can be learned from {plan.log.name}: every turn's weight is 0. Before they are "
        f"clipped (min_weight={settings.min_weight}, max_weight={settings.max_weight}) weights lie "
        f"in [{round(weights.lowest, 9):.3g}, {round(weights.highest, 9):.3g}] with "
        f"baseline={settings.baseline!r}. "
        "Take a log whose rewards differ, another baseline, or imitate it (method='sft')."
    )


def _as_rollouts(batch: Sequence[LoggedDialogue], tape: Tape, num_turns: int) -> RolloutBatch:
    """Return logged dialogues as a rollout would have, for inspection."""
    reward_BT, alive_BT = rewards_of(batch, num_turns)
    none_B = np.zeros(len(batch), dtype=bool)
    return RolloutBatch(
        reward_BT=reward_BT,
        alive_BT=alive_BT,
        group_B=group_numbers(batch),
        cut_BT=np.zeros_like(alive_BT),
        truncated_B=none_B,
        overflow_B=none_B,
        part_BT={},
        transcripts=[dialogue.messages for dialogue in batch],
        boundaries=None,
        seconds=0.0,
        tape=tape,
        personas=tuple(dialogue.persona for dialogue in batch),
        domains=tuple(dialogue.domain for dialogue in batch),
    )


def _spoken(turn_sL: torch.Tensor, num_turns: int) -> torch.Tensor:
    """Return spoken_sT, whether a sequence holds a turn's tokens."""
    own_sL = (turn_sL >= 0).to(torch.float32)
    return turn_logprobs(own_sL, turn_sL, num_turns) > 0


def _tensor(weight_sT: np.ndarray, policy: LMPolicy) -> torch.Tensor:
    return torch.as_tensor(weight_sT.astype(np.float32), device=policy.device)
