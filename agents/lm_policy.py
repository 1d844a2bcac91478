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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .chat_format import ChatFormat, require_chat_template
from .decoding import Decoder, Line, Network, pad_rows, sample_lines_of
from .policy import Messages

# Log-probabilities are formed for so many (token, vocabulary entry) pairs at a time: 64 MiB in
# float32.
_LOGITS_PER_CHUNK = 2**24


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

        lines: dict[int, Line] = {}
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
            token_BL=pad_rows(self._ids, self._policy.pad_id, np.int64),
            turn_BL=pad_rows(self._turns, -1, np.int64),
            old_logprob_BL=pad_rows(self._logprobs, 0.0, np.float32),
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

    def _record(self, lines: dict[int, Line], rooms: dict[int, int]) -> None:
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
        self.format = ChatFormat(tokenizer, self.name)
        self.network = Network(model)
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
        require_chat_template(tokenizer, str(path_or_name))
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
    ) -> dict[int, Line]:
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
        decoder: Decoder,
        pending: dict[int, Sequence[int]],
        rooms: dict[int, int],
        rngs: Sequence[np.random.Generator],
        deterministic: bool,
    ) -> dict[int, Line]:
        """Sample one line per dialogue with this policy's temperature and end tokens."""
        return sample_lines_of(
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

    def texts(self, lines: dict[int, Line]) -> dict[int, str]:
        """Return the lines as text without special tokens, outer blanks, NULs; "..." for none."""
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
