"""B dialogues that a model holds side by side, and the token record they leave behind.

Where the chat template only appends, a dialogue is one token sequence: the prompt, then own lines
and the template's tails with the partner's answers, as sampled and never tokenised again. Where the
template rewrites what was said (it drops thoughts, say), the next turn starts a new sequence from
what the model is then shown; the keys and values of the tokens that stayed the same are kept.

Dimension letters: B dialogues, S sequences, T turns, L tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .decoding import pad_rows
from .policy import Messages
from .sampling import Line, Sampler
from .tape import Tape


@dataclass
class _Sequence:
    """One token sequence under way; `num_read` of its tokens are in the decoder."""

    episode: int
    ids: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_read: int = 0

    def append_forced(self, ids: Sequence[int]) -> None:
        self.ids.extend(ids)
        self.turns.extend([-1] * len(ids))
        self.logprobs.extend([0.0] * len(ids))

    def append_line(self, line: Line, turn: int) -> None:
        # All has been read but the line's last token, which no next token was asked for.
        self.num_read = len(self.ids) + len(line.ids) - 1
        self.ids.extend(line.ids)
        self.turns.extend([turn] * len(line.ids))
        self.logprobs.extend(line.logprobs)


class Conversation:
    """B dialogues that a policy holds side by side; made by `LMPolicy.begin`, one `reply` per turn.

    The policy's weights must not change while a conversation is under way: the cache would be
    stale.

    Args:
        sampler: how lines are drawn.
        rngs: one generator per dialogue.
        new_sequence_each_turn: start a new sequence each turn even where the template only appends.
        announce: called when the first sequence is broken off.
    """

    def __init__(
        self,
        sampler: Sampler,
        rngs: Sequence[np.random.Generator],
        new_sequence_each_turn: bool = False,
        announce: Callable[[], None] | None = None,
    ) -> None:
        size = len(rngs)
        self._sampler = sampler
        self._rngs = rngs
        self._announce = announce
        self._decoder = sampler.network.decoder(size)
        self._appends = not new_sequence_each_turn and sampler.format.append_only
        self._sequences: list[_Sequence] = []
        self._current: list[_Sequence | None] = [None] * size
        self._last_line: list[Line | None] = [None] * size
        self._num_messages = [0] * size
        self._cuts: list[np.ndarray] = []
        self._truncated_B = np.zeros(size, dtype=bool)
        self._spoke_B = np.zeros(size, dtype=bool)

    @property
    def truncated_B(self) -> np.ndarray:
        """Whether each dialogue was stopped by the model's context length; a copy."""
        return self._truncated_B.copy()

    @property
    def spoke_B(self) -> np.ndarray:
        """Whether each dialogue had a line in the last turn, be it an empty one; a copy."""
        return self._spoke_B.copy()

    @torch.inference_mode()
    def reply(
        self,
        observations: Sequence[Messages],
        active_B: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> list[str]:
        """Return the next line of every active dialogue, "" for the rest and when out of context.

        Args:
            observations: B dialogues so far, each ending with the partner's message.
            active_B: which dialogues go on; default all.
            deterministic: take the most likely token each time.

        Raises:
            ValueError: if an observation does not go on from the one before.
        """
        size = len(self._rngs)
        if len(observations) != size:
            raise ValueError(f"This conversation holds {size} dialogues, got {len(observations)}.")
        active = range(size) if active_B is None else np.flatnonzero(active_B).tolist()
        self._sampler.network.model.eval()

        unread: dict[int, Sequence[int]] = {}
        rooms: dict[int, int] = {}
        for row in active:
            if self._truncated_B[row]:
                continue
            self._check_continues(row, observations[row])
            sequence, forced = self._next(row, observations[row])
            room = self._sampler.room(len(sequence.ids) + len(forced))
            if room < 1:
                self._truncated_B[row] = True
                continue
            self._go_on(row, sequence, forced)
            self._num_messages[row] = len(observations[row])
            unread[row], rooms[row] = sequence.ids[sequence.num_read :], room

        lines: dict[int, Line] = {}
        if unread:
            lines = self._sampler.lines(self._decoder, unread, rooms, self._rngs, deterministic)
        self._record(lines, rooms)
        return [lines[row].text if row in lines else "" for row in range(size)]

    def tape(self) -> Tape:
        """Return the token record of all turns so far."""
        size = len(self._rngs)
        kept = sorted(self._sequences, key=lambda sequence: sequence.episode)
        return Tape(
            token_SL=pad_rows([s.ids for s in kept], self._sampler.format.pad_id, np.int64),
            turn_SL=pad_rows([s.turns for s in kept], -1, np.int64),
            old_logprob_SL=pad_rows([s.logprobs for s in kept], 0.0, np.float32),
            length_S=np.array([len(s.ids) for s in kept], dtype=np.int64),
            episode_S=np.array([s.episode for s in kept], dtype=np.int64),
            cut_BT=np.array(self._cuts, dtype=bool).reshape(len(self._cuts), size).T,
            truncated_B=self.truncated_B,
        )

    def _next(self, row: int, messages: Messages) -> tuple[_Sequence, Sequence[int]]:
        """Return the sequence that this turn belongs to and the forced ids that it adds."""
        form, sequence, line = self._sampler.format, self._current[row], self._last_line[row]
        if sequence is None or line is None:
            return _Sequence(row), form.prompt_ids(messages)
        if self._appends and not line.has_thoughts:
            return sequence, form.tail(messages[-1]["content"], line.mark or "")
        prompt = form.prompt_ids(messages)
        read = sequence.ids[: sequence.num_read]
        return _Sequence(row, num_read=_shared(read, prompt[:-1])), prompt

    def _go_on(self, row: int, sequence: _Sequence, forced: Sequence[int]) -> None:
        if sequence is not self._current[row]:
            if self._current[row] is not None:
                self._decoder.rewind(row, sequence.num_read)
                if self._announce is not None:
                    self._announce()
            self._sequences.append(sequence)
            self._current[row] = sequence
        sequence.append_forced(forced)

    def _check_continues(self, row: int, messages: Messages) -> None:
        if not messages or messages[-1]["role"] != "user":
            raise ValueError(
                f"The observation of dialogue {row} must end with the partner's message (role "
                "'user') for the agent to speak; inactive dialogues are named by active_B."
            )
        expected = self._num_messages[row] + 2
        if self._num_messages[row] and len(messages) != expected:
            raise ValueError(
                f"The observation of dialogue {row} has {len(messages)} messages where the next "
                f"turn has {expected}; call begin() again after the environment was reset."
            )

    def _record(self, lines: dict[int, Line], rooms: dict[int, int]) -> None:
        turn = len(self._cuts)
        cut_B = np.zeros(len(self._rngs), dtype=bool)
        for row, line in lines.items():
            sequence = self._current[row]
            assert sequence is not None
            sequence.append_line(line, turn)
            self._last_line[row] = line
            cut_B[row] = line.mark is None
            cut_by_context = rooms[row] < self._sampler.max_new_tokens
            self._truncated_B[row] = line.mark is None and cut_by_context
        self._cuts.append(cut_B)
        self._spoke_B = np.isin(np.arange(len(self._rngs)), list(lines))


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))
