"""How good is a policy on personas it has not learned from? Means with confidence intervals, drift.

    result = evaluate_policy(envs, policy, episodes_per_persona=2, seed=0)
    result.metrics["reward"].mean, result.metrics["reward"].low, result.metrics["reward"].high

The unit of resampling is the persona: turns of one dialogue, and dialogues of one persona, resemble
each other, so intervals over turns would be too narrow. Evaluation shares no state with training.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from .logs import LoggedDialogue, Score, checked_scores, opened_by_the_partner, read_log
from .policy import Messages, Policy
from .quiz import Quiz, evaluate_quiz
from .rollout import RolloutBatch, collect_rollouts, speaker_for
from .statistics import Estimate, bootstrap_mean, drift_slopes


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: "reward" (mean per turn), "drift" (change of the reward per turn of the dialogue),
            "prompt_to_line_drift" (the same of the consistency with the persona), every part by
            name, "degenerate_rate" if the judge tells it, "qa" ... of a quiz; means of persona
            means.
        reward_T: mean reward of each turn.
        part_T: mean of each part of the reward at each turn, NaN where nothing could be checked.
        by_persona: {metric: {persona: its mean}}, for paired comparisons; NaN where it has none.
        records: the dialogues as JSON objects, see runs.read_transcripts.
        transcripts: what was said, one message list a dialogue.
        transcript_rewards: the rewards of each of them, one list a dialogue.
        boundaries: first turn of each phase of the dialogues, where they have phases.
        num_tokens: tokens sampled, 0 where they are not known.
        seconds: wall-clock time of the rollouts.
    """

    metrics: Mapping[str, Estimate]
    reward_T: np.ndarray
    part_T: Mapping[str, np.ndarray]
    by_persona: Mapping[str, Mapping[str, float]]
    records: Sequence[dict[str, Any]]
    transcripts: Sequence[Messages]
    transcript_rewards: Sequence[Sequence[float]]
    boundaries: tuple[int, ...] | None
    num_tokens: int
    seconds: float

    @property
    def persona_reward(self) -> Mapping[str, float]:
        """Mean reward per turn of each persona."""
        return self.by_persona["reward"]


@dataclass(frozen=True)
class StepEvaluation:
    """What single turns after logged histories earned.

    Attributes:
        reward: of the policy's lines, mean of persona means.
        logged: the same of the lines that were logged there: of those turns that count in `reward`
            and have a logged reward.
        reward_T: mean reward at each turn of the dialogue, of those that were that long.
        persona_reward: mean reward of each persona, for paired comparisons.
        num_steps: turns that were spoken; those without room in the policy's context were not.
    """

    reward: Estimate
    logged: Estimate
    reward_T: np.ndarray
    persona_reward: Mapping[str, float]
    num_steps: int


def evaluate_policy(
    envs: VectorEnv[Any, Any, Any],
    policy: Policy,
    *,
    personas: Sequence[str] | None = None,
    episodes_per_persona: int = 1,
    seed: int = 0,
    deterministic: bool = False,
    quiz: Quiz[Any] | None = None,
) -> Evaluation:
    """Let `policy` speak whole dialogues as each persona and return what came of it.

    Args:
        envs: a vector environment of PersonaDialogue-v0 made with held-out personas.
        policy: anything with `predict`.
        personas: ids; None takes all that `envs` has.
        episodes_per_persona: dialogues a persona, with different openings and partner seeds.
        seed: of dialogues and sampling; the same seed meets every policy with the same partners.
        deterministic: the most likely line instead of a sampled one.
        quiz: asks the agent about its persona after each dialogue; adds the metrics of
            quiz.evaluate_quiz.

    Raises:
        ValueError: if there are no personas to evaluate on.
    """
    ids = list(envs.unwrapped.persona_ids if personas is None else personas)  # type: ignore[attr-defined]
    if not ids or episodes_per_persona < 1:
        raise ValueError(
            f"Nothing to evaluate: {len(ids)} personas, {episodes_per_persona} episodes each."
        )
    wanted = ids * episodes_per_persona
    batches: list[tuple[RolloutBatch, int]] = []
    for start in range(0, len(wanted), envs.num_envs):
        chunk = wanted[start : start + envs.num_envs]
        filled = chunk + [chunk[0]] * (envs.num_envs - len(chunk))
        batch = collect_rollouts(
            envs,
            policy,
            seed=seed + start,
            options={"persona": filled},
            deterministic=deterministic,
            keep_tokens=False,
        )
        batches.append((batch, len(chunk)))
    spoken = [transcript for batch, kept in batches for transcript in batch.transcripts[:kept]]
    answered = {} if quiz is None else evaluate_quiz(policy, spoken, wanted, quiz, seed=seed)
    return _summary(batches, np.array(wanted), seed, answered)


def evaluate_steps(
    envs: VectorEnv[Any, Any, Any] | None,
    policy: Policy,
    log: str | Path | Iterable[LoggedDialogue],
    *,
    score: Score | None = None,
    seed: int = 0,
    deterministic: bool = False,
) -> StepEvaluation:
    """Let `policy` go on for one turn from every point of logged dialogues.

    The environment continues the logged history (`reset(options={"history": ...})`), the policy
    says the next line, the judge scores it. The logged lines before it are somebody else's, so
    this tells how good a line is where others have led, not where the policy leads itself. Every
    turn of a persona counts alike, so longer dialogues count more.

    Without an environment the policy sees the logged messages and `score` says what its line is
    worth; persona, partner and domain may be anything.

    Args:
        envs: a vector environment of PersonaDialogue-v0 that knows the logged personas; None =
            `score` is given.
        policy: anything with `predict`.
        log: held-out dialogues, or the file of a log; turns in which the agent spoke first are left
            out.
        score: gets records with "persona", "domain" and "messages" that end with the policy's line,
            and returns a reward for each, None where nobody can tell (as in logs.score_log).
        seed: of partner and sampling.
        deterministic: the most likely line instead of a sampled one.

    Raises:
        LogError: the file is no log.
        ValueError: if there is nothing to go on from, for an unknown persona, and for both or
            neither of `envs` and `score`.
    """
    if (envs is None) == (score is None):
        raise ValueError(
            "Who scores the lines? Give either a vector environment or score=, a function from "
            "dialogues to rewards."
        )
    known = None if envs is None else getattr(envs.unwrapped, "persona_ids", None)
    points = [
        _Point(number, dialogue, turn, opened_by_the_partner(history))
        for number, dialogue in enumerate(_known_dialogues(log, known))
        for turn in range(dialogue.num_turns)
        if (history := dialogue.history(turn)) and history[-1]["role"] == "user"
    ]
    if not points:
        raise ValueError("There is no logged turn to go on from.")
    reward_N, spoke_N = np.full(len(points), np.nan), np.zeros(len(points), dtype=bool)
    size = _STEPS_AT_ONCE if envs is None else envs.num_envs
    for start in range(0, len(points), size):
        chunk = points[start : start + size]
        filled = chunk + [chunk[0]] * (size - len(chunk))
        histories: Sequence[Messages] = [point.history for point in filled]
        if envs is not None:
            ids = [point.dialogue.persona for point in filled]
            options = {"persona": ids, "history": histories}
            histories = envs.reset(seed=seed + start, options=options)[0]
        speaker = speaker_for(policy, size, seed, start)
        lines = speaker.reply(histories, np.ones(size, dtype=bool), deterministic)
        said = tuple(line or "..." for line in lines)
        spoke_B = speaker.spoke_B[: len(chunk)]
        rewards = np.full(len(chunk), np.nan)
        if score is not None:
            about = [chunk[b].record(said[b]) for b in np.flatnonzero(spoke_B)]
            found = checked_scores(score, about) if about else []
            rewards[spoke_B] = [np.nan if reward is None else reward for reward in found]
        elif envs is not None:
            rewards[spoke_B] = envs.step(said)[1][: len(chunk)][spoke_B]
        spoke_N[start : start + len(chunk)] = spoke_B
        reward_N[start : start + len(chunk)] = rewards
    names, persona_N = np.unique([point.persona for point in points], return_inverse=True)
    logged_N = np.array([point.dialogue.reward_T[point.turn] for point in points])
    logged_N[np.isnan(reward_N)] = np.nan
    turn_N = np.array([point.turn for point in points])
    by_turn = [reward_N[turn_N == turn] for turn in range(turn_N.max() + 1)]
    means = _group_means(reward_N, persona_N)
    return StepEvaluation(
        reward=bootstrap_mean(means, seed),
        logged=bootstrap_mean(_group_means(logged_N, persona_N), seed),
        reward_T=np.array([_row_means(rewards[None])[0] for rewards in by_turn]),
        persona_reward=dict(zip(names.tolist(), means.tolist(), strict=True)),
        num_steps=int(spoke_N.sum()),
    )


_STEPS_AT_ONCE = 64


@dataclass(frozen=True)
class _Point:
    """Where in a logged dialogue the policy goes on."""

    number: int
    dialogue: LoggedDialogue
    turn: int
    history: Messages

    @property
    def persona(self) -> str:
        """Whose mean the turn belongs to: a persona's id or text, else a group or a dialogue."""
        first, group = self.dialogue.messages[0], self.dialogue.group
        told = first["content"] if first["role"] == "system" else ""
        alone = f"dialogue {self.number}" if group is None else f"group {group}"
        return self.dialogue.persona or told or alone

    def record(self, line: str) -> dict[str, Any]:
        """Return the dialogue as a record in which the policy's line is the last."""
        own = {"role": "assistant", "content": line}
        fields = {"persona": self.dialogue.persona, "domain": self.dialogue.domain}
        return {**fields, **self.dialogue.extra, "messages": [*self.history, own]}


def _known_dialogues(
    log: str | Path | Iterable[LoggedDialogue], known: Sequence[str] | None
) -> Iterator[LoggedDialogue]:
    """Yield the dialogues, as long as their personas are among those known; None = not told."""
    for number, dialogue in enumerate(
        read_log(log) if isinstance(log, str | Path) else log, start=1
    ):
        if known is not None and dialogue.persona not in known:
            near = difflib.get_close_matches(dialogue.persona, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Unknown persona id {dialogue.persona!r} in dialogue {number}.{hint} The "
                f"environment has {len(known)} personas: make it with those of the log, "
                "personas='all' for the bundled ones of every split, or the path of a persona file."
            )
        yield dialogue


def _summary(
    batches: Sequence[tuple[RolloutBatch, int]],
    persona_E: np.ndarray,
    seed: int,
    answered: Mapping[str, np.ndarray],
) -> Evaluation:
    num_turns = max(batch.reward_BT.shape[1] for batch, _ in batches)

    def gather(arrays: Sequence[np.ndarray]) -> np.ndarray:
        rows = [
            np.pad(
                array[:kept].astype(float),
                ((0, 0), (0, num_turns - array.shape[1])),
                constant_values=np.nan,
            )
            for array, (_, kept) in zip(arrays, batches, strict=True)
        ]
        return np.concatenate(rows)

    reward_ET = gather([np.where(b.alive_BT, b.reward_BT, np.nan) for b, _ in batches])
    columns = {"reward": _row_means(reward_ET), "drift": drift_slopes(reward_ET)}
    parts = {name: gather([b.part_BT[name] for b, _ in batches]) for name in batches[0][0].part_BT}
    columns |= {name: _row_means(part_ET) for name, part_ET in parts.items()}
    if "prompt_to_line" in parts:
        columns["prompt_to_line_drift"] = drift_slopes(parts["prompt_to_line"])
    if "well_formed" in columns:
        columns["degenerate_rate"] = 1.0 - columns.pop("well_formed")
    columns |= answered

    names, by_persona = np.unique(persona_E, return_inverse=True)
    means = {name: _group_means(column, by_persona) for name, column in columns.items()}
    kept = [(b, row) for b, number in batches for row in range(number)]
    return Evaluation(
        metrics={name: bootstrap_mean(column, seed) for name, column in means.items()},
        reward_T=_row_means(reward_ET.T),
        part_T={name: _row_means(part_ET.T) for name, part_ET in parts.items()},
        by_persona={
            metric: dict(zip(names.tolist(), column.tolist(), strict=True))
            for metric, column in means.items()
        },
        records=[record for b, number in batches for record in b.records(number)],
        transcripts=[b.transcripts[row] for b, row in kept],
        transcript_rewards=[b.reward_BT[row][b.alive_BT[row]].tolist() for b, row in kept],
        boundaries=batches[0][0].boundaries,
        num_tokens=sum(b.num_tokens for b, _ in batches),
        seconds=sum(b.seconds for b, _ in batches),
    )


def _row_means(value_EX: np.ndarray) -> np.ndarray:
    counted_EX = ~np.isnan(value_EX)
    with np.errstate(invalid="ignore"):
        return np.where(counted_EX, value_EX, 0.0).sum(axis=1) / counted_EX.sum(axis=1)


def _group_means(value_E: np.ndarray, group_E: np.ndarray) -> np.ndarray:
    counted_E = ~np.isnan(value_E)
    total = np.bincount(group_E, weights=np.where(counted_E, value_E, 0.0))
    with np.errstate(invalid="ignore"):
        return total / np.bincount(group_E, weights=counted_E)
