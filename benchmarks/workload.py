"""What every contender plays: a random language model, its tokenizer, dialogues of known length.

Everything is made here from a seed; nothing is downloaded. Three properties make contenders
comparable:

    the model says nothing but whole words, never an end token, so every line has exactly
    `new_tokens` tokens;
    text -> ids -> text -> ids is the identity for such lines, so reading a transcript afresh gives
    the ids that were sampled;
    the lengths of persona and partner lines depend on slot and turn alone, so all contenders read
    the same number of tokens.
"""

from __future__ import annotations

import argparse
import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

Messages = list[dict[str, str]]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|pad|>"]


@dataclass(frozen=True)
class Workload:
    """Sizes of dialogues and model; every field is a command-line option."""

    dialogues: int = 64
    """Dialogues played side by side."""
    group_size: int = 8
    """Dialogues that share persona, opening and partner seed; divides `dialogues`."""
    new_tokens: int = 24
    """Tokens in every line of the agent."""
    hidden: int = 192
    """Width of the model."""
    layers: int = 6
    """Number of layers."""
    heads: int = 6
    """Number of query heads."""
    kv_heads: int = 2
    """Number of key-value heads."""
    vocab: int = 4096
    """Entries of the vocabulary."""
    token_budget: int = 2048
    """Tokens in one forward and backward pass of an update, padding included."""
    dtype: str = "float32"
    """Of weights and activations: float32 or bfloat16."""
    device: str = "cpu"
    """Where the model lives."""
    seed: int = 0
    """Of weights, words and dialogues."""

    @property
    def num_groups(self) -> int:
        """Number of different personas."""
        return self.dialogues // self.group_size

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layers: 2 3/4 of the model's, a multiple of 64."""
        return -(-11 * self.hidden // 4 // 64) * 64

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def num_multiplied_weights(self) -> int:
        """Weights that every token is multiplied with: all but input embeddings and biases."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_width
        feed_forward = 3 * self.hidden * self.intermediate
        return self.layers * (attention + feed_forward) + self.vocab * self.hidden

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return {"float32": 4, "bfloat16": 2}[self.dtype]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one option per field of Workload."""
    for field in fields(Workload):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)


def from_options(options: argparse.Namespace) -> Workload:
    """Return the workload that was asked for."""
    workload = Workload(**{field.name: getattr(options, field.name) for field in fields(Workload)})
    if workload.dialogues % workload.group_size:
        raise ValueError(
            f"--group-size must divide --dialogues={workload.dialogues}, got {workload.group_size}."
        )
    return workload


# -- words and tokenizer -------------------------------------------------------------------------


def made_up_words(number: int, seed: int) -> list[str]:
    """Return `number` different words of two or three syllables such as "bade", "kilomu"."""
    syllables = [c + v for c in "bdfghjklmnprstvz" for v in "aeiou"]
    length = 2 if number < 0.8 * len(syllables) ** 2 else 3
    rng = random.Random(seed)
    words: set[str] = set()
    while len(words) < number:
        words.add("".join(rng.choices(syllables, k=length)))
    return sorted(words)


@functools.cache
def make_tokenizer(vocab: int, seed: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with ChatML, trained on made-up words."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f" {word}" for word in made_up_words(vocab, seed)]
    trained.train_from_iterator([*text, *["system\nuser\nassistant\n"] * 9], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[:1]})
    tokenizer.chat_template = CHATML
    return tokenizer


def speakable_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens that are one blank and a word, and that encode to themselves."""
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in vocabulary if re.fullmatch(r"Ġ[a-z]+", token)]
    return sorted(i for i in ids if tokenizer.encode(tokenizer.decode([i])) == [i])


# -- model ---------------------------------------------------------------------------------------


def make_model(workload: Workload, context: int) -> Qwen2ForCausalLM:
    """Return a stock Qwen2 with random weights that will only say speakable tokens.

    Coordinate 0 is 1 in every input embedding and stands out from the noise in every hidden state;
    in the output embeddings it is 0 for speakable tokens and -3 for all others, whose logits
    therefore lie tens of nats below.
    """
    tokenizer = make_tokenizer(workload.vocab, workload.seed)
    torch.manual_seed(workload.seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=workload.vocab,
            hidden_size=workload.hidden,
            intermediate_size=workload.intermediate,
            num_hidden_layers=workload.layers,
            num_attention_heads=workload.heads,
            num_key_value_heads=workload.kv_heads,
            max_position_embeddings=context,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0
        head_VH = model.get_output_embeddings().weight
        head_VH[:, 0] = -3.0
        head_VH[speakable_ids(tokenizer), 0] = 0.0
    return model.to(device=workload.device, dtype=getattr(torch, workload.dtype))


# -- dialogues -----------------------------------------------------------------------------------


class WordDialogues(gym.vector.VectorEnv[tuple[Messages, ...], tuple[str, ...], Any]):
    """Dialogues of made-up words, all `max_turns` turns long; slots of a group share a seed.

    The persona has 56 to 64 words. The partner repeats four words of the line and adds 8 to 16 of
    its own. The reward is the share of words in a line whose first letter is in the alphabet's
    first half.
    """

    def __init__(self, workload: Workload, max_turns: int) -> None:
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
        self.num_envs = workload.dialogues
        self.group_B = np.arange(workload.dialogues) // workload.group_size
        self.max_turns = max_turns
        tokenizer = make_tokenizer(workload.vocab, workload.seed)
        self.words = [tokenizer.decode([i]) for i in speakable_ids(tokenizer)]

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Messages, ...], dict[str, Any]]:
        """Start all dialogues; groups are those of the workload, whatever `options` say."""
        assert seed is None or isinstance(seed, int)
        number = int(self.group_B[-1]) + 1
        seeds = np.random.SeedSequence(seed).spawn(number)
        self.turn = 0
        self.rngs = [np.random.default_rng(seeds[group]) for group in self.group_B]
        self.messages = [
            [
                {"role": "system", "content": self._say(slot, 56 + group % 9)},
                {"role": "user", "content": self._say(slot, 16)},
            ]
            for slot, group in enumerate(self.group_B.tolist())
        ]
        return self._observations(), {"group_id": self.group_B.copy()}

    def step(
        self, actions: Sequence[str]
    ) -> tuple[tuple[Messages, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Answer all lines."""
        self.turn += 1
        for slot, (messages, line) in enumerate(zip(self.messages, actions, strict=True)):
            echo = "".join(f" {word}" for word in line.split()[-4:])
            more = 8 + (5 * int(self.group_B[slot]) + 3 * self.turn) % 9
            messages.append({"role": "assistant", "content": line})
            messages.append({"role": "user", "content": echo + self._say(slot, more)})
        reward_B = np.array([_reward(line) for line in actions])
        over_B = np.full(self.num_envs, self.turn >= self.max_turns)
        return self._observations(), reward_B, over_B, np.zeros_like(over_B), {}

    def _say(self, slot: int, number: int) -> str:
        chosen = self.rngs[slot].integers(len(self.words), size=number)
        return "".join(self.words[i] for i in chosen)

    def _observations(self) -> tuple[Messages, ...]:
        return tuple(list(messages) for messages in self.messages)


def _reward(line: str) -> float:
    words = line.split()
    return sum(word[0] < "n" for word in words) / max(1, len(words))
