"""A Hugging Face causal language model that speaks in dialogues and scores its own tokens again.

Acting keeps the key-value cache from turn to turn, so that a turn costs only its new tokens.
Training reads the token sequences that were sampled: ids are kept, text is never tokenised again.

    policy = LMPolicy.from_pretrained("path/to/model")
    text, _ = policy.predict(observation)                    # stateless

    conversation = policy.begin(batch_size=64)               # stateful: 64 dialogues side by side
    texts = conversation.reply(observations)                 # once per turn
    tape = conversation.tape()
    logprob_SL = policy.logprobs(tape.token_SL, tape.turn_SL)

Dimension letters: B dialogues, S token sequences, L tokens of the longest sequence.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .chat_format import ChatFormat, require_chat_template
from .conversation import Conversation
from .decoding import Network
from .policy import Messages
from .sampling import Line, Sampler
from .scoring import Scores, checkpoint_layers, score_tokens


class LMPolicy:
    """A causal language model with a chat template, as an agent that speaks and learns.

    Dropout stays off, in training too: the log-probabilities of training are those of sampling.
    Special tokens stay in the softmax, and training sees them; the text leaves them out. Thoughts
    (up to "</think>") are sampled and trained like all tokens, but not said aloud.

    Args:
        model: any Hugging Face causal LM.
        tokenizer: its tokenizer, with a chat template and an end token.
        max_new_tokens: longest line in tokens, end token included.
        temperature: of sampling, > 0; log-probabilities are taken at the same temperature.
        top_k, top_p: restrict what is sampled (0 and 1: nothing is); for acting only, an agent
            refuses to learn from a restricted support. Those of the model's own generation
            settings are not used.
        sequences: "auto" trains on one token sequence per dialogue where the chat template only
            appends, and starts a new one where it rewrites what was said; "turn" starts one each
            turn.
        gradient_checkpointing: keep less of the forward pass in training and compute it again.
        seed: of the randomness of `predict` and of `begin` where these get no generators.

    Raises:
        ValueError: if the tokenizer has no chat template or no end token, or is not the model's, or
            if a setting is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        sequences: str = "auto",
        gradient_checkpointing: bool = False,
        seed: int | None = None,
    ) -> None:
        if sequences not in ("auto", "turn"):
            raise ValueError(f"sequences is 'auto' or 'turn', got {sequences!r}.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = model.config.name_or_path or tokenizer.name_or_path or type(model).__name__
        self.format = ChatFormat(tokenizer, self.name)
        _refuse_strange_tokenizer(model, self.format)
        self.network = Network(model)
        self.sampler = Sampler(
            self.network, self.format, max_new_tokens, temperature, top_k=top_k, top_p=top_p
        )
        self.sequences = sequences
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            checkpoint_layers(model)
        self._seeds = np.random.SeedSequence(seed)
        self._announced = False

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        lora_rank: int = 0,
        **settings: Any,
    ) -> LMPolicy:
        """Load a model and its tokenizer from a folder or by name.

        Args:
            path_or_name: a folder written by `save` (a model, or the adapter of one), or a name
                that Hugging Face knows.
            device: "auto" takes CUDA where there is some, else the CPU.
            dtype: "auto" takes bfloat16 on CUDA, float32 elsewhere; also "bfloat16", "float32".
            lora_rank: > 0 freezes the model and adds a trainable LoRA adapter of this rank to its
                linear layers (needs peft).
            settings: those of `LMPolicy`.

        Raises:
            OSError: if there are no weights in the safetensors format. Pickled weights are refused:
                loading them runs code.
            ValueError: if the tokenizer has no chat template or no end token, or is not the
                model's.
        """
        place = torch.device(_best_device() if device == "auto" else device)
        _refuse_pickles(Path(path_or_name))
        tokenizer = AutoTokenizer.from_pretrained(path_or_name)
        require_chat_template(tokenizer, str(path_or_name))
        model = AutoModelForCausalLM.from_pretrained(
            path_or_name, dtype=_dtype(dtype, place), use_safetensors=True
        )
        torch.nn.Module.to(model, place)
        if lora_rank and _has_adapter(model):
            raise ValueError(
                f"{path_or_name} is an adapter already; leave out lora_rank to train it further."
            )
        if lora_rank:
            add_lora(model, lora_rank, settings.get("seed"))
        elif _has_adapter(model):
            model.set_adapter(model.active_adapters())  # loaded adapters are frozen
        return cls(model, tokenizer, **settings)

    def save(self, path: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write model and tokenizer to a folder that `from_pretrained` reads.

        So does transformers.AutoModelForCausalLM. Of a model with an adapter only the adapter is
        written, as peft does. `weights` stand in for the model's own, which may be sharded.
        """
        self.model.save_pretrained(path, state_dict=weights)
        self.tokenizer.save_pretrained(path)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    @property
    def tokenizer_fingerprint(self) -> str:
        """Short hash of the tokenizer's entries: logged ids mean the same where it is the same."""
        return self.format.fingerprint

    @property
    def max_new_tokens(self) -> int:
        """Longest line in tokens, end token included."""
        return self.sampler.max_new_tokens

    @property
    def temperature(self) -> float:
        """What logits are divided by, in sampling and in training."""
        return self.sampler.temperature

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained and the model itself is frozen."""
        return _has_adapter(self.model)

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
        lines = self._lines_afresh(observations, rngs, deterministic)
        too_long = [i for i in range(len(observations)) if i not in lines]
        if too_long:
            raise ValueError(
                f"The dialogues {too_long} leave no room in the model's context of "
                f"{self.network.context_length} tokens; use fewer turns or a model with a longer "
                "context."
            )
        return [lines[i].text for i in range(len(observations))]

    def begin(
        self, batch_size: int, rngs: Sequence[np.random.Generator] | None = None
    ) -> Conversation:
        """Return a new batch of dialogues with nothing said; `rngs`: one generator per dialogue."""
        rngs = self.spawn(batch_size) if rngs is None else rngs
        if len(rngs) != batch_size:
            raise ValueError(f"Got {len(rngs)} generators for {batch_size} dialogues.")
        return Conversation(self.sampler, rngs, self.sequences == "turn", self._announce_once)

    def spawn(self, number: int) -> list[np.random.Generator]:
        """Return `number` new generators from the policy's own seed."""
        return [np.random.default_rng(seed) for seed in self._seeds.spawn(number)]

    @property
    def num_seeds_spawned(self) -> int:
        """How many generators `spawn` has made; setting it goes on from there."""
        return int(self._seeds.n_children_spawned)

    @num_seeds_spawned.setter
    def num_seeds_spawned(self, number: int) -> None:
        self._seeds = np.random.SeedSequence(self._seeds.entropy, n_children_spawned=number)

    @torch.inference_mode()
    def _lines_afresh(
        self,
        observations: Sequence[Messages],
        rngs: Sequence[np.random.Generator],
        deterministic: bool,
    ) -> dict[int, Line]:
        """Return a line for each dialogue that leaves room for one, by index."""
        self.model.eval()
        prompts = {i: self.format.prompt_ids(chat) for i, chat in enumerate(observations)}
        rooms = {i: self.sampler.room(len(prompt)) for i, prompt in prompts.items()}
        pending: dict[int, Sequence[int]] = {i: prompts[i] for i in prompts if rooms[i] >= 1}
        if not pending:
            return {}
        decoder = self.network.decoder(len(observations))
        return self.sampler.lines(decoder, pending, rooms, rngs, deterministic)

    def _announce_once(self) -> None:
        if self._announced or self.sequences == "turn":
            return
        self._announced = True
        why = (
            "rewrites earlier turns as the dialogue goes on"
            if not self.format.append_only
            else "shows earlier lines without their thoughts"
        )
        warnings.warn(
            f"The chat template of {self.name} {why}, so a dialogue is trained on as several token "
            "sequences, each what the model was shown at its turn. That is exact and slower.",
            stacklevel=2,
        )

    # -- learning ----------------------------------------------------------------------------------

    def logprobs(
        self, token_SL: np.ndarray | torch.Tensor, turn_SL: np.ndarray | torch.Tensor
    ) -> torch.Tensor:
        """Return log pi(token | tokens before it) at the agent's tokens, with gradient.

            logprob[s, l] = log softmax(logits[s, l-1] / temperature)[token[s, l]]   where turn[s,
            l] >= 0, else 0

        Args:
            token_SL: ids, right-padded with any valid id.
            turn_SL: -1 where the agent did not speak; a Boolean mask will do.

        Returns:
            logprob_SL, float32, on the model's device.

        Raises:
            ValueError: if shapes differ, or the first token of a sequence is marked as the agent's.
        """
        return self.scores(token_SL, turn_SL).logprob_SL

    def scores(
        self,
        token_SL: np.ndarray | torch.Tensor,
        turn_SL: np.ndarray | torch.Tensor,
        *,
        entropy: bool = False,
        hidden: bool = False,
    ) -> Scores:
        """Return log-probabilities as `logprobs` does, on demand with entropies, hidden states."""
        token_SL = torch.as_tensor(token_SL, device=self.device)
        turn_SL = torch.as_tensor(turn_SL, device=self.device)
        return score_tokens(
            self.network,
            token_SL,
            turn_SL if turn_SL.dtype == torch.bool else turn_SL >= 0,
            temperature=self.temperature,
            entropy=entropy,
            hidden=hidden,
        )


class Reference:
    """A policy's model as it is now, frozen: a copy, or the same model with its adapter off."""

    def __init__(self, policy: LMPolicy) -> None:
        self._temperature = policy.temperature
        self.network = policy.network
        self._switches_adapter = policy.has_adapter
        if not self._switches_adapter:
            self.network = Network(copy.deepcopy(policy.model).requires_grad_(False))

    @torch.no_grad()
    def logprobs(self, token_SL: torch.Tensor, spoken_SL: torch.Tensor) -> torch.Tensor:
        """Return the reference's log-probabilities at the spoken tokens."""
        with self._adapter_off():
            return score_tokens(
                self.network, token_SL, spoken_SL, temperature=self._temperature
            ).logprob_SL

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        if not self._switches_adapter:
            yield
            return
        model = self.network.model
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()


def add_lora(model: PreTrainedModel, rank: int, seed: int | None = None) -> None:
    """Freeze the model and add a LoRA adapter of this rank to all its linear layers but the head.

    It starts as no change. Source: Hu et al., "LoRA", arXiv 2106.09685.

    Raises:
        ImportError: if peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs the package peft: pip install peft.") from error
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1 (0 = no adapter), got {rank}.")
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0 if seed is None else seed)
        model.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules="all-linear",
                lora_dropout=0.0,
                task_type="CAUSAL_LM",  # peft's AutoPeftModelForCausalLM asks for it
            )
        )


def _has_adapter(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _best_device() -> str:
    """Return this process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    if dtype not in known:
        raise ValueError(f"dtype is 'auto' or one of {', '.join(known)}; got {dtype!r}.")
    return known[dtype]


def _refuse_strange_tokenizer(model: PreTrainedModel, form: ChatFormat) -> None:
    """Refuse a tokenizer that writes ids which the model does not have.

    An entry beyond them that no dialogue uses does no harm; some loaders add such.
    """
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    system, opening = {"role": "system", "content": "Be."}, {"role": "user", "content": "Hello."}
    written = {*form.prompt_ids([system, opening]), *form.tail("Hello."), *form.end_ids}
    largest = max(int(form.tokenizer.vocab_size) - 1, *written)
    if largest >= rows:
        raise ValueError(
            f"The tokenizer writes ids up to {largest}, but {form.name} knows only {rows} tokens: "
            "it is the tokenizer of another model, or was extended. Load the model's own "
            "tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and save the model."
        )


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
