import sys
import types
import warnings
import zlib

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from own_domain import CAFE, GUESTS
from speakers import DOMAIN_NAMES
from stable_baselines3.common.env_checker import check_env as check_sb3
from stable_baselines3.common.vec_env import DummyVecEnv

from ppg_env import DOMAINS, DiscreteReply, EmbeddedObservation, HashedWords, PersonaDialogueEnv


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


# --- dialogues as vectors -------------------------------------------------------------------------


def vectors(domain="therapy", recent=2, embed="hashed", **kwargs):
    return EmbeddedObservation(menu(domain, **kwargs), embed, recent)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_gymnasium_and_stable_baselines_find_nothing_wrong_with_it(domain):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*different from the unwrapped version.*")
        check_env(vectors(domain), skip_render_check=True)
        check_sb3(vectors(domain))


def counted(texts):
    """Embed a text as (its number of words / 100, 1)."""
    return np.array([[len(text.split()) / 100, 1.0] for text in texts], dtype=np.float32)


def test_the_vector_is_made_of_persona_partner_own_lines_their_sum_and_the_clock():
    env = EmbeddedObservation(gym.make("PersonaDialogue-v0", max_turns=3), counted, recent=2)
    first, _ = env.reset(seed=0)
    system, opening = (
        len(m["content"].split()) / 100
        for m in env.env.unwrapped.world.observe(env.env.unwrapped._dialogue)
    )
    assert first == pytest.approx([system, 1, opening, 1, 0, 0, 0, 0, 0, 0, 0])
    env.step("One two three.")
    second, *_ = env.step("Four five.")
    assert second[4:10] == pytest.approx([0.02, 1, 0.03, 1, 0.05, 2])
    assert second[0] == pytest.approx(system)
    assert second[-1] == pytest.approx(2 / 3)
    last, _, terminated, *_ = env.step("Bye.")
    assert terminated and last[4:10] == pytest.approx([0.01, 1, 0.02, 1, 0.06, 3])
    assert last[-1] == 1.0
    assert env.observation_space.contains(last)


def test_a_text_is_embedded_once():
    seen = []

    def embed(texts):
        seen.extend(texts)
        return counted(texts)

    env = vectors(embed=embed)
    for _ in range(5):
        roll_vectors(env)
    assert len(seen) == len(set(seen)) > 20


def roll_vectors(env, seed=None):
    found = [env.reset(seed=seed)[0]]
    over = False
    while not over:
        observation, _, over, _, _ = env.step(len(found) % 5)
        found.append(observation)
    return np.array(found)


def test_hashed_words_are_the_same_everywhere_and_ignore_case_and_punctuation():
    embed = HashedWords(64)
    found = embed(["I like tea.", "TEA, like I", "", "I like coffee."])
    assert found.shape == (4, 64) and found.dtype == np.float32
    assert np.array_equal(found[0], found[1]) and not found[2].any()
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1, 0, 1])
    assert 0.3 < found[0] @ found[3] < 0.9
    (bucket,) = np.flatnonzero(HashedWords(64)(["tea"])[0])
    assert bucket == zlib.crc32(b"tea") % 64


def test_a_seeded_run_repeats_over_automatic_resets_and_options_last():
    def run(options):
        env = DummyVecEnv([vectors])
        env.seed(3)
        env.set_options(options)
        found, people = [env.reset()], [env.reset_infos[0]["persona"]]
        for step in range(30):
            observation, _, dones, _ = env.step(np.array([step % 5]))
            found.append(observation)
            people += [env.reset_infos[0]["persona"]] if dones[0] else []
        return np.array(found), people

    everything, people = run({})
    again, _ = run({})
    assert np.array_equal(everything, again)
    assert len(people) == 4 and len(set(people)) > 1
    _, same = run({"persona": people[0]})
    assert same == people[:1] * 4


def test_options_last_until_others_are_given_and_refused_ones_do_not():
    env = vectors(personas="all")
    for options in ({"persona": "therapy-0003"}, None):
        assert env.reset(options=options)[1]["persona"] == "therapy-0003"
    with pytest.raises(ValueError, match="Unknown persona id"):
        env.reset(options={"persona": "therapy-x"})
    assert env.reset()[1]["persona"] == "therapy-0003"
    env.reset(options={})
    assert len({env.reset()[1]["persona"] for _ in range(5)}) > 1


def test_what_is_no_dialogue_is_refused():
    with pytest.raises(TypeError, match="wraps environments that observe chat messages, got Box"):
        EmbeddedObservation(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match="recent must be at least 0, got -1"):
        vectors(recent=-1)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        HashedWords(0)
    with pytest.raises(ValueError, match=r"finite .* of shape \(1, size\) .* got shape \(3,\)"):
        vectors(embed=lambda texts: np.zeros(3))


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers, or take embed"):
        vectors(embed="all-MiniLM-L6-v2")


def test_a_sentence_transformer_is_loaded_by_name(monkeypatch):
    class SentenceTransformer:
        def __init__(self, name):
            self.name = name

        def encode(self, texts, normalize_embeddings):
            assert normalize_embeddings and self.name == "some/model"
            return counted(texts)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert vectors(embed="some/model").observation_space.shape == (11,)
