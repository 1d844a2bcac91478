"""Dialogues side by side: what the model reads, what it says aloud, and what the tape keeps."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    CHATML,
    REWRITING,
    THOUGHTLESS,
    Script,
    assert_same_logprobs,
    byte_tokenizer,
    follow_scripts,
    generators,
    goes_on,
    letter_tokenizer,
    openings,
    play,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
)
from tiny_worlds import EchoDialogues

from agents import PPGAgent, collect_rollouts
from agents.conversation import Conversation
from agents.lm_policy import LMPolicy
from agents.rollout import RolloutBatch
from agents.tape import Tape

# The prompt itself opens the thought that every line starts with.
OPENING = THOUGHTLESS.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")

several_sequences = pytest.mark.filterwarnings("ignore:.*several token sequences")


# -- one dialogue, one sequence --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mixed", "gpt2"])
def test_a_dialogue_does_not_depend_on_the_batch_it_rides_in(kind: str) -> None:
    policy = tiny_policy(kind)
    together, said = play(policy, [0, 1, 2, 3, 4], ends={3: 2})
    tape = together.tape()
    for slot in (1, 3, 4):
        alone, said_alone = play(policy, [slot], ends={3: 2})
        assert said_alone[0] == said[slot]
        length = tape.length_S[slot]
        np.testing.assert_array_equal(alone.tape().token_SL[0], tape.token_SL[slot, :length])


@contextmanager
def reading(policy: LMPolicy) -> Iterator[list[int]]:
    """Count the tokens, rows times width, of every forward pass."""
    assert policy.network.serves_cache  # probes run before
    seen: list[int] = []
    hook = policy.model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].numel())
    )
    yield seen
    hook.remove()


def test_a_turn_reads_only_its_new_tokens() -> None:
    policy = tiny_policy()
    conversation, chat = policy.begin(1), openings(1)[0]
    for turn in range(4):
        with reading(policy) as seen:
            (text,) = conversation.reply([chat])
        tape = conversation.tape()
        own = np.flatnonzero(tape.turn_SL[0] == turn)
        before = np.flatnonzero(tape.turn_SL[0] == turn - 1)
        # All that is new, and the last token of the line before, but not this line's last one.
        assert sum(seen) == own[-1] - (before[-1] if turn else 0)
        chat = goes_on(chat, text, turn, 0)
    assert sum(seen) < 60 < len(policy.format.prompt_ids(chat))


def test_the_conversation_says_what_a_policy_without_memory_says() -> None:
    policy = tiny_policy()
    chats = openings(3)
    texts = policy.begin(3, generators(1, 3)).reply(chats)
    assert texts == policy.predict_batch(chats, rngs=generators(1, 3))


def test_the_tape_is_the_rendered_dialogue_where_lines_are_plain_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    follow_scripts(monkeypatch)
    policy = tiny_policy()
    chats = openings(1)
    line = [*policy.format.encode("I like the rain."), policy.tokenizer.eos_token_id]
    conversation = policy.begin(1, [Script(line, line)])
    for turn in range(2):
        (text,) = conversation.reply(chats)
        assert text == "I like the rain."
        chats = [goes_on(chats[0], text, turn, 0)]
    tape = conversation.tape()
    rendered = policy.tokenizer.apply_chat_template(chats[0][:5], tokenize=False).rstrip("\n")
    assert policy.tokenizer.decode(tape.token_SL[0]) == rendered
    assert policy.tokenizer.decode(tape.token_SL[0][tape.turn_SL[0] == 1]) == (
        "I like the rain.<|im_end|>"
    )
    assert tape.token_SL[0].tolist() == policy.format.encode(rendered)


def test_a_line_without_words_is_spoken_as_an_ellipsis(monkeypatch: pytest.MonkeyPatch) -> None:
    follow_scripts(monkeypatch)
    policy = tiny_policy()
    end = policy.tokenizer.eos_token_id
    conversation = policy.begin(1, [Script([end], [end])])
    chat = openings(1)[0]
    assert conversation.reply([chat]) == ["..."]
    assert conversation.reply([goes_on(chat, "...", 0, 0)]) == ["..."]
    tape = conversation.tape()
    assert (tape.turn_SL >= 0).sum(axis=1).tolist() == [2]
    assert not tape.cut_BT.any()


def test_deterministic_lines_are_the_most_likely_ones() -> None:
    policy = tiny_policy()
    conversation, _ = play(policy, [0, 1], deterministic=True)
    tape = conversation.tape()
    with torch.no_grad():
        best_SL = policy.model(torch.as_tensor(tape.token_SL)).logits.argmax(-1).numpy()
    spoken = tape.turn_SL[:, 1:] >= 0
    np.testing.assert_array_equal(best_SL[:, :-1][spoken], tape.token_SL[:, 1:][spoken])
    chat = openings(1)[0]
    assert policy.predict(chat, deterministic=True) == policy.predict(chat, deterministic=True)


def test_an_observation_from_another_dialogue_is_refused() -> None:
    policy = tiny_policy()
    conversation = policy.begin(1)
    chat = openings(1)[0]
    conversation.reply([chat])
    with pytest.raises(ValueError, match="call begin"):
        conversation.reply([chat])
    with pytest.raises(ValueError, match="role 'user'"):
        policy.begin(1).reply([[*chat, {"role": "assistant", "content": "Hi."}]])
    with pytest.raises(ValueError, match="holds 1 dialogues, got 2"):
        policy.begin(1).reply([chat, chat])
    with pytest.raises(ValueError, match="1 generators for 2 dialogues"):
        policy.begin(2, generators(0, 1))


# -- templates that rewrite what was said ----------------------------------------------------------


def test_where_the_past_is_rewritten_each_turn_is_a_sequence_and_is_announced_once() -> None:
    policy = tiny_policy(template=REWRITING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tapes = [play(policy, [0, 1, 2], num_turns=3, ends={1: 1})[0].tape() for _ in range(2)]
    assert len([w for w in caught if "rewrites earlier turns" in str(w.message)]) == 1
    for tape in tapes:
        assert tape.episode_S.tolist() == [0, 0, 0, 1, 2, 2, 2]
        turns = [sorted(set(row) - {-1}) for row in tape.turn_SL.tolist()]
        assert turns == [[0], [1], [2], [0], [0], [1], [2]]
        assert_same_logprobs(policy, tape)


@pytest.mark.parametrize(
    "settings", [{}, {"template": REWRITING, "sequences": "turn"}], ids=["append-only", "asked for"]
)
def test_nothing_is_announced_where_nothing_is_unexpected(settings: dict[str, Any]) -> None:
    policy = tiny_policy(**settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tape = play(policy, [0, 1])[0].tape()
    assert len(tape.length_S) == (8 if settings else 2)
    assert not [w for w in caught if "sequences" in str(w.message)]


@several_sequences
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("template", [REWRITING, OPENING], ids=["rewriting", "thinking"])
def test_the_cache_keeps_the_common_beginning_of_a_rewritten_dialogue(
    template: str, kind: str
) -> None:
    policy = tiny_policy(kind, template=template, max_new_tokens=6)
    conversation, chat = policy.begin(1), openings(1)[0]
    chat[0]["content"] *= 40
    for turn in range(5):
        with reading(policy) as seen:
            (text,) = conversation.reply([chat])
        tape = conversation.tape()
        ids = [row[:n].tolist() for row, n in zip(tape.token_SL, tape.length_S, strict=True)]
        own = int((tape.turn_SL[turn] == turn).sum())
        prompt, former = ids[turn][:-own], ids[turn - 1][:-1] if turn else []
        pairs = zip(prompt, former, strict=False)
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        assert sum(seen) == len(prompt) - shared + own - 1
        chat = goes_on(chat, text, turn, 0)
    assert len(tape.length_S) == 5
    assert sum(seen) < len(prompt) / 3
    assert_same_logprobs(policy, tape)


@several_sequences
@pytest.mark.filterwarnings("ignore:.*cannot use the key-value cache")
def test_a_model_without_the_cache_reads_a_rewritten_dialogue_as_well() -> None:
    policy = tiny_policy("mamba", template=REWRITING, max_new_tokens=4)
    tape = play(policy, [0, 1, 2], num_turns=3, ends={1: 2})[0].tape()
    assert len(tape.length_S) == 8
    assert_same_logprobs(policy, tape)


# -- one sequence or several: the same gradient ----------------------------------------------------

LETTERS = "abcdefghijklmnopSUA"
LETTERED = (
    "{% for message in messages %}{{ message['role'][0] | upper }}{{ message['content'] }}<end>"
    "{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)
ENDS = [3, 2, 3, 1, 3, 3]


def lettered_policy(model: Any, sequences: str) -> LMPolicy:
    tokenizer = letter_tokenizer(LETTERS, LETTERED)
    return LMPolicy(model, tokenizer, max_new_tokens=5, temperature=0.8, sequences=sequences)


def lettered_tape(policy: LMPolicy) -> Tape:
    chats = [
        [{"role": "system", "content": "gabe"[: b % 4]}, {"role": "user", "content": "fade" * b}]
        for b in range(len(ENDS))
    ]
    conversation = policy.begin(len(ENDS), generators(10, len(ENDS)))
    for turn in range(3):
        texts = conversation.reply(chats, np.array(ENDS) > turn)
        for b, text in enumerate(texts):
            line, answer = {"role": "assistant", "content": text}, "cab"[: 1 + (b + turn) % 3]
            chats[b] = [*chats[b], line, {"role": "user", "content": answer}]
    return conversation.tape()


def batch_around(tape: Tape) -> RolloutBatch:
    alive_BT = np.arange(3) < np.array(ENDS)[:, None]
    reward_BT = np.random.default_rng(1).uniform(size=alive_BT.shape)
    return RolloutBatch(
        reward_BT=np.where(alive_BT, reward_BT, 0.0),
        alive_BT=alive_BT,
        group_B=np.zeros(len(ENDS), dtype=int),
        cut_BT=tape.cut_BT,
        truncated_B=tape.truncated_B,
        overflow_B=tape.truncated_B,
        part_BT={},
        transcripts=[[] for _ in ENDS],
        boundaries=None,
        seconds=0.0,
        tape=tape,
    )


class Standstill(torch.optim.SGD):
    """Remembers the gradient that it was to follow."""

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        self.gradient = torch.cat([p.grad.flatten() for p in parameters])


LOSSES: dict[str, dict[str, Any]] = {
    "policy gradient": {},
    "clipped by turn": {"batch_size": 6, "clip_range": 0.1},
    "clipped by token": {"batch_size": 6, "clip_range": 0.1, "ratio_level": "token"},
    "kl": {"kl_coef": 0.7},
    "entropy": {"ent_coef": 0.3},
    "all, in parts": {
        "batch_size": 6,
        "clip_range": 0.1,
        "kl_coef": 0.7,
        "ent_coef": 0.3,
        "token_budget": 40,
    },
}


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_one_sequence_or_one_a_turn_give_the_same_gradient(settings: dict[str, Any]) -> None:
    # With these seeds no line is empty, which would be said as "...".
    model = tiny_model("llama", seed=1, vocab_size=20, eos_token_id=0)
    found = {}
    policies = {kind: lettered_policy(model, kind) for kind in ("auto", "turn")}
    tapes = {kind: lettered_tape(policy) for kind, policy in policies.items()}
    agents = {
        kind: PPGAgent(policy, None, "kstep:2", max_grad_norm=math.inf, seed=0, **settings)
        for kind, policy in policies.items()
    }
    whole, parts = tapes["auto"], tapes["turn"]
    # The comparison makes sense where the prompt of each turn is the very beginning of the dialogue
    # as it was sampled; else the model is shown different things.
    assert whole.episode_S.tolist() == list(range(len(ENDS)))
    assert parts.episode_S.tolist() == np.repeat(np.arange(len(ENDS)), ENDS).tolist()
    for s, episode in enumerate(parts.episode_S):
        length = parts.length_S[s]
        np.testing.assert_array_equal(parts.token_SL[s, :length], whole.token_SL[episode, :length])
    assert whole.num_sampled == parts.num_sampled > 30
    assert 0 < whole.cut_BT.sum() < sum(ENDS)

    torch.manual_seed(0)
    with torch.no_grad():  # ratios leave 1 and the reference is left behind
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    for kind, agent in agents.items():
        agent.optimization.adam = Standstill(model.parameters(), lr=0.0)
        batch = batch_around(tapes[kind])
        measured = agent.update(batch, agent.credited(batch))
        found[kind] = agent.optimization.adam.gradient, measured
    (gradient, measured), (same_gradient, same_measured) = found["auto"], found["turn"]
    assert gradient.norm() > 0.1
    assert (gradient - same_gradient).norm() < 5e-6 * gradient.norm()
    for name in sorted(set(measured) - {"time/update_seconds"}):
        assert measured[name] == pytest.approx(same_measured[name], rel=1e-4, abs=1e-6), name
    if "batch_size" in settings:
        assert 0 < measured["train/clip_fraction"] < 1
    assert measured["train/approx_kl"] > 1e-3


# -- thoughts --------------------------------------------------------------------------------------

_CHATML = ("<|im_start|>", "<|im_end|>")


def thinking_policy(marks: str, template: str = THOUGHTLESS, **settings: Any) -> LMPolicy:
    """Return a policy to which "<think>" and "</think>" are one token each, or several."""
    special = ("<think>", "</think>") if marks == "special" else ()
    tokenizer = byte_tokenizer(template, (*_CHATML, *special), "<|im_end|>")
    if marks == "plain":
        tokenizer.add_tokens(["<think>", "</think>"])
    assert (len(tokenizer.encode("</think>", add_special_tokens=False)) == 1) == (marks != "words")
    return LMPolicy(tiny_model("llama"), tokenizer, **{"max_new_tokens": 40, "seed": 0, **settings})


each_way = pytest.mark.parametrize("marks", ["special", "plain", "words"])


def spoken(policy: LMPolicy, *lines: str) -> tuple[Conversation, list[str], list[list[int]]]:
    """Let the model say these lines; return what was said aloud, and the ids of each line."""
    ids = [policy.format.encode(line)[: policy.max_new_tokens] for line in lines]
    conversation, chat, aloud = policy.begin(1, [Script(*ids)]), openings(1)[0], []
    for turn in range(len(lines)):
        (text,) = conversation.reply([chat])
        (again,) = policy.predict_batch([chat], rngs=[Script(ids[turn])])
        assert again == text  # a policy without memory says the same
        aloud.append(text)
        chat = goes_on(chat, text, turn, 0)
    return conversation, aloud, ids


def prompt_text(policy: LMPolicy, tape: Tape, sequence: int) -> str:
    """Return what the model was shown before a sequence's first line."""
    first = int((tape.turn_SL[sequence] >= 0).argmax())
    return str(policy.tokenizer.decode(tape.token_SL[sequence, :first]))


@several_sequences
@each_way
def test_thoughts_are_trained_and_not_said_aloud(
    marks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_scripts(monkeypatch)
    policy = thinking_policy(marks)
    lines = [
        "<think>\nTea?\n</think>\n\nI like the rain.<|im_end|>",
        "<think></think>No.<|im_end|>",
    ]
    conversation, aloud, ids = spoken(policy, *lines)
    assert aloud == ["I like the rain.", "No."]
    tape = conversation.tape()
    assert tape.episode_S.tolist() == [0, 0]
    for turn in range(2):
        assert tape.token_SL[turn][tape.turn_SL[turn] == turn].tolist() == ids[turn]
    shown = prompt_text(policy, tape, 1)
    assert "I like the rain." in shown and "Tea?" not in shown and "think" not in shown
    logprob_SL = policy.logprobs(tape.token_SL, tape.turn_SL)
    assert (logprob_SL.detach().numpy() != 0).sum() == len(ids[0]) + len(ids[1])
    assert_same_logprobs(policy, tape)


@several_sequences
@each_way
@pytest.mark.parametrize(
    ("line", "aloud"),
    [
        ("<think>\nIs it tea that she likes, or rain, or the dog?", "..."),
        ("No. <think>\nIs it tea that she likes, or the dog?", "No."),
        ("<think>Tea?</think> No. <think>Or is it the rain?", "No."),
        ("<think>Tea?<|im_end|>", "..."),
        ("<think>Tea?</think><|im_end|>", "..."),
        ("<think>Tea?</think> \n<|im_end|>", "..."),
        ("Tea?</think>So.<|im_end|>", "So."),
        ("<think>a</think>b<think>c</think>d<|im_end|>", "d"),
    ],
)
def test_a_thought_is_not_said_aloud_even_if_it_is_cut_or_comes_late(
    marks: str, line: str, aloud: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_scripts(monkeypatch)
    policy = thinking_policy(marks)
    if "<|im_end|>" not in line:
        policy = thinking_policy(marks, max_new_tokens=len(policy.format.encode(line)))
    conversation, said, ids = spoken(policy, line, "I see.<|im_end|>")
    assert said == [aloud, "I see."]
    tape = conversation.tape()
    assert tape.cut_BT[0, 0] == ("<|im_end|>" not in line)
    assert len(tape.length_S) == 2  # the next turn does not see the thought
    assert tape.token_SL[0][tape.turn_SL[0] == 0].tolist() == ids[0]
    expected = policy.tokenizer.apply_chat_template(
        goes_on(openings(1)[0], aloud, 0, 0), tokenize=False, add_generation_prompt=True
    )
    assert prompt_text(policy, tape, 1) == expected


@several_sequences
@each_way
def test_where_the_prompt_opens_the_thought_a_line_without_its_end_says_nothing(
    marks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_scripts(monkeypatch)
    policy = thinking_policy(marks, OPENING, max_new_tokens=20)
    assert policy.format.opens_thought
    lines = ["Tea.<|im_end|>", "Tea or rain? " * 9, "Tea?\n</think>\n\nRain.<|im_end|>"]
    conversation, aloud, ids = spoken(policy, *lines)
    assert aloud == ["...", "...", "Rain."]
    tape = conversation.tape()
    assert tape.cut_BT.tolist() == [[False, True, False]]
    for turn in range(3):
        assert tape.token_SL[turn][tape.turn_SL[turn] == turn].tolist() == ids[turn]
    assert_same_logprobs(policy, tape)


def test_a_template_that_only_appends_begins_anew_after_a_thought_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    follow_scripts(monkeypatch)
    policy = thinking_policy("plain", CHATML)
    lines = ["No.", "<think>Tea?</think>Rain.", "So.", "<think>Sea?</think>Dog.", "And?"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        conversation, aloud, _ = spoken(policy, *[line + "<|im_end|>" for line in lines])
    (warning,) = [str(w.message) for w in caught if "sequences" in str(w.message)]
    assert "shows earlier lines without their thoughts" in warning
    assert aloud == ["No.", "Rain.", "So.", "Dog.", "And?"]
    tape = conversation.tape()
    turns = [sorted(set(row) - {-1}) for row in tape.turn_SL.tolist()]
    assert turns == [[0, 1], [2, 3], [4]]
    assert "Tea?" not in policy.tokenizer.decode(tape.token_SL[1])
    assert_same_logprobs(policy, tape)


@several_sequences
def test_the_environment_never_hears_a_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    follow_scripts(monkeypatch)
    policy = thinking_policy("plain")
    line = policy.format.encode("<think>My tea.</think>Fine.<|im_end|>")

    def scripts(seed: int | None, number: int, first_slot: int = 0) -> list[Script]:
        return [Script(*[line] * 4) for _ in range(number)]

    monkeypatch.setattr("agents.rollout.agent_generators", scripts)
    batch = collect_rollouts(EchoDialogues(3), policy, seed=0)
    said = [m["content"] for chat in batch.transcripts for m in chat if m["role"] != "system"]
    assert "Fine." in said and not any("tea" in content for content in said)
    np.testing.assert_array_equal(batch.part_BT["length"][batch.alive_BT], len("Fine."))
    assert batch.tape is not None and batch.num_tokens == batch.num_turns * len(line)


# -- a full context --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dialogue_that_fills_the_context_stops_and_the_others_go_on(kind: str) -> None:
    model = tiny_model(kind, max_position_embeddings=160)
    policy = LMPolicy(model, tiny_tokenizer(), max_new_tokens=12, seed=0)
    chats = openings(2)
    chats[1][0]["content"] = "You like tea. " * 10
    conversation = policy.begin(2, generators(0, 2))
    texts, stopped = ["", ""], []
    for turn in range(8):
        texts = conversation.reply(chats)
        stopped.append(conversation.truncated_B.tolist())
        chats = [goes_on(chat, text, turn, 0) for chat, text in zip(chats, texts, strict=True)]
    tape = conversation.tape()
    assert [False, True] in stopped and stopped[-1] == [True, True]
    assert texts == ["", ""]
    assert 140 < tape.length_S.min() <= tape.length_S.max() <= 160
    assert_same_logprobs(policy, tape)


def test_a_line_cut_by_the_context_stops_its_dialogue_and_one_cut_by_the_limit_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    follow_scripts(monkeypatch)
    chat = openings(1)[0]
    prompt = len(tiny_policy().format.prompt_ids(chat))
    for window, truncated in ((prompt + 5, True), (prompt + 6, False), (prompt + 100, False)):
        model = tiny_model("llama", max_position_embeddings=window)
        policy = LMPolicy(model, tiny_tokenizer(), max_new_tokens=6)
        conversation = policy.begin(1, [Script(policy.format.encode("dog") * 6)])
        assert conversation.reply([chat])[0].startswith("dog")
        tape = conversation.tape()
        assert tape.num_sampled == min(6, window - prompt)
        assert tape.cut_BT.tolist() == [[True]]
        assert conversation.truncated_B.tolist() == tape.truncated_B.tolist() == [truncated]


def test_a_long_answer_beside_a_nearly_full_dialogue_does_no_harm() -> None:
    model = tiny_model("gpt2", max_position_embeddings=180)
    policy = LMPolicy(model, tiny_tokenizer(), max_new_tokens=4, seed=0)
    full, short = (
        [{"role": "system", "content": "tea " * number}, {"role": "user", "content": "Hello."}]
        for number in (40, 1)
    )
    conversation = policy.begin(2)
    said = conversation.reply([full, short])
    full, short = goes_on(full, said[0], 0, 0), goes_on(short, said[1], 0, 0)
    short[-1]["content"] = "I see. " * 20
    assert len(policy.format.prompt_ids(full)) + len(policy.format.tail("I see. " * 20)) > 180
    conversation.reply([full, short])
    tape = conversation.tape()
    assert not tape.truncated_B.any()
    assert_same_logprobs(policy, tape)


@several_sequences
@pytest.mark.parametrize("template", [CHATML, REWRITING], ids=["append-only", "rewriting"])
def test_nothing_is_cut_silently_where_the_context_is_full(template: str) -> None:
    window = 130
    model = tiny_model("llama", max_position_embeddings=window)
    policy = LMPolicy(model, tiny_tokenizer(template), max_new_tokens=12, seed=0)
    agent = PPGAgent(policy, EchoDialogues(12), group_size=4, seed=2, learning_rate=0.0)
    batch = agent.collect()
    tape = batch.tape
    assert tape is not None
    assert 0 < batch.overflow_B.sum() < 12 and batch.truncated_B[batch.overflow_B].all()
    agent.learn(1)
    assert agent.log["rollout/overflow_rate"] == pytest.approx(batch.overflow_B.mean())

    assert tape.length_S.max() <= window
    for b, chat in enumerate(batch.transcripts):
        prompts = whole_prompts(policy, tape, b)
        # As many turns are on the tape as the environment heard, each after the whole prompt.
        assert len(prompts) == batch.alive_BT[b].sum() == sum(turn_is_own(chat))
        for turn, prompt in enumerate(prompts):
            expected = policy.format.render(chat[: 2 + 2 * turn])
            assert prompt.startswith("<|im_start|>system\nYou like the rain")
            if template == REWRITING or turn == 0:
                assert prompt == expected
            assert prompt.endswith(f"{chat[1 + 2 * turn]['content']}<|im_end|>\n{GENERATION}")
        if batch.overflow_B[b]:  # there was no room left for the next line, or for a whole one
            next_prompt = policy.format.prompt_ids(chat)
            assert len(next_prompt) + 12 > window
    assert_same_logprobs(policy, tape)


GENERATION = "<|im_start|>assistant\n"


def whole_prompts(policy: LMPolicy, tape: Tape, episode: int) -> list[str]:
    """Return what the model was shown before each of a dialogue's lines."""
    prompts = []
    for s in np.flatnonzero(tape.episode_S == episode):
        for turn in sorted(set(tape.turn_SL[s].tolist()) - {-1}):
            first = int((tape.turn_SL[s] == turn).argmax())
            prompts.append(str(policy.tokenizer.decode(tape.token_SL[s, :first])))
    return prompts


def turn_is_own(chat: Sequence[Any]) -> list[bool]:
    return [message["role"] == "assistant" for message in chat]
