"""Makes nano, the bundled tiny language model: corpus, tokenizer, pre-training, files.

    python -m agents.nano.make --out agents/nano      # about 15 minutes on one core, seeded

nano is pre-trained on dialogues that a scripted, imperfect persona speaks in the embedded worlds.
The speaker knows the facts but is suggestible: asked a leading question it yields to the false
presupposition, the more so the longer the dialogue lasts, and it chooses its acts without regard to
what they are worth. A model that learned this well is right about facts, wrong under pressure, and
has something to learn from every policy class.
"""

from __future__ import annotations

import argparse
import json
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
    "chatting": {"answer": 0.55, "volunteer": 0.2, "evade": 0.25},
    "education": {"explain": 0.3, "ask": 0.2, "answer": 0.2, "evade": 0.3},
    "therapy": {"surface": 0.3, "gradual": 0.2, "deep": 0.2, "evade": 0.3},
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
    num_kv_heads: int = 4
    intermediate_size: int = 344
    max_positions: int = 1024
    """Longest dialogue in tokens."""
    yield_first: float = 0.3
    """Probability of yielding to a leading question in the first turn."""
    yield_growth: float = 0.09
    """What each further turn adds to it (at most 0.95)."""
    lessons: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Copying comes first: short dialogues of at most so many facts, one lesson after the other."""
    lesson_steps: int = 300
    """Steps a lesson; with two facts from the start nothing was learned in a million tokens."""
    lesson_tokens: int = 1500
    """Tokens in a batch of a lesson: many small steps bring copying about sooner than few large."""
    steps: int = 1700
    """Steps on whole dialogues after that."""
    batch_tokens: int = 4000
    """Tokens in a batch of whole dialogues."""
    learning_rate: float = 1e-3
    """Peak; falls along a cosine during the whole dialogues."""
    fact_weight: float = 5.0
    """Weight in the loss of tokens that name a value; the speaker's other tokens weigh 1."""
    initializer_range: float = 0.05
    """Standard deviation of the initial weights."""
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


def short_dialogue(
    domain: Domain, persona: Persona, rng: np.random.Generator, max_facts: int
) -> Messages:
    """Return six questions about a persona of 1 to `max_facts` facts, answered truthfully."""
    names = list(rng.permutation(list(persona.facts)))[: 1 + int(rng.random() * max_facts)]
    facts = {name: persona.facts[name] for name in persona.facts if name in names}
    little = replace(persona, facts=facts, text=domain.persona_text(facts, {}, "Sam"))
    turns: tuple[Turn, ...] = ()
    for _ in range(6):
        attribute = domain.by_name[choose(rng, names)]
        tempting = max_facts > 1 and rng.random() < 0.3
        questions = attribute.tempted if tempting or not attribute.asked else attribute.asked
        question = attribute.phrase(choose(rng, questions), choose(rng, list(attribute.values)))
        answer = domain.phrase_act("state", little, domain.lexicon.read(question), rng)
        turns = (*turns, Turn(question, answer))
    return Transcript(little, domain.system_prompt(little), turns, None, 6).messages()


def dialogues(rng: np.random.Generator, c: NanoConfig, max_facts: int | None) -> Iterator[Messages]:
    """Yield training dialogues for ever, the domains in turn; `max_facts` None = whole ones."""
    pools = {name: bundled_personas(name, "train") for name in DOMAINS}
    while True:
        for name, personas in pools.items():
            persona = _reshuffled(choose(rng, personas), get_domain(name), rng)
            if max_facts is None:
                yield imperfect_dialogue(get_domain(name), persona, rng, c)
            else:
                yield short_dialogue(get_domain(name), persona, rng, max_facts)


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
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_positions,
        tie_word_embeddings=True,
        initializer_range=c.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def fact_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the first token of every attribute value, as it stands within a sentence."""
    spoken = [
        forms[0] for d in DOMAINS.values() for a in d.attributes for forms in a.values.values()
    ]
    return frozenset(tokenizer.encode(f" {v}", add_special_tokens=False)[0] for v in spoken)


def batches(
    stream: Iterator[Messages], tokenizer: PreTrainedTokenizerFast, c: NanoConfig, num_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield right-padded (token_BL, weight_BL) of about `num_tokens` tokens."""
    facts = fact_tokens(tokenizer)
    rows: list[tuple[list[int], list[float]]] = []
    for messages in stream:
        rows.append(encode(messages, tokenizer, facts, c))
        if sum(len(ids) for ids, _ in rows) < num_tokens:
            continue
        longest = max(len(ids) for ids, _ in rows)
        token_BL = torch.full((len(rows), longest), tokenizer.pad_token_id)
        weight_BL = torch.zeros(len(rows), longest)
        for row, (ids, weights) in enumerate(rows):
            token_BL[row, : len(ids)] = torch.tensor(ids)
            weight_BL[row, : len(ids)] = torch.tensor(weights)
        yield token_BL, weight_BL
        rows = []


def encode(
    messages: Messages, tokenizer: PreTrainedTokenizerFast, facts: frozenset[int], c: NanoConfig
) -> tuple[list[int], list[float]]:
    """Return token ids and the loss weight of each token."""
    ids: list[int] = []
    weights: list[float] = []
    for message in messages:
        marker, *piece = tokenizer.encode(render([message]), add_special_tokens=False)
        ids += [marker, *piece]
        if message["role"] == "assistant":
            weights += [0.0, *(c.fact_weight if token in facts else 1.0 for token in piece)]
        else:
            weight = c.partner_weight if message["role"] == "user" else 0.0
            weights += [0.0, *([weight] * len(piece))]
    return ids, weights


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, c: NanoConfig) -> None:
    """Pre-train: the lessons one after the other, then whole dialogues."""
    rng = np.random.default_rng(c.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=c.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    for max_facts in c.lessons:
        stream = batches(dialogues(rng, c, max_facts), tokenizer, c, c.lesson_tokens)
        for step in range(c.lesson_steps):
            _set_rate(optimizer, c.learning_rate * min(1.0, (step + 1) / 50))
            loss = _step(model, optimizer, *next(stream))
        print(f"lesson of {max_facts} facts: loss {loss:.3f}", flush=True)

    stream = batches(dialogues(rng, c, None), tokenizer, c, c.batch_tokens)
    for step in range(c.steps):
        falling = 0.02 + 0.98 * 0.5 * (1.0 + float(np.cos(np.pi * step / c.steps)))
        _set_rate(optimizer, c.learning_rate * min(1.0, (step + 1) / 50) * falling)
        loss = _step(model, optimizer, *next(stream))
        if step % 100 == 0 or step == c.steps - 1:
            print(f"whole dialogues, step {step}: loss {loss:.3f}", flush=True)


def _set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    token_BL: torch.Tensor,
    weight_BL: torch.Tensor,
) -> float:
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
    return loss.item()


def make(c: NanoConfig) -> None:
    """Make nano and write model, tokenizer, template and configuration to `c.out`."""
    rng = np.random.default_rng([c.seed, 1])
    whole, short = dialogues(rng, c, None), dialogues(rng, c, 3)
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
    given = parser.parse_args()
    torch.set_num_threads(1)
    make(NanoConfig(out=given.out, seed=given.seed, steps=given.steps))


if __name__ == "__main__":
    main()
