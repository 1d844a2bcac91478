"""The language-model policy: cached acting is plain encoding, training sees what was said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    CHATML,
    PLAIN,
    blank_first_tokenizer,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
)

from agents.conversation import Conversation
from agents.lm_policy import LMPolicy
from agents.sampling import sample_tokens
from agents.scoring import microbatches
from agents.tape import Tape

CACHED = ["llama", "qwen2", "mistral", "mixed", "gemma2", "gpt2"]
Chat = list[dict[str, str]]


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
    return [np.random.default_rng([seed, b]) for b in range(number)]


def goes_on(chat: Chat, text: str, turn: int, slot: int) -> Chat:
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


def plain_logprobs(policy: LMPolicy, tape: Tape) -> np.ndarray:
    """Score the agent's tokens, one dialogue at a time, with full logits and no cache."""
    found = np.zeros(tape.token_SL.shape, dtype=np.float32)
    for b, length in enumerate(tape.length_S):
        ids = torch.as_tensor(tape.token_SL[b, :length])[None]
        with torch.no_grad():
            logits = policy.model(ids, use_cache=False).logits[0].float() / policy.temperature
        logprob_L = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].numpy()
        found[b, 1:length] = logprob_L
    return np.where(tape.turn_SL >= 0, found, 0.0)


# -- acting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHED)
def test_cached_acting_gives_the_logits_of_plain_encoding(kind: str) -> None:
    policy = tiny_policy(kind)
    assert policy.network.serves_cache
    conversation, _ = play(policy, list(range(6)), ends={1: 1, 4: 2})
    tape = conversation.tape()
    assert (tape.turn_SL >= 0).sum() > 60
    np.testing.assert_allclose(tape.old_logprob_SL, plain_logprobs(policy, tape), atol=1e-4)


@pytest.mark.parametrize("kind", [*CACHED, "mamba"])
@pytest.mark.filterwarnings("ignore:.*cannot use the key-value cache")
def test_log_probabilities_of_training_equal_those_of_sampling(kind: str) -> None:
    policy = tiny_policy(kind, temperature=0.8, max_new_tokens=5 if kind == "mamba" else 12)
    conversation, _ = play(policy, [0, 1, 2, 3], num_turns=3, ends={2: 1})
    tape = conversation.tape()
    logprob_BL = policy.logprobs(tape.token_SL, tape.turn_SL)
    assert logprob_BL.requires_grad
    np.testing.assert_allclose(tape.old_logprob_SL, logprob_BL.detach().numpy(), atol=1e-4)


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


def test_a_turn_reads_only_its_new_tokens() -> None:
    policy = tiny_policy()
    conversation = policy.begin(2)
    seen: list[int] = []
    policy.model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[1])
    )
    chats = openings(2)
    lengths = []
    for turn in range(3):
        seen.clear()
        texts = conversation.reply(chats)
        lengths.append(max(seen))
        chats = [goes_on(chat, text, turn, 0) for chat, text in zip(chats, texts, strict=True)]
    prompt = policy.format.prompt_ids(chats[0])
    assert lengths[0] == max(len(policy.format.prompt_ids(chat)) for chat in openings(2))
    assert max(lengths[1:]) < 60 < len(prompt)


def test_the_conversation_says_what_a_policy_without_memory_says() -> None:
    policy = tiny_policy()
    chats = openings(3)
    texts = policy.begin(3, generators(1, 3)).reply(chats)
    assert texts == policy.predict_batch(chats, rngs=generators(1, 3))


def test_the_tape_is_the_rendered_dialogue_where_lines_are_plain_text() -> None:
    policy = tiny_policy()
    chats = openings(1)
    conversation = policy.begin(1)
    # Put a known line into the mouth of the model: its ids and the end token.
    line = [*policy.format.encode("I like the rain."), policy.tokenizer.eos_token_id]
    _force(policy, [line, line])
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


def _force(policy: LMPolicy, lines: list[list[int]]) -> None:
    """Make the model's logits spell these lines, one token per forward pass."""
    tokens = iter([token for line in lines for token in line])

    def spell(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -100.0)
        forced[..., next(tokens)] = 100.0
        return forced

    assert policy.network.serves_cache  # probes run before the model is tampered with
    policy.model.lm_head.register_forward_hook(spell)


def test_a_line_without_words_is_spoken_as_an_ellipsis() -> None:
    policy = tiny_policy()
    end = policy.tokenizer.eos_token_id
    _force(policy, [[end], [end]])
    conversation = policy.begin(1)
    chat = openings(1)[0]
    assert conversation.reply([chat]) == ["..."]
    assert conversation.reply([goes_on(chat, "...", 0, 0)]) == ["..."]
    tape = conversation.tape()
    assert (tape.turn_SL >= 0).sum(axis=1).tolist() == [2]
    assert not tape.cut_BT.any()


def test_a_cut_line_is_flagged_and_gets_the_end_token_as_a_forced_one() -> None:
    policy = tiny_policy(max_new_tokens=3)
    end = policy.tokenizer.eos_token_id
    dog = policy.format.encode("dog")[0]
    _force(policy, [[dog, dog, dog], [dog, end]])
    conversation = policy.begin(1)
    chat = openings(1)[0]
    conversation.reply([chat])
    conversation.reply([goes_on(chat, "dogdogdog", 0, 0)])
    tape = conversation.tape()
    np.testing.assert_array_equal(tape.cut_BT, [[True, False]])
    first = np.flatnonzero(tape.turn_SL[0] == 0)
    assert tape.token_SL[0, first[-1] + 1] == end
    assert tape.turn_SL[0, first[-1] + 1] == -1


def test_a_sampled_end_token_is_not_doubled() -> None:
    policy = tiny_policy()
    conversation, _ = play(policy, [0, 1, 2, 3])
    tape = conversation.tape()
    end = policy.tokenizer.eos_token_id
    doubled = (tape.token_SL[:, 1:] == end) & (tape.token_SL[:, :-1] == end)
    inside = np.arange(tape.token_SL.shape[1] - 1) < tape.length_S[:, None] - 1
    assert not (doubled & inside).any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dialogue_that_fills_the_context_stops_and_the_others_go_on(kind: str) -> None:
    model = tiny_model(kind, max_position_embeddings=100)
    policy = LMPolicy(model, tiny_tokenizer(), max_new_tokens=12, seed=0)
    chats = openings(2)
    chats[1][0]["content"] = "You like tea." * 2
    conversation = policy.begin(2, generators(0, 2))
    texts = ["", ""]
    for turn in range(6):
        texts = conversation.reply(chats)
        chats = [goes_on(chat, text, turn, 0) for chat, text in zip(chats, texts, strict=True)]
    tape = conversation.tape()
    assert tape.truncated_B.all()
    assert texts == ["", ""]
    assert tape.length_S.max() <= 100
    np.testing.assert_allclose(tape.old_logprob_SL, plain_logprobs(policy, tape), atol=1e-4)


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
    np.testing.assert_allclose(tape.old_logprob_SL, plain_logprobs(policy, tape), atol=1e-4)


def test_predict_names_a_dialogue_that_is_too_long() -> None:
    policy = LMPolicy(tiny_model("llama", max_position_embeddings=16), tiny_tokenizer())
    with pytest.raises(ValueError, match="16 tokens"):
        policy.predict(openings(1)[0])


def test_deterministic_lines_are_the_most_likely_ones() -> None:
    policy = tiny_policy()
    conversation, _ = play(policy, [0, 1], deterministic=True)
    tape = conversation.tape()
    with torch.no_grad():
        best_BL = policy.model(torch.as_tensor(tape.token_SL)).logits.argmax(-1).numpy()
    spoken = tape.turn_SL[:, 1:] >= 0
    np.testing.assert_array_equal(best_BL[:, :-1][spoken], tape.token_SL[:, 1:][spoken])
    chat = openings(1)[0]
    assert policy.predict(chat, deterministic=True) == policy.predict(chat, deterministic=True)


def test_the_seed_decides_what_predict_says() -> None:
    chat = openings(1)[0]
    first, again, other = (
        [policy.predict(chat)[0] for _ in range(3)]
        for policy in (tiny_policy(seed=1), tiny_policy(seed=1), tiny_policy(seed=2))
    )
    assert first == again != other
    assert len(set(first)) > 1


def test_an_observation_from_another_dialogue_is_refused() -> None:
    policy = tiny_policy()
    conversation = policy.begin(1)
    chat = openings(1)[0]
    conversation.reply([chat])
    with pytest.raises(ValueError, match="call begin"):
        conversation.reply([chat])
    with pytest.raises(ValueError, match="role 'user'"):
        policy.begin(1).reply([[*chat, {"role": "assistant", "content": "Hi."}]])


# -- models without the cache ----------------------------------------------------------------------


def test_a_model_without_keys_and_values_is_read_again_with_a_warning() -> None:
    policy = tiny_policy("mamba", max_new_tokens=4)
    with pytest.warns(UserWarning, match="cannot use the key-value cache"):
        assert not policy.network.serves_cache
    conversation, _ = play(policy, [0, 1, 2], num_turns=2)
    tape = conversation.tape()
    np.testing.assert_allclose(tape.old_logprob_SL, plain_logprobs(policy, tape), atol=1e-4)


def test_capped_and_scaled_logits_are_formed_at_the_agents_tokens_only() -> None:
    assert tiny_policy("llama").network.split is not None
    policy = tiny_policy("gemma2")
    policy.model.config.final_logit_softcapping = 2.0
    split = policy.network.split
    assert split is not None and split.cap == 2.0
    conversation, _ = play(policy, [0, 1, 2], num_turns=2)
    tape = conversation.tape()
    np.testing.assert_allclose(tape.old_logprob_SL, plain_logprobs(policy, tape), atol=1e-4)


def test_logits_that_are_formed_otherwise_take_the_full_forward_pass() -> None:
    policy = tiny_policy("llama")
    head = policy.model.forward

    def shifted(*args: Any, **inputs: Any) -> Any:
        found = head(*args, **inputs)
        found.logits = found.logits + torch.arange(320) / 100
        return found

    policy.model.forward = shifted  # type: ignore[method-assign]
    assert policy.network.split is None
    conversation, _ = play(policy, [0, 1, 2], num_turns=2)
    tape = conversation.tape()
    logprob_SL = policy.logprobs(tape.token_SL, tape.turn_SL).detach().numpy()
    np.testing.assert_allclose(tape.old_logprob_SL, logprob_SL, atol=1e-4)
    np.testing.assert_allclose(tape.old_logprob_SL, plain_logprobs(policy, tape), atol=1e-4)


# -- templates and tokenizers ----------------------------------------------------------------------


def test_a_template_without_system_role_gets_it_in_the_first_message() -> None:
    policy = tiny_policy(template=PLAIN)
    prompt = policy.tokenizer.decode(policy.format.prompt_ids(openings(1)[0]))
    assert prompt == "user: You like tea.\n\nHello.\nassistant:"
    conversation, _ = play(policy, [0, 1, 2])
    tape = conversation.tape()
    np.testing.assert_allclose(tape.old_logprob_SL, plain_logprobs(policy, tape), atol=1e-4)


def test_no_start_token_appears_in_the_middle_of_a_dialogue() -> None:
    tokenizer = tiny_tokenizer("<s>" + CHATML, adds_start_token=True)
    assert tokenizer("dog").input_ids[0] == tokenizer.convert_tokens_to_ids("<s>")
    policy = LMPolicy(tiny_model("llama"), tokenizer, max_new_tokens=3, seed=0)
    start = tokenizer.convert_tokens_to_ids("<s>")
    conversation, _ = play(policy, [0, 1, 2])
    tape = conversation.tape()
    forced = tape.turn_SL == -1
    assert (((tape.token_SL == start) & forced).sum(axis=1) == 1).all()
    assert (tape.token_SL[:, 0] == start).all()


def test_no_blank_appears_in_the_middle_of_a_dialogue() -> None:
    tokenizer = blank_first_tokenizer(PLAIN)
    policy = LMPolicy(tiny_model("llama"), tokenizer)
    alone = policy.format.encode("\nuser: No.")
    assert tokenizer.convert_ids_to_tokens(alone)[0] == "\u2581"
    tail = policy.format.tail("No.")
    assert tokenizer.convert_ids_to_tokens(tail[0]).startswith("\n")
    assert "".join(tokenizer.convert_ids_to_tokens(tail)).count("\u2581") == 1


def test_a_line_also_ends_at_the_end_tokens_of_the_models_configuration() -> None:
    policy = tiny_policy()
    start = policy.tokenizer.convert_tokens_to_ids("<|im_start|>")
    policy.model.generation_config.eos_token_id = [1, start]
    dog = policy.format.encode("dog")
    _force(policy, [[*dog, start]])
    assert policy.predict(openings(1)[0]) == ("dog", None)


def test_a_missing_chat_template_or_end_token_is_named_with_the_remedy(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template") as error:
        LMPolicy.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match="no end token"):
        LMPolicy(tiny_model("llama"), tiny_tokenizer(eos_token=None))


# -- sampling --------------------------------------------------------------------------------------


def test_samples_follow_the_softmax() -> None:
    logit_V = torch.tensor([1.0, -2.0, 0.3, 2.2, -30.0, 0.0])
    number = 20_000
    token_n, logprob_n = sample_tokens(logit_V.repeat(number, 1), generators(3, number), 1.5)
    probability_V = (logit_V / 1.5).softmax(-1).double().numpy()
    count_V = np.bincount(token_n, minlength=6)
    chi_square = (((count_V - number * probability_V) ** 2) / (number * probability_V))[:4].sum()
    assert chi_square < 18.5  # 99.9 % point of 4 degrees of freedom
    assert count_V[4] == 0
    np.testing.assert_allclose(logprob_n, np.log(probability_V)[token_n], atol=1e-5)


def test_one_uniform_number_decides_each_token() -> None:
    logit_nV = torch.tensor([[0.0, 1.0, 2.0]]).repeat(50, 1)
    token_n, _ = sample_tokens(logit_nV, generators(0, 50))
    u_n = np.array([rng.random() for rng in generators(0, 50)])
    expected = np.searchsorted(logit_nV[0].double().softmax(-1).cumsum(-1).numpy(), u_n, "right")
    np.testing.assert_array_equal(token_n, expected)


# -- learning --------------------------------------------------------------------------------------


def test_the_gradient_equals_that_of_the_full_logits_also_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tiny_policy("llama")
    conversation, _ = play(policy, [0, 1, 2])
    tape = conversation.tape()

    def gradients() -> list[np.ndarray]:
        policy.model.zero_grad()
        weight_BL = torch.linspace(-1, 1, tape.turn_SL.size).reshape(tape.turn_SL.shape)
        (policy.logprobs(tape.token_SL, tape.turn_SL) * weight_BL).sum().backward()
        return [parameter.grad.numpy().copy() for parameter in policy.model.parameters()]

    whole = gradients()
    monkeypatch.setattr("agents.scoring._LOGITS_PER_CHUNK", 7 * 320)
    chunked = gradients()
    monkeypatch.setitem(policy.network.__dict__, "split", None)
    full = gradients()
    for a, b, c in zip(whole, chunked, full, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5)


def test_right_padding_does_not_change_log_probabilities() -> None:
    policy = tiny_policy("gpt2")
    conversation, _ = play(policy, [0, 1, 2], ends={0: 1})
    tape = conversation.tape()
    wide = np.pad(tape.token_SL, ((0, 0), (0, 9)), constant_values=7)
    turn = np.pad(tape.turn_SL, ((0, 0), (0, 9)), constant_values=-1)
    whole = policy.logprobs(wide, turn).detach().numpy()[:, :-9]
    alone = policy.logprobs(tape.token_SL[:1], tape.turn_SL[:1]).detach().numpy()
    np.testing.assert_allclose(whole[:1], alone, atol=1e-5)
    np.testing.assert_array_equal(whole[tape.turn_SL < 0], 0.0)


def test_log_probabilities_refuse_what_has_no_context() -> None:
    policy = tiny_policy()
    with pytest.raises(ValueError, match="first token"):
        policy.logprobs(np.ones((1, 3), dtype=int), np.zeros((1, 3), dtype=int))
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        policy.logprobs(np.ones((1, 3), dtype=int), np.zeros((1, 2), dtype=int))
    nobody = policy.logprobs(np.ones((1, 3), dtype=int), np.full((1, 3), -1))
    assert nobody.tolist() == [[0.0, 0.0, 0.0]]


def test_microbatches_cover_all_rows_within_the_budget() -> None:
    length_B = np.random.default_rng(0).integers(1, 200, size=50)
    batches = list(microbatches(length_B, 300))
    assert sorted(np.concatenate(batches).tolist()) == list(range(50))
    assert all(len(batch) * length_B[batch].max() <= 300 for batch in batches)
    assert length_B[batches[0][0]] == length_B.max()
    assert [batch.tolist() for batch in microbatches(np.array([5, 9]), 1)] == [[1], [0]]


# -- files -----------------------------------------------------------------------------------------


def test_a_saved_policy_speaks_as_before(tmp_path: Path) -> None:
    policy = tiny_policy("llama")
    policy.save(tmp_path)
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.bin"))
    loaded = LMPolicy.from_pretrained(tmp_path, device="cpu", max_new_tokens=12)
    assert loaded.model.dtype == torch.float32
    chats = openings(4)
    expected = policy.predict_batch(chats, rngs=generators(0, 4))
    assert loaded.predict_batch(chats, rngs=generators(0, 4)) == expected


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"pytorch_model\.bin"):
        LMPolicy.from_pretrained(tmp_path)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        tiny_policy(max_new_tokens=0)
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        tiny_policy(temperature=0.0)


def test_models_with_the_cache_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiny_policy("mixed").network.serves_cache
