"""Exactness by enumeration: the expected gradient of our loss IS the partial policy gradient.

A dialogue small enough to list: two tokens, three turns (the second of two tokens), partner tokens
in between, rewards that depend on all that was said, and, in one of two worlds, an end that depends
on it too. The policy is a table of logits, one row per history, so the parameters of a turn are its
own. The expectation of the loss's gradient is a sum over all outcomes of a batch. What it must
equal is derived without score functions: the derivative of the exactly computed expected reward
E[r_u] with respect to the parameters of turn t, weighted by W[t,u].
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.credit import (
    Discounted,
    FullPlanning,
    Greedy,
    KStep,
    Segment,
    Subset,
    Trajectory,
    advantages,
    credit_weights,
    partial_returns,
)
from agents.losses import clipped_loss, kl_to_reference, policy_gradient_loss, turn_logprobs

T = 3
TURN_L = [-1, 0, -1, 1, 1, -1, 2]  # -1: the partner speaks
TURN_OF_DEPTH = [0, 1, 1, 2]  # the turn that speaks the first, second, third, fourth token
ENDLESS, ENDING = 0, 1  # the two worlds

CREDITS = [
    FullPlanning(),
    Greedy(),
    KStep(2),
    Segment(length=2),
    Segment(boundaries=[0, 1]),
    Discounted(0.5),
    Subset([[0.2, 0.0, -1.0], [0.0, 3.0, 0.5], [0.0, 0.0, 1.0]]),
    Trajectory(),
]
each_credit = pytest.mark.parametrize("credit", CREDITS, ids=str)
each_world = pytest.mark.parametrize("world", [ENDLESS, ENDING], ids=["endless", "ending"])


# --- the world and the policy, listed in full -----------------------------------------------------


def node(said: tuple[int, ...]) -> int:
    """Index of a history in the tree of all histories."""
    return 2 ** len(said) - 1 + int("0" + "".join(map(str, said)), 2)


TURN_OF_NODE = torch.tensor([TURN_OF_DEPTH[(n + 1).bit_length() - 1] for n in range(15)])


def is_over(world: int, said: tuple[int, ...]) -> bool:
    return len(said) == 4 or (world == ENDING and said in {(1,), (0, 1, 1)})


def reward(world: int, said: tuple[int, ...]) -> float:
    """Any number in [0.4, 1], fixed by world and history."""
    return 0.4 + 0.6 * np.random.default_rng([world, *said, len(said)]).random()


@functools.cache
def stories(world: int) -> list[tuple[int, ...]]:
    """All that the agent can say in one episode."""
    turn_ends = {1, 3, 4}
    finished, open_ends = [], [()]
    while open_ends:
        said = open_ends.pop()
        for token in (0, 1):
            longer = (*said, token)
            over = len(longer) in turn_ends and is_over(world, longer)
            (finished if over else open_ends).append(longer)
    return finished


@functools.cache
def records(world: int) -> dict[str, np.ndarray]:
    """The stories as rows, the way a rollout would hand them over; NaN where no turn took place."""
    rows = stories(world)
    reward_NT = np.full((len(rows), T), np.nan)
    turn_NL = np.full((len(rows), len(TURN_L)), -1)
    node_NL, token_NL = np.zeros_like(turn_NL), np.zeros_like(turn_NL)
    spoken_positions = [position for position, turn in enumerate(TURN_L) if turn >= 0]
    for n, said in enumerate(rows):
        for depth, (token, position) in enumerate(zip(said, spoken_positions, strict=False)):
            turn_NL[n, position] = TURN_OF_DEPTH[depth]
            node_NL[n, position] = node(said[:depth])
            token_NL[n, position] = token
        for turn, end in enumerate((1, 3, 4)):
            if len(said) >= end:
                reward_NT[n, turn] = reward(world, said[:end])
    alive_NT = ~np.isnan(reward_NT)
    return {
        "reward_NT": reward_NT,
        "alive_NT": alive_NT,
        "turn_NL": turn_NL,
        "node_NL": node_NL,
        "token_NL": token_NL,
    }


def fresh_policy() -> Tensor:
    """Logits by world, history and token."""
    generator = torch.Generator().manual_seed(3)
    logits = 0.7 * torch.randn(2, 15, 2, generator=generator, dtype=torch.float64)
    return logits.requires_grad_()


def logprobs(logits: Tensor, world: int) -> Tensor:
    """logprob_NL of all stories. The partner's tokens depend on the parameters too: a trap."""
    rows = records(world)
    return logits.log_softmax(-1)[world, rows["node_NL"], rows["token_NL"]]


def story_probabilities(logits: Tensor, world: int) -> Tensor:
    """Probability of each story as a product of probabilities; differentiable."""
    token_probability = logits.softmax(-1)[world]
    return torch.stack(
        [
            torch.stack(
                [token_probability[node(said[:d]), said[d]] for d in range(len(said))]
            ).prod()
            for said in stories(world)
        ]
    )


# --- what the gradient must be --------------------------------------------------------------------


def partial_gradient_by_turn(world: int, weight_TT: np.ndarray) -> Tensor:
    """[t] = sum_u W[t,u] dE[r_u] / d(parameters of turn t): the direction of ascent."""
    logits = fresh_policy()
    reward_NT = torch.tensor(np.nan_to_num(records(world)["reward_NT"]))
    expected_reward_T = story_probabilities(logits, world) @ reward_NT
    derivative_T = torch.stack(
        [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in expected_reward_T]
    )
    gradient_T = torch.einsum("tu,uwnv->twnv", torch.tensor(weight_TT), derivative_T)
    own_TN = torch.arange(T)[:, None].eq(TURN_OF_NODE)
    return gradient_T * own_TN[:, None, :, None]


def alive_probability(world: int) -> np.ndarray:
    probability_N = story_probabilities(fresh_policy(), world).detach().numpy()
    return probability_N @ records(world)["alive_NT"]


def shrinkage(worlds, group_B, baseline: str) -> np.ndarray:
    """factor_BT that, in theory, multiplies turn t's expected gradient from episode b."""
    factor_BT = np.ones((len(worlds), T))
    for b, t in np.ndindex(*factor_BT.shape):
        others = [other for other in range(len(worlds)) if other != b]
        if baseline == "leave_one_out":
            nobody = [1 - alive_probability(worlds[other])[t] for other in others]
            factor_BT[b, t] = 1 - math.prod(nobody)
        elif baseline in {"group_mean", "batch_mean"}:
            if baseline == "group_mean":
                others = [other for other in others if group_B[other] == group_B[b]]
            factor_BT[b, t] = 0.0
            for living in itertools.product((False, True), repeat=len(others)):
                chance = math.prod(
                    alive_probability(worlds[other])[t]
                    if lives
                    else 1 - alive_probability(worlds[other])[t]
                    for other, lives in zip(others, living, strict=True)
                )
                factor_BT[b, t] += chance * (1 - 1 / (1 + sum(living)))
    return factor_BT


def predicted_gradient(worlds, group_B, baseline: str, weight_TT: np.ndarray) -> Tensor:
    factor_BT = torch.tensor(shrinkage(worlds, group_B, baseline))
    gradients = [
        torch.einsum("t,twnv->wnv", factor_BT[b], partial_gradient_by_turn(world, weight_TT))
        for b, world in enumerate(worlds)
    ]
    return torch.stack(gradients).mean(0)


# --- what our code gives --------------------------------------------------------------------------


def outcomes(worlds):
    """All joint outcomes of a batch of independent episodes: tuples of story numbers."""
    return itertools.product(*(range(len(stories(world))) for world in worlds))


def picked(worlds, outcome, column: str) -> np.ndarray:
    return np.stack([records(world)[column][n] for world, n in zip(worlds, outcome, strict=True)])


def expected_gradient(worlds, group_B, baseline: str, weight_TT: np.ndarray) -> Tensor:
    """E[-gradient of policy_gradient_loss], summed over all outcomes of the batch."""
    logits = fresh_policy()
    logprob = [logprobs(logits, world) for world in (ENDLESS, ENDING)]
    probability = [story_probabilities(logits, w).detach() for w in (ENDLESS, ENDING)]
    total = torch.zeros((), dtype=torch.float64)
    for outcome in outcomes(worlds):
        alive_BT = picked(worlds, outcome, "alive_NT")
        return_BT = partial_returns(picked(worlds, outcome, "reward_NT"), weight_TT, alive_BT)
        advantage_BT = advantages(return_BT, baseline=baseline, group_B=group_B, alive_BT=alive_BT)
        loss = policy_gradient_loss(
            torch.stack([logprob[w][n] for w, n in zip(worlds, outcome, strict=True)]),
            torch.tensor(advantage_BT),
            torch.tensor(picked(worlds, outcome, "turn_NL")),
        )
        chance = math.prod(float(probability[w][n]) for w, n in zip(worlds, outcome, strict=True))
        total = total + chance * loss
    return -torch.autograd.grad(total, logits)[0]


def assert_same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-13)


# --- the estimator --------------------------------------------------------------------------------


def test_the_enumeration_is_complete():
    assert [len(stories(world)) for world in (ENDLESS, ENDING)] == [16, 8]
    for world in (ENDLESS, ENDING):
        assert float(story_probabilities(fresh_policy(), world).detach().sum()) == pytest.approx(1)
    assert alive_probability(ENDLESS).tolist() == pytest.approx([1, 1, 1])
    middle, last = alive_probability(ENDING)[1:]
    assert 0.1 < last < middle < 1


@each_world
def test_the_full_partial_gradient_is_the_finite_difference_of_the_expected_total_reward(world):
    def value(logits: Tensor) -> float:
        reward_N = torch.tensor(np.nansum(records(world)["reward_NT"], axis=1))
        return float(story_probabilities(logits, world) @ reward_N)

    gradient = partial_gradient_by_turn(world, FullPlanning().weights(T)).sum(0)
    step = 1e-5
    with torch.no_grad():
        for index in np.ndindex(2, 15, 2):
            up, down = fresh_policy().detach(), fresh_policy().detach()
            up[index] += step
            down[index] -= step
            difference = (value(up) - value(down)) / (2 * step)
            assert float(gradient[index]) == pytest.approx(difference, abs=1e-9)


@each_world
@each_credit
def test_without_a_baseline_the_expected_gradient_is_the_partial_gradient(credit, world):
    weight_TT = credit.weights(T)
    exact = partial_gradient_by_turn(world, weight_TT).sum(0)
    assert exact.abs().max() > 0.01
    assert_same(expected_gradient([world], [0], "none", weight_TT), exact)


@each_world
def test_past_rewards_add_nothing_to_the_expected_gradient(world):
    of_trajectory = expected_gradient([world], [0], "none", Trajectory().weights(T))
    assert_same(of_trajectory, expected_gradient([world], [0], "none", FullPlanning().weights(T)))


@pytest.mark.parametrize("scale", ["window", "mean_window"])
@each_credit
def test_a_scaled_matrix_is_estimated_as_exactly_as_any_other(credit, scale):
    weight_TT = credit_weights(credit, T, scale=scale)
    exact = partial_gradient_by_turn(ENDING, weight_TT).sum(0)
    assert_same(expected_gradient([ENDING], [0], "none", weight_TT), exact)


def test_only_the_mean_window_keeps_the_direction_of_the_policy_gradient():
    def gradient(scale: str) -> Tensor:
        weight_TT = credit_weights(FullPlanning(), T, scale=scale)
        return partial_gradient_by_turn(ENDLESS, weight_TT).sum(0)

    assert_same(gradient("mean_window"), gradient("none") / 2)  # rows 3, 2, 1: the mean is 2
    cosine = torch.cosine_similarity(
        gradient("window").flatten(), gradient("none").flatten(), dim=0
    )
    assert cosine < 0.999


# --- baselines ------------------------------------------------------------------------------------


@each_credit
def test_leave_one_out_is_unbiased_in_a_pair_that_lives_throughout(credit):
    weight_TT = credit.weights(T)
    exact = partial_gradient_by_turn(ENDLESS, weight_TT).sum(0)
    assert_same(expected_gradient([ENDLESS] * 2, [5, 5], "leave_one_out", weight_TT), exact)


@each_credit
def test_leave_one_out_is_unbiased_despite_early_ends_while_anyone_else_is_alive(credit):
    # Both peers may be gone early, the other group's only member never is: its mean steps in.
    worlds, group_B, weight_TT = [ENDING, ENDING, ENDLESS], [5, 5, 2], credit.weights(T)
    gradient = expected_gradient(worlds, group_B, "leave_one_out", weight_TT)
    exact = partial_gradient_by_turn(ENDING, weight_TT).sum(0)
    assert_same(gradient[ENDING], exact[ENDING] * 2 / 3)  # two of the three episodes
    # The lone member leans on the two others, who may both be gone.
    assert_same(gradient, predicted_gradient(worlds, group_B, "leave_one_out", weight_TT))


@each_credit
def test_with_nobody_else_alive_leave_one_out_shrinks_a_turns_gradient_by_that_chance(credit):
    # The one refuted claim of unbiasedness. Advantage 0 instead of the raw return loses the
    # outcomes in which the peer is gone: turn t's gradient times P(peer alive at t), no more.
    weight_TT = credit.weights(T)
    gradient = expected_gradient([ENDING] * 2, [5, 5], "leave_one_out", weight_TT)
    by_turn = partial_gradient_by_turn(ENDING, weight_TT)
    alive_T = torch.tensor(alive_probability(ENDING))
    assert_same(gradient, torch.einsum("t,twnv->wnv", alive_T, by_turn))
    assert (gradient - by_turn.sum(0)).abs().max() > 1e-3


def test_the_last_fallback_fades_as_the_batch_grows():
    weight_TT, last = FullPlanning().weights(T), node((0, 0, 0))
    exact = partial_gradient_by_turn(ENDING, weight_TT).sum(0)
    gone = 1 - alive_probability(ENDING)[T - 1]
    for size in (2, 3, 4):
        gradient = expected_gradient([ENDING] * size, [0] * size, "leave_one_out", weight_TT)
        kept_share = float(gradient[ENDING, last, 0] / exact[ENDING, last, 0])
        assert kept_share == pytest.approx(1 - gone ** (size - 1))


@pytest.mark.parametrize(
    ("worlds", "group_B"),
    [
        ([ENDING] * 2, [0, 0]),
        ([ENDING] * 3, [0, 0, 0]),
        ([ENDING] * 3, [0, 1, 1]),
        ([ENDING] * 3, [0, 1, 2]),
        ([ENDLESS, ENDING], [0, 1]),
        ([ENDING, ENDLESS, ENDING], [0, 1, 0]),
    ],
)
@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "group_mean", "batch_mean"])
def test_every_baseline_has_exactly_the_stated_bias(baseline, worlds, group_B):
    for credit in (FullPlanning(), KStep(2)):
        weight_TT = credit.weights(T)
        assert_same(
            expected_gradient(worlds, group_B, baseline, weight_TT),
            predicted_gradient(worlds, group_B, baseline, weight_TT),
        )


@each_credit
@pytest.mark.parametrize("baseline", ["group_mean", "batch_mean"])
def test_a_mean_that_includes_itself_shrinks_the_gradient_by_one_nth(baseline, credit):
    weight_TT = credit.weights(T)
    exact = partial_gradient_by_turn(ENDLESS, weight_TT).sum(0)
    assert_same(expected_gradient([ENDLESS] * 2, [5, 5], baseline, weight_TT), exact * (1 - 1 / 2))


# --- variance -------------------------------------------------------------------------------------


def exact_moments(worlds, group_B, baseline: str, weight_TT) -> tuple[np.ndarray, float]:
    """Mean, and variance summed over all parameters, of the gradient estimate of one batch."""
    logits = fresh_policy()
    score, probability = {}, {}  # score[world][n, t] = gradient of log pi of turn t in story n
    for world in set(worlds):

        def turn_logprob_NT(logits, world=world):
            turn_NL = torch.tensor(records(world)["turn_NL"])
            return turn_logprobs(logprobs(logits, world), turn_NL, T)

        jacobian = torch.autograd.functional.jacobian(turn_logprob_NT, logits)
        score[world] = jacobian.flatten(2).numpy()
        probability[world] = story_probabilities(logits, world).detach().numpy()

    mean, mean_of_square = 0.0, 0.0
    for outcome in outcomes(worlds):
        alive_BT = picked(worlds, outcome, "alive_NT")
        return_BT = partial_returns(picked(worlds, outcome, "reward_NT"), weight_TT, alive_BT)
        advantage_BT = advantages(return_BT, baseline=baseline, group_B=group_B, alive_BT=alive_BT)
        score_BTP = np.stack([score[w][n] for w, n in zip(worlds, outcome, strict=True)])
        estimate_P = np.einsum("bt,btp->p", advantage_BT, score_BTP) / len(worlds)
        chance = math.prod(probability[w][n] for w, n in zip(worlds, outcome, strict=True))
        mean = mean + chance * estimate_P
        mean_of_square += chance * float(estimate_P @ estimate_P)
    return mean, mean_of_square - float(mean @ mean)


@each_credit
def test_baselines_lower_the_exact_variance_and_leave_one_out_keeps_the_mean(credit):
    pair, group_B = [ENDLESS] * 2, [0, 0]
    weight_TT = np.abs(credit.weights(T))  # an offset to remove needs weights of one sign
    plain_mean, plain_variance = exact_moments(pair, group_B, "none", weight_TT)
    mean, variance = exact_moments(pair, group_B, "leave_one_out", weight_TT)
    np.testing.assert_allclose(mean, plain_mean, atol=1e-13)
    exact = partial_gradient_by_turn(ENDLESS, weight_TT).sum(0)
    np.testing.assert_allclose(mean, exact.flatten(), atol=1e-13)
    assert variance < 0.7 * plain_variance

    for baseline in ("group_mean", "batch_mean"):  # half the estimate, a quarter of the variance
        _, shrunk_variance = exact_moments(pair, group_B, baseline, weight_TT)
        assert shrunk_variance == pytest.approx(variance / 4)


def test_the_variance_falls_with_early_ends_too():
    worlds, group_B, weight_TT = [ENDING, ENDING, ENDLESS], [0, 0, 1], FullPlanning().weights(T)
    _, plain_variance = exact_moments(worlds, group_B, "none", weight_TT)
    _, variance = exact_moments(worlds, group_B, "leave_one_out", weight_TT)
    assert variance < plain_variance


# --- unscorable turns -----------------------------------------------------------------------------


def expected_gradient_unscorable(worlds, group_B, baseline, weight_TT, fails) -> Tensor:
    """As `expected_gradient`, over verdicts too; fails(said): chance that a turn is unscorable."""
    logits = fresh_policy()
    probability = [story_probabilities(logits, w).detach() for w in (ENDLESS, ENDING)]
    logprob = [logprobs(logits, world) for world in (ENDLESS, ENDING)]
    total = torch.zeros((), dtype=torch.float64)
    for outcome in outcomes(worlds):
        alive_BT = picked(worlds, outcome, "alive_NT")
        chance = math.prod(float(probability[w][n]) for w, n in zip(worlds, outcome, strict=True))
        said_B = [stories(w)[n] for w, n in zip(worlds, outcome, strict=True)]
        fails_BT = np.array([[fails(said[:end]) for end in (1, 3, 4)] for said in said_B])
        for failed in itertools.product((False, True), repeat=alive_BT.size):
            failed_BT = np.array(failed).reshape(alive_BT.shape)
            weight = chance * float(np.where(failed_BT, fails_BT, 1 - fails_BT).prod())
            if weight == 0.0:
                continue
            reward_BT = picked(worlds, outcome, "reward_NT").copy()
            reward_BT[failed_BT] = np.nan
            advantage_BT = advantages(
                partial_returns(reward_BT, weight_TT, alive_BT),
                baseline=baseline,
                group_B=group_B,
                alive_BT=alive_BT,
                scorable_BT=~np.isnan(reward_BT),
            )
            total = total + weight * policy_gradient_loss(
                torch.stack([logprob[w][n] for w, n in zip(worlds, outcome, strict=True)]),
                torch.tensor(advantage_BT),
                torch.tensor(picked(worlds, outcome, "turn_NL")),
            )
    return -torch.autograd.grad(total, logits)[0]


@each_credit
def test_verdicts_that_fail_by_chance_only_discount_later_rewards(credit):
    q, weight_TT = 0.3, credit.weights(T)
    gradient = expected_gradient_unscorable([ENDING], [0], "none", weight_TT, lambda said: q)
    seen_TT = np.where(np.eye(T, dtype=bool), 1 - q, (1 - q) ** 2)
    assert_same(gradient, partial_gradient_by_turn(ENDING, weight_TT * seen_TT).sum(0))


def test_verdicts_that_fail_by_chance_leave_the_baseline_unbiased():
    # The peer's own verdict must be there, or nobody is counted: one more factor 1 - q, no more.
    q, weight_TT, alone = 0.3, KStep(2).weights(T), [ENDING]
    plain = expected_gradient_unscorable(alone, [0], "none", weight_TT, lambda said: q)
    pair = expected_gradient_unscorable(
        [ENDING] * 2, [0, 0], "leave_one_out", weight_TT, lambda said: q
    )
    counted_T = (1 - q) * torch.tensor(alive_probability(ENDING))
    assert_same(pair[ENDING], plain[ENDING] * counted_T[TURN_OF_NODE][:, None])


def test_verdicts_that_fail_for_some_words_let_the_baseline_move_the_mean():
    # Not a wish but a fact to know: an unscorable reply then counts as "as good as the baseline".
    def fails(said: tuple[int, ...]) -> float:
        return 1.0 if said == (0,) else 0.0

    weight_TT = Greedy().weights(T)
    plain = expected_gradient_unscorable([ENDLESS], [0], "none", weight_TT, fails)
    pair = expected_gradient_unscorable([ENDLESS] * 2, [0, 0], "leave_one_out", weight_TT, fails)
    first = node(())
    # Without a baseline all that is scored is pushed up; with one nothing is known of turn 0.
    assert plain[ENDLESS, first, 1] > 0.05
    assert pair[ENDLESS, first].abs().max() < 1e-13


# --- losses ---------------------------------------------------------------------------------------


def test_a_turns_log_probability_is_the_sum_over_its_tokens():
    logprob_BL = torch.tensor([[-9.0, -1.0, -9.0, -2.0, -3.0, -9.0, -4.0]])
    logprob_BT = turn_logprobs(logprob_BL, torch.tensor([TURN_L]), T + 1)
    assert logprob_BT.tolist() == [[-1.0, -5.0, -4.0, 0.0]]
    mean_BT = turn_logprobs(logprob_BL, torch.tensor([TURN_L]), T + 1, reduction="mean")
    assert mean_BT.tolist() == [[-1.0, -2.5, -4.0, 0.0]]


@pytest.mark.parametrize("junk", [-3.0, float("nan"), -float("inf")])
def test_tokens_of_others_get_exactly_no_gradient_from_any_loss(junk):
    # Mistake 5 of VOCABULARY.md, padding that holds NaN or -inf included.
    turn_BL = torch.tensor([TURN_L])
    spoken_BL = turn_BL >= 0
    old_BL = torch.where(spoken_BL, -1.0, junk)
    advantage_BT = torch.tensor([[1.0, -2.0, 3.0]])
    losses = {
        "policy gradient": lambda lp: policy_gradient_loss(lp, advantage_BT, turn_BL),
        "turn": lambda lp: clipped_loss(lp, old_BL, turn_BL, advantage_BT, level="turn"),
        "token": lambda lp: clipped_loss(lp, old_BL, turn_BL, advantage_BT, level="token"),
        "kl": lambda lp: kl_to_reference(lp, old_BL - 0.5, spoken_BL),
    }
    for name, loss in losses.items():
        logprob_BL = old_BL.clone().requires_grad_()
        value = loss(logprob_BL)
        (gradient_BL,) = torch.autograd.grad(value, logprob_BL)
        assert torch.isfinite(value), name
        assert (gradient_BL[~spoken_BL] == 0).all(), name
        assert (gradient_BL[spoken_BL] != 0).all(), name


def test_token_and_turn_forms_of_the_loss_agree():
    logprob_BL = -torch.rand(2, 7, dtype=torch.float64)
    turn_BL = torch.tensor([TURN_L, [-1, 0, -1, -1, -1, -1, -1]])
    advantage_BT = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    by_turn = policy_gradient_loss(turn_logprobs(logprob_BL, turn_BL, T), advantage_BT)
    assert_same(by_turn, policy_gradient_loss(logprob_BL, advantage_BT, turn_BL))
    token_advantage_BL = advantage_BT.gather(1, turn_BL.clamp(min=0)) * (turn_BL >= 0)
    assert_same(by_turn, -(token_advantage_BL * logprob_BL).sum() / 2)


def test_the_losses_of_parts_add_up_to_the_loss_of_the_batch():
    logprob_BL, advantage_BT = -torch.rand(4, 7).double(), torch.randn(4, T).double()
    turn_BL = torch.tensor([TURN_L] * 4)
    old_BL = logprob_BL + 0.3 * torch.randn(4, 7).double()
    losses = [
        lambda rows, n: policy_gradient_loss(
            logprob_BL[rows], advantage_BT[rows], turn_BL[rows], num_episodes=n
        ),
        lambda rows, n: clipped_loss(
            logprob_BL[rows], old_BL[rows], turn_BL[rows], advantage_BT[rows], num_episodes=n
        ),
        lambda rows, n: kl_to_reference(
            logprob_BL[rows], old_BL[rows], turn_BL[rows] >= 0, num_episodes=n
        ),
    ]
    for loss in losses:
        parts = loss(slice(0, 1), 4) + loss(slice(1, 4), 4)
        assert_same(parts, loss(slice(0, 4), None))


def test_no_gradient_flows_into_advantages_or_frozen_log_probabilities():
    logprob_BL, other_BL = -torch.rand(1, 7), (-torch.rand(1, 7)).requires_grad_()
    advantage_BT = torch.ones(1, T, requires_grad=True)
    turn_BL = torch.tensor([TURN_L])
    assert not policy_gradient_loss(logprob_BL, advantage_BT, turn_BL).requires_grad
    assert not clipped_loss(logprob_BL, other_BL, turn_BL, advantage_BT).requires_grad
    assert not kl_to_reference(logprob_BL, other_BL, turn_BL >= 0).requires_grad


@pytest.mark.parametrize("level", ["turn", "token"])
def test_in_its_first_pass_the_clipped_loss_has_the_policy_gradient(level):
    logprob_BL = (-torch.rand(1, 7, dtype=torch.float64)).requires_grad_()
    advantage_BT = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    turn_BL = torch.tensor([TURN_L])
    first = clipped_loss(logprob_BL, logprob_BL.detach(), turn_BL, advantage_BT, level=level)
    plain = policy_gradient_loss(logprob_BL, advantage_BT, turn_BL)
    assert_same(*(torch.autograd.grad(loss, logprob_BL)[0] for loss in (first, plain)))


def test_clipping_by_hand():
    # One turn of two tokens whose ratios are 1.1 and 1.2, so 1.32 for the turn; clip at 1.15.
    old_BL = torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
    turn_BL = torch.tensor([[0, 0]])

    def loss_and_gradient(advantage: float, level: str) -> tuple[float, list[float]]:
        new_BL = old_BL + torch.tensor([[1.1, 1.2]], dtype=torch.float64).log()
        new_BL.requires_grad_()
        advantage_BT = torch.tensor([[advantage]], dtype=torch.float64)
        loss = clipped_loss(new_BL, old_BL, turn_BL, advantage_BT, clip_range=0.15, level=level)
        return float(loss.detach()), torch.autograd.grad(loss, new_BL)[0].tolist()[0]

    assert loss_and_gradient(2.0, "turn") == (pytest.approx(-2.3), [0.0, 0.0])
    assert loss_and_gradient(-2.0, "turn") == (pytest.approx(2.64), pytest.approx([2.64] * 2))
    assert loss_and_gradient(2.0, "token") == (pytest.approx(-4.5), pytest.approx([-2.2, 0.0]))
    assert loss_and_gradient(-2.0, "token") == (pytest.approx(4.6), pytest.approx([2.2, 2.4]))


def test_an_enormous_ratio_stays_finite():
    advantage_BT, turn_BL = torch.tensor([[-1.0, 0.0]]), torch.tensor([[0, 1]])
    old_BL = torch.tensor([[-500.0, -500.0]])
    loss = clipped_loss(torch.zeros(1, 2), old_BL, turn_BL, advantage_BT)
    assert torch.isfinite(loss)


def test_the_importance_ratio_makes_another_policys_samples_exact():
    # Sampled from the old policy, unclipped: the gradient at the new one is that of the new one's.
    logits = fresh_policy()
    old = fresh_policy().detach().flip(1)
    rows = records(ENDLESS)
    old_BL = old.log_softmax(-1)[ENDLESS, rows["node_NL"], rows["token_NL"]]
    return_BT = partial_returns(rows["reward_NT"], Trajectory().weights(T))
    total = torch.zeros((), dtype=torch.float64)
    for n, chance in enumerate(story_probabilities(old, ENDLESS)):
        # The whole story as if it were one turn; ratios per turn are the usual surrogate.
        turn_BL = torch.tensor(rows["turn_NL"][n : n + 1]).clamp(max=0)
        advantage_BT = torch.tensor(return_BT[n : n + 1, :1])
        total = total + chance * clipped_loss(
            logprobs(logits, ENDLESS)[n : n + 1],
            old_BL[n : n + 1],
            turn_BL,
            advantage_BT,
            clip_range=1e9,
        )
    exact = partial_gradient_by_turn(ENDLESS, FullPlanning().weights(T)).sum(0)
    assert_same(-torch.autograd.grad(total, logits)[0], exact)


def test_the_kl_estimate_is_exact_on_average_and_never_negative():
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    ref_logprob = torch.tensor([-0.2, 0.9, 0.1], dtype=torch.float64).log_softmax(-1)
    logprob = logits.log_softmax(-1)
    mask_BL = torch.ones(1, 1, dtype=torch.bool)
    estimates = torch.stack(
        [
            kl_to_reference(logprob[None, v : v + 1], ref_logprob[None, v : v + 1], mask_BL)
            for v in range(3)
        ]
    )
    assert (estimates >= 0).all()
    probability = logprob.exp().detach()
    assert_same(probability @ estimates, (probability * (logprob - ref_logprob)).sum())

    (gradient,) = torch.autograd.grad(probability @ estimates, logits, retain_graph=True)
    other_way = (ref_logprob.exp() * (ref_logprob - logprob)).sum()
    assert_same(gradient, torch.autograd.grad(other_way, logits)[0])


def test_the_kl_is_zero_without_gradient_at_the_reference():
    logprob_BL = (-torch.rand(2, 5)).requires_grad_()
    loss = kl_to_reference(logprob_BL, logprob_BL.detach(), torch.ones(2, 5, dtype=torch.bool))
    assert float(loss.detach()) == 0.0
    assert not torch.autograd.grad(loss, logprob_BL)[0].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, turn: turn_logprobs(x, turn, 1), r"from -1 to 2, but turns are -1..0"),
        (lambda x, turn: turn_logprobs(x, turn - 1, 3), "from -2 to 1"),
        (
            lambda x, turn: turn_logprobs(x[:, :2], turn, 3),
            r"logprob_BL \(1, 2\), turn_BL \(1, 7\)",
        ),
        (lambda x, turn: turn_logprobs(x, turn, 3, reduction="max"), "got 'max'"),
        (lambda x, turn: policy_gradient_loss(x, x[:, :3]), r"advantage_BT \(1, 3\)"),
        (lambda x, turn: policy_gradient_loss(x[0], x[0]), "two dimensions"),
        (lambda x, turn: clipped_loss(x, x, turn, x[:, :3], clip_range=0), "got 0"),
        (lambda x, turn: clipped_loss(x, x, turn, x[:, :3], level="word"), "got 'word'"),
        (lambda x, turn: clipped_loss(x, x, turn, x[:, :2], level="token"), "turns are -1..1"),
        (lambda x, turn: kl_to_reference(x, x, turn[:, :2] >= 0), r"mask_BL \(1, 2\)"),
    ],
)
def test_losses_refuse_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 7), torch.tensor([TURN_L]))
