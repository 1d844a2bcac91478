"""A chat template as token ids: the whole prompt, and the tail that a later turn appends."""

from __future__ import annotations

import json
import re
from functools import cached_property, lru_cache
from hashlib import sha256

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from .policy import Message, Messages


class ChatFormat:
    """A chat template in ids: the whole prompt, and the tail that a later turn appends.

    The tail is everything between the agent's own line and its next one: the rest of the template
    after the own line, the partner's message and the generation prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        require_chat_template(tokenizer, name)
        special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))
        self.takes_system = self._accepts_system_messages()
        self.prompt = lru_cache(maxsize=4096)(self._prompt)
        self.tail = lru_cache(maxsize=4096)(self._tail)

    @property
    def pad_id(self) -> int:
        """A valid id to fill up rows with; no result depends on it."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the tokenizer's entries."""
        entries = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return sha256(entries.encode()).hexdigest()[:16]

    def line_ids(self, text: str) -> list[int]:
        """Return the ids of a whole line of the agent, end mark included, as training reads it."""
        said = self._special.sub("", text)
        if self.opens_thought:  # nothing was thought
            said = f"\n</think>\n\n{said}"
        if self._mark_token is not None:
            return [*self.encode(said), self._mark_token]
        if self.text_mark is not None:
            return self.encode(said + self.text_mark)
        return [*self.encode(said), int(self.tokenizer.eos_token_id)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as it stands: no start token, no end token."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def render(self, messages: Messages, prompt: bool = True) -> str:
        """Return the text of these messages and, with `prompt`, the start of the agent's line.

        Special tokens in what was said are left out: nobody can end a turn by naming its mark.
        """
        chat = [
            {"role": message["role"], "content": self._special.sub("", message["content"])}
            for message in messages
        ]
        if not self.takes_system:
            chat = _fold_system(chat)
        return str(
            self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        )

    def prompt_ids(self, messages: Messages) -> tuple[int, ...]:
        """Return the ids of the prompt for the next line; remembered, since groups share it."""
        return self.prompt(tuple((message["role"], message["content"]) for message in messages))

    def _prompt(self, messages: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        return tuple(
            self.encode(self.render([{"role": role, "content": text} for role, text in messages]))
        )

    def _tail(self, partner_text: str, said: str = "") -> tuple[int, ...]:
        """Return the tail's ids; without the template's end mark if that is `said` by the line."""
        text = self._tail_text(partner_text)
        begun = text.lstrip()  # some templates set a blank before their mark
        for mark in (said, said.rstrip()):
            if mark and begun.startswith(mark):
                return self._after(mark, begun[len(mark) :])
        return self._after(self.tokenizer.eos_token, text)

    def _after(self, mark: str, text: str) -> tuple[int, ...]:
        """Return the ids of text that goes on in the middle of a dialogue, after an end mark.

        Some tokenizers put a blank before the first word of a text, some marks swallow a blank
        behind them: hence the mark is encoded too and taken off again.
        """
        before, ids = self.encode(mark), self.encode(mark + text)
        if ids[: len(before)] == before:
            return tuple(ids[len(before) :])
        # The mark's last letters and the text's first ones would be one token.
        end = self.tokenizer.eos_token
        return self._after(end, text) if mark != end else tuple(self.encode(text))

    def _tail_text(self, partner_text: str) -> str:
        mark = "qXoWnLiNeXq"
        rendered = self.render(
            [*_chat("Be kind.", "Hello."), _say("assistant", mark), _say("user", partner_text)]
        )
        _, found, tail = rendered.partition(mark)
        if not found:
            raise ValueError(
                f"The chat template of {self.name} leaves out the agent's own earlier lines, so "
                "no dialogue of several turns can be written with it; use a model with another "
                "chat template."
            )
        return tail

    @cached_property
    def append_only(self) -> bool:
        """Whether a later prompt is the earlier one, the own line and the tail, no more."""
        chat = _chat("Be kind.", "How are you?")
        rendered = self.render(chat)
        for turn, reply in enumerate(("Fine, thanks.", "It sleeps.", "No.") * 4):
            answer = f"And the dog, number {turn}?"
            chat += [_say("assistant", reply), _say("user", answer)]
            longer = self.render(chat)
            end = reply + self._tail_text(answer)
            if not (longer.startswith(rendered) and longer[len(rendered) :].endswith(end)):
                return False
            # Some templates set a blank before a line; the model says that blank itself.
            if longer[len(rendered) : len(longer) - len(end)].strip():
                return False
            rendered = longer
        return True

    @cached_property
    def opens_thought(self) -> bool:
        """Whether the prompt itself opens a thought, so that every line starts with one."""
        return self.render(_chat("Be kind.", "Hello.")).rstrip().endswith("<think>")

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokenizer's end token, and the template's end mark where that is a special token."""
        eos, mark = int(self.tokenizer.eos_token_id), self._mark_token
        return frozenset({eos} if mark is None else {eos, mark})

    @cached_property
    def text_mark(self) -> str | None:
        """The template's end mark where that is plain text, which a model may split as it likes."""
        return (self._mark_text or None) if self._mark_token is None else None

    @cached_property
    def silent_ids(self) -> frozenset[int]:
        """Special tokens, which no line says aloud; the marks of a thought are looked for."""
        marks = {self.tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>")}
        return frozenset(self.tokenizer.all_special_ids) - marks

    @cached_property
    def _mark_text(self) -> str:
        """What the template puts right after a line when nothing follows, without blanks."""
        line = "qXoWnLiNeXq"
        chat = [*_chat("Be kind.", "Hello."), _say("assistant", line)]
        try:
            return self.render(chat, prompt=False).rpartition(line)[2].strip()
        except TemplateError:  # a template that wants the partner to have the last word
            return ""

    @cached_property
    def _mark_token(self) -> int | None:
        """The end mark where that is one token that no other text can be part of."""
        ids = self.encode(self._mark_text)
        return ids[0] if len(ids) == 1 and ids[0] in self.tokenizer.added_tokens_decoder else None

    def _accepts_system_messages(self) -> bool:
        self.takes_system = True
        try:
            return "qSyStEmXq" in self.render(_chat("qSyStEmXq", "Hello."))
        except TemplateError:
            return False


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _chat(system: str, opening: str) -> list[Message]:
    return [_say("system", system), _say("user", opening)]


def _fold_system(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the chat with a leading system message put at the head of the first user message."""
    if len(chat) < 2 or chat[0]["role"] != "system" or chat[1]["role"] != "user":
        return chat
    return [_say("user", f"{chat[0]['content']}\n\n{chat[1]['content']}"), *chat[2:]]


def require_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError if the tokenizer lacks a chat template or an end token."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"The tokenizer in {name} has no chat template, so dialogues cannot be written as "
            "tokens. Use an instruction-tuned model, or set tokenizer.chat_template and save the "
            "tokenizer again."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer in {name} has no end token (eos_token), so a line would never end. Set "
            "tokenizer.eos_token to the token that ends a message in its chat template."
        )
