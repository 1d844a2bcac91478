"""Tiny real language models, tokenizers, chat templates and dialogues, made in memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from agents.conversation import Conversation
from agents.lm_policy import LMPolicy
from agents.tape import Tape

Chat = list[dict[str, str]]

CACHED = ["llama", "qwen2", "mistral", "mixed", "gemma2", "cohere", "granite", "gpt2"]
"""Kinds of `tiny_model` whose keys and values can be kept from turn to turn."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Shows only the last own line in full: a prompt that is rewritten as the dialogue goes on.
REWRITING = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' and loop.index < loop.length - 1 %}(said)"
    "{% else %}{{ message['content'] }}{% endif %}",
)

# Drops thinking blocks from own earlier lines, as templates of reasoning models do.
THOUGHTLESS = CHATML.replace(
    "{{ message['content'] }}", "{{ message['content'].split('</think>')[-1].lstrip('\\n') }}"
)

# Knows neither a system role nor special tokens between messages; lines end in the end token.
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_TEXTS = [
    "I have a dog and I like the rain in May.",
    "Do you live near the sea? My sister does, and her name is Ada.",
    "system user assistant You are a person who likes tea.",
    "What do you do for a living? I teach children how to read, and you?",
]


@functools.cache
def _trained_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def blank_first_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a blank before the first word of a text, as Llama 2's does."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trained.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["</s>"], initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator(_TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


# How Qwen and Llama 3 cut a text into words: a newline stays with the punctuation before it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def _trained_on_words(special_tokens: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=312,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    brackets = ["rain.[END]\n[BOT]\n", "dog.[END]\n[USER]\n", "tea?[END]\n[SYSTEM]\n"]
    tokenizer.train_from_iterator([*_TEXTS, *brackets * 4], trainer)
    return tokenizer


def byte_tokenizer(
    template: str, special_tokens: Sequence[str], eos_token: str, **special: Any
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of about 310 entries that cuts words as Qwen's does."""
    trained = Tokenizer.from_str(_trained_on_words(tuple(special_tokens)).to_str())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        additional_special_tokens=list(special_tokens),
        eos_token=eos_token,
        **special,
    )
    tokenizer.chat_template = template
    return tokenizer


def letter_tokenizer(
    letters: str, template: str, end: str = "<end>", **special: Any
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a letter, so that text and ids are one to one."""
    trained = Tokenizer(models.WordLevel({end: 0} | {c: i + 1 for i, c in enumerate(letters)}, end))
    trained.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    trained.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=end, **special)
    tokenizer.chat_template = template
    return tokenizer


def tiny_tokenizer(
    template: str | None = CHATML, *, adds_start_token: bool = False, **special: Any
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 320 entries whose padding token is its end token."""
    trained = Tokenizer.from_str(_trained_tokenizer().to_str())
    if adds_start_token:
        trained.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", trained.token_to_id("<s>"))]
        )
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<s>"],
        **{name: token for name, token in special.items() if token is not None},
    )
    tokenizer.chat_template = template
    return tokenizer


_SIZE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def tiny_model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a randomly initialised model of one of the kinds below.

    `mistral` looks back 9 tokens in every layer, `mixed` (a Qwen2) in every other layer; `gemma2`
    caps its logits, `cohere` and `granite` scale them; `gpt2` has learned positions; `falcon` has
    dropout in the layer itself; `mamba` has no keys and values.
    """
    torch.manual_seed(seed)
    size = {**_SIZE, **changes}
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**size))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**size))
    elif kind == "mixed":
        layers = ["full_attention", "sliding_attention"]
        model = Qwen2ForCausalLM(
            Qwen2Config(**size, use_sliding_window=True, sliding_window=9, layer_types=layers)
        )
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**size, sliding_window=9))
    elif kind == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(**size, attn_implementation="eager", sliding_window=9)
        )
    elif kind == "cohere":
        model = CohereForCausalLM(CohereConfig(**size, logit_scale=0.25))
    elif kind == "granite":
        multipliers = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5}
        model = GraniteForCausalLM(GraniteConfig(**size, logits_scaling=4.0, **multipliers))
    elif kind == "falcon":
        own = ("hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
        shared = {name: size[name] for name in own}
        model = FalconForCausalLM(
            FalconConfig(vocab_size=size["vocab_size"], eos_token_id=1, **{**shared, **changes})
        )
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size["vocab_size"],
                n_embd=32,
                n_layer=size["num_hidden_layers"],
                n_head=4,
                n_positions=size["max_position_embeddings"],
                initializer_range=0.3,
                bos_token_id=None,
                eos_token_id=size["eos_token_id"],
                **{name: value for name, value in changes.items() if name not in _SIZE},
            )
        )
    elif kind == "mamba":
        model = MambaForCausalLM(
            MambaConfig(
                vocab_size=320,
                hidden_size=32,
                num_hidden_layers=2,
                state_size=4,
                eos_token_id=1,
                pad_token_id=None,
                bos_token_id=None,
            )
        )
    else:
        raise ValueError(f"unknown kind of tiny model: {kind!r}")
    return model.eval()


def tiny_policy(kind: str = "llama", template: str = CHATML, **settings: Any) -> LMPolicy:
    """Return an `LMPolicy` on a tiny model; lines are at most 12 tokens long."""
    return LMPolicy(
        tiny_model(kind), tiny_tokenizer(template), **{"max_new_tokens": 12, "seed": 0, **settings}
    )


# -- dialogues -------------------------------------------------------------------------------------


def openings(number: int) -> list[Chat]:
    """Return chats of different lengths, some of them alike."""
    return [
        [
            {"role": "system", "content": "You like tea." + " It rains." * (b % 3)},
            {"role": "user", "content": "Hello" + " you" * (b % 2) + "."},
        ]
        for b in range(number)
    ]


def generators(seed: int, number: int) -> list[np.random.Generator]:
    """Return one generator per dialogue."""
    return [np.random.default_rng([seed, b]) for b in range(number)]


def goes_on(chat: Chat, text: str, turn: int, slot: int) -> Chat:
    """Return the chat with the agent's line and the partner's answer to it."""
    answer = "I see. " * ((turn + slot) % 4) + f"And {turn}?"
    return [
        *chat,
        {"role": "assistant", "content": text},
        {"role": "user", "content": answer},
    ]


def play(
    policy: LMPolicy,
    slots: list[int],
    num_turns: int = 4,
    deterministic: bool = False,
    ends: dict[int, int] | None = None,
) -> tuple[Conversation, list[list[str]]]:
    """Let the dialogues of these slots run; `ends` says after how many turns a slot stops."""
    chats = [openings(8)[slot] for slot in slots]
    rngs = [generators(5, 8)[slot] for slot in slots]
    conversation = policy.begin(len(slots), rngs)
    said: list[list[str]] = [[] for _ in slots]
    for turn in range(num_turns):
        active = np.array([turn < (ends or {}).get(slot, num_turns) for slot in slots])
        texts = conversation.reply(chats, active, deterministic)
        for i, slot in enumerate(slots):
            if active[i]:
                said[i].append(texts[i])
                chats[i] = goes_on(chats[i], texts[i], turn, slot)
    return conversation, said


class Script(np.random.Generator):
    """Stands in a generator's place and holds the tokens that are to be drawn."""

    def __init__(self, *lines: Sequence[int]) -> None:
        super().__init__(np.random.PCG64(0))
        self.tokens: Iterator[int] = iter([token for line in lines for token in line])


def follow_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dialogues with a `Script` draw its tokens, with the probabilities they really have."""

    def draw(
        logit_nV: torch.Tensor,
        rngs: Sequence[Script],
        temperature: float = 1.0,
        deterministic: bool = False,
        **support: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        token_n = np.array([next(rng.tokens) for rng in rngs])
        logprob_nV = (logit_nV.float() / temperature).log_softmax(-1).numpy()
        return token_n, logprob_nV[np.arange(len(token_n)), token_n]

    monkeypatch.setattr("agents.sampling.sample_tokens", draw)


def plain_logprobs(policy: LMPolicy, tape: Tape) -> np.ndarray:
    """Score the agent's tokens, one sequence at a time, with full logits and no cache."""
    found = np.zeros(tape.token_SL.shape, dtype=np.float32)
    for s, length in enumerate(tape.length_S):
        ids = torch.as_tensor(tape.token_SL[s, :length])[None]
        with torch.no_grad():
            logits = policy.model(ids, use_cache=False).logits[0].float() / policy.temperature
        logprob_L = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].numpy()
        found[s, 1:length] = logprob_L
    return np.where(tape.turn_SL >= 0, found, 0.0)


def assert_same_logprobs(policy: LMPolicy, tape: Tape, tolerance: float = 1e-4) -> None:
    """Check that sampling, a plain forward pass and training agree on every agent token."""
    trained = policy.logprobs(tape.token_SL, tape.turn_SL).detach().numpy()
    assert (tape.old_logprob_SL[tape.action_mask_SL] < 0).any()
    np.testing.assert_allclose(tape.old_logprob_SL, plain_logprobs(policy, tape), atol=tolerance)
    np.testing.assert_allclose(tape.old_logprob_SL, trained, atol=tolerance)
