import pickle

import numpy as np
import pytest
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st

from ppg_env.spaces import DialogueMessages, Utterance

CHAT = [
    {"role": "system", "content": "You are Mia."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
]


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "I have a cat.",
        "naïve café",
        "東京に住んでいます。",
        "أعيش في القاهرة.",
        "אני גר בחיפה.",
        "🙂👩‍👩‍👧‍👦",
        "two\nlines\tand a tab",
        "\u200bx",
    ],
)
def test_an_utterance_may_hold_any_script(text):
    assert text in Utterance()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("\n\t", "empty"),
        ("\u3000", "empty"),
        ("nul\0here", "NUL"),
        ("nül\0", "NUL"),
        ("lone \ud83d here", "surrogate"),
        ("\udfff", "surrogate"),
        (b"bytes", "bytes"),
        (None, "NoneType"),
        (3, "int"),
        (["a"], "list"),
        ("x" * 2001, "2001 characters"),
    ],
)
def test_what_is_no_utterance_is_refused_with_its_reason(text, named):
    space = Utterance(2000)
    assert text not in space
    assert named in space.problem(text)


def test_the_length_limit_counts_characters_and_includes_its_end():
    space = Utterance(3)
    assert "日本語" in space
    assert "日本語x" not in space


@given(st.text(min_size=1, max_size=50))
def test_every_utterance_survives_utf8(text):
    if text in Utterance():
        assert text.encode("utf-8").decode("utf-8") == text


@pytest.mark.parametrize("space", [Utterance(40), DialogueMessages(10)])
def test_samples_belong_to_their_space_and_follow_its_seed(space):
    space.seed(5)
    first = [space.sample() for _ in range(50)]
    space.seed(5)
    assert first == [space.sample() for _ in range(50)]
    assert all(sample in space for sample in first)
    assert len({str(sample) for sample in first}) > 10


@pytest.mark.parametrize("max_length", [1, 2, 7])
def test_samples_keep_to_a_short_limit(max_length):
    space = Utterance(max_length, seed=0)
    assert all(space.sample() in space for _ in range(200))


@pytest.mark.parametrize("max_messages", [1, 2, 3, 4])
def test_message_samples_keep_to_a_small_limit(max_messages):
    space = DialogueMessages(max_messages, seed=0)
    assert all(space.sample() in space for _ in range(100))


@pytest.mark.parametrize("space", [Utterance(), DialogueMessages(10)])
def test_sampling_refuses_what_it_would_ignore(space):
    with pytest.raises(ValueError, match=r"mask"):
        space.sample(mask=np.ones(2, dtype=np.int8))


def test_a_maximum_length_below_one_is_refused():
    with pytest.raises(ValueError, match=r"max_length must be at least 1, got 0"):
        Utterance(0)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_messages_are_system_then_user_and_assistant_in_turn(length):
    assert CHAT[:length] in DialogueMessages(4)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        CHAT[1:],
        [CHAT[0], CHAT[2]],
        [CHAT[0], CHAT[1], CHAT[1]],
        [*CHAT[:3], CHAT[2]],
        [{"role": "system"}],
        [{"role": "system", "content": None}],
        ["You are Mia."],
        "You are Mia.",
        None,
        [*CHAT, CHAT[2]],
    ],
)
def test_what_is_no_dialogue_is_refused(messages):
    assert messages not in DialogueMessages(4)


def test_spaces_are_equal_by_their_limits_and_survive_pickling():
    assert Utterance(5) == Utterance(5) != Utterance(6)
    assert DialogueMessages(5) == DialogueMessages(5) != DialogueMessages(6)
    assert Utterance(5) != DialogueMessages(5)
    for space in (Utterance(5), DialogueMessages(5)):
        assert pickle.loads(pickle.dumps(space)) == space
    assert repr(Utterance(5)) == "Utterance(max_length=5)"
    assert repr(DialogueMessages(5)) == "DialogueMessages(max_messages=5)"


def test_batched_spaces_hold_tuples():
    space = batch_space(Utterance(), 3)
    assert ("a", "b", "c") in space
    assert ("a", "b") not in space
    assert not Utterance().is_np_flattenable
    assert not DialogueMessages(4).is_np_flattenable
