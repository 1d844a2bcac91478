"""A chat template as token ids: the whole prompt, and the tail that a later turn appends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

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
        self.takes_system = self._accepts_system_messages()
        self.prompt = lru_cache(maxsize=4096)(self._prompt)
        self.tail = lru_cache(maxsize=4096)(self._tail)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as it stands: no start token, no end token."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def render(self, messages: Messages) -> str:
        """Return the prompt text for the agent's next line."""
        chat = [dict(message) for message in messages]
        if not self.takes_system:
            chat = _fold_system(chat)
        return str(
            self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        )

    def prompt_ids(self, messages: Messages) -> tuple[int, ...]:
        """Return the ids of the prompt for the next line; remembered, since groups share it."""
        return self.prompt(tuple((message["role"], message["content"]) for message in messages))

    def _prompt(self, messages: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        return tuple(
            self.encode(self.render([{"role": role, "content": text} for role, text in messages]))
        )

    def _tail(self, partner_text: str) -> tuple[int, ...]:
        """Return the tail's ids; they begin with the template's own end token where it has one."""
        text = self._tail_text(partner_text)

        # Some tokenizers put a blank before the first word of a text: an end token in front takes
        # its place.
        anchor = self.tokenizer.eos_token_id
        ids = self.encode(self.tokenizer.eos_token + text)
        return tuple(ids[1:] if ids[:1] == [anchor] else self.encode(text))

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
        replies = ("Fine, thanks.", "It sleeps.", "No.")
        return self._appends(replies)

    @cached_property
    def keeps_thoughts(self) -> bool:
        """Whether own lines with a thinking block stay in the prompt as they were said."""
        return self._appends(("<think>\nOne.\n</think>\n\nTwo.",) * 2)

    def _appends(self, replies: Sequence[str]) -> bool:
        chat = _chat("Be kind.", "How are you?")
        rendered = self.render(chat)
        for turn, reply in enumerate(replies):
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
    def end_ids(self) -> frozenset[int]:
        """The tokenizer's end token, and the one that the template puts after a line."""
        ids = {int(self.tokenizer.eos_token_id)}
        first = self.tail("Hello.")[:1]
        ids.update(set(first) & set(self.tokenizer.all_special_ids))
        return frozenset(ids)

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
