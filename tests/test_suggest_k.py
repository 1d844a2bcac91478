"""The suggested K: against worlds whose best K is known exactly, and honest where none is.

python tests/test_suggest_k.py prints how often it is wrong: the table in docs/diagnostics.md.
"""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from act_worlds import ActWorld

from agents.credit import FullPlanning, KStep, Subset, parse_credit
from agents.diagnostics import default_credits
from agents.suggest import CERTAINTY, FEWEST_GROUPS, suggest_k
from agents.turn_gradients import TurnGradients

GROUP_SIZE = 8


def named(world, credits, update_episodes, num_groups, num_pilots, seed=0):
    """Count what is suggested over many pilots; None = cannot tell."""
    rng = np.random.default_rng(seed)
    counts = {number: Counter() for number in update_episodes}
    for _ in range(num_pilots):
        pilot = world.pilot(num_groups, rng, GROUP_SIZE)
        for suggestion in suggest_k(pilot, update_episodes, credits, num_resamples=300):
            counts[suggestion.update_episodes][suggestion.credit] += 1
    return counts


# ---- the answer is right -------------------------------------------------------------------------


def test_in_education_small_updates_call_for_greedy_and_large_ones_for_full_planning():
    world, credits = ActWorld("education", num_turns=6, num_steps=5), ("greedy", "kstep:3", "full")
    assert world.error("greedy", GROUP_SIZE, 16) < world.error("kstep:3", GROUP_SIZE, 16) - 0.1
    assert world.error("full", GROUP_SIZE, 1024) < world.error("kstep:3", GROUP_SIZE, 1024) - 0.05
    counts = named(world, credits, (16, 1024), num_groups=64, num_pilots=8)
    assert counts[16]["greedy"] >= 7
    assert counts[1024]["full"] >= 4
    assert set(counts[1024]) <= {"full", None}


def test_in_therapy_small_updates_call_for_greedy_and_large_ones_for_three_steps():
    # Acts reach three turns: from K = 3 on little is gained but noise.
    world, credits = ActWorld("therapy", num_turns=6, num_steps=3), ("greedy", "kstep:3", "full")
    small, large = ({c: world.error(c, GROUP_SIZE, n) for c in credits} for n in (8, 256))
    assert small["greedy"] < min(small["kstep:3"], small["full"]) - 0.03
    assert large["kstep:3"] < min(large["greedy"], large["full"]) - 0.03
    counts = named(world, credits, (8, 256), num_groups=64, num_pilots=8)
    assert counts[8]["greedy"] >= 4
    assert counts[256]["kstep:3"] >= 5
    assert set(counts[8]) <= {"greedy", None}
    assert set(counts[256]) <= {"kstep:3", None}


def test_in_chatting_two_steps_are_found_among_all_lookaheads():
    world = ActWorld("chatting", num_turns=6, num_steps=5)
    counts = named(world, None, (16,), num_groups=32, num_pilots=8)[16]
    assert counts["kstep:2"] >= 7


@pytest.mark.parametrize("domain", ["chatting", "education", "therapy"])
def test_errors_biases_and_variances_are_the_exact_ones_within_their_sampling_error(domain):
    # 25 pilots of 32 groups. The error is a ratio, for which 0.02 of bias are allowed.
    world, rng = ActWorld(domain, num_turns=4, num_steps=3), np.random.default_rng(1)
    pilots = [
        suggest_k(world.pilot(32, rng, GROUP_SIZE), (16, 256), num_resamples=100) for _ in range(25)
    ]
    full, covered = world.gradient(FullPlanning().weights(4)), []
    for i, c in np.ndindex(2, 4):
        found = [each[i].errors[c] for each in pilots]
        number, weight_TT = pilots[0][i].update_episodes, parse_credit(found[0].credit).weights(4)
        exact = {
            "error": world.error(found[0].credit, GROUP_SIZE, number),
            "variance": world.group_variance(weight_TT, GROUP_SIZE) * GROUP_SIZE / number,
            "squared_bias": ((world.gradient(weight_TT) - full) ** 2).sum(),
        }
        for name, value in exact.items():
            value_R = np.array([getattr(each, name).mean for each in found])
            slack = 4 * value_R.std(ddof=1) / 5 + (0.02 if name == "error" else 1e-12)
            assert abs(value_R.mean() - value) < slack, (found[0].credit, number, name)
        covered += [each.error.low <= exact["error"] <= each.error.high for each in found]
    assert np.mean(covered) > 0.88  # of 95 % intervals


def test_the_error_is_that_of_updates_scaled_as_well_as_can_be():
    # Updates of 16 dialogues, drawn again and again, against the gradient that is known.
    world, rng = ActWorld("therapy", num_turns=3), np.random.default_rng(2)
    full = world.gradient(FullPlanning().weights(3)).ravel()
    for credit in ("greedy", "full"):
        updates = []
        for _ in range(1500):
            gradient_BTP, reward_BT, _ = world.dialogues(2, rng, GROUP_SIZE)
            return_GNT = (reward_BT @ parse_credit(credit).weights(3).T).reshape(2, GROUP_SIZE, 3)
            others_GNT = return_GNT.sum(axis=1, keepdims=True) - return_GNT
            advantage_BT = (return_GNT - others_GNT / (GROUP_SIZE - 1)).reshape(-1, 3)
            updates.append(np.einsum("bt,btp->p", advantage_BT, gradient_BTP) / len(reward_BT))
        update_RP = np.array(updates)
        scales = np.linspace(0.0, 1.5, 301)
        square, along = (update_RP**2).sum(axis=1).mean(), (update_RP @ full).mean()
        errors = scales**2 * square - 2 * scales * along + full @ full
        assert world.error(credit, GROUP_SIZE, 16) == pytest.approx(
            errors.min() / (full @ full), abs=0.02
        )


# ---- it depends on what matters, and on nothing else ---------------------------------------------


def test_the_scale_of_rewards_and_of_a_credit_does_not_matter():
    pilot = ActWorld("education").pilot(16, np.random.default_rng(3))
    twofold = replace(pilot, reward_BT=2.0 * pilot.reward_BT)
    plain, scaled = (suggest_k(each, (64,), num_resamples=50)[0] for each in (pilot, twofold))
    heavy = Subset(5.0 * KStep(2).weights(4))
    (of_heavy,) = suggest_k(pilot, (64,), ["greedy", heavy], num_resamples=50)
    (of_plain,) = suggest_k(pilot, (64,), ["greedy", "kstep:2"], num_resamples=50)
    for one, other in zip(plain.errors, scaled.errors, strict=True):
        assert other.error.mean == pytest.approx(one.error.mean)
        assert other.variance.mean == pytest.approx(4 * one.variance.mean)
        assert other.wins == one.wins
    assert of_heavy.errors[1].error.mean == pytest.approx(of_plain.errors[1].error.mean)
    assert of_heavy.errors[1].squared_bias.mean > 2 * of_plain.errors[1].squared_bias.mean


def test_larger_updates_have_less_variance_the_same_bias_and_smaller_errors():
    pilot = ActWorld("education").pilot(16, np.random.default_rng(3))
    small, large = suggest_k(pilot, (10, 1000), num_resamples=50)
    for one, other in zip(small.errors, large.errors, strict=True):
        assert other.variance.mean == pytest.approx(one.variance.mean / 100)
        assert other.squared_bias == one.squared_bias
        assert other.error.mean < one.error.mean
    assert large.errors[-1].squared_bias.mean == pytest.approx(0.0, abs=1e-12)  # full itself


def test_the_same_pilot_gives_the_same_answer_and_the_seed_changes_only_the_resamples():
    pilot = ActWorld("education").pilot(16, np.random.default_rng(3))
    first, again, other = (
        suggest_k(pilot, (64,), num_resamples=50, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert first == again
    assert other.errors[0].error != first.errors[0].error
    assert other.errors[0].error.mean == first.errors[0].error.mean


# ---- it says when it cannot tell -----------------------------------------------------------------


def test_credits_that_are_equally_good_are_not_told_apart():
    world, credits = ActWorld("therapy", num_turns=6, num_steps=5), ("greedy", "kstep:3", "full")
    errors = [world.error(credit, GROUP_SIZE, 16) for credit in credits[:2]]
    assert errors[0] == pytest.approx(errors[1], abs=0.003)
    counts = named(world, credits, (16,), num_groups=48, num_pilots=10)[16]
    assert counts[None] >= 7


def test_small_pilots_seldom_name_a_wrong_credit():
    # A pilot of 128 dialogues knows little about updates of 1024: it has to say so.
    wrong = told = 0
    for domain, best in (("chatting", "kstep:2"), ("therapy", "kstep:3"), ("education", "full")):
        world, credits = ActWorld(domain), ("greedy", best, "full")
        assert min(credits, key=lambda c: world.error(c, GROUP_SIZE, 1024)) == best
        count = named(world, credits, (1024,), FEWEST_GROUPS, num_pilots=30)[1024]
        told += 30 - count[None]
        wrong += 30 - count[None] - count[best]
    assert wrong <= 0.08 * 90
    assert told < 0.4 * 90


def test_a_pilot_of_few_groups_cannot_tell_whatever_it_shows():
    world = ActWorld("chatting", num_turns=6, num_steps=5)
    pilot = world.pilot(FEWEST_GROUPS - 1, np.random.default_rng(0), 16)
    (suggestion,) = suggest_k(pilot, (16,), ["greedy", "kstep:2"], num_resamples=50)
    assert max(each.wins for each in suggestion.errors) > 0.95
    assert suggestion.credit is None
    assert "the pilot has 15 groups, and at least 16 are needed" in suggestion.verdict


def test_where_rewards_do_not_depend_on_the_agent_there_is_nothing_to_tell():
    world, rng = ActWorld("education"), np.random.default_rng(4)
    unclear = []
    for _ in range(10):
        gradient_BTP, reward_BT, group_B = world.dialogues(16, rng)
        pilot = TurnGradients.from_vectors(gradient_BTP, rng.random(reward_BT.shape), group_B)
        (suggestion,) = suggest_k(pilot, (64,), num_resamples=200)
        if suggestion.credit is None and suggestion.shown < CERTAINTY:
            unclear.append(suggestion)
            assert "show a gradient beyond their noise" in suggestion.verdict
            assert suggestion.errors[0].error.high == pytest.approx(1.0, abs=0.05)
    assert len(unclear) >= 7


def test_rewards_that_never_differ_give_no_answer():
    pilot = ActWorld("chatting").pilot(FEWEST_GROUPS, np.random.default_rng(0))
    constant = replace(pilot, reward_BT=np.full(pilot.reward_BT.shape, 0.5))
    (suggestion,) = suggest_k(constant, (64,), num_resamples=50)
    assert suggestion.credit is None
    assert "only 0% of the resampled pilots show a gradient" in suggestion.verdict
    assert np.isnan(suggestion.errors[0].error.mean)


def test_the_verdict_names_the_answer_or_the_candidates_with_their_shares():
    pilot = ActWorld("chatting", num_turns=6, num_steps=5).pilot(32, np.random.default_rng(5))
    (clear,) = suggest_k(pilot, (16,), num_resamples=200)
    assert clear.credit == "kstep:2"
    assert clear.verdict.startswith("For updates of 16 dialogues: kstep:2; it has the smallest")
    assert clear.candidates[0] == "kstep:2"
    tied = suggest_k(pilot, (16,), ["kstep:5", "full"], num_resamples=200)[0]
    unclear = replace(tied, credit=None)
    for name in unclear.candidates:
        wins = next(each.wins for each in unclear.errors if each.credit == name)
        assert f"{name} {wins:.0%}" in unclear.verdict
    assert sum(each.wins for each in tied.errors) == pytest.approx(tied.shown)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0,),), "at least 1 dialogue, got update_episodes=0"),
        (((64,), ["kstepp:2"]), "Did you mean 'kstep'"),
        (((64,), ["kstep:0"]), "k must be an integer of at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    pilot = ActWorld("chatting", num_turns=2).pilot(4, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        suggest_k(pilot, *arguments)


def test_an_unknown_baseline_and_a_single_group_are_refused():
    world, rng = ActWorld("chatting", num_turns=2), np.random.default_rng(0)
    with pytest.raises(ValueError, match="Did you mean 'leave_one_out'"):
        suggest_k(world.pilot(4, rng), (64,), baseline="leave_on_out")
    with pytest.raises(ValueError, match="All dialogues are of one group"):
        suggest_k(world.pilot(1, rng), (64,))


# ---- how often it is wrong -----------------------------------------------------------------------


def main() -> None:
    """Count wrong answers over pilots of 18 worlds, with all lookaheads and with three."""
    sizes, num_pilots = (16, 64, 256, 1024), 45
    print("| pilot | update | named | wrong | error lost by the first candidate |")
    print("|---|---|---|---|---|")
    for num_groups in (FEWEST_GROUPS, 2 * FEWEST_GROUPS):
        told, wrong, lost = Counter(), Counter(), Counter()
        worlds = itertools.product(("chatting", "therapy", "education"), (4, 6), (0, 5, 20))
        cases = list(itertools.product(worlds, (None, ("greedy", "kstep:3", "full"))))
        for (domain, num_turns, num_steps), credits in cases:
            world = ActWorld(domain, num_turns=num_turns, num_steps=num_steps)
            names, rng = credits or default_credits(num_turns), np.random.default_rng(0)
            errors = {n: {c: world.error(c, GROUP_SIZE, n) for c in names} for n in sizes}
            for _ in range(num_pilots):
                pilot = world.pilot(num_groups, rng, GROUP_SIZE)
                for found in suggest_k(pilot, sizes, credits, num_resamples=300):
                    number, error = found.update_episodes, errors[found.update_episodes]
                    best = min(error, key=error.__getitem__)
                    first = max(found.errors, key=lambda each: each.wins).credit
                    told[number] += found.credit is not None
                    wrong[number] += found.credit not in (None, best)
                    lost[number] += error[first] - error[best]
        total = len(cases) * num_pilots
        for number in sizes:
            shares = (told[number] / total, wrong[number] / total)
            cells = [f"{num_groups * GROUP_SIZE}", f"{number}", *(f"{s:.1%}" for s in shares)]
            print("| " + " | ".join([*cells, f"{lost[number] / total:.3f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
