"""One dialogue as one token sequence that only grows, spoken by a model that runs elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..chat_format import ChatFormat
from ..policy import Messages
from ..sampling import Sampler


class LineReader(Sampler):
    """Writes prompts as ids and says what sampled ids mean; it draws none itself.

    Args:
        tokenizer: has a chat template that only appends, whose end mark is one token.
        engine: who draws the tokens, for messages.
        stops_at: the tokens at which the engine ends a line; None = those that it is told to.

    Raises:
        ValueError: no chat template or end token; a template that rewrites what was said, or whose
            end mark the engine does not stop at.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        engine: str,
        stops_at: Collection[int] | None = None,
    ) -> None:
        name = tokenizer.name_or_path or "this tokenizer"
        chat_format = ChatFormat(tokenizer, name)
        ends = chat_format.end_ids if stops_at is None else stops_at
        elsewhere: Any = SimpleNamespace(
            model=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=list(ends)))
        )
        super().__init__(elsewhere, chat_format, max_new_tokens=1)
        if not chat_format.append_only:
            raise ValueError(
                f"The chat template of {name} rewrites what was said before, but {engine} trains "
                "on one token sequence a dialogue. Use a template that only appends, or PPGAgent."
            )
        if chat_format.text_mark is not None:
            raise ValueError(
                f"The chat template of {name} ends a line with {chat_format.text_mark!r}, which is "
                f"no single token, so {engine} would not stop there. Use a template whose end mark "
                "is a special token, or PPGAgent."
            )
        if missing := chat_format.end_ids - set(ends):
            marks = tokenizer.convert_ids_to_tokens(sorted(missing))
            raise ValueError(
                f"The chat template of {name} ends a line with {marks[0]!r}, at which {engine} "
                f"does not stop: set tokenizer.eos_token = {marks[0]!r}, or name it in "
                "model.generation_config.eos_token_id."
            )

    def text(self, ids: list[int]) -> str:
        """Return what a line says aloud: no end mark, special tokens or thoughts."""
        [(text, _)] = self._said([self._before_end_token(ids)])
        return text


@dataclass
class DialogueTokens:
    """What the model read and said, in order; nothing is ever tokenised again.

    Thoughts that a line holds stay where they were sampled, whatever the template would make of
    them in a later prompt.
    """

    reader: LineReader
    ids: list[int] = field(default_factory=list)
    """All tokens so far."""
    turns: list[int] = field(default_factory=list)
    """The turn that spoke each token, -1 for those that are not the agent's."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token where the engine told, 0 elsewhere."""
    prompt_length: int = 0
    """How many tokens were read before the first line."""
    num_turns: int = 0
    """Lines said so far."""
    _last_line: list[int] = field(default_factory=list)

    def unread(self, messages: Messages) -> list[int]:
        """Return the ids that the observation adds before the next line: prompt, or tail."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError(
                "An observation must end with the partner's message (role 'user') for the agent to "
                f"speak; got {messages!r:.80}"
            )
        if self.num_turns == 0:
            return list(self.reader.format.prompt_ids(messages))
        mark = self.reader.mark_at_end(self._last_line) or ""
        return list(self.reader.format.tail(messages[-1]["content"], mark))

    def read(self, ids: Sequence[int]) -> None:
        """Append tokens that are not the agent's."""
        self._append(ids, -1, [0.0] * len(ids))
        if self.num_turns == 0:
            self.prompt_length = len(self.ids)

    def say(self, ids: list[int], logprobs: Sequence[float] | None = None) -> str:
        """Append a line of the agent and return what it says aloud."""
        self._append(ids, self.num_turns, logprobs or [0.0] * len(ids))
        self._last_line = ids
        self.num_turns += 1
        return self.reader.text(ids)

    def _append(self, ids: Sequence[int], turn: int, logprobs: Sequence[float]) -> None:
        self.ids.extend(ids)
        self.turns.extend([turn] * len(ids))
        self.logprobs.extend(logprobs)
