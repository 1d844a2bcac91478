"""Bad input meets an error that names the value and the remedy, and harms nothing else."""

import gymnasium as gym
import pytest
from gymnasium.error import ResetNeeded
from own_domain import CAFE, DRINK
from test_personas import GOOD, write

from ppg_env import (
    Domain,
    Persona,
    PersonaDialogueEnv,
    PersonaFileError,
    bundled_personas,
    get_domain,
    load_personas,
)

USER = {"role": "user", "content": "Hello!"}
AGENT = {"role": "assistant", "content": "Hi."}
SYSTEM = {"role": "system", "content": "You are Mia."}


def make(**kwargs):
    return gym.make("PersonaDialogue-v0", **kwargs)


# ---- making an environment -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("terapy", "Did you mean 'therapy'"),
        ("Education", "Did you mean 'education'"),
        ("zzz", "There are"),
    ],
)
def test_an_unknown_domain_lists_what_exists_and_suggests_the_nearest(name, suggestion):
    with pytest.raises(ValueError, match=f"Unknown domain '{name}'.*{suggestion}") as caught:
        make(domain=name)
    assert "'chatting', 'education', 'therapy'" in str(caught.value)


def test_a_domain_is_a_name_or_a_domain():
    with pytest.raises(ValueError, match=r"Unknown domain None"):
        get_domain(None)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_turns": 0}, "max_turns is a whole number of at least 1, got 0"),
        ({"max_turns": -3}, "got -3"),
        ({"max_turns": 2.5}, "got 2.5"),
        ({"max_turns": "8"}, "got '8'"),
        ({"noise": 1.1}, "noise is a probability in .*1.1"),
        ({"noise": float("nan")}, "noise is a probability in .*nan"),
        ({"max_utterance_length": 0}, "max_length must be at least 1, got 0"),
        ({"unscorable_reward": 2.0}, "unscorable_reward is NaN or in .*2.0"),
        ({"unscorable_reward": -1.0}, "unscorable_reward"),
        ({"partner": "scriptd"}, "partner is 'scripted', .*, got 'scriptd'"),
        ({"judge": "rulez"}, "judge is 'rules', .*, got 'rulez'"),
        ({"render_mode": "pixels"}, "render_mode is None, 'human' or 'ansi', got 'pixels'"),
        ({"personas": "tran"}, "Did you mean 'train'"),
        ({"personas": []}, "at least one Persona"),
    ],
)
def test_impossible_settings_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        PersonaDialogueEnv(**arguments)


def test_a_domain_of_ones_own_needs_personas_of_ones_own():
    with pytest.raises(ValueError, match=r"no bundled personas for the domain 'cafe'"):
        make(domain=CAFE)


def test_a_malformed_persona_file_is_named_with_line_and_field(tmp_path):
    path = write(tmp_path / "own.jsonl", GOOD, {**GOOD, "id": "own-2", "split": "dev"})
    with pytest.raises(PersonaFileError, match=r"(?s)own.jsonl.*line 2: field 'split'.*dev"):
        make(domain="therapy", personas=path)
    env = make(domain="therapy", personas=load_personas(path, "therapy", on_error="skip"))
    assert env.reset(seed=0)[1]["persona"] == "own-1"


def test_an_unknown_split_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown split 'vaildation'.*Did you mean 'validation'"):
        bundled_personas("therapy", "vaildation")


def test_a_persona_without_facts_is_told_what_the_rule_judge_needs():
    free = Persona("free", "therapy", "You love the sea.")
    told = r"'free'.*no facts.*judge that reads free text.*openai:MODEL@URL.*nli:FOLDER"
    with pytest.raises(ValueError, match=told):
        make(domain="therapy", personas=[free])
    env = make(domain="therapy")
    env.reset(seed=0, options={"persona": free})
    with pytest.raises(ValueError, match=told):
        env.step("I love the sea.")
    assert make(domain="therapy", personas=[free], judge=lambda transcripts: []) is not None


# ---- reset ---------------------------------------------------------------------------------------


def test_an_unknown_persona_id_suggests_the_nearest():
    with pytest.raises(
        ValueError, match=r"Unknown persona id 'therapy-00000'.*Nearest: therapy-0000"
    ):
        make(domain="therapy").reset(seed=0, options={"persona": "therapy-00000"})


def test_a_persona_of_another_split_is_not_found_and_the_remedy_named():
    env = make(domain="therapy")
    with pytest.raises(ValueError, match=r"'therapy-0399'.*personas='all'"):
        env.reset(options={"persona": "therapy-0399"})


def test_an_unknown_option_is_named_with_those_that_exist():
    with pytest.raises(
        ValueError, match=r"Unknown reset option 'persna'; there are persona, history"
    ):
        make().reset(options={"persna": "chatting-0000"})


@pytest.mark.parametrize(
    ("history", "named"),
    [
        ([], "it has 0 spoken messages"),
        ([USER, AGENT], "must end with a partner line"),
        ([SYSTEM], "must end with a partner line"),
        ([AGENT, USER], r"history\[0\] has role 'assistant', expected 'user'"),
        ([USER, USER], r"history\[1\] has role 'user', expected 'assistant'"),
        ([SYSTEM, AGENT], r"history\[1\] has role 'assistant', expected 'user'"),
        ([SYSTEM, USER, AGENT, AGENT], r"history\[3\] has role 'assistant', expected 'user'"),
        ([USER, SYSTEM, USER], r"history\[1\] has role 'system'"),
        ([{"content": "Hello!"}], r"history\[0\] has role None"),
        ([USER, {"role": "assistant"}, USER], r"history\[1\] has no text under 'content'"),
        ([{"role": "user", "content": None}], r"history\[0\] has no text under 'content'"),
        ([USER, AGENT, {"role": "user", "content": ["Hi"]}], r"history\[2\] has no text"),
        (["Hello!"], r"history\[0\] is a message.*got 'Hello!'"),
        ([USER, "Hi.", USER], r"history\[1\] is a message.*got 'Hi.'"),
        ("Hello!", "history is a list of chat messages, got 'Hello!'"),
        (USER, "history is a list of chat messages"),
        (5, "history is a list of chat messages, got 5"),
        ([USER, AGENT] * 8 + [USER], "history already has 8 agent turns.*max_turns=8"),
    ],
)
def test_a_malformed_history_is_refused_and_the_position_named(history, named):
    env = make()
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=named):
        env.reset(seed=0, options={"history": history})
    assert env.unwrapped.transcript.messages() == before


# ---- step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_step_before_the_reset_says_what_to_do(wrapped):
    env = make() if wrapped else PersonaDialogueEnv()
    with pytest.raises(ResetNeeded, match=r"reset"):
        env.step("Hello.")


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_step_after_the_end_says_what_to_do(wrapped):
    env = make(max_turns=1) if wrapped else PersonaDialogueEnv(max_turns=1)
    env.reset(seed=0)
    env.step("Hello.")
    with pytest.raises(ResetNeeded, match=r"over; call reset"):
        env.step("Hello again.")


def test_state_and_transcript_need_a_dialogue():
    env = PersonaDialogueEnv()
    for ask in (env.state, lambda: env.transcript):
        with pytest.raises(ResetNeeded, match=r"reset"):
            ask()


@pytest.mark.parametrize(
    ("action", "named"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        (None, "NoneType"),
        (3, "int"),
        (["Hello."], "list"),
        (b"Hello.", "bytes"),
        ("nul\0", "NUL"),
        ("lone \udc80", "surrogate"),
        ("x" * 2001, "2001 characters, the action space allows 2000.*max_utterance_length"),
    ],
)
def test_a_bad_action_is_refused_and_the_dialogue_goes_on_unharmed(action, named):
    env, twin = PersonaDialogueEnv(), PersonaDialogueEnv()
    env.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(ValueError, match=f"Invalid action: .*{named}"):
        env.step(action)
    assert env.step("I have a cat.") == twin.step("I have a cat.")


def test_the_length_of_a_line_can_be_chosen():
    env = make(max_utterance_length=10)
    env.reset(seed=0)
    env.step("x" * 10)
    with pytest.raises(ValueError, match=r"11 characters"):
        env.step("x" * 11)


def test_a_snapshot_of_a_longer_dialogue_is_refused():
    env, shorter = PersonaDialogueEnv(), PersonaDialogueEnv(max_turns=4)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"max_turns=8, this environment has 4"):
        shorter.restore(env.state())


@pytest.mark.parametrize("broken", ["judge", "partner"])
def test_a_broken_judge_or_partner_raises_and_is_not_turned_into_a_reward(broken):
    def breaks(*arguments):
        if arguments[0][0].turns:
            raise ConnectionError("the endpoint is gone")
        return ["Hello."]

    env = make(**{broken: breaks})
    env.reset(seed=0)
    with pytest.raises(ConnectionError, match=r"the endpoint is gone"):
        env.step("I have a cat.")


# ---- a domain of one's own -----------------------------------------------------------------------


def test_an_act_that_the_domain_does_not_know_is_refused():
    env = PersonaDialogueEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"Unknown act 'sing' in domain 'chatting'; it has answer"):
        env.world.domain.speak("sing", env.transcript, env.np_random)


def test_two_values_of_one_word_are_refused():
    twin = Domain(
        "twin", "a", "b", "You.", (DRINK, type(DRINK)("mood", {"calm": ("tea",)}, "", ("{v}",)))
    )
    with pytest.raises(ValueError, match=r"'tea' stands for both drink=tea and mood=calm"):
        twin.lexicon.read("Tea.")
