import itertools
import math
from functools import cache

import gymnasium as gym
import numpy as np
import pytest
from speakers import DOMAIN_NAMES

from ppg_env import DOMAINS, ActProcess, DiscreteReply, PersonaDialogueEnv, bundled_personas
from ppg_env.process import DISTRACTED_FACTOR, turn_value

PERSONAS = {
    "chatting": [bundled_personas("chatting")[0]],
    "education": [bundled_personas("education")[0]],
    "therapy": [
        next(p for p in bundled_personas("therapy") if p.traits["guardedness"] == level)
        for level in ("guarded", "open")
    ],
}
KINDS = [(domain, i) for domain in DOMAIN_NAMES for i in range(len(PERSONAS[domain]))]


def dynamics_of(domain, kind=0):
    return DOMAINS[domain].dynamics(PERSONAS[domain][kind])


def window(num_turns, k):
    """weight_TT of KStep(k), written out from METHOD.md's table."""
    return np.array([[float(t <= u < t + k) for u in range(num_turns)] for t in range(num_turns)])


def segments(num_turns, boundaries):
    """weight_TT of Segment(boundaries)."""
    part = [sum(b <= t for b in boundaries) for t in range(num_turns)]
    turns = range(num_turns)
    return np.array([[float(u >= t and part[u] == part[t]) for u in turns] for t in turns])


def random_policy(process, seed=0):
    rng = np.random.default_rng(seed)
    logits_TSA = rng.normal(size=process.uniform_policy().shape)
    return logits_TSA, softmax(logits_TSA)


def softmax(logits_TSA):
    weight_TSA = np.exp(logits_TSA)
    return weight_TSA / weight_TSA.sum(axis=2, keepdims=True)


# ---- what each class can reach -------------------------------------------------------------------


@cache
def share(domain, k):
    """Return the share of the optimal value that KStep(k) reaches, mean over kinds of personas."""
    processes = [ActProcess(dynamics_of(d, i), 8, 0.1) for d, i in KINDS if d == domain]
    return float(np.mean([process.limit(window(8, k)).share for process in processes]))


GREEDY, FULL, GAP, SAME = 1, 8, 0.05, 0.01


def test_in_education_full_planning_beats_three_steps_and_they_beat_greedy():
    assert share("education", FULL) >= share("education", 3) + GAP
    assert share("education", 3) >= share("education", GREEDY) + GAP


def test_in_therapy_three_steps_are_as_good_as_full_planning_and_greedy_is_not():
    assert abs(share("therapy", 3) - share("therapy", FULL)) <= SAME
    assert share("therapy", GREEDY) <= share("therapy", 3) - GAP


def test_in_chatting_two_steps_are_as_good_as_full_planning_and_greedy_is_not():
    assert abs(share("chatting", 2) - share("chatting", FULL)) <= SAME
    assert share("chatting", GREEDY) <= share("chatting", 2) - GAP


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_every_class_ends_above_the_uniform_policy_and_below_the_optimum(domain):
    process = ActProcess(dynamics_of(domain), 8, 0.1)
    uniform = process.value(process.uniform_policy())
    assert uniform < share(domain, GREEDY) * process.optimal_value()
    assert share(domain, FULL) <= 1.0 + 1e-12
    assert share(domain, FULL) > 0.95


# ---- the dynamic programme -----------------------------------------------------------------------


@pytest.mark.parametrize(("domain", "kind"), KINDS)
@pytest.mark.parametrize("attentive", [True, False])
def test_without_chance_the_optimal_value_is_that_of_the_best_act_sequence(domain, kind, attentive):
    dynamics, num_turns = dynamics_of(domain, kind), 4

    def total(acts):
        state, value = dynamics.start, 0.0
        for act in acts:
            value += turn_value(dynamics, state, act, attentive)
            state = dynamics.advance(state, act)
        return value

    best = max(map(total, itertools.product(dynamics.acts, repeat=num_turns)))
    process = ActProcess(dynamics, num_turns, noise=0.0 if attentive else 1.0)
    assert process.optimal_value() == pytest.approx(best / num_turns, abs=1e-12)


@pytest.mark.parametrize(("domain", "kind"), KINDS)
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_with_chance_the_optimal_value_is_that_of_looking_ahead_through_every_future(
    domain, kind, noise
):
    dynamics, num_turns = dynamics_of(domain, kind), 4

    def look_ahead(state, turns_left):
        if turns_left == 0:
            return 0.0
        expected = 0.0
        for attentive, probability in ((True, 1 - noise), (False, noise)):
            expected += probability * max(
                turn_value(dynamics, state, act, attentive)
                + look_ahead(dynamics.advance(state, act), turns_left - 1)
                for act in dynamics.acts
            )
        return expected

    process = ActProcess(dynamics, num_turns, noise)
    best = look_ahead(dynamics.start, num_turns) / num_turns
    assert process.optimal_value() == pytest.approx(best, abs=1e-12)


def test_no_deterministic_policy_beats_the_dynamic_programme():
    """Chatting in two turns is small enough to try every policy."""
    process = ActProcess(dynamics_of("chatting"), num_turns=2, noise=0.3)
    start = [s for s, p in enumerate(process._start_S) if p > 0]
    num_acts, num_states = len(process.acts), len(process.states)
    values = []
    for first in itertools.product(range(num_acts), repeat=len(start)):
        for second in itertools.product(range(num_acts), repeat=num_states):
            policy_TSA = process.uniform_policy()
            policy_TSA[0, start] = np.eye(num_acts)[list(first)]
            policy_TSA[1] = np.eye(num_acts)[list(second)]
            values.append(process.value(policy_TSA))
    assert max(values) == pytest.approx(process.optimal_value(), abs=1e-12)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_a_random_policy_is_worth_less_than_the_optimal_one(domain):
    process = ActProcess(dynamics_of(domain), 5, 0.2)
    for seed in range(10):
        _, policy_TSA = random_policy(process, seed)
        assert process.value(policy_TSA) < process.optimal_value()


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_rewards_depend_on_the_last_acts_only_as_far_back_as_the_domain_says(domain):
    """Dependence length m: 2 in chatting, 3 in therapy, unbounded in education."""
    dynamics = dynamics_of(domain)
    length = {"chatting": 2, "therapy": 3, "education": math.inf}[domain]

    def values(acts):
        state, found = dynamics.start, []
        for act in acts:
            found.append(dynamics.value(state, act, True))
            state = dynamics.advance(state, act)
        return found

    reach = 0
    for tail in itertools.product(dynamics.acts, repeat=4):
        heads = np.array([values((head, *tail)) for head in dynamics.acts])
        differs_U = np.ptp(heads, axis=0) > 0
        reach = max(reach, int(np.flatnonzero(differs_U)[-1]))
    assert reach == min(length - 1, 4)


# ---- the expected gradient -----------------------------------------------------------------------


@pytest.mark.parametrize(("domain", "kind"), KINDS)
def test_for_full_planning_the_gradient_is_the_slope_of_the_total_reward(domain, kind):
    process = ActProcess(dynamics_of(domain, kind), num_turns=3, noise=0.2)
    logits_TSA, policy_TSA = random_policy(process)
    gradient_TSA = process.expected_gradient(policy_TSA, window(3, 3))
    epsilon = 1e-6
    for index in np.ndindex(logits_TSA.shape):
        step_TSA = np.zeros_like(logits_TSA)
        step_TSA[index] = epsilon
        above = process.rewards(softmax(logits_TSA + step_TSA)).sum()
        below = process.rewards(softmax(logits_TSA - step_TSA)).sum()
        assert gradient_TSA[index] == pytest.approx((above - below) / (2 * epsilon), abs=1e-8)


def listed(process, policy_TSA):
    """Yield every trajectory: its probability, its (turn, state, act) and its rewards."""
    dynamics, num_turns = process.dynamics, process.num_turns
    index = {state: i for i, state in enumerate(process.states)}
    choices = list(itertools.product((True, False), range(len(process.acts))))
    for path in itertools.product(choices, repeat=num_turns):
        memory, probability, places, rewards = dynamics.start, 1.0, [], []
        for t, (attentive, a) in enumerate(path):
            s, act = index[memory, attentive], process.acts[a]
            probability *= (1 - process.noise if attentive else process.noise) * policy_TSA[t, s, a]
            places.append((t, s, a))
            rewards.append(turn_value(dynamics, memory, act, attentive))
            memory = dynamics.advance(memory, act)
        yield probability, places, rewards


def enumerated_gradient(process, policy_TSA, weight_TT):
    """Return sum over all trajectories of P * sum_t grad log pi(a_t|s_t) * sum_u W[t,u] r_u."""
    gradient_TSA = np.zeros_like(policy_TSA)
    for probability, places, rewards in listed(process, policy_TSA):
        for t, s, a in places:
            score_A = np.eye(len(process.acts))[a] - policy_TSA[t, s]
            gradient_TSA[t, s] += probability * (weight_TT[t] @ rewards) * score_A
    return gradient_TSA


PARTIAL = {
    "Greedy": window(3, 1),
    "KStep(2)": window(3, 2),
    "Full": window(3, 3),
    "Segment(0, 1)": segments(3, [0, 1]),
    "Segment(0, 2)": segments(3, [0, 2]),
    "Discounted(0.7)": np.triu([[0.7 ** abs(u - t) for u in range(3)] for t in range(3)]),
    "Subset": np.array([[0.0, 0.5, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.3]]),
}


@pytest.mark.parametrize(("domain", "kind"), KINDS)
@pytest.mark.parametrize("credit", PARTIAL)
def test_the_expected_partial_gradient_is_that_of_the_enumeration(domain, kind, credit):
    process = ActProcess(dynamics_of(domain, kind), num_turns=3, noise=0.2)
    _, policy_TSA = random_policy(process)
    expected_TSA = enumerated_gradient(process, policy_TSA, PARTIAL[credit])
    found_TSA = process.expected_gradient(policy_TSA, PARTIAL[credit])
    np.testing.assert_allclose(found_TSA, expected_TSA, atol=1e-14)


def test_rewards_before_the_act_add_nothing_in_expectation():
    """Trajectory credit (all ones) has the expectation of full planning."""
    process = ActProcess(dynamics_of("therapy"), num_turns=3, noise=0.2)
    _, policy_TSA = random_policy(process)
    everything_TSA = enumerated_gradient(process, policy_TSA, np.ones((3, 3)))
    full_TSA = process.expected_gradient(policy_TSA, window(3, 3))
    np.testing.assert_allclose(everything_TSA, full_TSA, atol=1e-14)
    np.testing.assert_allclose(process.expected_gradient(policy_TSA, np.ones((3, 3))), full_TSA)


def enumerated_weights(process, policy_TSA, weight_TT):
    """Return (E[R_t], policy times E[max(0, R_t - E[R_t])] of each turn, state and act)."""
    trajectories = list(listed(process, policy_TSA))
    returns = [np.triu(weight_TT) @ rewards for _, _, rewards in trajectories]
    chances = [probability for probability, _, _ in trajectories]
    mean_T = np.array(chances) @ returns
    total_TSA = np.zeros_like(policy_TSA)
    for (probability, places, _), return_T in zip(trajectories, returns, strict=True):
        for place, above in zip(places, np.maximum(0.0, return_T - mean_T), strict=True):
            total_TSA[place] += probability * above
    return mean_T, total_TSA


ON_THE_GRID = {name: PARTIAL[name] for name in PARTIAL if name != "Discounted(0.7)"}


@pytest.mark.parametrize(("domain", "kind"), KINDS)
@pytest.mark.parametrize("credit", ON_THE_GRID)
def test_what_an_endless_log_teaches_is_what_its_enumeration_teaches(domain, kind, credit):
    process, weight_TT = ActProcess(dynamics_of(domain, kind), 3, noise=0.2), PARTIAL[credit]
    _, policy_TSA = random_policy(process)
    mean_T, total_TSA = enumerated_weights(process, policy_TSA, weight_TT)
    np.testing.assert_allclose(process.mean_credit(policy_TSA, weight_TT), mean_T, atol=1e-14)
    learned_TSA = process.learned_from_log(policy_TSA, weight_TT, resolution=400)
    np.testing.assert_allclose(learned_TSA.sum(axis=2), 1.0, atol=1e-14)
    total_TS1 = total_TSA.sum(axis=2, keepdims=True)
    reached_TS = total_TS1[:, :, 0] > 1e-12
    expected_TSA = np.divide(total_TSA, total_TS1, where=total_TS1 > 0, out=policy_TSA.copy())
    assert reached_TS.sum() > 2 * process.num_turns
    np.testing.assert_allclose(learned_TSA[reached_TS], expected_TSA[reached_TS], atol=1e-12)


def test_a_log_of_one_turn_teaches_acts_by_how_far_they_are_above_its_mean():
    """By hand: acts worth .55, .45, 0, 0, equally likely: mean .25, weights .30 and .20."""
    process = ActProcess(dynamics_of("chatting"), num_turns=1, noise=0.0)
    learned_TSA = process.learned_from_log(process.uniform_policy(), window(1, 1))
    start = int(np.flatnonzero(process._start_S)[0])
    by_act = dict(zip(process.acts, learned_TSA[0, start], strict=True))
    assert by_act == pytest.approx({"answer": 0.6, "volunteer": 0.4, "evade": 0, "contradict": 0})


def test_a_state_in_which_nothing_is_above_the_baseline_teaches_nothing():
    process = ActProcess(dynamics_of("therapy"), num_turns=3, noise=0.1)
    _, policy_TSA = random_policy(process)
    learned_TSA = process.learned_from_log(policy_TSA, window(3, 2), np.full(3, 2.0))
    np.testing.assert_array_equal(learned_TSA, policy_TSA)


@pytest.mark.parametrize("weight", [0.37, -1.0])
def test_credit_that_is_on_no_grid_is_refused(weight):
    process = ActProcess(dynamics_of("chatting"), num_turns=3, noise=0.1)
    with pytest.raises(ValueError, match=r"multiples of 1/40 .* finer resolution"):
        process.learned_from_log(process.uniform_policy(), weight * window(3, 2))


def test_ascent_does_not_depend_on_the_scale_of_the_weights():
    process = ActProcess(dynamics_of("chatting"), num_turns=3, noise=0.0)
    one, three = process.limit(window(3, 2)), process.limit(3 * window(3, 2))
    assert one.value == pytest.approx(three.value, abs=1e-6)


@pytest.mark.parametrize(
    ("num_turns", "noise", "named"),
    [(0, 0.1, "num_turns must be at least 1, got 0"), (3, 1.2, "noise is a probability.*1.2")],
)
def test_an_impossible_process_is_refused(num_turns, noise, named):
    with pytest.raises(ValueError, match=named):
        ActProcess(dynamics_of("chatting"), num_turns, noise)


# ---- the text environment IS the process ---------------------------------------------------------


def spoken_turns(domain, noise, seeds):
    """Yield (dynamics' state, act, attentive, reward, info) of random acts spoken in text."""
    env = DiscreteReply(gym.make("PersonaDialogue-v0", domain=domain, noise=noise))
    inner = env.unwrapped
    assert isinstance(inner, PersonaDialogueEnv)
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        dynamics = DOMAINS[domain].dynamics(inner.transcript.persona)
        state, over = dynamics.start, False
        while not over:
            action = rng.integers(len(env.acts))
            line = observation[-1]["content"]
            attentive = not any(d in line for d in DOMAINS[domain].distractions)
            observation, reward, over, _, info = env.step(action)
            yield dynamics, state, env.acts[action], attentive, reward, info
            state = dynamics.advance(state, env.acts[action])


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_random_acts_spoken_in_text_earn_exactly_what_the_process_says(domain, noise):
    distracted = 0
    for dynamics, state, act, attentive, reward, info in spoken_turns(domain, noise, range(100)):
        assert info["act"] == act, info["reason"]
        value = dynamics.value(state, act, attentive)
        assert reward == (value if attentive else DISTRACTED_FACTOR * value)
        distracted += not attentive
    assert distracted / 800 == pytest.approx(noise, abs=0.08)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_the_mean_return_in_text_is_the_value_in_the_process(domain, noise):
    """Uniformly random acts, 400 dialogues, within four standard errors."""
    turns = list(spoken_turns(domain, noise, range(400)))
    reward_BT = np.array([reward for *_, reward, _ in turns]).reshape(400, 8)
    share_of_kind: dict[object, float] = {}
    for dynamics, *_ in turns[::8]:
        share_of_kind[dynamics] = share_of_kind.get(dynamics, 0.0) + 1 / 400
    expected_T = sum(
        share * (process := ActProcess(dynamics, 8, noise)).rewards(process.uniform_policy())
        for dynamics, share in share_of_kind.items()
    )
    error_T = reward_BT.std(axis=0) / 20
    np.testing.assert_array_less(np.abs(reward_BT.mean(axis=0) - expected_T), 4 * error_T + 1e-12)
    mean_error = reward_BT.mean(axis=1).std() / 20
    assert reward_BT.mean() == pytest.approx(float(np.mean(expected_T)), abs=4 * mean_error)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_the_optimal_policy_spoken_in_text_earns_the_optimal_value(domain):
    noise = 0.1
    env = PersonaDialogueEnv(domain=domain, noise=noise)
    totals, expected = [], []
    optimal = {}
    for seed in range(200):
        env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        dynamics = DOMAINS[domain].dynamics(env.transcript.persona)
        if dynamics not in optimal:
            process = ActProcess(dynamics, 8, noise)
            optimal[dynamics] = process, process.optimal_policy(), process.optimal_value()
        process, policy_TSA, value = optimal[dynamics]
        state, rewards = dynamics.start, []
        for t in range(8):
            attentive = DOMAINS[domain].attentive(str(env.transcript.pending))
            s = process.states.index((state, attentive))
            act = process.acts[int(policy_TSA[t, s].argmax())]
            line = DOMAINS[domain].speak(act, env.transcript, rng)
            rewards.append(env.step(line)[1])
            state = dynamics.advance(state, act)
        totals.append(np.mean(rewards))
        expected.append(value)
    error = np.std(np.array(totals) - expected) / np.sqrt(200)
    assert np.mean(totals) == pytest.approx(np.mean(expected), abs=4 * error)
