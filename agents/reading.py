"""Logged dialogues as the tape that a policy would have left had it said these lines itself.

Lines come as the ids that were sampled, where the log has them and the tokenizer is the same;
otherwise they are tokenised once, with the end mark that the chat template puts behind a line. One
token sequence holds a dialogue where the template only appends, else each turn starts a new one, as
in conversation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decoding import pad_rows
from .lm_policy import LMPolicy
from .logs import LogError, Trajectory
from .policy import Messages
from .tape import Tape

OPENING = "(You begin.)"
"""Stands for the partner's first line where the agent spoke first: chat templates want one."""


@dataclass(frozen=True)
class Reading:
    """B logged dialogues as token sequences.

    Attributes:
        tape: their tokens; of turns that the model's context has no room for there are none.
        has_logprobs_B: whether the log tells how likely the lines were when they were sampled.
    """

    tape: Tape
    has_logprobs_B: np.ndarray


def read_dialogues(
    policy: LMPolicy, trajectories: Sequence[Trajectory], tokenise_again: bool = False
) -> Reading:
    """Return the tape of logged dialogues.

    Args:
        policy: whose chat template and tokenizer.
        trajectories: B dialogues.
        tokenise_again: make new ids from the texts where the logged ones belong to another
            tokenizer, instead of refusing; their log-probabilities are lost.

    Raises:
        LogError: logged ids belong to another tokenizer.
    """
    rows: list[_Row] = []
    cuts, known = [], []
    truncated_B = np.zeros(len(trajectories), dtype=bool)
    for b, trajectory in enumerate(trajectories):
        stored = _stored(policy, trajectory, tokenise_again)
        known.append(stored is not None and trajectory.logprobs is not None)
        dialogue = _read(policy, trajectory, b, stored)
        rows += dialogue
        cuts.append(trajectory.num_turns)
        spoken = {turn for row in dialogue for turn in row.turns if turn >= 0}
        truncated_B[b] = len(spoken) < trajectory.num_turns
    tape = Tape(
        token_SL=pad_rows([row.ids for row in rows], policy.format.pad_id, np.int64),
        turn_SL=pad_rows([row.turns for row in rows], -1, np.int64),
        old_logprob_SL=pad_rows([row.logprobs for row in rows], 0.0, np.float32),
        length_S=np.array([len(row.ids) for row in rows], dtype=np.int64),
        episode_S=np.array([row.episode for row in rows], dtype=np.int64),
        cut_BT=np.zeros((len(trajectories), max(cuts, default=0)), dtype=bool),
        truncated_B=truncated_B,
    )
    return Reading(tape, np.array(known, dtype=bool))


@dataclass
class _Row:
    """One token sequence under way."""

    episode: int
    ids: list[int]
    turns: list[int]
    logprobs: list[float]

    def add(self, ids: Sequence[int], turn: int, logprobs: Sequence[float] | None = None) -> None:
        self.ids += ids
        self.turns += [turn] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


def _read(
    policy: LMPolicy,
    trajectory: Trajectory,
    episode: int,
    stored: Sequence[Sequence[int]] | None,
) -> list[_Row]:
    """Return the dialogue's sequences, up to the turn that no longer fits the context."""
    form, limit = policy.format, policy.network.context_length
    appends = goes_on = policy.sequences != "turn" and form.append_only
    messages = _opened_by_the_partner(trajectory.messages)
    at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    rows: list[_Row] = []
    mark: str | None = None
    for turn, position in enumerate(at):
        text = messages[position]["content"]
        ids = form.line_ids(text) if stored is None else list(stored[turn])
        if rows and goes_on:
            row = rows[-1]
            forced: Sequence[int] = form.tail(messages[position - 1]["content"], mark or "")
        else:
            row, forced = _Row(episode, [], [], []), form.prompt_ids(messages[:position])
        if limit is not None and len(row.ids) + len(forced) + len(ids) > limit:
            break
        if not row.ids:
            rows.append(row)
        row.add(forced, -1)
        logprobs = None if stored is None or trajectory.logprobs is None else trajectory.logprobs
        row.add(ids, turn, None if logprobs is None else list(logprobs[turn]))
        mark = policy.sampler.mark_at_end(ids)
        # A thought was in the model's sight while it spoke and is in nobody's afterwards.
        goes_on = appends and not policy.sampler.has_thoughts(ids)
    return rows


def _stored(
    policy: LMPolicy, trajectory: Trajectory, tokenise_again: bool
) -> Sequence[Sequence[int]] | None:
    """Return the ids that were sampled, None if the texts have to be tokenised."""
    if trajectory.token_ids is None:
        return None
    if trajectory.tokenizer == policy.tokenizer_fingerprint:
        return trajectory.token_ids
    if tokenise_again:
        return None
    raise LogError(
        f"The dialogue of persona {trajectory.persona!r} was logged as ids of the tokenizer "
        f"{trajectory.tokenizer or 'of an unknown model'}, {policy.name} has "
        f"{policy.tokenizer_fingerprint}: the ids mean other words. Learn with the model that "
        "spoke, or set tokenise_again, which uses the texts and no logged log-probabilities."
    )


def _opened_by_the_partner(messages: Messages) -> Messages:
    """Return the dialogue with a first line of the partner where the agent spoke first."""
    first = 1 if messages[0]["role"] == "system" else 0
    if messages[first]["role"] == "user":
        return messages
    opening = {"role": "user", "content": OPENING}
    return [*messages[:first], opening, *messages[first:]]
