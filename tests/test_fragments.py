"""Partial returns of rollouts that cut episodes: against whole episodes, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from agents.credit import (
    Credit,
    Discounted,
    FullPlanning,
    Greedy,
    KStep,
    Segment,
    Subset,
    Trajectory,
    parse_credit,
)
from agents.fragments import MOST_TURNS, TO_THE_END, CreditMatrix, FragmentReturns, fragment_returns

nan = np.nan
EVERY_OTHER = Subset(np.eye(40) + np.eye(40, k=2))
CREDITS: list[Credit] = [
    FullPlanning(),
    Greedy(),
    KStep(3),
    Segment(length=4),
    Segment(boundaries=(0, 2, 7)),
    Discounted(0.5),
    EVERY_OTHER,
    Trajectory(),
]
each_credit = pytest.mark.parametrize("credit", CREDITS, ids=lambda credit: credit.name)


def of_one(
    credit: Credit,
    rewards: list[float],
    starts: list[int],
    ends: list[int],
    gamma: float = 1.0,
    first_turn: int = 0,
    values: list[float] | None = None,
    longest: int | None = None,
) -> FragmentReturns:
    """Return what the steps of one environment answer for; starts and ends are steps."""
    steps = np.arange(len(rewards))
    return fragment_returns(
        np.array(rewards)[:, None],
        np.isin(steps, starts)[:, None],
        np.isin(steps, ends)[:, None],
        [first_turn],
        CreditMatrix(credit, gamma),
        None if values is None else np.array(values)[:, None],
        longest,
    )


def test_two_steps_ahead_by_hand() -> None:
    found = of_one(KStep(2), [1, 2, 4, 8, 16], starts=[0, 3], ends=[2])
    np.testing.assert_array_equal(found.return_NE[:, 0], [3, 6, 4, 24, nan])
    assert found.turn_NE[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert found.complete_NE[:, 0].tolist() == [True, True, True, True, False]


def test_full_planning_with_a_discount_is_the_reward_to_go() -> None:
    found = of_one(FullPlanning(), [1, 2, 4, 8], starts=[0], ends=[2], gamma=0.5)
    np.testing.assert_allclose(found.return_NE[:, 0], [1 + 1 + 1, 2 + 2, 4, nan])


def test_an_episode_goes_on_in_the_next_rollout_where_it_was() -> None:
    found = of_one(Segment(length=3), [1, 2, 4, 8], starts=[], ends=[3], first_turn=2)
    assert found.turn_NE[:, 0].tolist() == [2, 3, 4, 5]
    assert found.return_NE[:, 0].tolist() == [1, 14, 12, 8]


def test_nothing_is_complete_where_full_planning_does_not_see_the_end() -> None:
    assert not of_one(FullPlanning(), [1, 2, 4], starts=[0], ends=[]).complete_NE.any()


def test_environments_do_not_mix() -> None:
    reward_NE = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    start_NE = np.array([[True, True], [False, True], [False, False]])
    end_NE = np.array([[False, True], [False, False], [True, False]])
    found = fragment_returns(reward_NE, start_NE, end_NE, [0, 0], CreditMatrix(KStep(2)))
    np.testing.assert_array_equal(found.return_NE, [[3, 10], [6, 60], [nan, nan]])


@each_credit
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("longest", [None, 6, 19])
def test_every_rollout_finds_what_the_whole_episodes_say(
    credit: Credit, gamma: float, longest: int | None
) -> None:
    """Episodes cut into rollouts of 7 steps; what counts by looking at each reward."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, (longest or 19) + 1, size=90)
    turn_N = np.concatenate([np.arange(length) for length in lengths])
    episode_N = np.repeat(np.arange(90), lengths)
    reward_N = rng.standard_normal(len(turn_N))
    weight_TT = credit.weights(40) * gamma ** np.abs(
        np.subtract.outer(np.arange(40), np.arange(40))
    )
    seen = 0
    for first in range(0, len(turn_N) - 7, 7):
        window = slice(first, first + 7)
        found = fragment_returns(
            reward_N[window, None],
            (turn_N == 0)[window, None],
            (np.append(turn_N[1:], 0) == 0)[window, None],
            [turn_N[first]],
            CreditMatrix(credit, gamma),
            longest=longest,
        )
        for n in range(first, first + 7):
            of_episode = np.flatnonzero(episode_N == episode_N[n])
            asked = np.flatnonzero(weight_TT[turn_N[n]])
            held = of_episode[0] + min(asked[-1], (longest or 40) - 1) < first + 7
            on_trust = longest is None and asked[-1] == 39 and credit is not EVERY_OTHER
            sure = held or (on_trust and of_episode[-1] < first + 7)
            counts = sure and of_episode[0] + asked[0] >= first
            assert found.complete_NE[n - first, 0] == counts, (n, asked)
            if counts:
                expected = weight_TT[turn_N[n], : len(of_episode)] @ reward_N[of_episode]
                assert found.return_NE[n - first, 0] == pytest.approx(expected)
                seen += 1
    never = credit == Trajectory() and longest == 19  # a window of 7 surely holds none of these
    assert seen == 0 if never else seen >= 10


@each_credit
def test_whether_a_step_counts_is_no_matter_of_how_its_episode_goes_on(credit: Credit) -> None:
    """Episodes that begin at step 4 of 12 and last 1 to 6 steps, one in each environment."""
    steps_N, length_E = np.arange(12)[:, None], np.arange(1, 7)
    start_NE = (steps_N == 0) | (steps_N == 4) | (steps_N == 4 + length_E)
    end_NE = np.concatenate([start_NE[1:], np.zeros((1, 6), dtype=bool)])
    found = fragment_returns(
        np.ones((12, 6)), start_NE, end_NE, np.zeros(6, int), CreditMatrix(credit), longest=7
    )
    for turn in range(6):
        there_E = length_E > turn
        assert len(set(found.complete_NE[4 + turn, there_E].tolist())) == 1
    assert found.complete_NE[4].all()
    waits = (FullPlanning, KStep, Discounted, Subset, Trajectory)
    assert found.complete_NE[11].any() == (not isinstance(credit, waits))


def test_what_lasts_to_the_end_is_taken_on_trust_where_no_episode_is_bounded() -> None:
    rewards, of = [1.0, 2.0, 4.0], {"starts": [0], "ends": [2]}
    assert of_one(FullPlanning(), rewards, **of).return_NE[:, 0].tolist() == [7, 6, 4]
    surely = of_one(FullPlanning(), rewards, **of, longest=3)
    assert surely.return_NE[:, 0].tolist() == [7, 6, 4]
    assert not of_one(FullPlanning(), rewards, **of, longest=4).complete_NE.any()
    in_midst = of_one(FullPlanning(), rewards, [], [2], first_turn=1, longest=4)
    assert in_midst.return_NE[:, 0].tolist() == [7, 6, 4]
    with pytest.raises(ValueError, match="has 3 steps or more, and longest_episode is 2"):
        of_one(FullPlanning(), rewards, **of, longest=2)


class Window:
    """A credit of one's own: the next `k` rewards."""

    name = "window"

    def __init__(self, k: int) -> None:
        self.k = k

    def weights(self, num_turns: int, boundaries: object = None) -> np.ndarray:
        return KStep(self.k).weights(num_turns)


@pytest.mark.parametrize("k", [1, 64, 65, 100, 127])
def test_how_far_a_credit_looks_is_found_in_its_matrix(k: int) -> None:
    assert CreditMatrix(Window(k)).ahead(64) == CreditMatrix(KStep(k)).ahead(64) == k
    of_own = of_one(Window(64), [1.0] * 64, [0], [9, 63], first_turn=0)
    assert of_own.complete_NE.sum() == of_one(KStep(64), [1.0] * 64, [0], [9, 63]).complete_NE.sum()


def test_who_asks_for_all_to_come_is_known_whatever_comes_first() -> None:
    for name in ("full", "discounted:0.5", "segment:0,5,10", "trajectory"):
        assert CreditMatrix(parse_credit(name)).ahead(8) == TO_THE_END
    assert CreditMatrix(parse_credit("segment:0,100")).ahead(8) == 100
    assert CreditMatrix(EVERY_OTHER).ahead(8) == 3
    assert CreditMatrix(FullPlanning(), gamma=0.0).ahead(8) == 1


@pytest.mark.parametrize("number", [400, 600, 5000])
def test_long_rollouts_and_small_discounts_change_nothing(number: int) -> None:
    of = {"starts": [*range(0, number, 20)], "ends": [*range(19, number, 20)]}
    for longest in (None, 20):
        full = of_one(FullPlanning(), [1.0] * number, **of, gamma=0.5, longest=longest)
        assert full.complete_NE.all() and full.return_NE[18, 0] == 1.5
    few = of_one(KStep(5), [1.0] * number, **of)
    assert few.complete_NE.sum() == number - 4


# --- one value for what follows a cut -------------------------------------------------------------


def test_a_value_stands_for_the_rest() -> None:
    values = [nan, nan, nan, 100.0]
    of = {"starts": [0, 2], "ends": [1], "values": values}
    full = of_one(FullPlanning(), [1, 2, 4, 8], gamma=0.5, **of)
    assert full.return_NE[:, 0].tolist() == [2, 2, 4 + 4 + 25, 8 + 50]
    discounted = of_one(Discounted(0.5), [1, 2, 4, 8], **of)
    assert discounted.return_NE[:, 0].tolist() == full.return_NE[:, 0].tolist()
    greedy = of_one(Greedy(), [1, 2, 4, 8], **of)
    assert greedy.return_NE[:, 0].tolist() == [1, 2, 4, 8]


def test_a_value_counts_only_for_turns_of_its_own_segment() -> None:
    rewards, values = [1, 2, 4, 8, 16], [nan] * 4 + [100.0]
    inside = of_one(Segment(length=3), rewards, [0], [], values=values)
    assert inside.return_NE[:, 0].tolist() == [7, 6, 4, 124, 116]
    at_its_end = of_one(Segment(length=5), rewards, [0], [], values=values)
    assert at_its_end.return_NE[:, 0].tolist() == [31, 30, 28, 24, 16]


def test_a_time_limit_in_the_midst_of_a_rollout_has_its_own_value() -> None:
    found = of_one(FullPlanning(), [1, 2, 4], [0, 2], ends=[], values=[nan, 10.0, 20.0])
    assert found.return_NE[:, 0].tolist() == [13, 12, 24]


def test_where_steps_ask_for_different_parts_of_the_rest_a_value_does_not_help() -> None:
    found = of_one(KStep(3), [1, 2, 4, 8], [0], [], values=[nan, nan, nan, 100.0])
    np.testing.assert_array_equal(found.return_NE[:, 0], [7, 14, nan, nan])


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("full", True),
        ("greedy", True),
        ("segment:3", True),
        ("segment:0,2,7", True),
        ("discounted:0.9", True),
        ("trajectory", False),
        ("kstep:1", True),
        ("kstep:2", False),
        ("kstep:5", False),
    ],
)
def test_which_credits_have_one_rest_for_all(name: str, has: bool) -> None:
    assert CreditMatrix(parse_credit(name)).has_one_tail == has
    assert CreditMatrix(parse_credit(name), 0.9).has_one_tail == has


def test_a_subset_with_gaps_has_no_one_rest() -> None:
    assert not CreditMatrix(EVERY_OTHER).has_one_tail


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [nan, np.inf])
def test_a_reward_that_is_no_number_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"reward of step 1 in environment 0 is (nan|inf)"):
        of_one(Greedy(), [1.0, bad], [0], [])


def test_episodes_may_be_endless_where_turns_are_not_counted() -> None:
    long = of_one(KStep(2), [1.0, 2.0, 4.0], [], [], first_turn=10**9)
    np.testing.assert_array_equal(long.return_NE[:, 0], [3, 6, nan])
    assert long.turn_NE[:, 0].tolist() == [10**9, 10**9 + 1, 10**9 + 2]
    with pytest.raises(ValueError, match=r"more than 4096 turns; for segment:5 .*TimeLimit"):
        of_one(Segment(length=5), [1.0], [], [], first_turn=MOST_TURNS)


def test_discounts_out_of_range_and_matrices_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1\.5"):
        CreditMatrix(Greedy(), 1.5)
    with pytest.raises(ValueError, match="This Subset covers 2 turns but 3 are needed"):
        of_one(Subset(np.eye(2)), [1.0, 1.0, 1.0], [0], [2])


def test_segments_need_their_boundaries() -> None:
    with pytest.raises(ValueError, match=r"Segment\(\) follows the episode's own phases"):
        CreditMatrix(Segment()).over(3)
    matrix = CreditMatrix(Segment(), boundaries=(0, 1))
    assert matrix.over(2)[1, 1:4].tolist() == [1, 1, 1]
