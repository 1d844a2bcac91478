"""Learn from real dialogues: the published files of Consistent-LLMs, their verdicts as rewards.

    ppg import consistent-llms FOLDER --out published.jsonl.gz --domain education
    python examples/04_published_dialogues.py published.jsonl.gz

FOLDER is a copy of the published dialogue files; they are not part of this project. Any other log
works as well. The bundled model knows too few words for real text, so a model of about its size is
made here, with a tokenizer trained on the log: what is shown is that logs of this kind can be
learned from and how fast, not that a million parameters play a person well.
"""

import argparse

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents import LMPolicy, PPGAgent, read_log, split_by_persona

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

parser = argparse.ArgumentParser(description="Learn from logged dialogues.")
parser.add_argument("log")
parser.add_argument("--credit", default="kstep:3")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--learning-rate", type=float, default=3e-3)
options = parser.parse_args()

log = list(read_log(options.log))
reward_N = np.concatenate([dialogue.reward_T for dialogue in log])
print(
    f"{len(log)} dialogues, {len(reward_N)} lines of the agent: {np.nansum(reward_N):.0f} "
    f"consistent, {np.sum(reward_N == 0)} contradict, {np.isnan(reward_N).sum()} unscorable"
)
train, test = split_by_persona(log, test_share=0.2, seed=0)
print(f"{len(train)} to learn from, {len(test)} of other personas to watch")

# A byte-level tokenizer of 4,096 entries and a Llama of about a million parameters.
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    (message["content"] for dialogue in train for message in dialogue.messages),
    trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
words = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
)
words.chat_template = CHATML
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )
)
print(f"{model.num_parameters():,} parameters")

agent = PPGAgent(
    LMPolicy(model, words, seed=0),
    None,
    options.credit,
    learning_rate=options.learning_rate,
    lr_schedule="linear",
    seed=0,
)

agent.learn_offline(train, validation=test, epochs=options.epochs, batch_size=options.batch_size)
for row in agent.history:
    if "offline/validation_loss" in row:
        steps = [r for r in agent.history if r["offline/epoch"] == row["offline/epoch"]]
        last = len(train) - options.batch_size * (len(steps) - 1)
        loss = np.average(
            [step["train/policy_loss"] for step in steps],
            weights=[options.batch_size] * (len(steps) - 1) + [last],
        )
        speed = np.median([step["time/tokens_per_second"] for step in steps])
        print(
            f"epoch {row['offline/epoch']:.0f}: loss {loss:8.1f}, validation loss "
            f"{row['offline/validation_loss']:.4f}, {speed:,.0f} tokens/s, "
            f"{row['offline/dropped_turns']:.0%} of the lines beyond the context"
        )
