import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from own_domain import CAFE, GUESTS
from speakers import DOMAIN_NAMES
from test_env import LINES, Silent

from ppg_env import (
    Persona,
    PersonaDialogueEnv,
    PersonaDialogueVectorEnv,
    bundled_personas,
)


def make_vec(num_envs, domain="chatting", **kwargs):
    envs = gym.make_vec("PersonaDialogue-v0", num_envs=num_envs, domain=domain, **kwargs)
    assert isinstance(envs, PersonaDialogueVectorEnv)
    return envs


def lines_for(num_envs, turn):
    """Return a different line for each slot, so that no two dialogues go the same way."""
    return [LINES[(turn + slot) % len(LINES)] for slot in range(num_envs)]


def roll(envs, seed, **options):
    """Return what a whole dialogue in every slot gives."""
    found = [envs.reset(seed=seed, options=options or None)]
    for turn in range(8):
        found.append(envs.step(lines_for(envs.num_envs, turn)))
    return found


def slot_of(infos, slot):
    """Return the single environment's info for this slot, None where a part is NaN."""
    info = {}
    for key, column in infos.items():
        if key.startswith("_") or not infos[f"_{key}"][slot]:
            continue
        info[key] = slot_of(column, slot) if isinstance(column, dict) else plain(column[slot])
    return info


def plain(value):
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value


def single_roll(domain, seed, slot, **kwargs):
    env = gym.make("PersonaDialogue-v0", domain=domain, **kwargs)
    return [env.reset(seed=seed + slot)] + [
        env.step(LINES[(turn + slot) % len(LINES)]) for turn in range(8)
    ]


# ---- batching does not change a dialogue ---------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
@pytest.mark.parametrize("num_envs", [1, 7])
def test_a_slot_is_the_single_environment_with_its_seed(domain, num_envs):
    together = roll(make_vec(num_envs, domain, noise=0.3), seed=40)
    for slot in range(num_envs):
        alone = single_roll(domain, 40, slot, noise=0.3)
        observations, infos = together[0]
        assert (observations[slot], slot_of(infos, slot)) == alone[0]
        for (observations, *numbers, infos), (observation, *single, info) in zip(
            together[1:], alone[1:], strict=True
        ):
            assert observations[slot] == observation
            assert [column[slot].item() for column in numbers] == single
            assert slot_of(infos, slot) == info


def test_a_dialogue_does_not_depend_on_the_batch_it_rides_in():
    seeds = [5, 900, 17]
    small, large = make_vec(1), make_vec(3)
    large.reset(seed=seeds)
    found = [large.step([line] * 3) for line in LINES]
    for slot, seed in enumerate(seeds):
        small.reset(seed=[seed])
        for line, step in zip(LINES, found, strict=True):
            assert small.step([line])[0][0] == step[0][slot]


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
@pytest.mark.parametrize(
    ("mode", "vector_kwargs"),
    [
        ("sync", {"autoreset_mode": AutoresetMode.DISABLED}),
        ("async", {"autoreset_mode": AutoresetMode.DISABLED, "shared_memory": False}),
    ],
)
def test_gymnasiums_own_vector_environments_give_the_same(domain, mode, vector_kwargs):
    """Asynchronous ones need shared_memory=False: text has no array form."""
    envs = gym.make_vec(
        "PersonaDialogue-v0",
        num_envs=3,
        vectorization_mode=mode,
        vector_kwargs=vector_kwargs,
        domain=domain,
    )
    try:
        theirs, ours = roll(envs, seed=6), roll(make_vec(3, domain), seed=6)
    finally:
        envs.close()
    for their_step, our_step in zip(theirs, ours, strict=True):
        assert their_step[0] == our_step[0]
        for their_column, our_column in zip(their_step[1:-1], our_step[1:-1], strict=True):
            np.testing.assert_array_equal(their_column, our_column)
        their_infos, our_infos = their_step[-1], our_step[-1]
        assert set(their_infos) == set(our_infos)
        for slot in range(3):
            assert slot_of(their_infos, slot) == slot_of(our_infos, slot)


def test_gymnasiums_own_vector_environments_reset_by_themselves_unless_told_otherwise():
    envs = gym.make_vec(
        "PersonaDialogue-v0", num_envs=2, vectorization_mode="sync", domain="therapy", max_turns=2
    )
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    envs.reset(seed=0)
    lengths = [len(envs.step(("Well.", "Hm."))[0][0]) for _ in range(4)]
    assert lengths == [4, 5, 2, 4]


def test_an_own_domain_travels_to_other_processes():
    envs = gym.make_vec(
        "PersonaDialogue-v0",
        num_envs=2,
        vectorization_mode="async",
        vector_kwargs={"shared_memory": False, "context": "spawn"},
        domain=CAFE,
        personas=GUESTS,
    )
    try:
        observations, _ = envs.reset(seed=1)
        assert observations == make_vec(2, CAFE, personas=GUESTS).reset(seed=1)[0]
        assert envs.step(("I drink tea.", "I drink tea."))[1].max() <= 1.0
    finally:
        envs.close()


# ---- what it returns -----------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_observations_rewards_and_infos_have_the_documented_forms(domain):
    envs = make_vec(4, domain)
    for observations, *rest in roll(envs, seed=0):
        assert isinstance(observations, tuple)
        assert observations in envs.observation_space
        infos = rest[-1]
        if rest[:-1]:
            reward_N, terminated_N, truncated_N = rest[:-1]
            assert (reward_N.dtype, reward_N.shape) == (np.dtype(np.float64), (4,))
            assert (terminated_N.dtype, truncated_N.dtype) == (np.dtype(bool), np.dtype(bool))
            assert not truncated_N.any()
            assert infos["unscorable"].dtype == bool
            for name, part_N in infos["reward_parts"].items():
                assert part_N.dtype == (bool if name.startswith("_") else float)
        for name in ("turn", "phase", "group_id"):
            assert infos[name].dtype == np.int64
            assert infos[f"_{name}"].all()
        assert infos["persona"].shape == (4,)


def test_its_metadata_says_that_it_never_resets_by_itself():
    envs = make_vec(2)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert envs.spec is not None and envs.spec.id == "PersonaDialogue-v0"
    assert (envs.unwrapped.max_turns, envs.unwrapped.num_phases) == (8, 3)
    assert envs.unwrapped.phase_boundaries == [0, 2, 6]
    assert envs.action_space.sample() in envs.action_space


def test_one_partner_call_and_one_judge_call_a_step():
    calls = []

    def partner(transcripts, rngs):
        calls.append(("partner", len(transcripts)))
        return ["Go on."] * len(transcripts)

    def judge(transcripts):
        calls.append(("judge", len(transcripts)))
        return Silent()(transcripts)

    envs = make_vec(5, "therapy", partner=partner, judge=judge, max_turns=2)
    envs.reset(seed=0)
    envs.step(["Well."] * 5)
    envs.step(["Hm."] * 5)
    assert calls == [("partner", 5), ("judge", 5), ("partner", 5), ("judge", 5)]


def test_unscorable_turns_are_nan_or_the_penalty():
    for penalty, expected in ((float("nan"), np.nan), (0.25, 0.25)):
        envs = make_vec(2, judge=Silent(), unscorable_reward=penalty)
        envs.reset(seed=0)
        np.testing.assert_array_equal(envs.step(["One.", "Two."])[1], [0.5, 0.5])
        _, reward_N, _, _, infos = envs.step(["Three.", "Four."])
        np.testing.assert_array_equal(reward_N, [expected, expected])
        assert infos["unscorable"].all()
        assert np.isnan(infos["reward_parts"]["fluency"]).all()


# ---- finished slots and masks --------------------------------------------------------------------


def spoken(turns):
    """Return a history of so many agent turns."""
    history = [{"role": "user", "content": "Hi!"}]
    for turn in range(turns):
        history += [
            {"role": "assistant", "content": f"Line {turn}."},
            {"role": "user", "content": f"And {turn}?"},
        ]
    return history


def finished_and_running():
    """Return an environment whose slot 0 is over while slots 1 and 2 go on, and its last step."""
    envs = make_vec(3, "therapy")
    envs.reset(seed=0, options={"history": [spoken(7), None, None]})
    last = envs.step(["The last.", "The first.", "The first."])
    np.testing.assert_array_equal(last[2], [True, False, False])
    return envs, last


def test_a_finished_slot_stays_finished_until_it_is_reset():
    envs, (before, *_) = finished_and_running()
    for line in ("Ignored.", "", None):
        observations, reward_N, terminated_N, _, infos = envs.step([line, "Well.", "Hm."])
        assert observations[0] == before[0]
        assert observations[1] != before[1]
        assert reward_N[0] == 0.0
        assert terminated_N[0]
        np.testing.assert_array_equal(infos["_turn"], [False, True, True])
        np.testing.assert_array_equal(infos["_reward_parts"], [False, True, True])


def test_when_all_slots_are_finished_a_step_changes_nothing():
    envs = make_vec(2, max_turns=1)
    envs.reset(seed=0)
    last = envs.step(["One.", "Two."])
    for _ in range(2):
        observations, reward_N, terminated_N, truncated_N, infos = envs.step(["Ignored."] * 2)
        assert observations == last[0]
        assert not reward_N.any() and terminated_N.all() and not truncated_N.any()
        assert infos == {}


def test_a_mask_resets_its_slots_and_no_other():
    envs, (before, *_) = finished_and_running()
    kept = [transcript.turns for transcript in envs.transcripts]
    observations, infos = envs.reset(options={"reset_mask": np.array([True, False, False])})
    assert len(observations[0]) == 2
    assert observations[1:] == before[1:]
    assert [t.turns for t in envs.transcripts] == [(), *kept[1:]]
    np.testing.assert_array_equal(infos["_persona"], [True, False, False])
    _, _, terminated_N, _, infos = envs.step(["Hello.", "Well.", "Hm."])
    assert not terminated_N.any()
    np.testing.assert_array_equal(infos["turn"], [1, 2, 2])


def test_a_masked_reset_may_be_seeded():
    envs = make_vec(3)
    envs.reset(seed=0)
    fresh = make_vec(3).reset(seed=70)[0]
    observations, _ = envs.reset(seed=70, options={"reset_mask": np.array([False, True, False])})
    assert observations[1] == fresh[1]
    assert observations[0] != fresh[0] and observations[2] != fresh[2]


def test_a_masked_reset_does_not_touch_the_dice_of_other_slots():
    one, two = make_vec(2), make_vec(2)
    one.reset(seed=3)
    two.reset(seed=3)
    one.reset(options={"reset_mask": np.array([True, False])})
    for line in LINES[:3]:
        assert one.step([line] * 2)[0][1] == two.step([line] * 2)[0][1]
    assert one.reset()[0][1] == two.reset()[0][1]


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_a_group_shares_persona_opening_and_partner_seed(domain):
    envs = make_vec(6, domain)
    observations, infos = envs.reset(seed=9, options={"group_size": 3})
    for start in (0, 3):
        members = slice(start, start + 3)
        assert len({json.dumps(o) for o in observations[members]}) == 1
        assert len(set(infos["persona"][members])) == 1
        assert len(set(infos["group_id"][members])) == 1
    assert infos["group_id"][0] != infos["group_id"][3]
    assert observations[0] != observations[3]


def test_a_group_hears_the_same_lines_as_long_as_its_members_say_the_same():
    envs = make_vec(4)
    envs.reset(seed=2, options={"group_size": 4})
    for line in LINES[:4]:
        observations, *_ = envs.step([line] * 4)
        assert all(observation == observations[0] for observation in observations)
    persona = envs.transcripts[0].persona
    aside = f"My hobby is {persona.facts['hobby']}."
    observations, *_ = envs.step([aside, *["It depends on the day."] * 3])
    assert observations[1] == observations[2] == observations[3]
    assert observations[0][:-2] == observations[1][:-2]


def test_group_k_is_the_single_environment_seeded_with_the_seed_plus_k():
    observations, infos = make_vec(6).reset(seed=30, options={"group_size": 2})
    single = PersonaDialogueEnv()
    for group in range(3):
        observation, info = single.reset(seed=30 + group)
        assert observations[2 * group] == observations[2 * group + 1] == observation
        assert infos["group_id"][2 * group] == info["group_id"]


def test_groups_go_on_without_a_seed_and_change_every_time():
    envs = make_vec(4)
    envs.reset(seed=0, options={"group_size": 2})
    seen = set()
    for _ in range(5):
        _, infos = envs.reset(options={"group_size": 2})
        ids = infos["group_id"]
        assert ids[0] == ids[1] != ids[2] == ids[3]
        seen |= set(ids.tolist())
    assert len(seen) == 10


def test_groups_without_any_seed_still_share():
    _, infos = make_vec(4).reset(options={"group_size": 4})
    assert len(set(infos["group_id"].tolist())) == 1


def test_part_of_a_group_may_be_reset_and_is_then_a_group_of_its_own():
    envs = make_vec(4)
    _, before = envs.reset(seed=0, options={"group_size": 4})
    mask = np.array([False, True, True, False])
    observations, after = envs.reset(options={"group_size": 4, "reset_mask": mask})
    assert observations[1] == observations[2] != observations[0] == observations[3]
    assert after["group_id"][1] == after["group_id"][2] != before["group_id"][0]


# ---- other options -------------------------------------------------------------------------------


def test_personas_may_be_one_for_all_or_one_a_slot():
    envs = make_vec(3, "therapy", personas="all")
    _, infos = envs.reset(seed=0, options={"persona": "therapy-0399"})
    assert set(infos["persona"]) == {"therapy-0399"}
    people = ["therapy-0001", bundled_personas("therapy")[2], None]
    _, infos = envs.reset(seed=0, options={"persona": people})
    assert list(infos["persona"][:2]) == ["therapy-0001", "therapy-0002"]


def test_histories_may_be_one_for_all_or_one_a_slot():
    history, envs = spoken(1), make_vec(2)
    observations, infos = envs.reset(seed=0, options={"history": history})
    assert observations[0][1:] == observations[1][1:] == history
    np.testing.assert_array_equal(infos["turn"], [1, 1])
    observations, infos = envs.reset(seed=0, options={"history": [None, history]})
    np.testing.assert_array_equal(infos["turn"], [0, 1])
    assert observations[1][1:] == history
    envs.step(["Well.", "Hm."])


def test_dialogues_of_different_lengths_end_at_different_times():
    envs = make_vec(2)
    envs.reset(seed=0, options={"history": [spoken(6), None]})
    ends = [envs.step(["More.", "Less."])[2].tolist() for _ in range(3)]
    assert ends == [[False, False], [True, False], [True, False]]


def test_own_personas_of_ones_own_domain_work_in_a_batch():
    envs = make_vec(3, CAFE, personas=GUESTS)
    envs.reset(seed=0)
    drinks = [transcript.persona.facts["drink"] for transcript in envs.transcripts]
    _, reward_N, *_ = envs.step([f"I drink {drink}." for drink in drinks])
    assert (reward_N > 0).all()


# ---- state and restore ---------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True])
def test_a_batch_can_be_branched_and_resumed_bit_for_bit(pickled):
    envs = make_vec(3, "education", noise=0.5)
    envs.reset(seed=0)
    for turn in range(3):
        envs.step(lines_for(3, turn))
    snapshots = envs.state()
    if pickled:
        snapshots = pickle.loads(pickle.dumps(snapshots))
    rest = [envs.step(lines_for(3, turn)) for turn in range(3, 8)]

    other = make_vec(3, "education", noise=0.5)
    assert [len(observation) for observation in other.restore(snapshots)] == [8, 8, 8]
    again = [other.step(lines_for(3, turn)) for turn in range(3, 8)]
    for first, second in zip(rest, again, strict=True):
        assert first[0] == second[0]
        np.testing.assert_array_equal(first[1], second[1])
        np.testing.assert_array_equal(first[2], second[2])
        assert [slot_of(first[4], i) for i in range(3)] == [slot_of(second[4], i) for i in range(3)]


def test_one_dialogue_can_be_branched_into_many_slots():
    single = PersonaDialogueEnv(domain="therapy")
    single.reset(seed=5)
    single.step("I feel something.")
    envs = make_vec(4, "therapy")
    envs.restore([single.state()] * 4)
    observations, *_ = envs.step(["Well, you see."] * 4)
    assert all(observation == observations[0] for observation in observations)
    assert single.step("Well, you see.")[0] == observations[0]


# ---- bad input -----------------------------------------------------------------------------------


def test_a_step_before_the_reset_says_what_to_do():
    with pytest.raises(ResetNeeded, match=r"reset"):
        make_vec(2).step(["a", "b"])
    with pytest.raises(ResetNeeded, match=r"reset"):
        make_vec(2).reset(options={"reset_mask": np.array([True, False])})


@pytest.mark.parametrize("bad", ["", None, "nul\0", "lone \ud800", "x" * 2001, 5])
def test_one_bad_action_is_refused_and_nothing_has_changed(bad):
    envs, twin = make_vec(3), make_vec(3)
    envs.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(ValueError, match=r"Invalid action"):
        envs.step(["Fine.", bad, "Good."])
    assert envs.step(["A.", "B.", "C."])[0] == twin.step(["A.", "B.", "C."])[0]


@pytest.mark.parametrize("actions", [["one"], ["a", "b", "c"], "ab", []])
def test_a_wrong_number_of_actions_is_refused(actions):
    envs = make_vec(2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"step takes 2 actions"):
        envs.step(actions)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reset_mask": [True, False, True, False]}, "bool array of shape"),
        ({"reset_mask": np.array([1, 0, 1, 0])}, "bool array of shape"),
        ({"reset_mask": np.ones(3, dtype=bool)}, r"shape \(4,\)"),
        ({"reset_mask": np.zeros(4, dtype=bool)}, "selects no slot"),
        ({"group_size": 3}, "must divide num_envs=4, got 3"),
        ({"group_size": 0}, "must divide num_envs=4, got 0"),
        ({"group_size": -2}, "must divide num_envs=4, got -2"),
        ({"group_size": 2.0}, "group_size.*2.0"),
        ({"group_size": "2"}, "group_size.*'2'"),
        ({"groupsize": 2}, "Unknown reset option 'groupsize'.*group_size"),
        ({"persona": ["chatting-0000"]}, "'persona'.* 4 of them, got 1"),
        ({"persona": 7}, "'persona'.*7"),
        ({"persona": "chatting-9999"}, "Unknown persona id 'chatting-9999'"),
        ({"history": 7}, "'history'.*7"),
        ({"history": [{"role": "assistant", "content": "Hi."}]}, r"history\[0\]"),
        ({"history": ["Hi.", None, None, None]}, "history is a list of chat messages"),
    ],
)
def test_impossible_options_are_refused_with_their_remedy(options, named):
    envs = make_vec(4)
    with pytest.raises(ValueError, match=named):
        envs.reset(seed=0, options=options)


@pytest.mark.parametrize("seed", [[1, 2, 3], []])
def test_seeds_must_be_one_a_slot(seed):
    with pytest.raises(ValueError, match=r"seed needs 2 entries"):
        make_vec(2).reset(seed=seed)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"num_envs must be at least 1, got 0"):
        PersonaDialogueVectorEnv(num_envs=0)
    with pytest.raises(ValueError, match=r"renders nothing"):
        make_vec(2, render_mode="human")
    envs = make_vec(2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"restore takes 2 snapshots, got 1"):
        envs.restore(envs.state()[:1])


def test_a_persona_object_with_unknown_facts_is_refused():
    odd = Persona("odd", "chatting", "You have a unicorn.", {"pet": "unicorn"})
    with pytest.raises(ValueError, match=r"'odd'.*'facts.pet'.*unicorn"):
        make_vec(2).reset(options={"persona": odd})
    with pytest.raises(ValueError, match=r"'odd'.*'facts.pet'.*unicorn"):
        make_vec(2, personas=[odd])
