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
from .logs import LogError, LoggedDialogue, opened_by_the_partner
from .policy import Messages
from .tape import Tape

_NOTHING = "..."  # what the environment hears of a line that says nothing aloud, see sampling.py
_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"


def read_dialogues(
    policy: LMPolicy, dialogues: Sequence[LoggedDialogue], tokenise_again: bool = False
) -> Tape:
    """Return the tape of logged dialogues; of turns that the context has no room for, nothing.

    Args:
        policy: whose chat template and tokenizer.
        dialogues: B of them, which `refuse_unreadable` lets pass.
        tokenise_again: make new ids from the texts where the logged ones are of no use; their
            log-probabilities are lost.
    """
    rows: list[_Row] = []
    truncated_B = np.zeros(len(dialogues), dtype=bool)
    spelling = _spelling(policy)
    for b, dialogue in enumerate(dialogues):
        stored = stored_ids(policy, dialogue, tokenise_again)
        own_rows = _read(policy, dialogue, b, stored, spelling)
        rows += own_rows
        spoken = {turn for row in own_rows for turn in row.turns if turn >= 0}
        truncated_B[b] = len(spoken) < dialogue.num_turns
    longest = max((dialogue.num_turns for dialogue in dialogues), default=0)
    return Tape(
        token_SL=pad_rows([row.ids for row in rows], policy.format.pad_id, np.int64),
        turn_SL=pad_rows([row.turns for row in rows], -1, np.int64),
        old_logprob_SL=pad_rows([row.logprobs for row in rows], 0.0, np.float32),
        length_S=np.array([len(row.ids) for row in rows], dtype=np.int64),
        episode_S=np.array([row.episode for row in rows], dtype=np.int64),
        cut_BT=np.zeros((len(dialogues), longest), dtype=bool),
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
    dialogue: LoggedDialogue,
    episode: int,
    stored: Sequence[Sequence[int]] | None,
    spelling: _Spelling,
) -> list[_Row]:
    """Return the dialogue's sequences, up to the turn that no longer fits the context."""
    form, limit = policy.format, policy.network.context_length
    appends = goes_on = policy.sequences != "turn" and form.append_only
    messages = _without_thoughts(opened_by_the_partner(dialogue.messages))
    lines = dialogue.lines
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
        logprobs = None if stored is None or dialogue.logprobs is None else dialogue.logprobs
        row.add(ids, turn, None if logprobs is None else list(logprobs[turn]))
        mark = policy.sampler.mark_at_end(ids)
        # A thought was in the model's sight while it spoke and is in nobody's afterwards.
        goes_on = appends and not policy.sampler.has_thoughts(ids)
    return rows


def stored_ids(
    policy: LMPolicy, dialogue: LoggedDialogue, tokenise_again: bool = False
) -> Sequence[Sequence[int]] | None:
    """Return the ids that were sampled; None if there are none, or they are not to be used."""
    if dialogue.token_ids is None or (
        tokenise_again and _why_unusable(policy, dialogue, dialogue.token_ids)
    ):
        return None
    return dialogue.token_ids


def refuse_unreadable(
    policy: LMPolicy, dialogue: LoggedDialogue, place: str, tokenise_again: bool = False
) -> None:
    """Check that a policy can read a logged dialogue; `place` says in errors where it stands.

    Raises:
        LogError: a text cannot be tokenised, or logged ids belong to another tokenizer, are not in
            the vocabulary, or say something else than the logged line.
    """
    for message in dialogue.messages:
        if not _is_unicode(message["content"]):
            raise LogError(
                f"{place}: a line of {message['role']!r} holds half a character (a lone surrogate),"
                " which no tokenizer reads; write the whole character, or take it out "
                f"({message['content']!r:.80})."
            )
    if dialogue.token_ids is None or tokenise_again:
        return
    why = _why_unusable(policy, dialogue, dialogue.token_ids)
    if why:
        raise LogError(
            f"{place}: {why}. Learn with the model that spoke, or set tokenise_again, which uses "
            "the texts and no logged log-probabilities."
        )


def _why_unusable(
    policy: LMPolicy, dialogue: LoggedDialogue, token_ids: Sequence[Sequence[int]]
) -> str:
    """Return why logged ids are not those of the logged lines for this policy, "" if they are."""
    if dialogue.tokenizer != policy.tokenizer_fingerprint:
        return (
            "logged as ids of the tokenizer "
            f"{dialogue.tokenizer or 'of an unknown model'}, {policy.name} has "
            f"{policy.tokenizer_fingerprint}: the ids mean other words"
        )
    embeddings = policy.model.get_input_embeddings()
    size, largest = int(embeddings.num_embeddings), max(map(max, token_ids))
    if largest >= size:
        return f"token id {largest}, and {policy.name} knows {size} tokens"
    for turn, (ids, line) in enumerate(zip(token_ids, dialogue.lines, strict=True)):
        said = _said_aloud(policy, ids)
        if (said or _NOTHING) != (_aloud(line) or _NOTHING):
            return f"the ids of line {turn} say {said!r:.80}, the log has {line!r:.80}"
    return ""


def _said_aloud(policy: LMPolicy, ids: Sequence[int]) -> str:
    """Return what the environment heard of a line of these ids, see sampling.py."""
    form = policy.format
    silent = form.silent_ids | policy.sampler.end_ids
    text = form.tokenizer.decode(
        [token for token in ids if token not in silent], clean_up_tokenization_spaces=False
    )
    text = str(text).replace("\0", "")
    if form.text_mark is not None:
        text = text.rstrip().removesuffix(form.text_mark)
    if form.opens_thought and _END_OF_THOUGHT not in text:
        return ""
    return _aloud(text)


def _aloud(text: str) -> str:
    """Return a line without thoughts and without blanks around it."""
    return text.rpartition(_END_OF_THOUGHT)[2].partition(_THOUGHT)[0].strip()


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


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
