"""Tiny real language models, tokenizers and chat templates, made in memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
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

from agents.lm_policy import LMPolicy

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
    """Return a randomly initialised model: llama, qwen2, mistral, mixed, gemma2, gpt2 or mamba.

    `mistral` looks back 9 tokens in every layer, `mixed` (a Qwen2) in every other layer; `gemma2`
    caps its logits; `gpt2` has learned positions; `mamba` has no keys and values.
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
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size["vocab_size"],
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=size["max_position_embeddings"],
                initializer_range=0.3,
                bos_token_id=None,
                eos_token_id=1,
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
