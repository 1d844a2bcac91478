from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest

from ppg_env import Persona, RuleJudge, Transcript, Turn, Verdict, get_domain
from ppg_env.verdict_cache import CachedJudge
from ppg_env.weighted_judge import WeightedJudge

NURSE = Persona("nurse", "chatting", "You are a nurse.", {"job": "nurse", "pet": "cat"})


class Says:
    """Gives every transcript the same verdict."""

    remote = False
    nondeterministic = False

    def __init__(self, reward=1.0, act="", claims=(), reason="so", key="says", **parts):
        self.verdict = Verdict(reward, parts, reason, act, claims)
        if key:
            self.cache_key = key

    def __call__(self, transcripts):
        self.batch = transcripts
        return [self.verdict for _ in transcripts]


class Remote(Says):
    """Answers only while the others are being asked, too."""

    remote = True

    def __init__(self, barrier, **says):
        super().__init__(**says)
        self.barrier = barrier

    def __call__(self, transcripts):
        self.barrier.wait(30)
        return super().__call__(transcripts)


def said(*lines):
    return Transcript(NURSE, NURSE.text, tuple(Turn("What?", line) for line in lines), None, 8)


def joined(**judges):
    (verdict,) = WeightedJudge(judges)([said("I am a nurse.")])
    return verdict


# ---- the joint verdict ---------------------------------------------------------------------------


def test_the_reward_is_the_weighted_mean_and_everything_is_shown():
    verdict = joined(
        rules=(0.25, Says(0.6, "disclose", ("job=nurse",), "in character", depth=0.5)),
        model=(0.75, Says(1.0, "other", ("pet=cat",), "fits", prompt_to_line=1.0, parsed=None)),
    )
    assert verdict.reward == pytest.approx(0.25 * 0.6 + 0.75 * 1.0)
    assert verdict.parts == {
        "rules": 0.6,
        "weight/rules": 0.25,
        "rules/depth": 0.5,
        "model": 1.0,
        "weight/model": 0.75,
        "model/prompt_to_line": 1.0,
        "model/parsed": None,
        "prompt_to_line": 1.0,
        "parsed": None,
    }
    assert verdict.reason == "rules: in character; model: fits"
    assert (verdict.act, verdict.claims) == ("disclose", ("job=nurse",))


def test_act_and_claims_are_those_of_the_first_judge_that_reads_some():
    verdict = joined(
        a=(0.4, Says()), b=(0.3, Says(claims=("pet=cat",))), c=(0.3, Says(act="evade"))
    )
    assert (verdict.act, verdict.claims) == ("evade", ("pet=cat",))


@pytest.mark.parametrize("others", [1.0, 0.0])
def test_a_turn_that_one_judge_cannot_score_is_unscorable(others):
    verdict = joined(a=(0.01, Says(None)), b=(0.99, Says(others)))
    assert verdict.reward is None
    assert verdict.parts["a"] is None and verdict.parts["b"] == others


@pytest.mark.parametrize("part", ["prompt_to_line", "line_to_line"])
def test_who_comes_first_speaks_for_the_persona_metrics_also_where_it_cannot_tell(part):
    first, second = Says(**{part: None}), Says(**{part: 1.0})
    assert joined(a=(0.2, Says()), b=(0.4, first), c=(0.4, second)).parts[part] is None
    assert joined(a=(0.2, Says()), b=(0.4, second), c=(0.4, first)).parts[part] == 1.0


@pytest.mark.parametrize("part", ["well_formed", "parsed"])
@pytest.mark.parametrize(
    ("given", "expected"), [((1.0, 0.0), 0.0), ((None, 1.0), 1.0), ((None, None), None)]
)
def test_one_judge_that_objects_to_the_form_is_enough(part, given, expected):
    judges = {str(i): (0.5, Says(**{part: value})) for i, value in enumerate(given)}
    assert joined(**judges).parts[part] == expected


def test_a_part_that_no_judge_gives_is_not_made_up():
    assert set(joined(a=(1.0, Says())).parts) == {"a", "weight/a"}


def test_a_perfect_turn_earns_no_more_than_one():
    """Ten weights of 0.1 sum to a little more or less than 1."""
    weights = [0.1] * 9 + [0.1000005]
    verdict = joined(**{str(i): (weight, Says()) for i, weight in enumerate(weights)})
    assert verdict.reward == 1.0


def test_each_judge_gets_the_whole_batch_and_verdicts_keep_their_order():
    rules, other = RuleJudge(get_domain("chatting")), Says(0.0)
    batch = [said("I work as a nurse."), said("I work as a cook."), said("Hm.", "I have a cat.")]
    verdicts = WeightedJudge({"rules": (0.5, rules), "other": (0.5, other)})(batch)
    plain = RuleJudge(get_domain("chatting"))(batch)
    assert [v.reward for v in verdicts] == [p.reward / 2 for p in plain]
    assert [v.act for v in verdicts] == [p.act for p in plain] and other.batch is batch


def test_a_weighted_judge_may_be_a_part_of_another():
    inner = WeightedJudge({"x": (0.5, Says(0.0, well_formed=0.0)), "y": (0.5, Says())})
    verdict = joined(inner=(0.5, inner), z=(0.5, Says()))
    assert verdict.reward == 0.75 and verdict.parts["inner/x"] == 0.0
    assert verdict.parts["inner/weight/x"] == 0.5 and verdict.parts["inner/x/well_formed"] == 0.0
    assert verdict.parts["well_formed"] == 0.0


def test_an_empty_batch_asks_nobody():
    judge = Says()
    assert WeightedJudge({"a": (1.0, judge)})([]) == [] and not hasattr(judge, "batch")


# ---- what can go wrong ---------------------------------------------------------------------------

WRONG = {
    "none": ({}, r"no judges; hand in \{\"name\": \(weight, judge\)"),
    "sum": ({"a": (0.5, Says()), "b": (0.6, Says())}, r"sum to 1, got \{'a': 0.5, 'b': 0.6\}"),
    "zero": ({"a": (0.0, Says()), "b": (1.0, Says())}, "above 0 and sum to 1, got"),
    "negative": ({"a": (-0.5, Says()), "b": (1.5, Says())}, "above 0 and sum to 1, got"),
    "nan": ({"a": (float("nan"), Says())}, "above 0 and sum to 1, got"),
    "text": ({"a": ("1", Says())}, "above 0 and sum to 1, got"),
    "no pair": ({"a": Says()}, r"'a' needs \(weight, judge\), got <"),
    "swapped": ({"a": (Says(), 1.0)}, r"'a' needs \(weight, judge\), got \("),
    "slash": ({"a/b": (1.0, Says())}, "'a/b' cannot be the name of a judge"),
    "no name": ({"": (1.0, Says())}, "'' cannot be the name of a judge"),
    "part": ({"well_formed": (1.0, Says())}, "'well_formed' cannot be the name of a judge"),
    "weight": ({"weight": (1.0, Says())}, "'weight' cannot be the name of a judge"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_weights_and_names_are_refused(case):
    judges, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        WeightedJudge(judges)


def test_thirds_and_numpy_weights_are_fine():
    joined(a=(1 / 3, Says()), b=(1 / 3, Says()), c=(1 / 3, Says()))
    verdict = joined(a=(np.float32(0.3), Says()), b=(np.float32(0.7), Says(0.5)))
    assert verdict.reward == pytest.approx(0.65) and type(verdict.parts["weight/a"]) is float


def test_a_judge_that_returns_too_few_verdicts_is_named():
    judge = WeightedJudge({"good": (0.5, Says()), "short": (0.5, lambda transcripts: [])})
    with pytest.raises(ValueError, match="'short' returned 0 verdicts for 1 transcripts"):
        judge([said("Hello.")])


# ---- judges that wait for a server ---------------------------------------------------------------


def test_remote_judges_are_asked_side_by_side():
    barrier = threading.Barrier(2)
    verdict = joined(
        a=(0.2, Remote(barrier, reward=0.5, reason="first")),
        b=(0.3, Says(reason="second")),
        c=(0.5, Remote(barrier, reward=0.0, reason="third")),
    )
    assert verdict.reward == pytest.approx(0.4)
    assert verdict.reason == "a: first; b: second; c: third"


def test_the_error_of_a_remote_judge_is_raised():
    def fails(transcripts):
        raise RuntimeError("no connection")

    fails.remote = True
    with pytest.raises(RuntimeError, match="no connection"):
        joined(a=(0.5, fails), b=(0.5, Remote(threading.Barrier(1))))


def test_a_judge_without_threads_is_asked_in_the_callers_thread():
    threads = []

    def asks(transcripts):
        threads.append(threading.current_thread())
        return Says()(transcripts)

    barrier = threading.Barrier(2)
    weighted = {"a": (0.2, asks), "b": (0.3, Remote(barrier)), "c": (0.3, Remote(barrier))}
    joined(**weighted, d=(0.2, asks))
    assert threads == [threading.current_thread()] * 2


# ---- what others look up -------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["remote", "nondeterministic"])
def test_one_part_is_enough_to_be_remote_or_nondeterministic(attribute):
    part = Says()
    judge = WeightedJudge({"a": (0.5, Says()), "b": (0.5, part)})
    bare = WeightedJudge({"a": (1.0, lambda transcripts: [])})
    assert getattr(judge, attribute) is False and getattr(bare, attribute) is False
    setattr(part, attribute, True)
    assert getattr(judge, attribute) is True


def test_whatever_determines_the_verdicts_is_in_the_cache_key():
    def key(**judges):
        return WeightedJudge(judges).cache_key

    keys = [
        key(a=(0.5, Says(key="x")), b=(0.5, Says(key="y"))),
        key(a=(0.5, Says(key="x")), b=(0.5, Says(key="z"))),
        key(a=(0.4, Says(key="x")), b=(0.6, Says(key="y"))),
        key(a=(0.5, Says(key="x")), c=(0.5, Says(key="y"))),
        key(b=(0.5, Says(key="y")), a=(0.5, Says(key="x"))),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key(a=(0.5, Says(key="x")), b=(0.5, Says(key="y")))


def test_without_a_cache_key_of_a_part_there_is_none_and_a_cache_says_which(tmp_path):
    judge = WeightedJudge({"a": (0.5, Says()), "rules": (0.5, Says(key=None))})
    assert getattr(judge, "cache_key", None) is None
    with pytest.raises(ValueError, match=r"no cache_key.*'rules', a Says.*Give it an attribute"):
        CachedJudge(judge, tmp_path / "verdicts.sqlite")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda j: pickle.loads(pickle.dumps(j))])
def test_copies_and_kept_verdicts_are_equal(tmp_path, duplicate):
    rules = RuleJudge(get_domain("chatting"))
    judge = WeightedJudge({"rules": (0.5, rules), "says": (0.5, Says(well_formed=1.0))})
    expected = judge([said("I have a cat.")])
    assert duplicate(judge)([said("I have a cat.")]) == expected
    for _ in range(2):
        assert CachedJudge(judge, tmp_path / "verdicts.sqlite")([said("I have a cat.")]) == expected
