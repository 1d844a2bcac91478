"""Token by token: a key-value cache with one row per dialogue, and the network's logits.

Rows have their own lengths and no holes, so that a kept cache gives the logits of a full
re-encoding. Dimension letters: n rows of one forward pass, q new tokens per row, k keys that a
query may look at, V vocabulary, L tokens of the longest dialogue.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

_SERVABLE_ATTENTION = ("sdpa", "eager")
_FORCE_GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"
_SERVABLE_LAYERS = ("full_attention", "sliding_attention")


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

    def __init__(self, cache: RaggedCache) -> None:
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


class RaggedCache(Cache):
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


class Decoder(Protocol):
    """Reads tokens of several dialogues, returns the logits of each one's next token."""

    def feed(
        self, rows: np.ndarray, ids: Sequence[Sequence[int]] | np.ndarray
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Append each row's ids and return (rows in the order of the logits, logits (n, V))."""
        ...

    def rewind(self, row: int, length: int) -> None:
        """Forget all of a row but its first `length` tokens."""
        ...


class CachedDecoder:
    """Reads only new tokens. Speaking rows are kept in front: a pass sees a view of the buffer."""

    def __init__(self, network: Network, num_rows: int) -> None:
        self._network = network
        self._cache = RaggedCache(network.num_layers, num_rows)
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

    def rewind(self, row: int, length: int) -> None:
        """Forget all of a row but its first `length` tokens; what is behind is overwritten."""
        at = np.flatnonzero(self._row_at == row)
        self._length[at] = np.minimum(self._length[at], length)

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
        with _heads_share_keys(network.device, q):
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


@contextmanager
def _heads_share_keys(device: torch.device, num_queries: int) -> Iterator[None]:
    """Let grouped query heads read one copy of their keys where several tokens are read on a CPU.

    transformers copies keys and values for every query head under a mask, since GPU kernels want
    that; on a CPU the copies take longer than the attention. Single tokens are packed without
    copies anyhow.
    """
    if device.type != "cpu" or num_queries == 1:
        yield
        return
    before = os.environ.get(_FORCE_GROUPED)
    os.environ[_FORCE_GROUPED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE_GROUPED]
        else:
            os.environ[_FORCE_GROUPED] = before


class ReencodingDecoder:
    """Reads every dialogue from its start each time: exact for any causal model, and slow."""

    def __init__(self, network: Network, num_rows: int) -> None:
        self._network = network
        self._ids: list[list[int]] = [[] for _ in range(num_rows)]

    def feed(
        self, rows: np.ndarray, ids: Sequence[Sequence[int]] | np.ndarray
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Append each dialogue's new ids (one each if an array), return the next logits."""
        for row, new in zip(rows.tolist(), ids, strict=True):
            self._ids[row].extend([int(new)] if isinstance(ids, np.ndarray) else new)
        token_nL = pad_rows([self._ids[row] for row in rows], 0, np.int64)
        last_n = np.array([len(self._ids[row]) - 1 for row in rows])
        device = self._network.device
        at = (torch.arange(len(rows), device=device), torch.as_tensor(last_n, device=device))
        return rows, self._network.logits_at(torch.as_tensor(token_nL, device=device), at)

    def rewind(self, row: int, length: int) -> None:
        """Forget all of a row but its first `length` tokens."""
        del self._ids[row][length:]


@dataclass(frozen=True)
class SplitModel:
    """A causal LM in two parts: logits = cap * tanh(scale * head(body(tokens)) / cap)."""

    body: torch.nn.Module
    head: torch.nn.Module
    scale: float = 1.0
    cap: float | None = None
    """None: no cap."""

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, V) of hidden states."""
        logit_NV = self.head(hidden_NH)
        if self.scale != 1.0:
            logit_NV = logit_NV * self.scale
        return logit_NV if self.cap is None else torch.tanh(logit_NV / self.cap) * self.cap


class Network:
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

    def decoder(self, num_rows: int) -> Decoder:
        """Return a decoder with our cache where that is exact, else one that re-encodes."""
        kind = CachedDecoder if self.serves_cache else ReencodingDecoder
        return kind(self, num_rows)

    def logits_at(
        self, token_nq: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], **inputs: Any
    ) -> torch.Tensor:
        """Return the logits (number of positions, V) at `at` = (rows, columns)."""
        if self.split is None:
            return self._run(self.model, token_nq, inputs).logits[at]
        return self.split.logits(self.hidden_at(token_nq, at, **inputs))

    def hidden_at(
        self, token_nq: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], **inputs: Any
    ) -> torch.Tensor:
        """Return the last hidden states (number of positions, H): what the output head gets."""
        if self.split is not None:
            return self._run(self.split.body, token_nq, inputs).last_hidden_state[at]
        return self._run(
            self.model, token_nq, {**inputs, "output_hidden_states": True}
        ).hidden_states[-1][at]

    @staticmethod
    def _run(module: torch.nn.Module, token_nq: torch.Tensor, inputs: dict[str, Any]) -> Any:
        # Without a cache all tokens are marked real: right padding cannot reach back in a causal
        # model, and a mask without zeros lets the fast causal kernel run.
        if "past_key_values" not in inputs:
            inputs = {"attention_mask": torch.ones_like(token_nq), "use_cache": False, **inputs}
        return module(input_ids=token_nq, **inputs)

    @cached_property
    @torch.inference_mode()
    def split(self) -> SplitModel | None:
        """The model as body and output head if a probe shows that they give its logits, or None."""
        body = getattr(self.model, self.model.base_model_prefix, None)
        head = self.model.get_output_embeddings()
        if body is None or body is self.model or head is None:
            return None
        token_1q = self._probe_ids(7)[None]
        hidden = getattr(body(input_ids=token_1q, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return None
        expected = self.model(input_ids=token_1q, use_cache=False).logits
        cap = getattr(self.config, "final_logit_softcapping", None)
        scale = getattr(self.config, "logit_scale", None) or 1.0  # Cohere's models
        divisor = getattr(self.config, "logits_scaling", None) or 1.0  # Granite's models
        for found in (SplitModel(body, head), SplitModel(body, head, scale / divisor, cap)):
            logits = found.logits(hidden)
            if logits.shape == expected.shape and _close(logits, expected):
                return found
        return None

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
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model that does not know our cache may fail in any way
            return f"it fails with it ({type(error).__name__}: {error})"
        return None if exact else "its logits with it differ from those without"

    def _probe_cache(self) -> bool:
        ids = [self._probe_ids(5).tolist(), self._probe_ids(9)[1:].tolist()]
        decoder = CachedDecoder(self, 2)
        decoder.feed(np.array([0, 1]), [ids[0][:2], ids[1][:5]])
        _, first = decoder.feed(np.array([1]), [ids[1][5:]])
        _, second = decoder.feed(np.array([0]), [ids[0][2:]])
        plain = ReencodingDecoder(self, 2)
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


def pad_rows(rows: Sequence[Sequence[Any]], fill: float, dtype: Any) -> np.ndarray:
    """Return ragged rows as one array, filled up on the right."""
    padded = np.full((len(rows), max((len(row) for row in rows), default=0)), fill, dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
