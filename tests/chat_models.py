"""Chat models whose answers a test writes: an object in this process, and an endpoint over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fault_proxy import FaultProxy, Reply, Request, completion

from ppg_env import Persona, Transcript, Turn
from ppg_env.chat import Completion
from ppg_env.dialogue import Messages

Say = Callable[[Messages, int], "str | Completion"]
"""(chat, seed) -> what the model answers."""


class Speaks:
    """A chat model that answers what `say` says, and remembers what it was asked.

    An answer instead of a function is the answer to everything.
    """

    def __init__(
        self, say: Say | str | Completion, remote: bool = False, nondeterministic: bool = False
    ) -> None:
        self.say: Say = say if callable(say) else (lambda chat, seed: say)
        self.name, self.remote, self.nondeterministic = "test:speaks", remote, nondeterministic
        self.asked: list[Messages] = []
        self.seeds: list[int] = []
        self.settings: list[tuple[float, int]] = []
        self._lock = threading.Lock()

    def __call__(
        self,
        chats: Sequence[Messages],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int,
    ) -> list[Completion]:
        with self._lock:
            self.asked += chats
            self.seeds += seeds
            self.settings.append((temperature, max_tokens))
        answers = [self.say(chat, seed) for chat, seed in zip(chats, seeds, strict=True)]
        return [a if isinstance(a, Completion) else Completion(a, True) for a in answers]


def in_turn(*answers: str | Completion) -> Say:
    """Return what gives these answers one after the other, the last one for ever."""
    rest = list(answers)
    return lambda chat, seed: rest.pop(0) if len(rest) > 1 else rest[0]


def is_repair(chat: Messages) -> bool:
    """Return whether the chat asks a judge a second time."""
    return len(chat) == 4


def material_of(chat: Messages) -> dict[str, Any]:
    """Return the JSON object that a judge's question holds, parsed as a program would."""
    text = chat[1]["content"]
    return json.JSONDecoder().raw_decode(text[text.index("{") :])[0]


def dialogue(*turns: tuple[str, str], persona: Persona | None = None) -> Transcript:
    """Return a transcript of (partner, agent) turns of which the last one is to be judged."""
    persona = persona or Persona("mia", "chatting", "You are Mia, a nurse in Oslo.")
    return Transcript(persona, persona.text, tuple(Turn(*turn) for turn in turns), None, 8)


Answered = Reply | str


def endpoint(answer: Callable[[Request], Answered | Awaitable[Answered]]) -> FaultProxy:
    """Return an HTTP server that answers each request as the test says; a text is a completion."""

    async def reply(request: Request) -> Reply:
        answered = answer(request)
        if isinstance(answered, Awaitable):
            answered = await answered
        return completion(answered) if isinstance(answered, str) else answered

    return FaultProxy(reply)


def refusal(status: int, message: str, **more: Any) -> Reply:
    """Return an error as OpenAI's API words it."""
    return Reply(status, json.dumps({"error": {"message": message, **more}}).encode())
