"""Language models that answer chats: an OpenAI-compatible endpoint, or a model in this process.

    chat = open_chat("openai:Qwen/Qwen3-8B@http://localhost:8000/v1")     # vLLM, SGLang, Ollama ...
    chat = open_chat("hf:path/to/model")                                  # Hugging Face, in process

Partners and judges speak through either. A call answers many chats; it returns all of them or
raises, and what it raises never holds a key.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np

from .dialogue import Messages

if TYPE_CHECKING:
    import openai
    import torch

T = TypeVar("T")
R = TypeVar("R")

OPENAI_URL = "https://api.openai.com/v1"
_BRACKETED = re.compile(r"\[(?=/?[A-Z_]+\])")
_OF_THIS_PROCESS = ("_client", "_lock", "_slots")
_UNREACHABLE_PATIENCE = 15.0
"""Seconds for which an endpoint that has never answered may be unreachable, as one that starts, or
send what is no chat completion, as the start page of something else."""
_LONGEST_PAUSE = 30.0
_NO_KEY = "none"
"""Stands in for a key where there is none; the client wants one."""
_LIKE_ADDRESS = re.compile(
    r"@(?:.*//|.*/v1/?$|(?:[^/]*@)?(?:localhost\b|[\w.-]+:\d+(?:/|$)|\d+(?:\.\d+){3}\b))"
)
_UNKNOWN_FIELD = re.compile("support|unrecognized|unknown|unexpected|extra|not permitted")
_KEY_LIKE = re.compile(r"\b(?:sk|hf|gsk|xai)[-_][\w*.-]{6,}|(?<=Bearer )\S+", re.IGNORECASE)


class Completion(NamedTuple):
    """An answer: its text without thoughts, and whether the model ended it by itself."""

    text: str
    finished: bool


class ChatModel(Protocol):
    """Answers chats. One protocol for partners and judges, endpoints and models in process."""

    @property
    def name(self) -> str:
        """Who answers, e.g. "openai:MODEL@URL"; part of cache keys, holds no secret."""
        ...

    @property
    def remote(self) -> bool:
        """Whether a call mostly waits for somebody else's computer."""
        ...

    @property
    def nondeterministic(self) -> bool:
        """Whether equal chats with equal seeds may get different answers."""
        ...

    def __call__(
        self,
        chats: Sequence[Messages],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int,
    ) -> list[Completion]:
        """Return one completion for each chat.

        Args:
            chats: system, user, assistant, ..., user messages each.
            seeds: one a chat, in [0, 2**31).
            temperature: 0 takes the most likely token.
            max_tokens: longest answer in tokens, thoughts included.

        Raises:
            ChatError: there is no answer, for good.
        """
        ...


class ChatError(RuntimeError):
    """A chat model gave no answer, for good. Names the model, where it is, and the cause."""


def open_chat(spec: str) -> ChatModel:
    """Return the chat model of "openai:MODEL@URL", "openai:MODEL" or "hf:FOLDER_OR_NAME".

    Equal texts give the same object, so that a partner and a judge share one model.

    Raises:
        ValueError: for any other text.
        ImportError: names the package to install.
    """
    if not is_chat_spec(spec):
        raise ValueError(
            f"{spec!r} names no chat model; write openai:MODEL@URL for an endpoint "
            "(openai:MODEL for OpenAI's own) or hf:FOLDER for a model in this process."
        )
    return _opened(spec)


@lru_cache(maxsize=8)
def _opened(spec: str) -> ChatModel:
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return TransformersChat(rest)
    model, found, address = rest.rpartition("@http")
    if found:
        return OpenAIChat(model, f"http{address}")
    if _LIKE_ADDRESS.search(rest):  # else a forgotten scheme sends the dialogues to OpenAI
        raise ValueError(
            f"The url after {rest.partition('@')[0]!r} and '@' must begin with http:// or https://."
        )
    return OpenAIChat(rest)


def is_chat_spec(spec: object) -> bool:
    """Return whether `open_chat` knows this kind of text."""
    return isinstance(spec, str) and spec.startswith(("openai:", "hf:"))


class OpenAIChat:
    """A model behind an OpenAI-compatible endpoint, through the `openai` client.

    The chats of one call are asked side by side. Timeouts, lost connections, 429, 5xx and answers
    that are no chat completion are tried again, with growing pauses or as long as the server asks,
    until `budget` is used up.

    Args:
        model: the model's name as the server knows it.
        url: the endpoint's root, such as http://localhost:8000/v1 ("/v1" is added to a bare host).
        api_key_env: environment variable that holds the key; servers of one's own need none. The
            key is read when the first question is asked and kept by the client alone.
        concurrency: requests under way at a time, over all calls: a partner and a judge share it.
        timeout: seconds one attempt may take.
        budget: seconds one chat may take, all attempts and pauses included.

    Attributes:
        retries: attempts that failed and were repeated, by cause.

    Raises:
        ValueError: for a malformed url, one with a password in it, and bad numbers.
    """

    remote = True

    def __init__(
        self,
        model: str,
        url: str = OPENAI_URL,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 128,
        timeout: float = 120.0,
        budget: float = 900.0,
    ) -> None:
        if not model:
            raise ValueError("The model has no name; write openai:MODEL@URL.")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}.")
        if not timeout > 0 or not budget > 0:
            raise ValueError(f"timeout and budget are seconds > 0, got {timeout} and {budget}.")
        require_chat_packages()
        self.model, self.url, self.api_key_env = model, _checked_url(url), api_key_env
        self.concurrency, self.timeout, self.budget = concurrency, timeout, budget
        self.retries: Counter[str] = Counter()
        self.name = f"openai:{model}@{self.url}"
        self._refused: set[str] = set()  # request fields that this server does not take
        self._reached = False
        self._start()

    def __repr__(self) -> str:
        """Return e.g. "OpenAIChat('Qwen/Qwen3-8B', 'http://localhost:8000/v1')"."""
        return f"{type(self).__name__}({self.model!r}, {self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _OF_THIS_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._client: tuple[int, openai.OpenAI] | None = None
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.concurrency)

    @property
    def nondeterministic(self) -> bool:
        """Whether the server was found to take no seed.

        A server that takes one may still ignore it, or compute a little differently in another
        batch: that cannot be seen from outside.
        """
        return "seed" in self._refused

    def __call__(
        self,
        chats: Sequence[Messages],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int,
    ) -> list[Completion]:
        """Return one completion for each chat; see ChatModel."""
        failed = threading.Event()  # then the others of this call need not go on trying

        def ask(question: tuple[Messages, int]) -> Completion:
            chat, seed = question
            request = {
                "model": self.model,
                "messages": chat,
                "seed": seed,
                "temperature": temperature,
                "max_tokens": max_tokens,
            }
            try:
                return self._answer(request, failed)
            except ChatError:
                failed.set()
                raise

        return side_by_side(ask, list(zip(chats, seeds, strict=True)), self.concurrency)

    def _answer(self, request: dict[str, Any], failed: threading.Event) -> Completion:
        """Ask until there is an answer, a final error, no time left, or another one failed."""
        import tenacity

        started = time.monotonic()

        def give_up(state: tenacity.RetryCallState) -> bool:
            assert state.outcome is not None
            error = state.outcome.exception()
            # Some servers answer 500 for a model that they do not have.
            nobody = _is_unreachable(error) or isinstance(error, _UnusableAnswerError)
            strange = (nobody or _kind_of(error) == "status 500") and not self._reached
            patience = min(self.budget, _UNREACHABLE_PATIENCE) if strange else self.budget
            late = time.monotonic() - started + state.upcoming_sleep >= patience
            return late or failed.is_set()

        def note(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None
            with self._lock:
                self.retries[_kind_of(state.outcome.exception())] += 1

        attempts = tenacity.Retrying(
            stop=give_up,
            wait=_pause,
            retry=tenacity.retry_if_exception(_is_passing),
            before_sleep=note,
            reraise=True,
        )
        problem = ""
        try:
            return attempts(self._attempt, request, started)
        except Exception as error:
            problem = self._explain(error, attempts.statistics.get("attempt_number", 1), started)
        # Outside of the except block: an error of the client may quote the request's headers.
        raise ChatError(problem)

    def _attempt(self, request: dict[str, Any], started: float) -> Completion:
        import openai

        while True:
            sent = self._accepted(request)
            try:
                with self._slots:
                    left = max(0.1, self.budget - (time.monotonic() - started))
                    body = self._post(sent, min(self.timeout, left))
                break
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                field = _refused_field(error, sent)
                if not field:
                    raise
                self._refused.add(field)  # maybe not the first: others asked at the same time
        completion = _read(body)
        self._reached = True
        return completion

    def _post(self, sent: dict[str, Any], timeout: float) -> bytes:
        """Send a request and return the body of the answer.

        Raises:
            openai.OpenAIError: there is none; also where one trickles in for longer than `timeout`,
                which the client's own limit, a pause between two parts, would let pass.
        """
        import openai

        until = time.monotonic() + timeout
        create = self._connected().chat.completions.with_streaming_response.create
        # As `extra_body`: the client's checks of messages would take two thirds of a call's time.
        with create(model=self.model, messages=[], extra_body=sent, timeout=timeout) as response:
            parts = []
            try:
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > until:
                        raise openai.APITimeoutError(response.http_request)
            except openai.OpenAIError:
                raise
            except Exception as error:
                raise openai.APIConnectionError(request=response.http_request) from error
        return b"".join(parts)

    def _connected(self) -> openai.OpenAI:
        """Return this process's client; one that a fork brought along is left to its parent."""
        import openai

        with self._lock:
            if self._client is None or self._client[0] != os.getpid():
                key = os.environ.get(self.api_key_env, "").strip() or _NO_KEY
                if not (key.isascii() and key.isprintable()):
                    raise ValueError(f"the key in {self.api_key_env} holds more than ASCII letters")
                client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)
                self._client = (os.getpid(), client)
            return self._client[1]

    def _accepted(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the request in the words that this server takes."""
        accepted = {k: v for k, v in request.items() if k not in self._refused}
        if "system" in self._refused:
            accepted["messages"] = without_system(request["messages"])
        if "max_tokens" in self._refused:  # newer servers call it otherwise
            accepted["max_completion_tokens"] = request["max_tokens"]
        return accepted

    def _explain(self, error: Exception, attempts: int, started: float) -> str:
        """Return what to tell the user about a final error; no key in it."""
        import openai

        cause = self._without_secrets(_cause(error))[:400]
        where = f"{self.model!r} at {self.url}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            set_already = bool(os.environ.get(self.api_key_env))
            remedy = (
                f"check the key in {self.api_key_env}"
                if set_already
                else (f"there is no key: set the environment variable {self.api_key_env}")
            )
            return f"The server of {where} refused access ({cause}); {remedy}."
        if isinstance(error, openai.NotFoundError):
            return f"{where} was not found ({cause}). {self._what_there_is()}"
        if _is_unreachable(error) and not self._reached:
            return (
                f"Nothing answers for {where} ({cause}); is the server running, and is the url "
                "right?"
            )
        if isinstance(error, _UnusableAnswerError) and not self._reached:
            return (
                f"What answers for {where} is no chat endpoint ({cause}); is the url right? It "
                "usually ends in /v1."
            )
        if isinstance(error, openai.APIStatusError) and not _is_passing(error):
            return f"{where} refused the request ({cause})."
        if not _is_passing(error):
            return f"{where} cannot be asked ({cause})."
        spent = time.monotonic() - started
        return (
            f"{where} gave no usable answer in {attempts} attempts and {spent:.0f} s (budget "
            f"{self.budget:.0f} s); the last one: {cause}. Nothing was lost: the same step can be "
            "tried again."
        )

    def _what_there_is(self) -> str:
        try:
            models = [model.id for model in self._connected().models.list(timeout=5.0).data]
        except Exception:  # the question was only asked to be of help
            return "Check the url (it usually ends in /v1) and the model's name."
        names = ", ".join(models[:10]) or "none"
        return self._without_secrets(f"Models that the server lists: {names}.")

    def _without_secrets(self, text: str) -> str:
        keys = {os.environ.get(self.api_key_env), self._client and self._client[1].api_key}
        for key in keys - {None, "", _NO_KEY}:
            text = text.replace(str(key), "[key]")
        return _KEY_LIKE.sub("[key]", text)


class TransformersChat:
    """A Hugging Face causal language model in this process, asked in batches.

    Sampling adds each chat's own Gumbel noise to the logits and takes the largest, which is a draw
    from the softmax: an answer depends on its chat and seed, on the batch only through rounding.

    Args:
        model: a folder or a name on the hub.
        device: "auto" (a GPU if there is one), "cpu", "cuda:1", ...
        batch_size: chats in one forward pass.

    Raises:
        ValueError: the model or its chat template cannot be loaded.
    """

    remote = False
    nondeterministic = False

    def __init__(self, model: str, *, device: str = "auto", batch_size: int = 16) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
            network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot load a language model from {model!r}: {error}") from error
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {model!r} has no chat template; use an instruction-tuned model."
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = network.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        self._ends: list[int] = [ends] if isinstance(ends, int) else list(ends or [])
        network.generation_config = GenerationConfig()  # a model's own may bend its probabilities
        self.network = network.eval().to(device)
        self.batch_size = batch_size
        self.name = f"hf:{model}"
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> TransformersChat:
        """Return itself: `env.spec` copies what an environment was made with, nobody two models."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __call__(
        self,
        chats: Sequence[Messages],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int,
    ) -> list[Completion]:
        """Return one completion for each chat; see ChatModel."""
        prompts = [self._encode(chat) for chat in chats]
        context = getattr(self.network.config, "max_position_embeddings", None)
        for prompt in prompts:
            if context is not None and len(prompt) + max_tokens > context:
                raise ChatError(
                    f"{self.name} has a context of {context} tokens; a question of {len(prompt)} "
                    f"leaves no room for max_tokens={max_tokens}."
                )
        completions: list[Completion] = []
        with self._lock:
            for start in range(0, len(prompts), self.batch_size):
                part = slice(start, start + self.batch_size)
                completions += self._generate(prompts[part], seeds[part], temperature, max_tokens)
        return completions

    def _encode(self, chat: Messages) -> list[int]:
        from jinja2 import TemplateError

        def encode(messages: Messages) -> list[int]:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=False
            )

        try:
            return encode(chat)
        except TemplateError:  # some templates know no system message
            return encode(without_system(chat))

    def _generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float, longest: int
    ) -> list[Completion]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        padded = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt")
        processors = LogitsProcessorList()
        if temperature > 0:
            processors.append(_gumbel_noise(seeds, temperature))
        settings = GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=self._ends or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with torch.inference_mode():
            output_BL = self.network.generate(
                **padded.to(self.network.device),
                generation_config=settings,
                logits_processor=processors,
            )
        answers = output_BL[:, padded["input_ids"].shape[1] :].tolist()
        completions = []
        for answer in answers:
            stops = [i for i, token in enumerate(answer) if token in self._ends]
            said = answer[: stops[0]] if stops else answer
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            completions.append(without_thoughts(text, finished=bool(stops)))
        return completions


def _gumbel_noise(
    seeds: Sequence[int], temperature: float
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a logits processor under which the largest entry is a sample of each row's softmax."""
    import torch

    generators = [np.random.default_rng(seed) for seed in seeds]

    def processor(token_BL: torch.Tensor, logit_BV: torch.Tensor) -> torch.Tensor:
        noise = np.stack([rng.gumbel(size=logit_BV.shape[1]) for rng in generators])
        return logit_BV.float() / temperature + torch.from_numpy(noise).to(logit_BV)

    return processor


def without_thoughts(text: str, finished: bool) -> Completion:
    """Return the completion without what a reasoning model thought before it answered.

    Thoughts end at the last `</think>`; an answer that broke off within them is empty.
    """
    _, found, said = sayable(text).rpartition("</think>")
    if found:
        return Completion(said.strip(), finished)
    if "<think>" in said:
        return Completion(said.partition("<think>")[0].strip(), False)
    return Completion(said.strip(), finished)


def sayable(text: str) -> str:
    """Return the text without what no space, file or terminal carries: NUL and lone surrogates."""
    return text.encode("utf-8", "ignore").decode("utf-8").replace("\0", "")


def without_system(chat: Messages) -> Messages:
    """Return the chat with its system message put before the first user message."""
    if not chat or chat[0]["role"] != "system":
        return chat
    first = {**chat[1], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
    return [first, *chat[2:]]


def ask_about(instructions: str, material: object, ask: str) -> Messages:
    """Return a chat that asks about texts of others: they can be read and give no orders.

    Args:
        instructions: the system message.
        material: becomes one JSON object in the user's message. In JSON a text can neither end its
            own quotation nor, without control tokens ("<|im_end|>", "</s>", "[INST]"), begin a
            message of its own.
        ask: the user's message, with {material} where the object goes.
    """
    quoted = json.dumps(material, ensure_ascii=False, indent=1)
    quoted = _BRACKETED.sub(r"\\u005b", quoted.replace("<", "\\u003c"))
    return [
        {"role": "system", "content": instructions},
        {"role": "user", "content": ask.format(material=quoted)},
    ]


def answers_to(
    chats: Sequence[Messages], chat: ChatModel, temperature: float, max_tokens: int
) -> list[Completion]:
    """Return the answer to each chat, asked with a seed made of its text: always the same one."""
    if not chats:
        return []
    seeds = [int(sha256(json.dumps(c).encode()).hexdigest()[:8], 16) % 2**31 for c in chats]
    return chat(chats, seeds, temperature=temperature, max_tokens=max_tokens)


def side_by_side(function: Callable[[T], R], items: Sequence[T], limit: int) -> list[R]:
    """Return [function(item) for item in items], up to `limit` at a time in threads.

    After an error no further item is begun, and the first one is raised once the others under way
    have come to their end. Ctrl-C does not wait for anybody.
    """
    if len(items) <= 1 or limit == 1:
        return [function(item) for item in items]
    results: dict[int, R] = {}
    errors: dict[int, BaseException] = {}
    waiting = iter(range(len(items)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                i = None if errors else next(waiting, None)
            if i is None:
                return
            try:
                results[i] = function(items[i])
            except BaseException as error:
                errors[i] = error

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(limit, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as interrupt:
        errors[-1] = interrupt  # nobody begins another item
        raise
    if errors:
        raise errors[min(errors)]
    return [results[i] for i in range(len(items))]


def require_chat_packages() -> None:
    """Check that the packages for endpoints are installed.

    Raises:
        ImportError: says how to install them.
    """
    try:
        import openai  # noqa: F401
        import tenacity  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"An endpoint needs the package {error.name}: "
            "pip install 'partial-policy-gradients[chat]'."
        ) from error


class _UnusableAnswerError(Exception):
    """The server answered 200, and what it sent is no chat completion.

    Quotes more than is told in the end: a key that was cut in two could not be found any more.
    """


def _read(body: bytes) -> Completion:
    """Return the completion in an HTTP body.

    Raises:
        _UnusableAnswerError: there is none in it.
    """
    try:
        choice = json.loads(body)["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        elsewhere = any(message.get(name) for name in ("refusal", "reasoning_content", "reasoning"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _UnusableAnswerError(
            f"the answer is no chat completion ({type(error).__name__}): {body[:2000]!r}"
        ) from None
    if text is None and (elsewhere or reason in ("length", "content_filter")):
        return Completion("", False)  # it refused, or all its tokens went into thoughts
    if not isinstance(text, str):
        raise _UnusableAnswerError(f"the answer's content is {text!r:.2000}")
    return without_thoughts(text, finished=reason in ("stop", "eos", "eos_token", None))


def _is_passing(error: BaseException | None) -> bool:
    """Return whether the same question may well be answered in a while."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | _UnusableAnswerError) or _is_unreachable(
        error
    )


def _is_unreachable(error: BaseException | None) -> bool:
    import openai

    return isinstance(error, openai.APIConnectionError) and not isinstance(
        error, openai.APITimeoutError
    )


def _pause(state: Any) -> float:
    """Return the seconds to wait: what the server asks for, else growing and a little random."""
    asked = _retry_after(state.outcome.exception())
    if asked:
        return asked
    growing = min(_LONGEST_PAUSE, 0.25 * 2.0 ** min(state.attempt_number - 1, 10))
    # Jitter keeps many clients from coming back at once; it touches no dialogue.
    return growing * (0.75 + 0.5 * (time.monotonic_ns() % 997) / 997)


def _retry_after(error: BaseException | None) -> float:
    """Return the seconds that a server asks to wait, 0 if it does not."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        asked = float(headers.get("retry-after", ""))
    except ValueError:
        return 0.0
    return asked if 0 < asked < float("inf") else 0.0


def _refused_field(error: openai.APIStatusError, sent: Mapping[str, Any]) -> str:
    """Return which field the server does not take, of those that one can do without; else ""."""
    model = rf"(?<![\w-]){re.escape(str(sent['model']))}(?![\w-])"
    text = re.sub(model, "", f"{error.message} {error.code} {error.response.text}").lower()
    if not _UNKNOWN_FIELD.search(text):
        return ""
    there = [name for name in ("max_tokens", "seed", "temperature") if name in sent]
    if sent["messages"][0]["role"] == "system":
        there.append("system")
    named = getattr(error, "param", None)
    if named in there:
        return str(named)
    return next((name for name in there if re.search(rf"\b{name}\b", text)), "")


def _kind_of(error: BaseException | None) -> str:
    status = getattr(error, "status_code", None)
    return f"status {status}" if status else type(error).__name__.lstrip("_")


def _cause(error: BaseException) -> str:
    """Return an error in one line, with what lies behind a failed connection."""
    text = f"{type(error).__name__.lstrip('_')}: {error}"
    said = getattr(getattr(error, "response", None), "text", "")
    if said and said not in text:
        text = f"{text} - {said}"
    behind = error.__cause__
    if behind is not None and str(behind) and str(behind) not in text:
        text = f"{text} {behind}"
    asked = _retry_after(error)
    if asked:
        text = f"it asks to wait {asked:.0f} s; {text}"
    return " ".join(text.split())


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
        secret = parts.username or parts.password or parts.query or parts.fragment
    except ValueError:
        usable = False
    if secret if usable else "@" in url:
        raise ValueError(
            f"The url{f' of {parts.hostname}' if usable else ''} holds a user, password, query or "
            "fragment; keys belong into an environment variable (OPENAI_API_KEY), so that they end "
            "up in no log."
        )
    if not usable:
        shown = re.split("[?#]", url)[0]
        raise ValueError(f"{shown!r:.200} is no http url; write e.g. http://localhost:8000/v1.")
    return url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")
