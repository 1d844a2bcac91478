import gymnasium as gym
import numpy as np
import pytest
from own_domain import CAFE, GUESTS
from speakers import DOMAIN_NAMES

from ppg_env import DOMAINS, DiscreteReply, PersonaDialogueEnv


def menu(domain="therapy", **kwargs):
    return DiscreteReply(gym.make("PersonaDialogue-v0", domain=domain, **kwargs))


def roll(env, seed):
    """Return a whole dialogue in which the acts take turns."""
    found = [env.reset(seed=seed)]
    over = False
    while not over:
        found.append(env.step(np.int64(len(found) % len(env.acts))))
        over = found[-1][2]
    return found


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_each_action_performs_its_act_in_words(domain):
    env = menu(domain)
    assert env.acts == DOMAINS[domain].dynamics().acts
    assert env.action_space == gym.spaces.Discrete(len(env.acts))
    for seed in range(20):
        for number, (observation, *_, info) in enumerate(roll(env, seed)[1:], start=1):
            assert info["act"] == env.acts[number % len(env.acts)]
            assert observation[2 * number]["role"] == "assistant"


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_the_same_seed_and_actions_give_the_same_words(domain):
    assert roll(menu(domain), 3) == roll(menu(domain), 3)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_no_sentence_is_said_twice_in_a_dialogue(domain):
    env = menu(domain)
    for act in range(len(env.acts)):
        for seed in range(20):
            env.reset(seed=seed)
            over = False
            while not over:
                *_, over, _, info = env.step(act)
                assert info["reward_parts"]["well_formed"] == 1.0


def test_any_integer_will_do_as_an_action():
    env = menu()
    for action in (1, np.int32(1), np.int64(1)):
        env.reset(seed=0)
        assert env.step(action)[4]["act"] == "gradual"


@pytest.mark.parametrize("action", [-1, 5, 1.0, "gradual", None, np.array([1])])
def test_an_action_that_is_not_on_the_menu_is_refused_with_the_menu(action):
    env = menu()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"Invalid action .*0: surface, 1: gradual"):
        env.step(action)


def test_a_domain_of_ones_own_has_a_menu_too():
    env = menu(CAFE, personas=GUESTS, noise=0.0)
    assert env.acts == ("answer", "evade", "contradict")
    env.reset(seed=0)
    assert [env.step(act)[1] for act in (0, 1, 2)] == [1.0, 0.0, 0.0]


def test_only_persona_dialogues_can_be_wrapped():
    with pytest.raises(TypeError, match=r"DiscreteReply wraps PersonaDialogue-v0, got CartPoleEnv"):
        DiscreteReply(gym.make("CartPole-v1"))


def test_a_bare_environment_can_be_wrapped():
    env = DiscreteReply(PersonaDialogueEnv())
    env.reset(seed=0)
    assert env.step(0)[4]["act"] == "answer"
