"""Rollouts: one dialogue per slot, in any vector environment, with any policy."""

from __future__ import annotations

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from tiny_models import tiny_policy
from tiny_worlds import EchoDialogue, EchoDialogues

from agents.lm_policy import LMPolicy
from agents.policy import Messages, Policy, RandomPolicy, ScriptedPolicy
from agents.rollout import agent_generators, collect_rollouts

SCRIPT = ["Hello.", "I like tea.", "No.", "It rains."]


def sync(number: int, mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> SyncVectorEnv:
    return SyncVectorEnv([EchoDialogue] * number, autoreset_mode=mode)


def turns_of(transcript: Messages) -> int:
    return sum(message["role"] == "assistant" for message in transcript)


def assert_consistent(batch: object, envs: VectorEnv) -> None:
    """Check a scripted rollout of `EchoDialogues` against its own transcripts."""
    from agents.rollout import RolloutBatch

    assert isinstance(batch, RolloutBatch)
    assert len(batch.transcripts) == envs.num_envs
    for b, transcript in enumerate(batch.transcripts):
        number = turns_of(transcript)
        width = batch.alive_BT.shape[1]
        np.testing.assert_array_equal(batch.alive_BT[b], np.arange(width) < number)
        said = [m["content"] for m in transcript if m["role"] == "assistant"]
        assert said == SCRIPT[:number]
        expected = [np.nan if t == 1 else len(line) / 100 for t, line in enumerate(said)]
        np.testing.assert_allclose(batch.reward_BT[b, :number], expected)
        np.testing.assert_array_equal(batch.reward_BT[b, number:], 0.0)
        parts = batch.part_BT["length"][b]
        np.testing.assert_array_equal(parts[:number], [len(line) for line in said])
        assert np.isnan(parts[number:]).all()


def test_dialogues_end_when_they_end() -> None:
    envs = EchoDialogues(12)
    batch = collect_rollouts(envs, ScriptedPolicy(SCRIPT), seed=0)
    assert_consistent(batch, envs)
    assert set(batch.alive_BT.sum(axis=1)) == {2, 3, 4}
    assert batch.num_turns == batch.alive_BT.sum()
    assert batch.boundaries == (0, 2)
    assert batch.tape is None and batch.num_tokens == 0
    assert not batch.cut_BT.any() and not batch.truncated_B.any()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_gymnasiums_own_vector_environments_give_the_same_dialogues(mode: AutoresetMode) -> None:
    ours = collect_rollouts(EchoDialogues(5), ScriptedPolicy(SCRIPT), seed=3)
    envs = sync(5, mode)
    theirs = collect_rollouts(envs, ScriptedPolicy(SCRIPT), seed=3)
    assert_consistent(theirs, envs)
    np.testing.assert_array_equal(ours.reward_BT, theirs.reward_BT)
    assert ours.transcripts == theirs.transcripts
    assert theirs.boundaries == (0, 2)


def test_asynchronous_environments_give_the_same_dialogues() -> None:
    ours = collect_rollouts(EchoDialogues(2), ScriptedPolicy(SCRIPT), seed=3)
    envs = AsyncVectorEnv([EchoDialogue] * 2, shared_memory=False)
    try:
        theirs = collect_rollouts(envs, ScriptedPolicy(SCRIPT), seed=3)
    finally:
        envs.close()
    np.testing.assert_array_equal(ours.reward_BT, theirs.reward_BT)
    assert ours.transcripts == theirs.transcripts


def test_groups_come_from_the_environment() -> None:
    batch = collect_rollouts(
        EchoDialogues(6), ScriptedPolicy(SCRIPT), seed=0, options={"group_size": 3}
    )
    assert batch.group_B.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.transcripts[0] == batch.transcripts[1] == batch.transcripts[2]
    alone = collect_rollouts(sync(3), ScriptedPolicy(SCRIPT), seed=0)
    assert alone.group_B.tolist() == [0, 1, 2]


def test_reward_parts_may_come_as_an_array_of_dicts() -> None:
    class Worded(EchoDialogues):
        def step(self, actions):  # type: ignore[no-untyped-def]
            *rest, infos = super().step(actions)
            parts = infos["reward_parts"]
            spoke_B = parts["_length"]
            infos["reward_parts"] = np.array(
                [
                    {"length": n, "kind": None} if spoke else None
                    for n, spoke in zip(parts["length"], spoke_B, strict=True)
                ],
                dtype=object,
            )
            return *rest, infos

    plain = collect_rollouts(EchoDialogues(4), ScriptedPolicy(SCRIPT), seed=0)
    worded = collect_rollouts(Worded(4), ScriptedPolicy(SCRIPT), seed=0)
    np.testing.assert_array_equal(plain.part_BT["length"], worded.part_BT["length"])
    assert np.isnan(worded.part_BT["kind"]).all()


def test_a_language_models_tokens_match_the_transcripts() -> None:
    policy = tiny_policy()
    batch = collect_rollouts(EchoDialogues(8), policy, seed=1)
    assert batch.tape is not None
    for b, transcript in enumerate(batch.transcripts):
        said = [m["content"] for m in transcript if m["role"] == "assistant"]
        assert sorted(set(batch.tape.turn_SL[b]) - {-1}) == list(range(len(said)))
        for t, line in enumerate(said):
            ids = batch.tape.token_SL[b][batch.tape.turn_SL[b] == t]
            decoded = policy.tokenizer.decode(ids, skip_special_tokens=True)
            assert decoded.replace("\0", "").strip() == line
    assert batch.cut_BT.shape == batch.alive_BT.shape
    assert not batch.cut_BT[~batch.alive_BT].any()
    assert batch.num_tokens == (batch.tape.turn_SL >= 0).sum() > 0
    logprob_BL = policy.logprobs(batch.tape.token_SL, batch.tape.turn_SL).detach().numpy()
    np.testing.assert_allclose(batch.tape.old_logprob_SL, logprob_BL, atol=1e-4)


def test_the_same_seed_gives_the_same_rollout_and_another_seed_another() -> None:
    policy = tiny_policy()
    first, again, other = (
        collect_rollouts(EchoDialogues(3), policy, seed=seed) for seed in (4, 4, 5)
    )
    assert first.transcripts == again.transcripts != other.transcripts
    np.testing.assert_array_equal(first.tape.token_SL, again.tape.token_SL)


def test_a_dialogue_does_not_depend_on_the_number_of_slots() -> None:
    policy = tiny_policy()
    few = collect_rollouts(EchoDialogues(2), policy, seed=4)
    many = collect_rollouts(EchoDialogues(7), policy, seed=4)
    assert few.transcripts == many.transcripts[:2]


def test_members_of_a_group_draw_different_lines() -> None:
    batch = collect_rollouts(EchoDialogues(4), tiny_policy(), seed=0, options={"group_size": 4})
    assert len({transcript[2]["content"] for transcript in batch.transcripts}) == 4


def test_the_agents_randomness_is_not_the_environments() -> None:
    agent = agent_generators(7, 3)
    world = [np.random.default_rng(child) for child in np.random.SeedSequence(7).spawn(3)]
    assert {rng.random() for rng in agent}.isdisjoint({rng.random() for rng in world})
    assert [rng.random() for rng in agent_generators(7, 3)] == [
        rng.random() for rng in agent_generators(7, 5)[:3]
    ]


def test_a_full_context_ends_the_dialogue_as_truncated() -> None:
    from tiny_models import tiny_model, tiny_tokenizer

    model = tiny_model("llama", max_position_embeddings=150)
    policy = LMPolicy(model, tiny_tokenizer(), max_new_tokens=12, seed=0)
    batch = collect_rollouts(EchoDialogues(6, max_turns=9), policy, seed=2)
    assert batch.truncated_B.any()
    assert batch.tape is not None
    assert batch.tape.token_SL.shape[1] <= 150
    for b in range(6):
        turns = set(batch.tape.turn_SL[b]) - {-1}
        np.testing.assert_array_equal(np.flatnonzero(batch.alive_BT[b]), sorted(turns))


def test_tokens_are_kept_only_if_asked_for() -> None:
    kept = collect_rollouts(EchoDialogues(2), tiny_policy(), seed=0)
    mere = collect_rollouts(EchoDialogues(2), tiny_policy(), seed=0, keep_tokens=False)
    assert kept.tape is not None and kept.num_tokens == kept.tape.num_sampled > 0
    assert mere.tape is None and mere.num_tokens == 0
    np.testing.assert_array_equal(mere.reward_BT, kept.reward_BT)


@pytest.mark.parametrize(
    "policy",
    [
        RandomPolicy(["Yes.", "No."], seed=0),
        RandomPolicy(EchoDialogue().action_space, seed=0),
        ScriptedPolicy(lambda observation: f"Line {len(observation)}"),
        ScriptedPolicy(["Yes."]),
    ],
    ids=["lines", "space", "function", "script"],
)
def test_any_policy_with_predict_can_be_rolled_out(policy: Policy) -> None:
    assert isinstance(policy, Policy)
    batch = collect_rollouts(EchoDialogues(3), policy, seed=0)
    assert all(turns_of(transcript) >= 2 for transcript in batch.transcripts)


def test_a_random_policy_depends_on_its_seed_and_leaves_the_space_alone() -> None:
    space = EchoDialogue().action_space
    space.seed(1)
    before = space.np_random.bit_generator.state
    draws = [
        [RandomPolicy(source, seed=seed).predict([])[0] for seed in range(20)]
        for source in (space, space, ["a", "b"])
    ]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1 and len(set(draws[2])) > 1
    assert space.np_random.bit_generator.state == before


def test_policies_without_lines_are_refused() -> None:
    for make in (partial(RandomPolicy, []), partial(ScriptedPolicy, [])):
        with pytest.raises(ValueError, match="at least one line"):
            make()


def test_importing_policies_and_rollouts_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, agents.policy, agents.rollout; sys.exit('torch' in sys.modules)"
    root = gym.__file__ and str(__import__("pathlib").Path(__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
