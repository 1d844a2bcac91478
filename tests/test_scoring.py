"""Log-probabilities with gradient: as sampled, of the agent's tokens only, in bounded memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    CACHED,
    assert_same_logprobs,
    plain_logprobs,
    play,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
)
from tiny_worlds import EchoDialogues

from agents import PPGAgent
from agents.lm_policy import LMPolicy, add_lora
from agents.ppg import MicroBatch
from agents.scoring import microbatches
from agents.tape import Tape

# -- sampling and training agree -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*CACHED, "mamba"])
@pytest.mark.filterwarnings("ignore:.*cannot use the key-value cache")
def test_log_probabilities_of_training_equal_those_of_sampling(kind: str) -> None:
    policy = tiny_policy(kind, temperature=0.8, max_new_tokens=5 if kind == "mamba" else 12)
    tape = play(policy, [0, 1, 2, 3], num_turns=3, ends={2: 1})[0].tape()
    assert policy.logprobs(tape.token_SL, tape.turn_SL).requires_grad
    assert_same_logprobs(policy, tape)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", CACHED)
def test_the_first_steps_ratios_are_one(kind: str, temperature: float) -> None:
    policy = tiny_policy(kind, temperature=temperature)
    agent = PPGAgent(
        policy, EchoDialogues(8), group_size=4, seed=0, batch_size=8, ratio_level="token"
    )
    batch = agent.collect()
    tape = batch.tape
    assert tape is not None and tape.num_sampled > 200
    drift_SL = policy.logprobs(tape.token_SL, tape.turn_SL).detach().numpy() - tape.old_logprob_SL
    np.testing.assert_allclose(np.exp(drift_SL), 1.0, atol=2e-4)
    for turn in range(4):  # and those of whole lines
        drift_S = np.where(tape.turn_SL == turn, drift_SL, 0).sum(axis=1)
        np.testing.assert_allclose(np.exp(drift_S), 1.0, atol=5e-4)
    measured = agent.update(batch, agent.credited(batch))
    assert abs(measured["train/approx_kl"]) < 1e-8 and measured["train/clip_fraction"] == 0
    agent.learn(1)
    assert "train/approx_kl" in agent.log and abs(agent.log["train/approx_kl"]) < 1e-8


def test_later_steps_on_the_same_dialogues_leave_a_ratio_of_one() -> None:
    agent = PPGAgent(
        tiny_policy(), EchoDialogues(8), group_size=4, seed=0, n_epochs=3, learning_rate=3e-3
    )
    assert agent.learn(1).log["train/approx_kl"] > 1e-6


# -- exactness -------------------------------------------------------------------------------------


def full_logits(policy: LMPolicy, tape: Tape) -> torch.Tensor:
    """Return the logits of the whole tape, divided by the temperature; S, L, V."""
    logits: torch.Tensor = policy.model(torch.as_tensor(tape.token_SL), use_cache=False).logits
    return logits.float() / policy.temperature


def gradients(policy: LMPolicy, loss: torch.Tensor) -> torch.Tensor:
    policy.model.zero_grad()
    loss.backward()
    found = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return torch.cat(found).clone()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
def test_log_probabilities_entropies_and_gradients_equal_those_of_the_full_logits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(kind, temperature=0.7)
    tape = play(policy, [0, 1, 2], ends={1: 2})[0].tape()
    spoken_SL = torch.as_tensor(tape.action_mask_SL)
    weight_SL = torch.linspace(-1, 1, tape.turn_SL.size).reshape(tape.turn_SL.shape) * spoken_SL

    def scored() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = policy.scores(tape.token_SL, tape.turn_SL, entropy=True)
        assert scores.entropy_SL is not None
        total = (scores.logprob_SL * weight_SL).sum() + (scores.entropy_SL * weight_SL.abs()).sum()
        return scores.logprob_SL.detach(), scores.entropy_SL.detach(), gradients(policy, total)

    logprob_SLV = full_logits(policy, tape).log_softmax(-1)[:, :-1]
    next_SL = torch.as_tensor(tape.token_SL)[:, 1:]
    logprob_SL = logprob_SLV.gather(-1, next_SL[..., None])[..., 0] * spoken_SL[:, 1:]
    entropy_SL = -(logprob_SLV.exp() * logprob_SLV).sum(-1) * spoken_SL[:, 1:]
    total = (logprob_SL * weight_SL[:, 1:]).sum() + (entropy_SL * weight_SL[:, 1:].abs()).sum()
    expected = gradients(policy, total)

    assert policy.network.split is not None
    whole = scored()
    monkeypatch.setattr("agents.scoring._LOGITS_PER_CHUNK", 7 * 320)
    chunked = scored()
    monkeypatch.setitem(policy.network.__dict__, "split", None)
    unsplit = scored()
    for found_SL, also_SL, gradient in (whole, chunked, unsplit):
        torch.testing.assert_close(found_SL[:, 1:], logprob_SL.detach(), rtol=0, atol=1e-4)
        torch.testing.assert_close(also_SL[:, 1:], entropy_SL.detach(), rtol=0, atol=1e-4)
        assert (found_SL[~spoken_SL] == 0).all() and (also_SL[~spoken_SL] == 0).all()
        assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite"])
def test_hidden_states_are_those_just_before_each_token(kind: str) -> None:
    policy = tiny_policy(kind)
    tape = play(policy, [0, 1, 2], ends={1: 2})[0].tape()
    scores = policy.scores(tape.token_SL, tape.turn_SL, hidden=True)
    assert scores.hidden_NH is not None and scores.hidden_NH.requires_grad
    row_N, column_N = scores.at
    assert len(row_N) == tape.num_sampled
    with torch.no_grad():
        ids_SL = torch.as_tensor(tape.token_SL)
        hidden_SLH = policy.model(ids_SL, output_hidden_states=True).hidden_states[-1]
    expected_NH = hidden_SLH[row_N, column_N - 1]
    torch.testing.assert_close(scores.hidden_NH.detach(), expected_NH, rtol=0, atol=1e-4)


def test_right_padding_does_not_change_log_probabilities() -> None:
    policy = tiny_policy("gpt2")
    tape = play(policy, [0, 1, 2], ends={0: 1})[0].tape()
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
    with pytest.raises(ValueError, match="token_budget must be at least 1 token, got 0"):
        next(microbatches(length_B, 0))


# -- heads that scale or cap their logits ----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "scale", "cap"),
    [("llama", 1.0, None), ("cohere", 0.25, None), ("granite", 0.25, None), ("gemma2", 1.0, 30.0)],
)
def test_capped_and_scaled_logits_are_formed_at_the_agents_tokens_only(
    kind: str, scale: float, cap: float | None
) -> None:
    policy = tiny_policy(kind)
    split = policy.network.split
    assert split is not None and (split.scale, split.cap) == (scale, cap)
    tape = play(policy, [0, 1, 2], num_turns=2, ends={1: 1})[0].tape()
    rows: list[int] = []
    hook = split.head.register_forward_hook(
        lambda _, __, logits: rows.append(logits.numel() // 320)
    )
    logprob_SL = policy.logprobs(tape.token_SL, tape.turn_SL).detach().numpy()
    hook.remove()
    assert sum(rows) == tape.num_sampled  # no logits at anybody else's tokens
    np.testing.assert_allclose(tape.old_logprob_SL, logprob_SL, atol=1e-4)
    np.testing.assert_allclose(tape.old_logprob_SL, plain_logprobs(policy, tape), atol=1e-4)


def test_a_tight_cap_is_kept() -> None:
    model = tiny_model("gemma2")
    model.config.final_logit_softcapping = 2.0
    policy = LMPolicy(model, tiny_tokenizer(), max_new_tokens=12, seed=0)
    assert policy.network.split is not None and policy.network.split.cap == 2.0
    tape = play(policy, [0, 1, 2], num_turns=2)[0].tape()
    assert tape.old_logprob_SL.min() > -2 * 2.0 - math.log(320)
    assert_same_logprobs(policy, tape)


def test_logits_that_are_formed_otherwise_take_the_full_forward_pass() -> None:
    policy = tiny_policy("llama")
    head = policy.model.forward

    def shifted(*args: Any, **inputs: Any) -> Any:
        found = head(*args, **inputs)
        found.logits = found.logits + torch.arange(320) / 100
        return found

    policy.model.forward = shifted  # type: ignore[method-assign]
    assert policy.network.split is None
    assert_same_logprobs(policy, play(policy, [0, 1, 2], num_turns=2)[0].tape())


# -- what the loss touches -------------------------------------------------------------------------

LOSSES: dict[str, dict[str, Any]] = {
    "policy gradient": {},
    "clipped by turn": {"batch_size": 8},
    "clipped by token": {"batch_size": 8, "ratio_level": "token"},
    "kl": {"kl_coef": 0.3},
    "entropy": {"ent_coef": 0.3},
}
each_loss = pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)


def learner(policy: LMPolicy, settings: dict[str, Any]) -> tuple[PPGAgent, MicroBatch]:
    """Return an agent whose weights have moved since it sampled the whole of its batch."""
    agent = PPGAgent(policy, EchoDialogues(8), group_size=4, seed=0, **settings)
    batch = agent.collect()
    assert batch.tape is not None
    advantage_BT = agent.credited(batch)
    micro = agent._micro_batch(batch.tape, np.arange(8), advantage_BT, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    return agent, micro


@each_loss
def test_labels_of_partner_persona_and_padding_do_not_matter(settings: dict[str, Any]) -> None:
    # A model that cannot look back: its layers' attention adds nothing. Every token is then context
    # of the next one alone, and what is changed elsewhere could only act as a label.
    policy = tiny_policy()
    for layer in policy.model.model.layers:
        layer.self_attn.o_proj.weight.requires_grad_(False).zero_()
    agent, micro = learner(policy, settings)
    spoken_sL = micro.turn_sL >= 0
    context_sL = torch.nn.functional.pad(spoken_sL[:, 1:], (0, 1))
    free_sL = ~spoken_sL & ~context_sL
    assert free_sL.sum() > 300 and free_sL[:, -1].any()

    def learned(changed: MicroBatch) -> tuple[float, torch.Tensor]:
        loss, _ = agent.loss(changed)
        return loss.item(), gradients(policy, loss)

    loss, gradient = learned(micro)
    assert gradient.norm() > 0.01
    shifted_sL = (micro.token_sL + 13) % 320
    other = replace(
        micro,
        token_sL=torch.where(free_sL, shifted_sL, micro.token_sL),
        old_logprob_sL=torch.where(spoken_sL, micro.old_logprob_sL, -7.0),
    )
    changed_loss, changed = learned(other)
    assert changed_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(changed, gradient, rtol=0, atol=1e-6 * float(gradient.norm()))

    # The agent's own labels do matter.
    own_sL = torch.where(spoken_sL & ~context_sL, shifted_sL, micro.token_sL)
    changed_loss, changed = learned(replace(micro, token_sL=own_sL))
    if "ent_coef" not in settings:
        assert changed_loss != pytest.approx(loss, rel=1e-3)
    assert (changed - gradient).norm() > 1e-3 * gradient.norm()


@each_loss
@pytest.mark.parametrize("junk", [5.0, math.nan, -math.inf])
def test_scores_of_other_tokens_are_not_looked_at(settings: dict[str, Any], junk: float) -> None:
    agent, micro = learner(tiny_policy(), settings)
    spoken_sL = micro.turn_sL >= 0
    found = []
    for value in (0.0, junk):
        scores = agent.scores(micro)
        spoiled = replace(scores, logprob_SL=torch.where(spoken_sL, scores.logprob_SL, value))
        old_sL = torch.where(spoken_sL, micro.old_logprob_sL, value)
        # As labels: where the loss is formed, and no longer where the model reads.
        loss, sums = agent.loss_of(spoiled, replace(micro, old_logprob_sL=old_sL))
        found.append((loss.item(), sums, gradients(agent.policy, loss)))
    (loss_value, sums, gradient), (spoiled_value, spoiled_sums, spoiled_gradient) = found
    assert spoiled_value == loss_value and spoiled_sums == sums
    assert torch.equal(gradient, spoiled_gradient) and gradient.norm() > 0.01


# -- memory ----------------------------------------------------------------------------------------

_MEASURE = """
    import torch
    from tiny_models import tiny_model
    from agents.decoding import Network
    from agents.scoring import score_tokens

    def peak():
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    V = 150_000
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny_model("llama", vocab_size=V, **size, **heads)
    network = Network(model)
    print(peak())
    for length in LENGTHS:
        token_SL = torch.randint(V, (ROWS, length))
        spoken_SL = torch.arange(length).expand(ROWS, length) >= 8
        scores = score_tokens(network, token_SL, spoken_SL, entropy=ENTROPY)
        loss = scores.logprob_SL.sum()
        if ENTROPY:
            loss = loss + scores.entropy_SL.sum()
        loss.backward()
        assert model.lm_head.weight.grad.abs().sum() > 0
        print(peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("rows", "lengths", "entropy"),
    [(4, (64, 512), False), (1, (512, 1024), False), (2, (64, 512), True)],
)
def test_memory_does_not_grow_with_vocabulary_times_length(
    rows: int, lengths: tuple[int, int], entropy: bool
) -> None:
    script = textwrap.dedent(_MEASURE)
    for name, value in (("ROWS", rows), ("LENGTHS", lengths), ("ENTROPY", entropy)):
        script = script.replace(name, str(value))
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
            "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed leaves the process at once
        },
        capture_output=True,
        text=True,
        check=True,
    )
    start, short, long = (float(word) for word in done.stdout.split())
    added_logits = rows * (lengths[1] - lengths[0]) * 150_000 * 4 / 2**20  # MiB in float32, once
    assert short - start > 20  # something is measured
    # A chunk's logits are 64 MiB, and a few of them are alive at a time, however long the rows.
    assert long - short < 0.25 * added_logits
    assert long - start < (550 if entropy else 400) < rows * lengths[1] * 150_000 * 4 / 2**20


# -- gradient checkpointing ------------------------------------------------------------------------

DROPOUTS: dict[str, dict[str, float]] = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "falcon": {"attention_dropout": 0.5, "hidden_dropout": 0.5},  # in the layer itself
}


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Count the bytes of different tensors that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}
    total = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        total[0] = sum(kept.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


@pytest.mark.parametrize("kind", DROPOUTS)
def test_checkpointed_layers_give_the_same_gradient_from_less_memory_without_dropout(
    kind: str,
) -> None:
    plain = LMPolicy(tiny_model(kind, num_hidden_layers=4), tiny_tokenizer(), max_new_tokens=12)
    model = tiny_model(kind, num_hidden_layers=4, **DROPOUTS[kind])
    model.load_state_dict(plain.model.state_dict())
    policy = LMPolicy(model, tiny_tokenizer(), max_new_tokens=12, gradient_checkpointing=True)
    tape = play(plain, [0, 1, 2])[0].tape()

    found = []
    for each in (plain, policy):
        assert each.network.split is not None
        with saved_bytes() as saved:
            logprob_SL = each.logprobs(tape.token_SL, tape.turn_SL)
        found.append((logprob_SL, gradients(each, logprob_SL.sum()), saved[0]))
    (logprob_SL, gradient, saved_all), (again_SL, gradient_again, saved_few) = found
    torch.testing.assert_close(again_SL, logprob_SL, rtol=0, atol=1e-6)
    assert (gradient_again - gradient).norm() < 1e-5 * gradient.norm() and gradient.norm() > 1
    assert saved_few < 0.7 * saved_all

    # Afterwards the model acts with its cache as before, and in eval mode.
    assert not any(module.training for module in model.modules())
    after = play(policy, [0, 1, 2])[0].tape()
    np.testing.assert_array_equal(after.token_SL, tape.token_SL)
    np.testing.assert_allclose(after.old_logprob_SL, tape.old_logprob_SL, atol=1e-5)


def test_checkpointed_layers_under_an_adapter_give_the_same_gradient() -> None:
    policies = []
    for checkpointing in (False, True):
        model = tiny_model("llama", attention_dropout=0.5 * checkpointing)
        add_lora(model, 4, seed=1)
        _move_adapter(model)
        policies.append(
            LMPolicy(
                model, tiny_tokenizer(), max_new_tokens=12, gradient_checkpointing=checkpointing
            )
        )
    tape = play(policies[0], [0, 1, 2])[0].tape()
    first, second = (
        gradients(policy, policy.logprobs(tape.token_SL, tape.turn_SL).sum()) for policy in policies
    )
    assert (first - second).norm() < 1e-5 * first.norm() and first.norm() > 0.1


def _move_adapter(model: torch.nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def test_an_agent_learns_alike_with_and_without_checkpointed_layers() -> None:
    ends = []
    for checkpointing in (False, True):
        policy = tiny_policy(gradient_checkpointing=checkpointing)
        agent = PPGAgent(policy, EchoDialogues(8), group_size=4, seed=0, kl_coef=0.1).learn(24)
        assert agent.num_updates >= 1
        ends.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)
    assert not torch.equal(ends[0], _start())


def _start() -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in tiny_model("llama").parameters()])


def test_a_model_that_cannot_checkpoint_its_layers_is_refused_with_the_remedy() -> None:
    model = tiny_model("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="cannot checkpoint its layers; lower token_budget"):
        LMPolicy(model, tiny_tokenizer(), gradient_checkpointing=True)
