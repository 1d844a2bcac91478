"""The language-model policy: cached acting is plain encoding; loading, saving, adapters, dtypes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_models import (
    CACHED,
    CHATML,
    assert_same_logprobs,
    generators,
    openings,
    play,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
)
from tiny_worlds import EchoDialogues
from transformers import AutoModelForCausalLM, PreTrainedModel

from agents import PPGAgent
from agents.lm_policy import LMPolicy, Reference
from agents.optimization import Optimization

# -- acting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHED)
def test_cached_acting_gives_the_logits_of_plain_encoding(kind: str) -> None:
    policy = tiny_policy(kind)
    assert policy.network.serves_cache
    tape = play(policy, list(range(6)), ends={1: 1, 4: 2})[0].tape()
    assert (tape.turn_SL >= 0).sum() > 60
    assert_same_logprobs(policy, tape)


def test_a_model_without_keys_and_values_is_read_again_with_a_warning() -> None:
    policy = tiny_policy("mamba", max_new_tokens=4)
    with pytest.warns(UserWarning, match="cannot use the key-value cache"):
        assert not policy.network.serves_cache
    assert_same_logprobs(policy, play(policy, [0, 1, 2], num_turns=2)[0].tape())


def test_models_with_the_cache_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiny_policy("mixed").network.serves_cache


def test_predict_names_a_dialogue_that_is_too_long() -> None:
    policy = LMPolicy(tiny_model("llama", max_position_embeddings=16), tiny_tokenizer())
    with pytest.raises(ValueError, match="16 tokens"):
        policy.predict(openings(1)[0])
    policy = LMPolicy(tiny_model("llama", max_position_embeddings=60), tiny_tokenizer())
    long = [{"role": "user", "content": "Hello. " * 40}]
    with pytest.raises(ValueError, match=r"dialogues \[1\] leave no room"):
        policy.predict_batch([openings(1)[0], long])


def test_the_seed_decides_what_predict_says() -> None:
    chat = openings(1)[0]
    first, again, other = (
        [policy.predict(chat)[0] for _ in range(3)]
        for policy in (tiny_policy(seed=1), tiny_policy(seed=1), tiny_policy(seed=2))
    )
    assert first == again != other
    assert len(set(first)) > 1


# -- bad input -------------------------------------------------------------------------------------


def test_a_missing_chat_template_or_end_token_is_named_with_the_remedy(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template") as error:
        LMPolicy.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match=r"no end token \(eos_token\).*Set tokenizer\.eos_token"):
        LMPolicy(tiny_model("llama"), tiny_tokenizer(eos_token=None))


def test_the_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    message = r"tokenizer writes ids up to 319, but .* knows only 300 tokens.*own tokenizer"
    with pytest.raises(ValueError, match=message):
        LMPolicy(tiny_model("llama", vocab_size=300), tiny_tokenizer())
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        LMPolicy.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    extended = tiny_tokenizer(CHATML.replace("<|im_start|>", "<new>"))
    extended.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"up to 320.*resize_token_embeddings"):
        LMPolicy(tiny_model("llama"), extended)
    # An entry that no dialogue uses does no harm, and a model may have rows to spare.
    extended.chat_template = CHATML
    assert LMPolicy(tiny_model("llama"), extended).predict(openings(1)[0])
    assert LMPolicy(tiny_model("llama", vocab_size=384), tiny_tokenizer()).predict(openings(1)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequences": "x"}, "sequences is 'auto' or 'turn', got 'x'"),
        ({"dtype": "float99"}, "dtype is 'auto' or one of bfloat16, float32.*got 'float99'"),
        ({"lora_rank": -1}, r"lora_rank must be at least 1 \(0 = no adapter\), got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
    ],
)
def test_settings_out_of_range_are_named(
    settings: dict[str, Any], message: str, tiny_folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        LMPolicy.from_pretrained(tiny_folder, **settings)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy("llama").save(folder)
    return folder


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


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(torch.arange(2, 60)[None]).logits
    return logits


def test_a_model_trained_in_full_is_a_plain_transformers_model(
    tiny_folder: Path, tmp_path: Path
) -> None:
    policy = LMPolicy.from_pretrained(tiny_folder, max_new_tokens=12, seed=0)
    agent = PPGAgent(policy, EchoDialogues(8), group_size=4, seed=0, learning_rate=1e-3).learn(24)
    agent.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(policy.model))
    assert not torch.equal(logits_of(loaded), logits_of(tiny_model("llama")))
    again = LMPolicy.from_pretrained(tmp_path, max_new_tokens=12)
    chats = openings(4)
    said = policy.predict_batch(chats, rngs=generators(0, 4))
    assert again.predict_batch(chats, rngs=generators(0, 4)) == said


# -- adapters --------------------------------------------------------------------------------------


def adapted(folder: Path, **settings: Any) -> LMPolicy:
    settings = {"lora_rank": 4, "max_new_tokens": 12, "seed": 0, **settings}
    return LMPolicy.from_pretrained(folder, **settings)


def adapter_learner(policy: LMPolicy, **settings: Any) -> PPGAgent:
    settings = {"group_size": 4, "seed": 0, "learning_rate": 1e-2, **settings}
    return PPGAgent(policy, EchoDialogues(8), **settings)


def test_only_the_adapter_learns(tiny_folder: Path) -> None:
    policy = adapted(tiny_folder)
    assert policy.has_adapter
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    assert torch.equal(logits_of(policy.model), logits_of(tiny_model("llama")))  # no change yet

    tape = play(policy, [0, 1])[0].tape()
    policy.logprobs(tape.token_SL, tape.turn_SL).sum().backward()
    given = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    assert given == {name for name in before if "lora_" in name} and len(given) == 28
    assert not any("lm_head" in name or "embed" in name for name in given)
    policy.model.zero_grad()

    adapter_learner(policy).learn(40)
    moved = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == given
    assert (logits_of(policy.model) - logits_of(tiny_model("llama"))).abs().max() > 1e-3


def test_the_same_seed_makes_the_same_adapter_and_touches_no_other_randomness(
    tiny_folder: Path,
) -> None:
    def adapter(seed: int) -> torch.Tensor:
        parameters = adapted(tiny_folder, seed=seed).model.parameters()
        return torch.cat([p.detach().flatten() for p in parameters if p.requires_grad])

    adapter(0)
    torch.manual_seed(5)
    first, state = adapter(1), torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(first, adapter(1)) and not torch.equal(first, adapter(2))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_reference_of_an_adapter_is_the_model_without_it(tiny_folder: Path) -> None:
    base = LMPolicy.from_pretrained(tiny_folder, max_new_tokens=12, temperature=0.8, seed=0)
    policy = adapted(tiny_folder, temperature=0.8)
    tape = play(base, [0, 1, 2])[0].tape()
    expected = base.logprobs(tape.token_SL, tape.turn_SL).detach()
    tokens, spoken = torch.as_tensor(tape.token_SL), torch.as_tensor(tape.action_mask_SL)
    reference = Reference(policy)
    agent = adapter_learner(policy, kl_coef=0.1)
    for _ in range(2):
        own = policy.logprobs(tape.token_SL, tape.turn_SL).detach()
        found = reference.logprobs(tokens, spoken)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        # The adapter is on again, and trainable.
        assert torch.equal(policy.logprobs(tape.token_SL, tape.turn_SL), own)
        assert sum(p.requires_grad for p in policy.model.parameters()) == 28
        agent.learn(1)
    assert (own - expected).abs().max() > 1e-3  # it had moved the second time
    assert agent.log["train/kl"] > 1e-4

    with pytest.raises(ValueError, match="must be"):
        reference.logprobs(tokens, spoken[:, 1:])
    assert (policy.logprobs(tape.token_SL, tape.turn_SL) - expected).abs().max() > 1e-3


def test_a_reference_of_a_whole_model_stays_what_it_was() -> None:
    policy = tiny_policy()
    tape = play(policy, [0, 1])[0].tape()
    tokens, spoken = torch.as_tensor(tape.token_SL), torch.as_tensor(tape.action_mask_SL)
    reference, start = Reference(policy), policy.logprobs(tape.token_SL, tape.turn_SL).detach()
    PPGAgent(policy, EchoDialogues(8), group_size=4, seed=0, learning_rate=1e-2).learn(1)
    assert torch.equal(reference.logprobs(tokens, spoken), start)
    assert not torch.equal(policy.logprobs(tape.token_SL, tape.turn_SL), start)


def test_a_saved_adapter_is_read_by_transformers_and_peft_and_can_be_trained_on(
    tiny_folder: Path, tmp_path: Path
) -> None:
    policy = adapted(tiny_folder)
    agent = adapter_learner(policy, kl_coef=0.1).learn(24)
    agent.save(tmp_path)
    expected = logits_of(policy.model)
    assert (expected - logits_of(tiny_model("llama"))).abs().max() > 1e-3
    weights = [path.name for path in tmp_path.glob("*.safetensors")]
    assert weights == ["adapter_model.safetensors"]  # nothing of the model itself

    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        PeftModel.from_pretrained(plain, str(tmp_path)),
    ):
        torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-5)

    again = LMPolicy.from_pretrained(tmp_path, max_new_tokens=12, seed=0)
    chats = openings(4)
    said = policy.predict_batch(chats, rngs=generators(0, 4))
    assert again.predict_batch(chats, rngs=generators(0, 4)) == said
    assert again.has_adapter
    names = {name for name, p in again.model.named_parameters() if p.requires_grad}
    assert names == {name for name, p in policy.model.named_parameters() if p.requires_grad}

    # Learning goes on: the same step as in the agent that was never saved.
    resumed = PPGAgent.load(tmp_path, EchoDialogues(8))
    assert resumed.num_updates == agent.num_updates
    fresh = adapter_learner(again, kl_coef=0.1)
    fresh.num_updates = agent.num_updates
    for learner in (resumed, fresh):
        learner.learn(1)
    assert not torch.equal(logits_of(again.model), expected)
    assert torch.equal(logits_of(resumed.policy.model), logits_of(again.model))


# -- bfloat16 --------------------------------------------------------------------------------------


def half_policy(kind: str = "llama", **settings: Any) -> LMPolicy:
    model = tiny_model(kind).bfloat16()
    return LMPolicy(model, tiny_tokenizer(), **{"max_new_tokens": 12, "seed": 0, **settings})


def optimization(model: PreTrainedModel, rate: float = 1e-5, **settings: Any) -> Optimization:
    settings = {"adam_eps": 1e-8, "max_grad_norm": 1.0, "skip_grad_norm": 1e9, **settings}
    return Optimization([model.parameters()], [rate], processes=PartialState(), **settings)


def masters_of(optimization: Optimization, model: PreTrainedModel) -> list[torch.Tensor]:
    tensors, _ = optimization.state()
    return [tensors[f"master.{i}"] for i in range(len(list(model.parameters())))]


def test_many_steps_too_small_for_bfloat16_add_up() -> None:
    model = tiny_model("llama").bfloat16()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    naive = copy.deepcopy(model)
    adam = torch.optim.AdamW(naive.parameters(), lr=1e-4, weight_decay=0.0)
    careful = optimization(model, 1e-4)
    for _ in range(100):  # the gradient is 1 everywhere, so AdamW goes 1e-4 down each time
        careful.backward(sum(p.float().sum() for p in model.parameters()))  # type: ignore[arg-type]
        assert not careful.step().skipped
        for parameter, master in zip(model.parameters(), masters_of(careful, model), strict=True):
            assert parameter.dtype == torch.bfloat16 and master.dtype == torch.float32
            assert torch.equal(parameter, master.bfloat16())
        sum(p.float().sum() for p in naive.parameters()).backward()  # type: ignore[union-attr]
        adam.step()
        adam.zero_grad()

    for at_start, master in zip(start, masters_of(careful, model), strict=True):
        torch.testing.assert_close(master, at_start.float() - 0.01, rtol=0, atol=1e-5)
    large = [at_start.abs() > 0.26 for at_start in start]  # where bfloat16 steps by 1/512 or more
    assert sum(int(there.sum()) for there in large) > 1000
    for at_start, parameter, there in zip(start, naive.parameters(), large, strict=True):
        assert torch.equal(parameter[there], at_start[there])  # without masters nothing moves
    for at_start, parameter, there in zip(start, model.parameters(), large, strict=True):
        assert (parameter[there] < at_start[there]).all()


def test_a_bfloat16_agent_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    def learner() -> PPGAgent:
        settings = {"group_size": 4, "seed": 0, "learning_rate": 1e-4}
        return PPGAgent(half_policy(), EchoDialogues(8), **settings)

    stopped, never_stopped = learner().learn(40), learner().learn(40)
    weights = list(stopped.policy.model.parameters())
    masters = masters_of(stopped.optimization, stopped.policy.model)
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters)  # they hold more
    assert all(torch.equal(w, m.bfloat16()) for w, m in zip(weights, masters, strict=True))
    stopped.checkpoint(tmp_path)
    resumed = learner()
    assert resumed.restore(tmp_path)
    for agent in (resumed, never_stopped):
        agent.learn(40)
    ends = [
        masters_of(agent.optimization, agent.policy.model) for agent in (resumed, never_stopped)
    ]
    for one, other, at_stop in zip(*ends, masters, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, at_stop)


@pytest.mark.parametrize("kind", CACHED)
def test_in_bfloat16_sampling_and_training_agree_to_its_rounding(kind: str) -> None:
    policy = half_policy(kind)
    assert policy.network.serves_cache and policy.network.split is not None
    tape = play(policy, list(range(6)))[0].tape()
    logprob_SL = policy.logprobs(tape.token_SL, tape.turn_SL)
    assert logprob_SL.dtype == torch.float32
    drift = (logprob_SL.detach().numpy() - tape.old_logprob_SL)[tape.action_mask_SL]
    assert np.abs(np.exp(drift) - 1).max() < 0.08  # bfloat16 has 8 bits
    assert abs(drift.mean()) < 0.005
    assert np.mean(np.expm1(drift) - drift) < 1e-4  # train/approx_kl


def test_an_agent_learns_saves_and_loads_in_bfloat16(tmp_path: Path) -> None:
    tiny_policy("llama").save(tmp_path / "start")
    for place, rank in (("whole", 0), ("adapter", 4)):
        policy = LMPolicy.from_pretrained(
            tmp_path / "start", dtype="bfloat16", lora_rank=rank, max_new_tokens=12, seed=0
        )
        assert policy.model.model.embed_tokens.weight.dtype == torch.bfloat16
        start = logits_of(policy.model)
        agent = PPGAgent(policy, EchoDialogues(8), group_size=4, seed=0, learning_rate=3e-3)
        agent.learn(24)
        assert agent.log["train/skipped_steps"] == 0 and agent.log["train/approx_kl"] < 1e-3
        assert not torch.equal(logits_of(policy.model), start)
        agent.save(tmp_path / place)
        again = LMPolicy.from_pretrained(tmp_path / place, dtype="bfloat16", max_new_tokens=12)
        assert torch.equal(logits_of(again.model), logits_of(policy.model))
