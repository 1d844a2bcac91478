"""Credit assignment: the matrix identities, partial returns and baselines against plain sums."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.credit import (
    Credit,
    Discounted,
    FullPlanning,
    Greedy,
    KStep,
    Segment,
    Subset,
    Trajectory,
    advantages,
    batch_mean,
    credit_weights,
    group_mean,
    leave_one_out,
    no_baseline,
    parse_credit,
    partial_returns,
)

turn_counts = st.integers(1, 9)
CREDITS: list[Credit] = [
    FullPlanning(),
    Greedy(),
    KStep(3),
    Segment(length=2),
    Segment(boundaries=[0, 2, 5]),
    Discounted(0.9),
    Subset(np.triu(np.arange(81.0).reshape(9, 9))),
    Trajectory(),
]
each_credit = pytest.mark.parametrize("credit", CREDITS, ids=str)


# --- policy classes -------------------------------------------------------------------------------


@given(turn_counts)
def test_identities_between_policy_classes(num_turns):
    def same(left: Credit, right: Credit) -> bool:
        return np.array_equal(left.weights(num_turns), right.weights(num_turns))

    assert same(FullPlanning(), KStep(num_turns))
    assert same(FullPlanning(), KStep(num_turns + 3))
    assert same(FullPlanning(), Segment(length=num_turns))
    assert same(FullPlanning(), Segment(boundaries=[0]))
    assert same(FullPlanning(), Discounted(1.0))
    assert same(FullPlanning(), Subset(np.triu(np.ones((num_turns, num_turns)))))
    assert same(Greedy(), KStep(1))
    assert same(Greedy(), Segment(length=1))
    assert same(Greedy(), Segment(boundaries=range(num_turns)))
    assert same(Greedy(), Discounted(0.0))
    assert same(Greedy(), Subset(np.eye(num_turns)))


@given(turn_counts, st.integers(1, 5), st.floats(0, 1))
def test_each_entry_follows_the_definition_of_its_class(num_turns, k, gamma):
    def entries(credit: Credit) -> list[list[float]]:
        return credit.weights(num_turns).tolist()

    turns = range(num_turns)
    assert entries(FullPlanning()) == [[float(u >= t) for u in turns] for t in turns]
    assert entries(Greedy()) == [[float(u == t) for u in turns] for t in turns]
    assert entries(KStep(k)) == [[float(t <= u < t + k) for u in turns] for t in turns]
    assert entries(Segment(length=k)) == [
        [float(u >= t and u // k == t // k) for u in turns] for t in turns
    ]
    np.testing.assert_allclose(
        entries(Discounted(gamma)),
        [[gamma ** (u - t) if u >= t else 0.0 for u in turns] for t in turns],
    )
    assert entries(Trajectory()) == [[1.0] * num_turns] * num_turns


@given(st.sets(st.integers(1, 8)), turn_counts)
def test_a_segment_ends_where_the_next_one_starts(later_starts, num_turns):
    starts = [0, *sorted(later_starts)]
    segment_of = [sum(start <= turn for start in starts) for turn in range(num_turns)]
    expected = [
        [float(u >= t and segment_of[u] == segment_of[t]) for u in range(num_turns)]
        for t in range(num_turns)
    ]
    assert Segment(boundaries=starts).weights(num_turns).tolist() == expected
    assert Segment().weights(num_turns, starts).tolist() == expected
    assert Segment().weights(num_turns, np.array(starts)).tolist() == expected


def test_own_boundaries_win_over_those_passed_in():
    own = Segment(boundaries=[0, 2])
    assert np.array_equal(own.weights(4, boundaries=[0, 1]), own.weights(4))


@each_credit
def test_fewer_turns_are_the_upper_left_block_of_more_turns(credit):
    for num_turns in range(1, 9):
        block_TT = credit.weights(9)[:num_turns, :num_turns]
        assert np.array_equal(credit.weights(num_turns), block_TT)


@each_credit
def test_every_class_but_the_trajectory_is_causal(credit):
    is_causal = not np.tril(credit.weights(5), -1).any()
    assert is_causal == (credit != Trajectory())


@each_credit
def test_policy_classes_are_values(credit):
    twin = pickle.loads(pickle.dumps(credit))
    assert twin == credit and hash(twin) == hash(credit) and len({twin, credit}) == 1
    assert str(credit) == credit.name
    assert np.array_equal(twin.weights(4), credit.weights(4))
    with pytest.raises(AttributeError):
        credit.k = 7


def test_equal_arguments_of_other_types_make_equal_objects():
    assert KStep(np.int64(3)) == KStep(3)
    assert Segment(boundaries=np.array([0, 2])) == Segment(boundaries=(0, 2))
    assert Subset([[1, 2], [0, 3]]) == Subset(np.array([[1.0, 2.0], [0.0, 3.0]]))
    assert KStep(3) != Segment(length=3)


def test_changing_returned_weights_does_not_change_the_class():
    credit = Subset(np.eye(2))
    credit.weights(2)[0, 1] = 5.0
    assert credit.weights(2)[0, 1] == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KStep(0), "k must be an integer of at least 1, got 0; k=1 is Greedy"),
        (lambda: KStep(-2), "got -2"),
        (lambda: KStep(2.0), "got 2.0"),
        (lambda: KStep(True), "got True"),
        (lambda: Segment(length=0), "length must be an integer of at least 1, got 0"),
        (lambda: Segment(length=1.5), "got 1.5"),
        (lambda: Segment(length=2, boundaries=[0]), "length or boundaries, not both"),
        (lambda: Segment(boundaries=[]), "starts with turn 0"),
        (lambda: Segment(boundaries=[1, 3]), r"starts with turn 0, got boundaries \(1, 3\)"),
        (lambda: Segment(boundaries=[0, 4, 2]), "2 follows 4"),
        (lambda: Segment(boundaries=[0, 3, 3]), "3 follows 3"),
        (lambda: Segment(boundaries=[0, -1]), "turn index from 0, got -1"),
        (lambda: Segment(boundaries=[0, 1.5]), "integer turn index, got 1.5"),
        (lambda: Segment().weights(4), "phases, but none were passed in"),
        (lambda: Segment().weights(4, [0, 2, 1]), "1 follows 2"),
        (lambda: Discounted(1.1), r"\[0, 1\], got 1.1"),
        (lambda: Discounted(-0.1), "got -0.1"),
        (lambda: Discounted(float("nan")), "got nan"),
        (lambda: Subset([[1, 0, 0], [0, 1, 0], [0.5, 0, 1]]), r"\[2, 0\] is 0.5.*before it"),
        (lambda: Subset([[1, np.inf], [0, 1]]), r"\[0, 1\] is inf"),
        (lambda: Subset([[1, 0]]), r"square T x T matrix, got shape \(1, 2\)"),
        (lambda: Subset(np.zeros((0, 0))), r"got shape \(0, 0\)"),
        (lambda: Subset(np.eye(2)).weights(3), "covers 2 turns but 3 are needed"),
        (lambda: Subset(np.eye(2)).weights(0), "num_turns must be an integer"),
        (lambda: FullPlanning().weights(0), "num_turns must be an integer of at least 1, got 0"),
        (lambda: Trajectory().weights(-1), "got -1"),
    ],
)
def test_malformed_policy_classes_are_refused_with_the_value_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "credit"),
    [
        ("full", FullPlanning()),
        ("greedy", Greedy()),
        (" Greedy ", Greedy()),
        ("kstep:3", KStep(3)),
        ("segment", Segment()),
        ("segment:2", Segment(length=2)),
        ("segment:0,2,5", Segment(boundaries=(0, 2, 5))),
        ("segment:0", Segment(boundaries=(0,))),
        ("discounted:0.9", Discounted(0.9)),
        ("trajectory", Trajectory()),
    ],
)
def test_a_name_is_read_and_written_back(text, credit):
    assert parse_credit(text) == credit
    assert parse_credit(credit.name) == credit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gredy", "There are: full, greedy, kstep:3, .*Did you mean 'greedy'"),
        ("k-step:3", "Did you mean 'kstep'"),
        ("zzzz", r"Unknown policy class 'zzzz'.*trajectory\.$"),
        ("kstep", "e.g. 'kstep:3': the number after the colon is missing"),
        ("kstep:", "missing"),
        ("kstep:two", "e.g. 'kstep:3'"),
        ("kstep:0", "got 0"),
        ("greedy:3", "takes no argument, got '3'"),
        ("discounted:2", "got 2.0"),
        ("segment:-1", "got -1"),
        ("segment:", "segment:2"),
    ],
)
def test_an_unreadable_name_says_what_to_write(text, message):
    with pytest.raises(ValueError, match=message):
        parse_credit(text)


# --- weights of a batch ---------------------------------------------------------------------------


def test_each_episode_gets_the_segments_of_its_own_phases():
    boundaries = [[0, 2], [0, 1, 3], [0, 2]]
    weight_BTT = credit_weights(Segment(), 4, boundaries_per_episode=boundaries)
    assert weight_BTT.shape == (3, 4, 4)
    for weight_TT, each in zip(weight_BTT, boundaries, strict=True):
        assert np.array_equal(weight_TT, Segment(boundaries=each).weights(4))


def test_one_matrix_serves_all_where_boundaries_do_not_matter():
    same = credit_weights(Segment(), 4, boundaries_per_episode=[[0, 2], [0, 2], [0, 2, 7]])
    assert np.array_equal(same, Segment(length=2).weights(4))
    ignored = credit_weights(KStep(2), 4, boundaries_per_episode=[[0, 2], [0, 1]])
    assert np.array_equal(ignored, KStep(2).weights(4))
    assert np.array_equal(credit_weights(Segment(), 4, [0, 2]), same)


@each_credit
def test_scaling_by_the_window_makes_returns_of_ones_one(credit):
    weight_TT = credit_weights(credit, 6, scale="window")
    row_sums = weight_TT.sum(axis=1)
    np.testing.assert_allclose(row_sums[credit.weights(6).any(axis=1)], 1.0)


@each_credit
def test_scaling_by_the_mean_window_is_one_number(credit):
    weight_TT, scaled_TT = credit.weights(6), credit_weights(credit, 6, scale="mean_window")
    np.testing.assert_allclose(scaled_TT * weight_TT.sum() / 6, weight_TT)
    np.testing.assert_allclose(scaled_TT.sum(axis=1).mean(), 1.0)


def test_scaling_leaves_empty_rows_empty():
    nothing = Subset(np.zeros((2, 2)))
    for scale in ("none", "window", "mean_window"):
        assert not credit_weights(nothing, 2, scale=scale).any()


def test_scaling_does_not_depend_on_how_long_an_episode_lasted():
    weight_TT = credit_weights(FullPlanning(), 4, scale="window")
    alive_BT = np.array([[True, True, True, True], [True, False, False, False]])
    return_BT = partial_returns(np.ones((2, 4)), weight_TT, alive_BT)
    assert return_BT[:, 0].tolist() == [1.0, 0.25]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boundaries": [0], "scale": "windw"}, "Unknown scale 'windw'.*Did you mean 'window'"),
        ({"boundaries": [0], "boundaries_per_episode": [[0]]}, "not both"),
        ({"boundaries_per_episode": []}, "is empty"),
        ({"boundaries_per_episode": [[0, 1], [0, 2, 1]]}, "1 follows 2"),
    ],
)
def test_malformed_batch_weights_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        credit_weights(Segment(), 4, **arguments)


# --- against plain sums ---------------------------------------------------------------------------


@st.composite
def batches(draw):
    """Random rewards with early ends, unscorable turns, groups, and a matrix per episode or one."""
    num_episodes, num_turns = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    reward_BT = rng.normal(size=(num_episodes, num_turns))
    reward_BT[rng.random(reward_BT.shape) < draw(st.sampled_from([0.0, 0.4]))] = np.nan
    length_B = rng.integers(draw(st.integers(0, num_turns)), num_turns + 1, size=num_episodes)
    alive_BT = np.arange(num_turns) < length_B[:, None]
    group_B = rng.choice([-3, 5, 11], size=num_episodes)
    shape = (num_turns, num_turns)
    weight = rng.normal(size=(num_episodes, *shape) if draw(st.booleans()) else shape)
    return reward_BT, alive_BT, group_B, weight


@given(batches())
def test_partial_returns_are_plain_weighted_sums(batch):
    reward_BT, alive_BT, _, weight = batch
    return_BT = partial_returns(reward_BT, weight, alive_BT)
    num_episodes, num_turns = reward_BT.shape
    for b in range(num_episodes):
        weight_TT = weight[b] if weight.ndim == 3 else weight
        for t in range(num_turns):
            expected = 0.0
            for u in range(num_turns):
                if alive_BT[b, t] and alive_BT[b, u] and not np.isnan(reward_BT[b, u]):
                    expected += weight_TT[t, u] * reward_BT[b, u]
            assert return_BT[b, t] == pytest.approx(expected, abs=1e-12)


def _expected_baseline(baseline, return_BT, counted_BT, group_B, b, t):
    """What a returns' baseline is, said with loops; None where the advantage has to be 0."""
    counted = [other for other in range(len(group_B)) if counted_BT[other, t]]
    mine = [other for other in counted if group_B[other] == group_B[b]]
    peers = [other for other in mine if other != b]
    strangers = [other for other in counted if group_B[other] != group_B[b]]
    chosen = {
        "leave_one_out": peers or strangers,
        "group_mean": mine,
        "batch_mean": counted,
        "none": [],
    }[baseline]
    if baseline == "none":
        return 0.0
    return sum(return_BT[other, t] for other in chosen) / len(chosen) if chosen else None


@given(batches(), st.sampled_from(["leave_one_out", "group_mean", "batch_mean", "none"]))
def test_advantages_are_returns_minus_plain_means(batch, baseline):
    reward_BT, alive_BT, group_B, weight = batch
    scorable_BT = ~np.isnan(reward_BT)
    return_BT = partial_returns(reward_BT, weight, alive_BT)
    advantage_BT = advantages(
        return_BT, baseline=baseline, group_B=group_B, alive_BT=alive_BT, scorable_BT=scorable_BT
    )
    counted_BT = alive_BT & scorable_BT
    for (b, t), advantage in np.ndenumerate(advantage_BT):
        expected = _expected_baseline(baseline, return_BT, counted_BT, group_B, b, t)
        if not counted_BT[b, t] or expected is None:
            assert advantage == 0.0
        else:
            assert advantage == pytest.approx(return_BT[b, t] - expected, abs=1e-12)


@given(batches())
def test_the_order_and_the_names_of_groups_do_not_matter(batch):
    reward_BT, alive_BT, group_B, weight = batch
    return_BT = partial_returns(reward_BT, weight, alive_BT)
    backwards = leave_one_out(return_BT[::-1], 100 - group_B[::-1], alive_BT[::-1])
    np.testing.assert_allclose(
        backwards[::-1], leave_one_out(return_BT, group_B, alive_BT), atol=1e-12
    )


@given(batches())
def test_inputs_are_left_as_they_were(batch):
    copies = [array.copy() for array in batch]
    reward_BT, alive_BT, group_B, weight = batch
    return_BT = partial_returns(reward_BT, weight, alive_BT)
    return_copy = return_BT.copy()
    advantages(return_BT, group_B=group_B, alive_BT=alive_BT, divide_by_std=True)
    for array, copy in zip([*batch, return_BT], [*copies, return_copy], strict=True):
        np.testing.assert_array_equal(array, copy)


# --- partial returns by hand ----------------------------------------------------------------------


def test_partial_returns_of_one_dialogue_by_hand():
    reward_BT = [[1.0, 2.0, 4.0, 8.0]]
    assert partial_returns(reward_BT, FullPlanning().weights(4)).tolist() == [[15, 14, 12, 8]]
    assert partial_returns(reward_BT, Greedy().weights(4)).tolist() == [[1, 2, 4, 8]]
    assert partial_returns(reward_BT, KStep(2).weights(4)).tolist() == [[3, 6, 12, 8]]
    assert partial_returns(reward_BT, Segment(length=2).weights(4)).tolist() == [[3, 2, 12, 8]]
    assert partial_returns(reward_BT, Discounted(0.5).weights(4)).tolist() == [[4, 6, 8, 8]]
    assert partial_returns(reward_BT, Trajectory().weights(4)).tolist() == [[15, 15, 15, 15]]


def test_rewards_after_the_end_are_never_read():
    alive_BT = np.array([[True, True, False, False]])
    for junk in (7.0, np.nan, np.inf):
        reward_BT = np.array([[1.0, 2.0, junk, junk]])
        for credit, expected in ((FullPlanning(), [3, 2, 0, 0]), (Trajectory(), [3, 3, 0, 0])):
            assert partial_returns(reward_BT, credit.weights(4), alive_BT).tolist() == [expected]


def test_a_turn_with_reward_zero_is_a_turn_like_any_other():
    # Mistake 3 of VOCABULARY.md: turn ends found by "reward != 0".
    return_BT = partial_returns([[0.0, 0.0, 1.0]], FullPlanning().weights(3))
    assert return_BT.tolist() == [[1.0, 1.0, 1.0]]
    advantage_BT = advantages([[0.0, 1.0], [1.0, 1.0]], group_B=[0, 0])
    assert advantage_BT.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_per_turn_rewards_are_neither_ignored_nor_merely_summed():
    # Mistake 3: two dialogues with the same total but other turns must be told apart.
    return_BT = partial_returns([[1.0, 0.0], [0.0, 1.0]], Greedy().weights(2))
    assert advantages(return_BT, group_B=[4, 4]).tolist() == [[1.0, -1.0], [-1.0, 1.0]]


def test_credit_reaches_past_the_partners_answers():
    # Mistake 4: an accidental greedy. The only reward comes three exchanges after the first turn.
    reward_BT = [[0.0, 0.0, 0.0, 1.0]]
    assert partial_returns(reward_BT, FullPlanning().weights(4)).tolist() == [[1, 1, 1, 1]]
    assert partial_returns(reward_BT, KStep(3).weights(4)).tolist() == [[0, 1, 1, 1]]


def test_an_unscorable_turn_adds_nothing_to_earlier_turns_and_has_no_advantage_itself():
    reward_BT = np.array([[1.0, np.nan, 1.0], [0.5, 0.5, 0.5], [0.0, 1.0, 0.0]])
    return_BT = partial_returns(reward_BT, FullPlanning().weights(3))
    assert return_BT[0].tolist() == [2.0, 1.0, 1.0]
    advantage_BT = advantages(return_BT, group_B=[0, 0, 0], scorable_BT=~np.isnan(reward_BT))
    assert advantage_BT[0, 1] == 0.0
    assert advantage_BT[:, 1].tolist() == [0.0, 0.0, 0.0]  # 1.0 - 1.0 both ways, without episode 0
    assert advantage_BT[0].tolist() == [2.0 - 1.25, 0.0, 1.0 - 0.25]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], np.eye(2)), r"reward_BT must have shape \(episodes, turns\), got .*\(2,\)"),
        (([[1.0, 2.0]], np.eye(3)), r"weight has shape \(3, 3\).*need \(2, 2\)"),
        (([[1.0, 2.0]], np.ones((2, 2, 2))), r"\(1, 2, 2\) for a matrix an episode"),
        (([[1.0, 2.0]], [[1.0, np.nan], [0.0, 1.0]]), "NaN or infinite"),
        (([[1.0, np.inf]], np.eye(2)), r"Entry \[0, 1\] is inf"),
        (([[1.0, 2.0]], np.eye(2), [[True]]), r"alive_BT has shape \(1, 1\)"),
        (([[1.0, 2.0]], np.eye(2), [[1, 0]]), "alive_BT must be boolean"),
        (([[1.0, 2.0]], np.eye(2), [[False, True]]), "episode 0 is over before turn 1 and alive"),
    ],
)
def test_partial_returns_refuse_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        partial_returns(*arguments)


# --- baselines by hand ----------------------------------------------------------------------------


def test_leave_one_out_by_hand_with_both_fallbacks():
    return_BT = np.array(
        [
            [6.0, 4.0, 9.0, 9.0],  # group 0
            [2.0, 1.0, 0.0, 0.0],
            [1.0, 0.0, 0.0, 0.0],
            [8.0, 2.0, 5.0, 0.0],  # group 1
            [4.0, 8.0, 3.0, 0.0],
        ]
    )
    length_B = np.array([4, 2, 1, 3, 3])
    alive_BT = np.arange(4) < length_B[:, None]
    advantage_BT = leave_one_out(return_BT, np.array([0, 0, 0, 1, 1]), alive_BT)
    assert advantage_BT.tolist() == [
        # turn 2: no peer lives, the other group's mean is 4; turn 3: nobody else lives at all
        [6 - 1.5, 4 - 1, 9 - 4, 0],
        [2 - 3.5, 1 - 4, 0, 0],
        [1 - 4, 0, 0, 0],
        [8 - 4, 2 - 8, 5 - 3, 0],
        [4 - 8, 8 - 2, 3 - 5, 0],
    ]


def test_a_group_of_one_never_gets_its_raw_return():
    # Mistake 8: with company it is compared with the other groups, alone it learns nothing.
    assert leave_one_out([[0.8], [0.2], [0.4]], [0, 1, 1])[0, 0] == pytest.approx(0.8 - 0.3)
    assert leave_one_out([[0.8, 0.5]], [0]).tolist() == [[0.0, 0.0]]
    assert group_mean([[0.8], [0.2], [0.4]], [0, 1, 1])[0, 0] == 0.0


def test_the_strangers_mean_counts_episodes_and_not_groups():
    advantage_BT = leave_one_out([[1.0], [0.0], [0.0], [0.6]], [0, 1, 1, 2])
    assert advantage_BT[0, 0] == pytest.approx(1.0 - 0.2)


def test_groups_are_told_apart_by_id_and_nothing_else():
    # Mistake 8: neighbouring rows are not a group, equal ids are.
    return_BT = [[1.0], [5.0], [2.0], [7.0]]
    assert leave_one_out(return_BT, [7, 9, 7, 9])[:, 0].tolist() == [-1.0, -2.0, 1.0, 2.0]


def test_group_mean_is_leave_one_out_shrunk_by_its_own_share():
    return_BT = np.random.default_rng(0).random((6, 3))
    group_B = np.array([0, 0, 0, 0, 1, 1])
    share_B1 = np.array([3 / 4] * 4 + [1 / 2] * 2)[:, None]
    np.testing.assert_allclose(
        group_mean(return_BT, group_B), share_B1 * leave_one_out(return_BT, group_B)
    )
    np.testing.assert_allclose(
        batch_mean(return_BT), 5 / 6 * leave_one_out(return_BT, np.zeros(6, dtype=int))
    )


def test_dead_turns_have_advantage_zero_under_every_baseline():
    alive_BT = np.array([[True, False], [True, True], [True, True]])
    for baseline in ("leave_one_out", "group_mean", "batch_mean", "none"):
        advantage_BT = advantages(
            [[1.0, np.nan], [2.0, 3.0], [4.0, 5.0]],
            baseline=baseline,
            group_B=[0, 0, 0],
            alive_BT=alive_BT,
        )
        assert advantage_BT[0, 1] == 0.0 and np.isfinite(advantage_BT).all()


def test_leave_one_out_is_the_default_baseline():
    return_BT, group_B = [[1.0], [2.0], [4.0]], [0, 0, 0]
    assert np.array_equal(advantages(return_BT, group_B=group_B), leave_one_out(return_BT, group_B))
    assert np.array_equal(advantages(return_BT, baseline="none"), no_baseline(return_BT))


def test_a_baseline_makes_a_constant_added_to_all_returns_vanish():
    return_BT = np.random.default_rng(1).random((4, 3))
    for baseline in (leave_one_out, group_mean, batch_mean):
        np.testing.assert_allclose(
            baseline(return_BT + 10.0, np.array([0, 0, 1, 1])),
            baseline(return_BT, np.array([0, 0, 1, 1])),
        )


def test_dividing_by_the_standard_deviation_is_off_unless_asked_for():
    return_BT, alive_BT = [[1.0, 9.0], [5.0, 3.0]], np.array([[True, False], [True, True]])
    plain_BT = advantages(return_BT, baseline="none", alive_BT=alive_BT)
    scaled_BT = advantages(return_BT, baseline="none", alive_BT=alive_BT, divide_by_std=True)
    assert plain_BT.tolist() == [[1.0, 0.0], [5.0, 3.0]]
    np.testing.assert_allclose(scaled_BT, plain_BT / np.std([1.0, 5.0, 3.0]))


def test_equal_advantages_are_not_divided_by_zero():
    same = advantages([[2.0], [2.0]], baseline="none", divide_by_std=True)
    assert same.tolist() == [[2.0], [2.0]]
    nobody = advantages([[2.0]], baseline="none", alive_BT=[[False]], divide_by_std=True)
    assert nobody.tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "leave-one-out"}, "There are: .*Did you mean 'leave_one_out'"),
        ({}, "leave_one_out needs group_B"),
        ({"baseline": "group_mean"}, "group_mean needs group_B"),
        ({"group_B": [0]}, "2 integer ids"),
        ({"group_B": [0.0, 1.0]}, "integer ids, one an episode; got float64"),
        ({"group_B": ["persona a", "persona a"]}, "integer ids"),
        ({"group_B": [0, 0], "alive_BT": [[True]]}, "alive_BT has shape"),
        ({"group_B": [0, 0], "scorable_BT": [[True]]}, "scorable_BT has shape"),
        ({"group_B": [0, 0], "scorable_BT": [[1, 1], [1, 1]]}, "scorable_BT must be boolean"),
    ],
)
def test_advantages_refuse_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        advantages([[1.0, 2.0], [3.0, 4.0]], **arguments)


def test_a_return_that_is_not_finite_is_refused_where_it_counts():
    with pytest.raises(ValueError, match=r"Entry \[0, 1\] is nan.*scorable_BT"):
        advantages([[1.0, np.nan]], group_B=[0])
    assert advantages([[1.0, np.nan]], group_B=[0], scorable_BT=[[True, False]])[0, 1] == 0.0
