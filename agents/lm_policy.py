"""A Hugging Face causal language model that speaks in dialogues and scores its own tokens again.

Acting keeps the key-value cache from turn to turn, so that a turn costs only its new tokens.
Training reads each dialogue as the one token sequence that was sampled: ids are kept, text is never
tokenised again.

    policy = LMPolicy.from_pretrained("path/to/model")
    text, _ = policy.predict(observation)                    # stateless

    conversation = policy.begin(batch_size=64)               # stateful: 64 dialogues side by side
    texts = conversation.reply(observations)                 # once per turn
    tape = conversation.tape()
    logprob_BL = policy.logprobs(tape.token_BL, tape.turn_BL)

Dimension letters: B dialogues, T turns, L tokens of the longest dialogue, V vocabulary, n rows of
one forward pass, q new tokens per row, k keys that a query may look at.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache, CacheLayerMixin

from .policy import Message, Messages

# Log-probabilities are formed for so many (token, vocabulary entry) pairs at a time: 64 MiB in
# float32.
_LOGITS_PER_CHUNK = 2**24

_SERVABLE_ATTENTION = ("sdpa", "eager")
_SERVABLE_LAYERS = ("full_attention", "sliding_attention")


# --------------------------------------------------------------------------------------------------
# The chat template as token ids


class _ChatFormat:
    """A chat template in ids: the whole prompt, and the tail that a later turn appends.

    The tail is everything between the agent's own line and its next one: the rest of the template
    after the own line, the partner's message and the generation prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        _require_chat_template(tokenizer, name)
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


def _require_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
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


# --------------------------------------------------------------------------------------------------
# The key-value cache: one row per dialogue, each with its own length, no holes


@dataclass
class _WriteHead:
    """Where one forward pass writes its keys and values; shared by the layers of a cache."""

    row_n1: torch.Tensor
    slot_nq: torch.Tensor
    num_keys: int
    num_rows: int


class _RaggedLayer(CacheLayerMixin):
    """One layer's buffer (rows, heads, capacity, width): key j of a row sits at position j."""

    is_croppable = False

    def __init__(self, cache: _RaggedCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate zeros: memory as found could hold NaN, and zero weight times NaN is NaN."""
        self.keys = self._empty(key_states)
        self.values = self._empty(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states (n, heads, q, width), return all of these rows up to the longest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.keys.shape[2] < self._cache.capacity:
            self.keys = self._grown(self.keys)
            self.values = self._grown(self.values)

        head = self._cache.head
        self.keys[head.row_n1, :, head.slot_nq] = key_states.transpose(1, 2)
        self.values[head.row_n1, :, head.slot_nq] = value_states.transpose(1, 2)
        rows, keys = slice(head.num_rows), slice(head.num_keys)
        return self.keys[rows, :, keys], self.values[rows, :, keys]

    def swap_rows(self, row: int, other: int, num_keys: int) -> None:
        """Exchange the first `num_keys` keys and values of two rows."""
        for buffer in (self.keys, self.values):
            assert buffer is not None
            kept = buffer[row, :, :num_keys].clone()
            buffer[row, :, :num_keys] = buffer[other, :, :num_keys]
            buffer[other, :, :num_keys] = kept

    def spread_rows(self, source_n: torch.Tensor, num_keys: int) -> None:
        """Let the first n rows hold what the rows `source_n` held."""
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[: len(source_n), :, :num_keys] = buffer[source_n, :, :num_keys]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys' length and offset; masks are handed in ready-made."""
        return self._cache.head.num_keys, 0

    def get_seq_length(self) -> int:
        """Return the longest row's length before this pass."""
        return self._cache.head.num_keys - self._cache.head.slot_nq.shape[1]

    def get_max_length(self) -> int:
        """Return -1: the buffer grows."""
        return -1

    def _empty(self, states: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = states.shape
        return states.new_zeros(self._cache.num_rows, heads, self._cache.capacity, width)

    def _grown(self, buffer: torch.Tensor) -> torch.Tensor:
        grown = self._empty(buffer)
        grown[:, :, : buffer.shape[2]] = buffer
        return grown


class _RaggedCache(Cache):
    """Keys and values of all layers for B dialogues; capacity doubles when it runs out."""

    def __init__(self, num_layers: int, num_rows: int) -> None:
        self.num_rows = num_rows
        self.capacity = 0
        self.head = _WriteHead(torch.empty(0), torch.empty(0, 0), 0, 0)
        self.ragged_layers = [_RaggedLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.ragged_layers))

    def reserve(self, num_keys: int) -> None:
        """Make room for `num_keys` keys per row."""
        if num_keys > self.capacity:
            self.capacity = max(2 * self.capacity, -(-num_keys // 64) * 64)


class _Decoder(Protocol):
    """Reads tokens of several dialogues, returns the logits of each one's next token."""

    def feed(
        self, rows: np.ndarray, ids: Sequence[Sequence[int]] | np.ndarray
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Append each row's ids and return (rows in the order of the logits, logits (n, V))."""
        ...


class _CachedDecoder:
    """Reads only new tokens. Speaking rows are kept in front: a pass sees a view of the buffer."""

    def __init__(self, network: _Network, num_rows: int) -> None:
        self._network = network
        self._cache = _RaggedCache(network.num_layers, num_rows)
        self._row_at = np.arange(num_rows)  # which dialogue sits in which row of the buffer
        self._length = np.zeros(num_rows, dtype=np.int64)  # per row of the buffer

    def feed(
        self, rows: np.ndarray, ids: Sequence[Sequence[int]] | np.ndarray
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Append each dialogue's new ids (one each if an array), return the next logits."""
        by_row = dict(zip(rows.tolist(), ids, strict=True))
        self._bring_to_front(rows)
        order = self._row_at[: len(rows)].copy()
        fresh = not self._length[: len(rows)].any()
        if isinstance(ids, np.ndarray):
            return order, self._read([[by_row[row]] for row in order.tolist()])
        in_order = [tuple(by_row[row]) for row in order.tolist()]
        return order, self._read_prompts(in_order) if fresh else self._read(in_order)

    def _bring_to_front(self, rows: np.ndarray) -> None:
        wanted = np.isin(self._row_at, rows)
        in_the_way = np.flatnonzero(~wanted[: len(rows)])
        if len(in_the_way) == 0:
            return
        behind = len(rows) + np.flatnonzero(wanted[len(rows) :])
        for row, other in zip(in_the_way.tolist(), behind.tolist(), strict=True):
            self._swap(row, other)

    def _swap(self, row: int, other: int) -> None:
        pair, exchanged = [row, other], [other, row]
        longest = int(self._length[pair].max())
        if longest > 0:
            for layer in self._cache.ragged_layers:
                layer.swap_rows(row, other, longest)
        self._row_at[pair] = self._row_at[exchanged]
        self._length[pair] = self._length[exchanged]

    def _read_prompts(self, ids: list[tuple[int, ...]]) -> torch.Tensor:
        """Read first prompts, each different one once: the members of a group begin alike."""
        place: dict[tuple[int, ...], int] = {}
        for prompt in ids:
            place.setdefault(prompt, len(place))
        if len(place) == len(ids):
            return self._read(ids)

        logit_uV = self._read(list(place))
        source_n = np.array([place[prompt] for prompt in ids])
        source_n_t = torch.as_tensor(source_n, device=logit_uV.device)
        self._length[: len(ids)] = self._length[source_n]
        for layer in self._cache.ragged_layers:
            layer.spread_rows(source_n_t, int(self._length.max()))
        return logit_uV[source_n_t]

    def _read(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the new tokens of the rows in front; return the logits (n, V) after the last."""
        n = len(ids)
        count_n = np.array([len(row) for row in ids])
        start_n = self._length[:n]
        end_n = start_n + count_n
        q = int(count_n.max())
        token_nq = np.zeros((n, q), dtype=np.int64)
        for row, tokens in enumerate(ids):
            token_nq[row, : len(tokens)] = tokens

        # Padded tokens write behind their row's end, where nobody looks and the next token will
        # overwrite.
        slot_nq = start_n[:, None] + np.arange(q)
        num_keys = int(slot_nq.max()) + 1
        position_nq = np.minimum(slot_nq, end_n[:, None] - 1)
        self._cache.reserve(num_keys)

        network = self._network
        slot_nq_t = torch.as_tensor(slot_nq, device=network.device)
        row_n1_t = torch.arange(n, device=network.device)[:, None]
        self._cache.head = _WriteHead(row_n1_t, slot_nq_t, num_keys, n)
        logit_nV = network.logits_at(
            torch.as_tensor(token_nq, device=network.device),
            (row_n1_t[:, 0], torch.as_tensor(count_n - 1, device=network.device)),
            position_ids=torch.as_tensor(position_nq, device=network.device),
            attention_mask=network.masks(slot_nq_t, num_keys),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._length[:n] = end_n
        return logit_nV


class _ReencodingDecoder:
    """Reads every dialogue from its start each time: exact for any causal model, and slow."""

    def __init__(self, network: _Network, num_rows: int) -> None:
        self._network = network
        self._ids: list[list[int]] = [[] for _ in range(num_rows)]

    def feed(
        self, rows: np.ndarray, ids: Sequence[Sequence[int]] | np.ndarray
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Append each dialogue's new ids (one each if an array), return the next logits."""
        for row, new in zip(rows.tolist(), ids, strict=True):
            self._ids[row].extend([int(new)] if isinstance(ids, np.ndarray) else new)
        token_nL = _pad([self._ids[row] for row in rows], 0, np.int64)
        last_n = np.array([len(self._ids[row]) - 1 for row in rows])
        device = self._network.device
        at = (torch.arange(len(rows), device=device), torch.as_tensor(last_n, device=device))
        return rows, self._network.logits_at(torch.as_tensor(token_nL, device=device), at)


# --------------------------------------------------------------------------------------------------
# The network: logits at chosen positions only, and what it takes to give it our cache


class _Network:
    """A causal LM seen as token ids -> logits at chosen positions."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.num_layers = int(self.config.num_hidden_layers)
        self.context_length: int | None = getattr(self.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def decoder(self, num_rows: int) -> _Decoder:
        """Return a decoder with our cache where that is exact, else one that re-encodes."""
        kind = _CachedDecoder if self.serves_cache else _ReencodingDecoder
        return kind(self, num_rows)

    def logits_at(
        self, token_nq: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], **inputs: Any
    ) -> torch.Tensor:
        """Return the logits (number of positions, V) at `at` = (rows, columns)."""
        if self.split is None:
            return self._run(self.model, token_nq, inputs).logits[at]
        _, head = self.split
        return head(self.hidden_at(token_nq, at, **inputs))

    def hidden_at(
        self, token_nq: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], **inputs: Any
    ) -> torch.Tensor:
        """Return what the output head gets at `at`; only where `split` is not None."""
        assert self.split is not None
        return self._run(self.split[0], token_nq, inputs).last_hidden_state[at]

    @staticmethod
    def _run(module: torch.nn.Module, token_nq: torch.Tensor, inputs: dict[str, Any]) -> Any:
        # Without a cache all tokens are marked real: right padding cannot reach back in a causal
        # model, and a mask without zeros lets the fast causal kernel run.
        if not inputs:
            inputs = {"attention_mask": torch.ones_like(token_nq), "use_cache": False}
        return module(input_ids=token_nq, **inputs)

    @cached_property
    @torch.inference_mode()
    def split(self) -> tuple[torch.nn.Module, torch.nn.Module] | None:
        """(body, output head) if head(body(tokens)) equals the model's logits on a probe, or None.

        Models that scale or cap their logits after the head fail the probe and keep their full
        forward pass.
        """
        body = getattr(self.model, self.model.base_model_prefix, None)
        head = self.model.get_output_embeddings()
        if body is None or body is self.model or head is None:
            return None
        token_1q = self._probe_ids(7)[None]
        hidden = getattr(body(input_ids=token_1q, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return None
        expected = self.model(input_ids=token_1q, use_cache=False).logits
        found = head(hidden)
        return (body, head) if found.shape == expected.shape and _close(found, expected) else None

    @cached_property
    @torch.inference_mode()
    def serves_cache(self) -> bool:
        """Whether the ragged cache gives the model's own logits (configuration and probe)."""
        reason = self._unservable() or self._misserved()
        if reason is not None:
            warnings.warn(
                f"{type(self.model).__name__} cannot use the key-value cache kept across turns, "
                f"since {reason}; every token will read the whole dialogue again, which is slow.",
                stacklevel=2,
            )
        return reason is None

    def _unservable(self) -> str | None:
        unknown = sorted(set(self.layer_types) - set(_SERVABLE_LAYERS))
        if unknown:
            return f"it has layers of type {', '.join(unknown)}"
        attention = self.config._attn_implementation
        if attention not in _SERVABLE_ATTENTION:
            return f"its attention is {attention!r} (use attn_implementation='sdpa')"
        return None

    def _misserved(self) -> str | None:
        try:
            exact = self._probe_cache()
        except Exception as error:  # a model that does not know our cache may fail in any way
            return f"it fails with it ({type(error).__name__}: {error})"
        return None if exact else "its logits with it differ from those without"

    def _probe_cache(self) -> bool:
        ids = [self._probe_ids(5).tolist(), self._probe_ids(9)[1:].tolist()]
        decoder = _CachedDecoder(self, 2)
        decoder.feed(np.array([0, 1]), [ids[0][:2], ids[1][:5]])
        _, first = decoder.feed(np.array([1]), [ids[1][5:]])
        _, second = decoder.feed(np.array([0]), [ids[0][2:]])
        plain = _ReencodingDecoder(self, 2)
        _, expected = plain.feed(np.array([1, 0]), [ids[1], ids[0]])
        return _close(torch.cat([first, second]), expected)

    def _probe_ids(self, number: int) -> torch.Tensor:
        size = int(self.config.vocab_size)
        return torch.arange(1, number + 1, device=self.device) * 37 % size

    @cached_property
    def layer_types(self) -> tuple[str, ...]:
        """The kind of attention of each layer, as the configuration tells it."""
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return tuple(types)
        return ("sliding_attention" if self.window else "full_attention",) * self.num_layers

    @cached_property
    def window(self) -> int | None:
        """How many tokens a sliding layer looks at, the query's own included."""
        if getattr(self.config, "use_sliding_window", True) is False:
            return None
        return getattr(self.config, "sliding_window", None)

    def masks(self, slot_nq: torch.Tensor, num_keys: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the additive mask (n, 1, q, k), or one per kind of layer where a model mixes them.

        Key j is open to the query at position p iff j <= p, in sliding layers iff p - window < j <=
        p.
        """
        kinds = dict.fromkeys(self.layer_types)
        masks = {kind: self._mask(kind, slot_nq, num_keys) for kind in kinds}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, kind: str, slot_nq: torch.Tensor, num_keys: int) -> torch.Tensor:
        key_k = torch.arange(num_keys, device=slot_nq.device)
        closed_nqk = key_k > slot_nq[:, :, None]
        if kind == "sliding_attention" and self.window is not None:
            closed_nqk |= key_k <= slot_nq[:, :, None] - self.window
        mask_nqk = torch.zeros(closed_nqk.shape, dtype=self.dtype, device=slot_nq.device)
        return mask_nqk.masked_fill_(closed_nqk, torch.finfo(self.dtype).min)[:, None]


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two logit tensors agree up to the rounding of their dtype, relative to their size."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= tolerance * expected.float().norm())


# --------------------------------------------------------------------------------------------------
# Sampling


def sample_tokens(
    logit_nV: torch.Tensor,
    rngs: Sequence[np.random.Generator],
    temperature: float = 1.0,
    deterministic: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token per row from the full softmax: the smallest v with P(token <= v) > u.

    Args:
        logit_nV: logits, any float dtype.
        rngs: n generators; each gives one uniform u in [0, 1) (none if deterministic), so that a
            row's draws do not depend on the other rows.
        temperature: divides the logits.
        deterministic: take the most likely token instead.

    Returns:
        (token_n, logprob_n): ids, and their log-probabilities at this temperature.
    """
    logit_nV = logit_nV.float()
    if logit_nV.device.type == "mps":  # no float64 there
        logit_nV = logit_nV.cpu()
    logprob_nV = torch.log_softmax(logit_nV if temperature == 1.0 else logit_nV / temperature, -1)
    if deterministic:
        token_n1 = logprob_nV.argmax(-1, keepdim=True)
    else:
        cdf_nV = logprob_nV.exp().cumsum(-1, dtype=torch.float64)
        u_n1 = torch.tensor([[rng.random()] for rng in rngs], dtype=torch.float64)
        level_n1 = u_n1.to(cdf_nV.device) * cdf_nV[:, -1:]
        token_n1 = torch.searchsorted(cdf_nV, level_n1, right=True)
        token_n1.clamp_(max=cdf_nV.shape[1] - 1)
    logprob_n = logprob_nV.gather(-1, token_n1)[:, 0]
    return token_n1[:, 0].cpu().numpy(), logprob_n.cpu().numpy()


@dataclass(frozen=True)
class _Line:
    """One sampled line: ids (with the end token if it was sampled), their log-probabilities."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


def _sample_lines(
    decoder: _Decoder,
    pending: dict[int, Sequence[int]],
    rooms: dict[int, int],
    rngs: Sequence[np.random.Generator],
    end_ids: frozenset[int],
    temperature: float,
    deterministic: bool,
) -> dict[int, _Line]:
    """Read each dialogue's pending ids, sample its line of at most `rooms[row]` (>= 1) tokens."""
    ids: dict[int, list[int]] = {row: [] for row in pending}
    logprobs: dict[int, list[float]] = {row: [] for row in pending}
    ended = dict.fromkeys(pending, False)
    order, logit_nV = decoder.feed(np.array(list(pending)), list(pending.values()))
    while True:
        row_rngs = [rngs[row] for row in order.tolist()]
        token_n, logprob_n = sample_tokens(logit_nV, row_rngs, temperature, deterministic)
        speaks_n = np.ones(len(order), dtype=bool)
        drawn = zip(order.tolist(), token_n.tolist(), logprob_n.tolist(), strict=True)
        for i, (row, token, logprob) in enumerate(drawn):
            ids[row].append(token)
            logprobs[row].append(logprob)
            ended[row] = token in end_ids
            speaks_n[i] = not ended[row] and len(ids[row]) < rooms[row]
        if not speaks_n.any():
            return {row: _Line(ids[row], logprobs[row], ended[row]) for row in pending}
        order, logit_nV = decoder.feed(order[speaks_n], token_n[speaks_n])


# --------------------------------------------------------------------------------------------------
# A batch of dialogues


@dataclass(frozen=True)
class Tape:
    """B dialogues in tokens, right-padded to the longest (L) and to the last turn (T)."""

    token_BL: np.ndarray
    """Token ids, int64: prompt, own lines and the partner's, as the model read and sampled them."""
    turn_BL: np.ndarray
    """The turn that spoke the token, int64; -1 for tokens that are not the agent's."""
    old_logprob_BL: np.ndarray
    """Log-probability of each token when it was sampled, float32; 0 where `turn_BL` is -1."""
    length_B: np.ndarray
    """Number of tokens of each dialogue, int64."""
    cut_BT: np.ndarray
    """Whether the line was cut: no end token was sampled within the allowed number of tokens."""
    truncated_B: np.ndarray
    """Whether the dialogue grew beyond the model's context and was stopped."""


class Conversation:
    """B dialogues that a policy holds side by side; made by `LMPolicy.begin`, one `reply` per turn.

    The policy's weights must not change while a conversation is under way: the cache would be
    stale.
    """

    def __init__(self, policy: LMPolicy, rngs: Sequence[np.random.Generator]) -> None:
        size = len(rngs)
        self._policy = policy
        self._rngs = rngs
        self._refusal = policy.tape_refusal
        self._decoder = policy.network.decoder(size) if self._refusal is None else None
        self._ids: list[list[int]] = [[] for _ in range(size)]
        self._turns: list[list[int]] = [[] for _ in range(size)]
        self._logprobs: list[list[float]] = [[] for _ in range(size)]
        self._num_read = [0] * size
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
        self._policy.model.eval()
        if self._decoder is None:
            return self._reply_afresh(observations, active, deterministic)

        pending = self._pending(observations, active)
        rooms = {
            row: self._policy.room(len(self._ids[row]) + len(new)) for row, new in pending.items()
        }
        for row in [row for row, room in rooms.items() if room < 1]:
            self._truncated_B[row] = True
            del pending[row], rooms[row]
        for row, new in pending.items():
            self._append_forced(row, new)

        lines: dict[int, _Line] = {}
        if pending:
            unread: dict[int, Sequence[int]] = {
                row: self._ids[row][self._num_read[row] :] for row in pending
            }
            lines = self._policy.sample_lines(
                self._decoder, unread, rooms, self._rngs, deterministic
            )
        self._record(lines, rooms)
        texts = self._policy.texts(lines)
        self._refuse_lost_thoughts(texts)
        return [texts.get(row, "") for row in range(size)]

    def tape(self) -> Tape:
        """Return the token record of all turns so far.

        Raises:
            ValueError: if the chat template rewrites earlier turns, so that no one sequence per
                dialogue equals what the model was shown at each turn.
        """
        if self._refusal is not None:
            raise ValueError(self._refusal)
        size = len(self._rngs)
        cut_BT = np.array(self._cuts, dtype=bool).reshape(len(self._cuts), size).T
        return Tape(
            token_BL=_pad(self._ids, self._policy.pad_id, np.int64),
            turn_BL=_pad(self._turns, -1, np.int64),
            old_logprob_BL=_pad(self._logprobs, 0.0, np.float32),
            length_B=np.array([len(ids) for ids in self._ids], dtype=np.int64),
            cut_BT=cut_BT,
            truncated_B=self.truncated_B,
        )

    def _pending(
        self, observations: Sequence[Messages], active: Sequence[int]
    ) -> dict[int, Sequence[int]]:
        """Return the forced ids that this turn adds: at first the prompt, later the tail."""
        pending: dict[int, Sequence[int]] = {}
        for row in active:
            if self._truncated_B[row]:
                continue
            messages = observations[row]
            self._check_continues(row, messages)
            self._num_messages[row] = len(messages)
            if not self._ids[row]:
                pending[row] = self._policy.format.prompt_ids(messages)
                continue
            tail = self._policy.format.tail(messages[-1]["content"])
            # The template's end token is there already if the model said it itself.
            last = self._ids[row][-1]
            pending[row] = tail[1:] if last in self._policy.end_ids and last == tail[0] else tail
        return pending

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

    def _append_forced(self, row: int, ids: Sequence[int]) -> None:
        self._ids[row].extend(ids)
        self._turns[row].extend([-1] * len(ids))
        self._logprobs[row].extend([0.0] * len(ids))

    def _record(self, lines: dict[int, _Line], rooms: dict[int, int]) -> None:
        turn = len(self._cuts)
        cut_B = np.zeros(len(self._rngs), dtype=bool)
        for row, line in lines.items():
            # Everything has been read but the line's last token, which no next token was asked for.
            self._num_read[row] = len(self._ids[row]) + len(line.ids) - 1
            self._ids[row].extend(line.ids)
            self._turns[row].extend([turn] * len(line.ids))
            self._logprobs[row].extend(line.logprobs)
            cut_B[row] = not line.ended
            self._truncated_B[row] = not line.ended and rooms[row] < self._policy.max_new_tokens
        self._cuts.append(cut_B)
        self._spoke_B = np.isin(np.arange(len(self._rngs)), list(lines))

    def _refuse_lost_thoughts(self, texts: dict[int, str]) -> None:
        """Go on without the cache once a line holds thoughts that the template will drop."""
        if self._policy.format.keeps_thoughts:
            return
        if any("</think>" in text for text in texts.values()):
            self._refusal = self._policy.format_refusal("drops the thinking block of earlier lines")
            self._decoder = None

    def _reply_afresh(
        self, observations: Sequence[Messages], active: Sequence[int], deterministic: bool
    ) -> list[str]:
        """Encode every prompt anew; exact where templates rewrite what was said."""
        rows = [row for row in active if not self._truncated_B[row]]
        lines = self._policy.lines_afresh(
            [observations[row] for row in rows], [self._rngs[row] for row in rows], deterministic
        )
        self._truncated_B[[row for i, row in enumerate(rows) if i not in lines]] = True
        texts = self._policy.texts({rows[i]: line for i, line in lines.items()})
        self._spoke_B = np.isin(np.arange(len(self._rngs)), list(texts))
        return [texts.get(row, "") for row in range(len(self._rngs))]


def _pad(rows: Sequence[Sequence[Any]], fill: float, dtype: Any) -> np.ndarray:
    """Return ragged rows as one array, filled up on the right."""
    padded = np.full((len(rows), max((len(row) for row in rows), default=0)), fill, dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


# --------------------------------------------------------------------------------------------------
# The policy


class LMPolicy:
    """A causal language model with a chat template, as an agent that speaks and learns.

    Dropout stays off, in training too: the log-probabilities of training are those of sampling.
    A line ends at the tokenizer's end token or at the one that the chat template puts after a
    message. Other special tokens stay in the softmax, and training sees them; the text leaves them
    out.

    Args:
        model: any Hugging Face causal LM.
        tokenizer: its tokenizer, with a chat template and an end token.
        max_new_tokens: longest line in tokens, end token included.
        temperature: of sampling, > 0; log-probabilities are taken at the same temperature.
        seed: of the randomness of `predict` and of `begin` where these get no generators.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if not temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {temperature}; for the most likely tokens use "
                "deterministic=True."
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.name = model.config.name_or_path or tokenizer.name_or_path or type(model).__name__
        self.format = _ChatFormat(tokenizer, self.name)
        self.network = _Network(model)
        self._seeds = np.random.SeedSequence(seed)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        **settings: Any,
    ) -> LMPolicy:
        """Load a model and its tokenizer from a folder or by name.

        Args:
            path_or_name: a folder written by `save`, or a name that Hugging Face knows.
            device: "auto" takes CUDA where there is some, else the CPU.
            dtype: "auto" takes bfloat16 on CUDA, float32 elsewhere.
            settings: `max_new_tokens`, `temperature`, `seed`.

        Raises:
            OSError: if there are no weights in the safetensors format. Pickled weights are refused:
                loading them runs code.
            ValueError: if the tokenizer has no chat template or no end token.
        """
        place = torch.device(_best_device() if device == "auto" else device)
        if dtype == "auto":
            dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        _refuse_pickles(Path(path_or_name))
        tokenizer = AutoTokenizer.from_pretrained(path_or_name)
        _require_chat_template(tokenizer, str(path_or_name))
        model = AutoModelForCausalLM.from_pretrained(
            path_or_name, dtype=dtype, use_safetensors=True
        )
        torch.nn.Module.to(model, place)
        return cls(model, tokenizer, **settings)

    def save(self, path: str | Path) -> None:
        """Write model (safetensors) and tokenizer to a folder that `from_pretrained` reads."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    @property
    def pad_id(self) -> int:
        """A valid id to fill up rows with; no result depends on it."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @property
    def tape_refusal(self) -> str | None:
        """Why conversations cannot be trained on as one sequence each, or None."""
        if self.format.append_only:
            return None
        return self.format_refusal("rewrites earlier turns when the dialogue goes on")

    def format_refusal(self, what: str) -> str:
        """Return the message for a template that does `what`."""
        return (
            f"The chat template of {self.name} {what}, so one token sequence per dialogue would "
            "differ from what the model was shown. Acting works; for training use a model whose "
            "template only appends."
        )

    # -- acting ------------------------------------------------------------------------------------

    def predict(self, observation: Messages, deterministic: bool = False) -> tuple[str, None]:
        """Return the next line of one dialogue and None, as Stable-Baselines3 does.

        Raises:
            ValueError: if the dialogue is longer than the model's context.
        """
        return self.predict_batch([observation], deterministic)[0], None

    def predict_batch(
        self,
        observations: Sequence[Messages],
        deterministic: bool = False,
        rngs: Sequence[np.random.Generator] | None = None,
    ) -> list[str]:
        """Return the next line of each dialogue, read from its start.

        Raises:
            ValueError: if a dialogue is longer than the model's context.
        """
        rngs = self.spawn(len(observations)) if rngs is None else rngs
        lines = self.lines_afresh(observations, rngs, deterministic)
        too_long = [i for i in range(len(observations)) if i not in lines]
        if too_long:
            raise ValueError(
                f"The dialogues {too_long} leave no room in the model's context of "
                f"{self.network.context_length} tokens; use fewer turns or a model with a longer "
                "context."
            )
        texts = self.texts(lines)
        return [texts[i] for i in range(len(observations))]

    def begin(
        self, batch_size: int, rngs: Sequence[np.random.Generator] | None = None
    ) -> Conversation:
        """Return a new batch of dialogues with nothing said; `rngs`: one generator per dialogue."""
        rngs = self.spawn(batch_size) if rngs is None else rngs
        if len(rngs) != batch_size:
            raise ValueError(f"Got {len(rngs)} generators for {batch_size} dialogues.")
        return Conversation(self, rngs)

    def spawn(self, number: int) -> list[np.random.Generator]:
        """Return `number` new generators from the policy's own seed."""
        return [np.random.default_rng(seed) for seed in self._seeds.spawn(number)]

    @torch.inference_mode()
    def lines_afresh(
        self,
        observations: Sequence[Messages],
        rngs: Sequence[np.random.Generator],
        deterministic: bool,
    ) -> dict[int, _Line]:
        """Return a line for each dialogue that leaves room for one, by index."""
        self.model.eval()
        prompts = {i: self.format.prompt_ids(chat) for i, chat in enumerate(observations)}
        rooms = {i: self.room(len(prompt)) for i, prompt in prompts.items()}
        pending: dict[int, Sequence[int]] = {i: prompts[i] for i in prompts if rooms[i] >= 1}
        if not pending:
            return {}
        decoder = self.network.decoder(len(observations))
        return self.sample_lines(decoder, pending, rooms, rngs, deterministic)

    def sample_lines(
        self,
        decoder: _Decoder,
        pending: dict[int, Sequence[int]],
        rooms: dict[int, int],
        rngs: Sequence[np.random.Generator],
        deterministic: bool,
    ) -> dict[int, _Line]:
        """Sample one line per dialogue with this policy's temperature and end tokens."""
        return _sample_lines(
            decoder, pending, rooms, rngs, self.end_ids, self.temperature, deterministic
        )

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a line."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        more = configured if isinstance(configured, list) else [configured]
        return self.format.end_ids | {int(token) for token in more if token is not None}

    def room(self, length: int) -> int:
        """Return how long a line after `length` tokens may be; below 1 the context is full."""
        limit = self.network.context_length
        return self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - length)

    def texts(self, lines: dict[int, _Line]) -> dict[int, str]:
        """Return the lines as text: no special tokens, no blanks around, no NUL characters."""
        if not lines:
            return {}
        ids = [line.ids[:-1] if line.ended else line.ids for line in lines.values()]
        texts = self.tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        cleaned = (text.replace("\0", "").strip() or "..." for text in texts)
        return dict(zip(lines, cleaned, strict=True))

    # -- learning ----------------------------------------------------------------------------------

    def logprobs(
        self, token_BL: np.ndarray | torch.Tensor, turn_BL: np.ndarray | torch.Tensor
    ) -> torch.Tensor:
        """Return log pi(token | tokens before it) at the agent's tokens, with gradient.

            logprob[b, l] = log softmax(logits[b, l-1] / temperature)[token[b, l]]   where turn[b,
            l] >= 0, else 0

        One forward pass reads each dialogue as one sequence up to the last agent token; the output
        head is applied at agent positions only, in chunks whose logits are recomputed in the
        backward pass.

        Args:
            token_BL: ids, right-padded with any valid id.
            turn_BL: -1 where the agent did not speak; a Boolean mask will do.

        Returns:
            logprob_BL, float32, on the model's device.

        Raises:
            ValueError: if shapes differ, or the first token of a dialogue is marked as the agent's.
        """
        token_BL = torch.as_tensor(token_BL, device=self.device)
        turn_BL = torch.as_tensor(turn_BL, device=self.device)
        if token_BL.shape != turn_BL.shape or token_BL.ndim != 2:
            raise ValueError(
                f"token_BL {tuple(token_BL.shape)} and turn_BL {tuple(turn_BL.shape)} must be (B, "
                "L) both."
            )
        spoken_BL = turn_BL if turn_BL.dtype == torch.bool else turn_BL >= 0
        row_N, column_N = spoken_BL.nonzero(as_tuple=True)
        logprob_BL = torch.zeros(token_BL.shape, dtype=torch.float32, device=self.device)
        if len(row_N) == 0:
            return logprob_BL
        if int(column_N.min()) == 0:
            raise ValueError(
                "The first token of a dialogue has no context, the agent cannot have said it."
            )

        self.model.eval()
        context_BL = token_BL[:, : int(column_N.max())]
        logprob_N = self._logprobs_at(context_BL, (row_N, column_N - 1), token_BL[row_N, column_N])
        return logprob_BL.index_put((row_N, column_N), logprob_N)

    def _logprobs_at(
        self,
        context_BL: torch.Tensor,
        at: tuple[torch.Tensor, torch.Tensor],
        target_N: torch.Tensor,
    ) -> torch.Tensor:
        split = self.network.split
        if split is None:
            return self._log_softmax_at(self.network.logits_at(context_BL, at), target_N)

        _, head = split
        hidden_NH = self.network.hidden_at(context_BL, at)

        def score(hidden_cH: torch.Tensor, target_c: torch.Tensor) -> torch.Tensor:
            return self._log_softmax_at(head(hidden_cH), target_c)

        chunk = max(1, _LOGITS_PER_CHUNK // int(self.network.config.vocab_size))
        if len(target_N) <= chunk:
            return score(hidden_NH, target_N)
        parts = zip(hidden_NH.split(chunk), target_N.split(chunk), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([score(hidden, target) for hidden, target in parts])
        return torch.cat(
            [checkpoint(score, hidden, target, use_reentrant=False) for hidden, target in parts]
        )

    def _log_softmax_at(self, logit_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        logit_NV = logit_NV.float()
        if self.temperature != 1.0:
            logit_NV = logit_NV / self.temperature
        return -torch.nn.functional.cross_entropy(logit_NV, target_N, reduction="none")


def microbatches(length_B: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Yield index arrays that cover all rows, longest first, each within the budget.

    rows x longest length in the batch <= token_budget, except that a row longer than the budget
    comes alone. Longest first: if memory is short, it shows at once.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1 token, got {token_budget}.")
    length_B = np.asarray(length_B)
    order_B = np.argsort(-length_B, kind="stable")
    start = 0
    while start < len(order_B):
        longest = max(1, int(length_B[order_B[start]]))
        stop = start + max(1, token_budget // longest)
        yield order_B[start:stop]
        start = stop


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _refuse_pickles(folder: Path) -> None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")
    )
    if pickled:
        raise OSError(
            f"{folder} has weights as a pickle only ({', '.join(pickled)}), which runs code when "
            "it is loaded. Convert them once with model.save_pretrained(...) in a safe place, "
            "which writes safetensors."
        )
