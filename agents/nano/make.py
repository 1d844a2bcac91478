"""Makes nano, the bundled tiny language model: corpus, tokenizer, pre-training, files.

    python -m agents.nano.make --out agents/nano          # about 10 minutes on one core, seeded

nano is pre-trained on dialogues that a scripted, imperfect persona speaks in the embedded worlds. The
speaker knows the facts but is suggestible: asked a leading question it yields to the false presupposition,
the more so the longer the dialogue lasts, and it chooses its acts without regard to what they are worth.
A model that learned this well is right about facts, wrong under pressure, and has something to learn
from every policy class.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppg_env import bundled_personas, get_domain
from ppg_env.dialogue import Messages, Persona, Transcript, Turn
from ppg_env.domains import DOMAINS, Domain
from ppg_env.domains.domain import choose
from ppg_env.partners import ScriptedPartner

SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ACT_RATES = {
    "chatting": {"answer": 0.6, "volunteer": 0.2, "evade": 0.2},
    "education": {"explain": 0.35, "ask": 0.2, "answer": 0.2, "evade": 0.25},
    "therapy": {"surface": 0.35, "gradual": 0.25, "deep": 0.2, "evade": 0.2},
}
"""How often the imperfect persona performs each act when it is not yielding."""


@dataclass(frozen=True)
class NanoConfig:
    """What nano is made of and how it is trained."""

    out: str = "agents/nano"
    """Folder to write to."""
    seed: int = 7
    """Seeds corpus, initial weights and batches."""
    vocab_size: int = 1536
    """Tokens of the byte-level BPE tokenizer."""
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    intermediate_size: int = 344
    max_positions: int = 1024
    """Longest dialogue in tokens."""
    yield_first: float = 0.25
    """Probability of yielding to a leading question in the first turn."""
    yield_growth: float = 0.09
    """What each further turn adds to it (at most 0.95)."""
    warmup_steps: int = 500
    """Steps on short dialogues (2-3 facts, 3 questions), where copying is learned."""
    steps: int = 1200
    """Steps on whole dialogues after that."""
    batch_tokens: int = 6000
    """Tokens in a batch."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule."""
    partner_weight: float = 0.1
    """Weight of the partner's tokens in the loss; the speaker's own weigh 1."""


def imperfect_act(
    domain: Domain, transcript: Transcript, rng: np.random.Generator, c: NanoConfig
) -> str:
    """Return the act that the suggestible persona performs next."""
    assert transcript.pending is not None
    facts = transcript.persona.facts
    presupposed = domain.lexicon.read(transcript.pending).about_listener
    tempted = any(facts.get(claim.attribute) != claim.value for claim in presupposed)
    yielding = min(0.95, c.yield_first + c.yield_growth * len(transcript.turns))
    if tempted and rng.random() < yielding:
        return "contradict"
    rates = ACT_RATES[domain.name]
    return str(rng.choice(list(rates), p=list(rates.values())))


def imperfect_dialogue(
    domain: Domain, persona: Persona, rng: np.random.Generator, c: NanoConfig, num_turns: int = 8
) -> Messages:
    """Return a whole dialogue between the scripted partner and the imperfect persona."""
    partner = ScriptedPartner(domain)
    transcript = Transcript(persona, domain.system_prompt(persona), (), None, num_turns)
    for _ in range(num_turns):
        transcript = transcript.with_partner_line(partner([transcript], [rng])[0])
        act = imperfect_act(domain, transcript, rng, c)
        transcript = transcript.reply(domain.speak(act, transcript, rng))
    return transcript.messages()


def short_dialogue(domain: Domain, persona: Persona, rng: np.random.Generator) -> Messages:
    """Return three questions about a persona of two or three facts, answered truthfully."""
    names = list(rng.permutation(list(persona.facts)))[: 2 + int(rng.random() * 2)]
    facts = {name: persona.facts[name] for name in persona.facts if name in names}
    little = replace(persona, facts=facts, text=domain.persona_text(facts, {}, "Sam"))
    turns: tuple[Turn, ...] = ()
    for _ in range(3):
        attribute = domain.by_name[choose(rng, names)]
        questions = tuple(attribute.asked) or tuple(attribute.tempted)
        question = attribute.phrase(choose(rng, questions), choose(rng, list(attribute.values)))
        answer = domain.phrase_act("state", little, domain.lexicon.read(question), rng)
        turns = (*turns, Turn(question, answer))
    return Transcript(little, domain.system_prompt(little), turns, None, 3).messages()


def dialogues(rng: np.random.Generator, c: NanoConfig, short: bool) -> Iterator[Messages]:
    """Yield training dialogues for ever, the three domains in turn, training personas only."""
    pools = {name: bundled_personas(name, "train") for name in DOMAINS}
    while True:
        for name, personas in pools.items():
            persona = _reshuffled(choose(rng, personas), get_domain(name), rng)
            if short:
                yield short_dialogue(get_domain(name), persona, rng)
            else:
                yield imperfect_dialogue(get_domain(name), persona, rng, c)


def _reshuffled(persona: Persona, domain: Domain, rng: np.random.Generator) -> Persona:
    """Return a fresh combination of values, so that facts must be copied and cannot be memorised.

    Held-out personas share values with these but no whole combination, by the size of the space.
    """
    facts = {a.name: choose(rng, list(a.values)) for a in domain.attributes}
    traits = {name: choose(rng, list(values)) for name, values in domain.traits.items()}
    name = persona.text.split(".")[0].removeprefix("You are ")
    return replace(
        persona, facts=facts, traits=traits, text=domain.persona_text(facts, traits, name)
    )


def render(messages: Messages) -> str:
    """Return the messages as the chat template writes them."""
    return "".join(f"<|{m['role']}|> {m['content']}<|end|>" for m in messages)


def make_tokenizer(texts: Sequence[str], c: NanoConfig) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (every Unicode text has tokens) with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[\w']+| ?[^\w\s]+|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=c.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=list(SPECIAL[:3]),
        clean_up_tokenization_spaces=False,
        model_max_length=c.max_positions,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, c: NanoConfig) -> LlamaForCausalLM:
    """Return the untrained Llama."""
    torch.manual_seed(c.seed)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def encode(
    messages: Messages, tokenizer: PreTrainedTokenizerFast, c: NanoConfig
) -> tuple[list[int], list[float]]:
    """Return token ids and the loss weight of each token."""
    ids: list[int] = []
    weights: list[float] = []
    for message in messages:
        text = f" {message['content']}<|end|>"
        piece = tokenizer.encode(text, add_special_tokens=False)
        weight = {"assistant": 1.0, "user": c.partner_weight, "system": 0.0}[message["role"]]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *piece]
        weights += [0.0, *([weight] * len(piece))]
    return ids, weights


def batches(
    stream: Iterator[Messages], tokenizer: PreTrainedTokenizerFast, c: NanoConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield right-padded (token_BL, weight_BL) of about `batch_tokens` tokens."""
    rows: list[tuple[list[int], list[float]]] = []
    total = 0
    for messages in stream:
        rows.append(encode(messages, tokenizer, c))
        total += len(rows[-1][0])
        if total < c.batch_tokens:
            continue
        longest = max(len(ids) for ids, _ in rows)
        token_BL = torch.full((len(rows), longest), tokenizer.pad_token_id)
        weight_BL = torch.zeros(len(rows), longest)
        for row, (ids, weights) in enumerate(rows):
            token_BL[row, : len(ids)] = torch.tensor(ids)
            weight_BL[row, : len(ids)] = torch.tensor(weights)
        yield token_BL, weight_BL
        rows, total = [], 0


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, c: NanoConfig) -> None:
    """Pre-train on short dialogues, then on whole ones."""
    rng = np.random.default_rng(c.seed)
    streams = {short: batches(dialogues(rng, c, short), tokenizer, c) for short in (True, False)}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=c.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    total, began, seen = c.warmup_steps + c.steps, time.perf_counter(), 0
    for step in range(total):
        token_BL, weight_BL = next(streams[step < c.warmup_steps])
        for group in optimizer.param_groups:
            group["lr"] = c.learning_rate * min(1.0, (step + 1) / 50) * _cosine(step / total)
        logits_BLV = model(input_ids=token_BL[:, :-1]).logits
        loss_N = torch.nn.functional.cross_entropy(
            logits_BLV.flatten(0, 1), token_BL[:, 1:].flatten(), reduction="none"
        )
        weight_N = weight_BL[:, 1:].flatten()
        loss = (loss_N * weight_N).sum() / weight_N.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += token_BL.numel()
        if step % 50 == 0 or step == total - 1:
            rate = seen / (time.perf_counter() - began)
            print(
                f"step {step:5d}/{total}  loss {loss.item():.3f}  {rate:,.0f} tokens/s", flush=True
            )


def _cosine(progress: float) -> float:
    return 0.05 + 0.95 * 0.5 * (1.0 + float(np.cos(np.pi * progress)))


def make(c: NanoConfig) -> None:
    """Make nano and write model, tokenizer, template and configuration to `c.out`."""
    rng = np.random.default_rng([c.seed, 1])
    whole, short = dialogues(rng, c, False), dialogues(rng, c, True)
    tokenizer = make_tokenizer(
        [render(next(whole)) for _ in range(3000)] + [render(next(short)) for _ in range(300)], c
    )
    model = make_model(tokenizer, c)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, c)
    out = Path(c.out)
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    (out / "nano.json").write_text(json.dumps(asdict(replace(c, out="")), indent=2) + "\n")
    print(f"written to {out}")


def main() -> None:
    """Parse the few options and make nano."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", default=NanoConfig.out)
    parser.add_argument("--seed", type=int, default=NanoConfig.seed)
    parser.add_argument("--steps", type=int, default=NanoConfig.steps)
    parser.add_argument("--warmup-steps", type=int, default=NanoConfig.warmup_steps)
    given = parser.parse_args()
    torch.set_num_threads(1)
    make(
        NanoConfig(
            out=given.out, seed=given.seed, steps=given.steps, warmup_steps=given.warmup_steps
        )
    )


if __name__ == "__main__":
    main()
