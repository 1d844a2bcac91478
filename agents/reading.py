"""Logged dialogues as the tape that a policy would have left had it said these lines itself.

Lines come as the ids that were sampled, where the log has them and the tokenizer is the same;
otherwise they are tokenised once, with the blanks and the end mark that the chat template puts
around a line. One token sequence holds a dialogue where the template only appends, else each turn
starts a new one, as in conversation.py.

Thoughts in a text (all up to its last "</think>") belong to its line and are in nobody's sight
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .chat_format import ChatFormat
from .decoding import pad_rows
from .lm_policy import LMPolicy
from .logs import OPENING as OPENING
from .logs import LogError, Trajectory, opened_by_the_partner
from .policy import Messages
from .tape import Tape

_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"


def read_dialogues(
    policy: LMPolicy, trajectories: Sequence[Trajectory], tokenise_again: bool = False
) -> Tape:
    """Return the tape of logged dialogues; of turns that the context has no room for, nothing.

    Args:
        policy: whose chat template and tokenizer.
        trajectories: B dialogues.
        tokenise_again: make new ids from the texts where the logged ones belong to another
            tokenizer, instead of refusing; their log-probabilities are lost.

    Raises:
        LogError: logged ids belong to another tokenizer.
    """
    rows: list[_Row] = []
    truncated_B = np.zeros(len(trajectories), dtype=bool)
    spelling = _spelling(policy)
    for b, trajectory in enumerate(trajectories):
        stored = usable_ids(policy, trajectory, tokenise_again)
        dialogue = _read(policy, trajectory, b, stored, spelling)
        rows += dialogue
        spoken = {turn for row in dialogue for turn in row.turns if turn >= 0}
        truncated_B[b] = len(spoken) < trajectory.num_turns
    longest = max((trajectory.num_turns for trajectory in trajectories), default=0)
    return Tape(
        token_SL=pad_rows([row.ids for row in rows], policy.format.pad_id, np.int64),
        turn_SL=pad_rows([row.turns for row in rows], -1, np.int64),
        old_logprob_SL=pad_rows([row.logprobs for row in rows], 0.0, np.float32),
        length_S=np.array([len(row.ids) for row in rows], dtype=np.int64),
        episode_S=np.array([row.episode for row in rows], dtype=np.int64),
        cut_BT=np.zeros((len(trajectories), longest), dtype=bool),
        truncated_B=truncated_B,
    )


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
    spelling: _Spelling,
) -> list[_Row]:
    """Return the dialogue's sequences, up to the turn that no longer fits the context."""
    form, limit = policy.format, policy.network.context_length
    appends = goes_on = policy.sequences != "turn" and form.append_only
    messages = _without_thoughts(opened_by_the_partner(trajectory.messages))
    lines = trajectory.lines
    at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    rows: list[_Row] = []
    mark: str | None = None
    for turn, position in enumerate(at):
        ids = _line_ids(form, lines[turn], spelling) if stored is None else list(stored[turn])
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


def usable_ids(
    policy: LMPolicy, trajectory: Trajectory, tokenise_again: bool
) -> Sequence[Sequence[int]] | None:
    """Return the ids that were sampled, None if the texts have to be tokenised.

    Raises:
        LogError: as `read_dialogues`.
    """
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


def _without_thoughts(messages: Messages) -> Messages:
    """Return the dialogue as its partner heard it."""
    return [
        {**message, "content": message["content"].rpartition(_END_OF_THOUGHT)[2].lstrip()}
        if message["role"] == "assistant" and _END_OF_THOUGHT in message["content"]
        else message
        for message in messages
    ]


@dataclass(frozen=True)
class _Spelling:
    """How a chat template writes a line."""

    before: str
    """Blanks between the prompt and the line."""
    after: str
    """Blanks between the line and its end mark."""
    trims: bool
    """Whether blanks around the line are left out."""


def _spelling(policy: LMPolicy) -> _Spelling:
    form, line = policy.format, "qXoWnLiNeXq"

    def written(text: str) -> str:
        own = {"role": "assistant", "content": text}
        return form.render([*chat, own, {"role": "user", "content": "Yes."}], prompt=False)

    chat = [{"role": "user", "content": "Hello."}]
    prompt = form.render(chat)
    before, _, after = written(line).partition(line)
    before = before[len(prompt) :] if before.startswith(prompt) else ""
    mark = (policy.sampler.mark_at_end(form.line_ids(line)) or "").strip()
    ends = bool(mark) and after.lstrip().startswith(mark)
    return _Spelling(
        before="" if before.strip() else before,
        after=after[: -len(after.lstrip())] if ends else "",
        trims=written(f" {line} ") == written(line),
    )


def _line_ids(form: ChatFormat, text: str, spelling: _Spelling) -> list[int]:
    """Return the ids of a line that is known as text."""
    thought, has_thought, said = text.rpartition(_END_OF_THOUGHT)
    if has_thought and form.opens_thought:
        thought = thought.rpartition(_THOUGHT)[2].strip("\n")
        return [*form.encode(thought), *form.line_ids(said.strip())]
    if has_thought and _END_OF_THOUGHT in form.tokenizer.all_special_tokens:
        text = said.lstrip()  # the marks would be left out, and the thought said aloud
    if spelling.trims:
        text = text.strip()
    return form.line_ids(f"{spelling.before}{text}{spelling.after}")
