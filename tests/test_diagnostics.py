"""Gradient diagnostics: against autograd on a real model, and against worlds known exactly."""

import itertools
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from act_worlds import ActWorld
from tiny_models import tiny_model, tiny_policy
from tiny_worlds import EchoDialogues

import agents.scoring
import agents.turn_gradients
from agents.credit import (
    FullPlanning,
    Greedy,
    KStep,
    Segment,
    Subset,
    Trajectory,
    advantages,
    credit_weights,
    parse_credit,
    partial_returns,
)
from agents.diagnostics import (
    default_credits,
    gradient_diagnostics,
    group_products,
    mean_between,
    mean_within,
    resampling_weights,
    reward_dependence,
    variance_bound,
)
from agents.lm_policy import add_lora
from agents.losses import policy_gradient_loss
from agents.rollout import collect_rollouts
from agents.turn_gradients import TurnGradients, turn_gradients

GROUP_SIZE = 4
CREDITS = [Greedy(), KStep(2), Segment(), FullPlanning(), Trajectory()]


# ---- the gradients of a language model -----------------------------------------------------------


def echoed(policy, num_groups=3, seed=1):
    """Dialogues of 2 to 4 turns whose second turn is unscorable."""
    envs = EchoDialogues(num_groups * GROUP_SIZE)
    return collect_rollouts(envs, policy, seed=seed, options={"group_size": GROUP_SIZE})


def loss_gradient(policy, batch, credit, baseline, parameters, dialogues=None):
    """-grad of `policy_gradient_loss` over the batch, or over some of its dialogues."""
    weight_TT = credit_weights(credit, batch.reward_BT.shape[1], batch.boundaries)
    advantage_BT = advantages(
        partial_returns(batch.reward_BT, weight_TT, batch.alive_BT),
        baseline=baseline,
        group_B=batch.group_B,
        alive_BT=batch.alive_BT,
        scorable_BT=~np.isnan(batch.reward_BT),
    )
    tape, num_episodes = batch.tape, len(batch.group_B)
    if dialogues is not None:
        advantage_BT = advantage_BT * np.isin(np.arange(num_episodes), dialogues)[:, None]
        num_episodes = len(dialogues)
    loss = policy_gradient_loss(
        policy.logprobs(tape.token_SL, tape.turn_SL),
        torch.as_tensor(advantage_BT[tape.episode_S].astype(np.float32)),
        torch.as_tensor(tape.turn_SL),
        num_episodes=num_episodes,
    )
    parts = torch.autograd.grad(-loss, parameters, materialize_grads=True, allow_unused=True)
    return torch.cat([part.flatten() for part in parts]).double()


@pytest.mark.parametrize("baseline", ["leave_one_out", "batch_mean", "none"])
def test_the_groups_gradients_are_those_of_the_loss(baseline):
    policy = tiny_policy()
    batch = echoed(policy)
    assert len(set(batch.alive_BT.sum(axis=1))) > 1
    assert np.isnan(batch.reward_BT[batch.alive_BT]).any()
    gradients = turn_gradients(policy, batch, "all")
    product_CCGG = group_products(gradients, CREDITS, baseline)
    parameters = list(policy.model.parameters())
    groups = [np.flatnonzero(batch.group_B == g) for g in range(3)]
    vector_CGP = torch.stack(
        [
            torch.stack(
                [loss_gradient(policy, batch, c, baseline, parameters, own) for own in groups]
            )
            for c in CREDITS
        ]
    )
    expected = torch.einsum("cgp,dhp->cdgh", vector_CGP, vector_CGP).numpy()
    assert np.diagonal(np.diagonal(expected)).min() > 0
    np.testing.assert_allclose(product_CCGG, expected, atol=1e-5 * expected.max())


def test_the_norm_and_the_batch_cosine_are_those_of_the_batchs_gradients():
    policy = tiny_policy()
    batch = echoed(policy)
    parameters = list(policy.model.parameters())
    of_full, of_greedy = (
        loss_gradient(policy, batch, credit, "leave_one_out", parameters)
        for credit in (FullPlanning(), Greedy())
    )
    (found,) = gradient_diagnostics(turn_gradients(policy, batch, "all"), ["greedy"])
    assert found.norm == pytest.approx(float(of_greedy.norm()), rel=1e-4)
    cosine = torch.cosine_similarity(of_full, of_greedy, dim=0)
    assert found.batch_cosine == pytest.approx(float(cosine), abs=1e-4)


def test_groups_of_different_size_weigh_by_their_dialogues():
    policy = tiny_policy()
    batch = replace(echoed(policy), group_B=np.repeat([5, 9], [8, 4]))
    gradients = turn_gradients(policy, batch, "all")
    parameters = list(policy.model.parameters())
    whole = loss_gradient(policy, batch, KStep(2), "leave_one_out", parameters)
    (found,) = gradient_diagnostics(gradients, ["kstep:2"])
    assert found.norm == pytest.approx(float(whole.norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["last_block", "lora", "auto"])
def test_parameters_are_chosen_by_name_and_left_as_they_were(name):
    policy = tiny_policy()
    if name == "lora":
        add_lora(policy.model, 2)
    batch = echoed(policy)
    required = [parameter.requires_grad for parameter in policy.model.parameters()]
    gradients = turn_gradients(policy, batch, name)
    assert [parameter.requires_grad for parameter in policy.model.parameters()] == required
    assert all(parameter.grad is None for parameter in policy.model.parameters())

    chosen = list(policy.model.model.layers[-1].parameters())
    if name == "lora":
        chosen = [p for key, p in policy.model.named_parameters() if "lora" in key]
    assert gradients.parameters == ("last_block" if name == "auto" else name)
    assert gradients.num_parameters == sum(p.numel() for p in chosen)
    for parameter in chosen:
        parameter.requires_grad_(True)
    vector = loss_gradient(policy, batch, FullPlanning(), "leave_one_out", chosen)
    (found,) = gradient_diagnostics(gradients, ["full"])
    assert found.norm == pytest.approx(float(vector.norm()), rel=1e-4)


def test_with_an_adapter_its_parameters_are_meant():
    policy = tiny_policy()
    add_lora(policy.model, 2)
    assert turn_gradients(policy, echoed(policy)).parameters == "lora"


@pytest.mark.parametrize("how", ["a sequence a turn", "checkpointed", "logits in chunks"])
def test_however_lines_are_scored_the_gradient_is_that_of_the_loss(how, monkeypatch):
    policy = tiny_policy(sequences="turn" if how == "a sequence a turn" else "auto")
    batch = echoed(policy)
    chosen = list(policy.model.model.layers[-1].parameters())
    vector = loss_gradient(policy, batch, KStep(2), "leave_one_out", chosen)
    if how == "a sequence a turn":
        assert len(batch.tape.episode_S) == batch.num_turns > len(batch.group_B)
    elif how == "checkpointed":
        policy = tiny_policy(gradient_checkpointing=True)
    else:
        monkeypatch.setattr(agents.scoring, "_LOGITS_PER_CHUNK", 3 * 320)
    (found,) = gradient_diagnostics(turn_gradients(policy, batch), ["kstep:2"])
    assert found.norm == pytest.approx(float(vector.norm()), rel=1e-4)


def test_turns_that_did_not_take_place_have_no_gradient():
    policy = tiny_policy()
    batch = echoed(policy)
    gradients = turn_gradients(policy, batch)
    np.testing.assert_array_equal(gradients.square_BT > 0, batch.alive_BT)


def test_a_table_that_would_be_too_large_is_sketched_within_the_documented_error(monkeypatch):
    policy = tiny_policy()
    batch = echoed(policy)
    exact = turn_gradients(policy, batch, "all")
    assert exact.sketch_width is None
    width = 2048
    monkeypatch.setattr(agents.turn_gradients, "_LARGEST_TABLE", width * batch.num_turns)
    rough = turn_gradients(policy, batch, "all")
    assert rough.sketch_width == width < rough.num_parameters
    square_N = np.diagonal(exact.product_NN)
    length_NN = np.sqrt(np.outer(square_N, square_N))
    alive_NN = length_NN > 0
    error_NN = (rough.product_NN - exact.product_NN)[alive_NN] / length_NN[alive_NN]
    assert 0 < np.sqrt((error_NN**2).mean()) < np.sqrt(2 / width)
    for one, other in zip(gradient_diagnostics(exact), gradient_diagnostics(rough), strict=True):
        assert other.norm == pytest.approx(one.norm, rel=0.1)
        assert other.variance.mean == pytest.approx(one.variance.mean, rel=0.15)


def test_a_batch_without_tokens_of_another_policy_or_of_a_cut_support_is_refused():
    policy = tiny_policy()
    batch = echoed(policy)
    with pytest.raises(ValueError, match=r"holds no tokens.*keep_tokens=True"):
        turn_gradients(policy, batch.without_tape())
    other = tiny_policy()
    other.model.load_state_dict(tiny_model("llama", seed=7).state_dict())
    with pytest.raises(ValueError, match="it has learned since, or is another one"):
        turn_gradients(other, batch)
    with pytest.raises(ValueError, match="top_k=5 and top_p=1"):
        turn_gradients(tiny_policy(top_k=5), batch)


def test_unknown_and_missing_parameters_are_refused():
    policy = tiny_policy()
    batch = echoed(policy)
    with pytest.raises(ValueError, match="'auto', 'lora', 'last_block' or 'all', got 'first'"):
        turn_gradients(policy, batch, "first")
    with pytest.raises(ValueError, match="no parameters called 'lora'; load it with lora_rank"):
        turn_gradients(policy, batch, "lora")


def test_the_bundled_model_is_measured_in_its_own_world():
    from agents import load_policy

    policy = load_policy("nano", seed=0)
    envs = gym.make_vec("ppg_env:PersonaDialogue-v0", num_envs=8, domain="therapy", max_turns=3)
    batch = collect_rollouts(envs, policy, seed=0, options={"group_size": 4})
    gradients = turn_gradients(policy, batch)
    found = gradient_diagnostics(gradients, num_resamples=50)
    assert [each.credit for each in found] == ["greedy", "kstep:2", "full", "trajectory"]
    assert gradients.num_parameters == 181_504
    assert all(0 < each.variance.mean < each.bound for each in found)


# ---- against exact expectations and variances ----------------------------------------------------


def test_the_exact_variance_is_that_of_all_outcomes_of_a_pair():
    # The closed form of ActWorld, held to a plain sum over every pair of dialogues.
    world = ActWorld("chatting", num_turns=2, num_steps=2)
    (process,) = world.processes
    stories = list(itertools.product(range(4), repeat=2))  # acts
    heeds = list(itertools.product((0, 1), repeat=2))
    chance_N, reward_NT, score_NTP = [], [], []
    for acts, inattentive in itertools.product(stories, heeds):
        memory, chance = world.start, 1.0
        reward_T = []
        score_TP = np.zeros((2, *world.policy_TSA.shape))
        for t, (act, distracted) in enumerate(zip(acts, inattentive, strict=True)):
            state = 2 * memory + distracted
            chance *= world.policy_TSA[t, state, act] * (0.1 if distracted else 0.9)
            reward_T.append(world.reward_KSA[0, state, act])
            score_TP[t, t, state] = -world.policy_TSA[t, state]
            score_TP[t, t, state, act] += 1
            memory = world.next_KMA[0, memory, act]
        chance_N.append(chance)
        reward_NT.append(reward_T)
        score_NTP.append(score_TP.reshape(2, -1))
    chance_N, reward_NT, score_NTP = map(np.array, (chance_N, reward_NT, score_NTP))
    assert chance_N.sum() == pytest.approx(1)
    for credit in (Greedy(), FullPlanning()):
        weight_TT = credit.weights(2)
        return_NT = reward_NT @ weight_TT.T
        gap_NMT = return_NT[:, None] - return_NT[None]
        pair_NMP = 0.5 * np.einsum("nmt,ntp->nmp", gap_NMT, score_NTP)
        pair_NMP = pair_NMP + pair_NMP.transpose(1, 0, 2)
        chance_NM = np.outer(chance_N, chance_N)
        mean_P = np.einsum("nm,nmp->p", chance_NM, pair_NMP)
        square = (chance_NM * (pair_NMP**2).sum(axis=2)).sum()
        np.testing.assert_allclose(mean_P, world.gradient(weight_TT).ravel(), atol=1e-12)
        assert square - mean_P @ mean_P == pytest.approx(world.group_variance(weight_TT, 2))
        np.testing.assert_allclose(
            world.gradient(weight_TT), process.expected_gradient(world.policy_TSA, weight_TT)
        )


def test_the_expected_full_gradient_is_the_slope_of_the_expected_total_reward():
    world = ActWorld("therapy", num_turns=3, num_steps=1)
    logits = np.log(world.policy_TSA)

    def total(logits_TSA):
        chance_TSA = np.exp(logits_TSA) / np.exp(logits_TSA).sum(axis=2, keepdims=True)
        return np.mean([p.rewards(chance_TSA).sum() for p in world.processes])

    gradient, step = world.gradient(FullPlanning().weights(3)), 1e-5
    for index in [(0, 0, 1), (1, 4, 2), (2, 7, 0), (1, 1, 3)]:
        up, down = logits.copy(), logits.copy()
        up[index] += step
        down[index] -= step
        slope = (total(up) - total(down)) / (2 * step)
        assert gradient[index] == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize(
    ("domain", "num_steps"), [("chatting", 5), ("therapy", 0), ("education", 5)]
)
def test_estimates_agree_with_the_exact_values_within_their_sampling_error(domain, num_steps):
    # 40 batches of 32 groups: the mean of each estimate has to lie within 4 standard errors.
    world, rng, num_groups = ActWorld(domain, num_steps=num_steps), np.random.default_rng(0), 32
    credits = ("greedy", "kstep:2", "full")
    found = [
        gradient_diagnostics(world.pilot(num_groups, rng), credits, num_resamples=200)
        for _ in range(40)
    ]
    covered = []
    for c, credit in enumerate(credits):
        weight_TT = parse_credit(credit).weights(4)
        gradient = world.gradient(weight_TT)
        signal = (gradient**2).sum()
        variance = world.group_variance(weight_TT, 8) / num_groups
        exact = {"signal": signal, "variance": variance, "snr": signal / variance}
        for name in ("signal", "variance"):
            value_R = np.array([getattr(each[c], name).mean for each in found])
            standard_error = value_R.std(ddof=1) / np.sqrt(len(value_R))
            assert abs(value_R.mean() - exact[name]) < 4 * standard_error, (credit, name)
            assert standard_error < 0.05 * exact[name]  # else the line above says little
        for each in found:
            covered += [
                getattr(each[c], name).low <= value <= getattr(each[c], name).high
                for name, value in exact.items()
            ]
    assert np.mean(covered) > 0.88  # of 95 % intervals


def test_the_mean_of_full_gradients_is_the_true_gradient():
    world, rng = ActWorld("education", num_turns=3, num_steps=3), np.random.default_rng(1)
    gradient_BTP, reward_BT, group_B = world.dialogues(1500, rng)
    advantage_BT = advantages(
        partial_returns(reward_BT, FullPlanning().weights(3)), group_B=group_B
    )
    one_BP = np.einsum("bt,btp->bp", advantage_BT, gradient_BTP)
    one_GP = one_BP.reshape(1500, 8, -1).mean(axis=1)
    true_P = world.gradient(FullPlanning().weights(3)).ravel()
    error_P = one_GP.std(axis=0, ddof=1) / np.sqrt(1500)
    seen_P = error_P > 1e-5
    score_P = (one_GP.mean(axis=0) - true_P)[seen_P] / error_P[seen_P]
    assert seen_P.sum() > 20
    assert np.abs(score_P).max() < 4.5
    assert 0.5 < (score_P**2).mean() < 1.6
    assert np.linalg.norm(true_P) > 20 * np.linalg.norm(error_P) / np.sqrt(len(error_P))


def test_no_variance_exceeds_the_bound_and_the_bound_grows_with_the_window():
    for domain, num_steps in itertools.product(("chatting", "therapy", "education"), (0, 20)):
        world = ActWorld(domain, num_turns=6, num_steps=num_steps)
        pilot = world.pilot(16, np.random.default_rng(0))
        weights = [KStep(k).weights(6) for k in range(1, 7)]
        bounds = [variance_bound(pilot, weight_TT) for weight_TT in weights]
        assert bounds == sorted(bounds)
        assert bounds[5] > 9 * bounds[0]
        for weight_TT, bound in zip(weights, bounds, strict=True):
            assert world.group_variance(weight_TT, 8) / 16 < bound


def test_the_bound_by_hand():
    # Two groups, two turns, rewards from -1 to 2, squared gradients 1 and 9 (4 and 0 in the other).
    gradient_BTP = np.zeros((4, 2, 1))
    gradient_BTP[:2, :, 0], gradient_BTP[2:, :, 0] = (1, 3), (2, 0)
    reward_BT = np.array([[-1, 2], [0, 1], [1, 1], [0.5, 0]])
    gradients = TurnGradients.from_vectors(gradient_BTP, reward_BT, np.array([3, 3, 8, 8]))
    # rho = 3; windows 2 and 1; mean squares 2.5 and 4.5.
    assert variance_bound(gradients, FullPlanning().weights(2)) == 9 / 2 * 3 * (2 * 2.5 + 4.5)
    assert variance_bound(gradients, -Greedy().weights(2)) == 9 / 2 * 2 * (2.5 + 4.5)


def test_the_cosine_of_expectations_is_found_where_that_of_one_batch_misleads():
    # The first act earns now what it costs twice over in the next turn: greedy climbs exactly the
    # wrong way. The noise of the rewards is in both gradients of a batch and makes them look alike.
    rng, effect_A = np.random.default_rng(0), np.linspace(-0.1, 0.1, 5)
    found = []
    for _ in range(20):
        act_BT = rng.integers(5, size=(512, 2))
        gradient_BTP = np.zeros((512, 2, 2, 5))
        for t in range(2):
            gradient_BTP[:, t, t] = np.eye(5)[act_BT[:, t]] - 0.2
        effect_B = effect_A[act_BT[:, 0]]
        reward_BT = np.stack([effect_B, -2 * effect_B], axis=1) + rng.normal(0, 0.3, (512, 2))
        pilot = TurnGradients.from_vectors(
            gradient_BTP.reshape(512, 2, 10), reward_BT, np.arange(512) // 8
        )
        found += gradient_diagnostics(pilot, ["greedy"], num_resamples=200)
    assert np.mean([each.batch_cosine for each in found]) > -0.6
    assert np.nanmean([each.cosine.mean for each in found]) < -0.85
    assert np.mean([each.cosine.low == -1.0 for each in found]) >= 0.85


def test_where_rewards_are_mere_chance_no_signal_is_found_and_it_is_said():
    world, rng = ActWorld("therapy"), np.random.default_rng(0)
    signals, claims = [], 0
    for _ in range(40):
        gradient_BTP, reward_BT, group_B = world.dialogues(16, rng)
        pilot = TurnGradients.from_vectors(gradient_BTP, rng.random(reward_BT.shape), group_B)
        for each in gradient_diagnostics(pilot, ["greedy", "full"], num_resamples=100):
            signals.append(each.snr.mean)
            claims += each.signal_found
            if each.signal.mean <= 0:
                assert np.isnan(each.cosine.mean)
            if each.credit == "greedy" and not each.signal_found:
                assert (each.cosine.low, each.cosine.high) == (-1.0, 1.0)
    assert 0.3 < np.mean(np.array(signals) <= 0) < 0.8  # unbiased, so about half come out negative
    assert claims < 0.1 * len(signals)
    true_signal = gradient_diagnostics(world.pilot(16, rng), ["full"], num_resamples=100)[0]
    assert true_signal.signal_found


def test_past_rewards_add_variance_and_no_signal():
    world, rng = ActWorld("therapy", num_turns=4), np.random.default_rng(0)
    pairs = [
        gradient_diagnostics(world.pilot(16, rng), ["full", "trajectory"], num_resamples=50)
        for _ in range(20)
    ]
    variance = np.array([[each.variance.mean for each in pair] for pair in pairs])
    signal = np.array([[each.signal.mean for each in pair] for pair in pairs])
    assert (variance[:, 1] > variance[:, 0]).mean() > 0.95
    difference = signal[:, 1] - signal[:, 0]
    assert abs(difference.mean()) < 4 * difference.std(ddof=1) / np.sqrt(20)


def test_a_group_that_was_drawn_twice_does_not_meet_itself():
    product_GG = np.array([[100.0, 1.0, 2.0], [1.0, 100.0, 3.0], [2.0, 3.0, 100.0]])
    weight_RG = np.array([[1, 1, 1], [2, 1, 0], [0, 0, 3]])
    assert mean_between(product_GG, weight_RG).tolist() == [2.0, 1.0, 0.0]
    assert mean_within(product_GG, weight_RG).tolist() == [100.0, 100.0, 100.0]


def test_resamples_draw_as_many_groups_as_there_are():
    weight_RG = resampling_weights(5, 2000, seed=0)
    assert weight_RG[0].tolist() == [1] * 5
    assert (weight_RG.sum(axis=1) == 5).all()
    assert weight_RG[1:].mean(axis=0) == pytest.approx([1] * 5, abs=0.1)
    assert weight_RG[1:].var() == pytest.approx(0.8, abs=0.08)


def test_a_second_call_gives_the_same_numbers():
    pilot = ActWorld("chatting").pilot(8, np.random.default_rng(0))
    assert gradient_diagnostics(pilot) == gradient_diagnostics(pilot)
    assert gradient_diagnostics(pilot, seed=1) != gradient_diagnostics(pilot)


def test_every_lookahead_is_there_by_default():
    assert default_credits(4) == ("greedy", "kstep:2", "kstep:3", "full")
    assert default_credits(1) == ("full",)
    (found,) = gradient_diagnostics(
        ActWorld("chatting").pilot(8, np.random.default_rng(0)), ["kstep:2"], num_resamples=10
    )
    assert found.window == 7 / 4


def test_one_group_cannot_tell_signal_from_noise():
    pilot = ActWorld("chatting").pilot(1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="of one group, so nothing tells signal from noise"):
        gradient_diagnostics(pilot)


def test_rewards_that_never_differ_leave_no_gradient_and_no_ratio():
    pilot = ActWorld("chatting").pilot(8, np.random.default_rng(0))
    constant = replace(pilot, reward_BT=np.full(pilot.reward_BT.shape, 0.5))
    for found in gradient_diagnostics(constant, ["greedy", "full"], num_resamples=20):
        assert (found.norm, found.signal.mean, found.variance.mean) == (0, 0, 0)
        assert not found.signal_found
        assert np.isnan([found.snr.mean, found.cosine.mean, found.batch_cosine]).all()
    assert reward_dependence(constant).upper.mean == pytest.approx(0, abs=1e-12)


def test_gradients_that_do_not_fit_or_are_not_finite_are_refused():
    pilot = ActWorld("chatting").pilot(2, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"product_NN \(64, 64\), reward_BT \(16, 3\)"):
        replace(pilot, reward_BT=pilot.reward_BT[:, :3])
    with pytest.raises(ValueError, match="not finite"):
        replace(pilot, product_NN=np.full((64, 64), np.nan))


# ---- the map -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("domain", "reach"), [("chatting", 2), ("therapy", 3), ("education", 5)])
def test_the_map_is_the_exact_one_and_reaches_as_far_as_acts_do(domain, reach):
    # 30 maps; the mean of their squares has to lie within 4.5 standard errors, entry by entry.
    world, rng = ActWorld(domain, num_turns=5), np.random.default_rng(0)
    square_RTT, covers = [], []
    for _ in range(30):
        pilot = world.pilot(32, rng)
        found = reward_dependence(pilot, num_resamples=200)
        length_T = pilot.square_BT.mean(axis=0)
        square = np.sign(found.strength_TT) * found.strength_TT**2 * length_T[:, None]
        square_RTT.append(square)
        exact_TT = np.sqrt(world.dependence() / length_T[:, None])
        covers.append((found.low_TT <= exact_TT + 1e-12) & (exact_TT - 1e-12 <= found.high_TT))
        assert (found.low_TT <= found.strength_TT).all()
    mean_TT, exact_TT = np.mean(square_RTT, axis=0), world.dependence()
    error_TT = np.std(square_RTT, axis=0, ddof=1) / np.sqrt(30)
    assert np.abs((mean_TT - exact_TT) / error_TT).max() < 4.5
    assert np.mean(covers) > 0.88

    ahead_TT = np.subtract.outer(np.arange(5), np.arange(5)).T
    unreached_TT = (ahead_TT < 0) | (ahead_TT >= reach)
    assert exact_TT[unreached_TT] == pytest.approx(0, abs=1e-15)
    assert (exact_TT[~unreached_TT] > 1e-6).all()
    assert (mean_TT[ahead_TT == 0] > 4 * error_TT[ahead_TT == 0]).all()


def test_strengths_are_in_units_of_the_reward():
    pilot = ActWorld("education").pilot(16, np.random.default_rng(0))
    found = reward_dependence(pilot)
    twofold = reward_dependence(replace(pilot, reward_BT=2 * pilot.reward_BT))
    longer = reward_dependence(replace(pilot, product_NN=9 * pilot.product_NN))
    np.testing.assert_allclose(twofold.strength_TT, 2 * found.strength_TT)
    np.testing.assert_allclose(longer.strength_TT, found.strength_TT)
    assert (found.strength_TT < pilot.reward_BT.std(axis=0)).all()


def test_what_all_members_of_a_group_share_moves_nothing():
    # A reward that only the persona decides: groups differ, members do not.
    pilot = ActWorld("education").pilot(16, np.random.default_rng(0))
    shared_BT = np.broadcast_to(pilot.group_B[:, None] / 16, pilot.reward_BT.shape)
    found = reward_dependence(replace(pilot, reward_BT=shared_BT))
    np.testing.assert_allclose(found.strength_TT, 0, atol=1e-7)


def test_below_the_diagonal_is_nothing_unless_the_batch_is_broken():
    world, rng = ActWorld("therapy", num_turns=5), np.random.default_rng(0)
    covered, caught = [], []
    for _ in range(30):
        pilot = world.pilot(32, rng)
        sound = reward_dependence(pilot, num_resamples=200)
        covered.append(sound.lower.low <= 0 <= sound.lower.high)
        assert sound.upper.low > 0
        late = replace(pilot, reward_BT=np.roll(pilot.reward_BT, -1, axis=1))  # one turn too early
        caught.append(reward_dependence(late, num_resamples=200).lower.low > 0)
    assert np.mean(covered) >= 0.85
    assert np.mean(caught) >= 0.95


def test_an_entry_of_the_map_is_the_signal_of_the_credit_that_keeps_only_it():
    pilot = ActWorld("chatting", num_turns=3).pilot(8, np.random.default_rng(0))
    reward_BT = np.where(np.random.default_rng(1).random((64, 3)) < 0.2, np.nan, pilot.reward_BT)
    alive_BT = np.arange(3) < np.random.default_rng(2).integers(1, 4, size=64)[:, None]
    pilot = replace(pilot, reward_BT=reward_BT, alive_BT=alive_BT)
    found = reward_dependence(pilot, num_resamples=10)
    for t, u in [(0, 0), (0, 2), (1, 2), (2, 2)]:
        only_TT = np.zeros((3, 3))
        only_TT[t, u] = 1.0
        (alone,) = gradient_diagnostics(pilot, [Subset(only_TT)], num_resamples=10)
        square = alone.signal.mean / pilot.square_BT[:, t].mean()
        assert found.strength_TT[t, u] == pytest.approx(np.sign(square) * np.sqrt(abs(square)))


def test_a_map_needs_two_groups():
    pilot = ActWorld("chatting").pilot(1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="All dialogues are of one group"):
        reward_dependence(pilot)


def test_dialogues_of_one_turn_have_a_map_of_one_entry():
    found = reward_dependence(ActWorld("chatting", num_turns=1).pilot(8, np.random.default_rng(0)))
    assert found.strength_TT.shape == (1, 1)
    assert np.isnan(found.lower.mean)
