"""The grammar of methods: what a name means, and what a slip is told."""

from __future__ import annotations

import numpy as np
import pytest

from agents import PPGAgent, PPOAgent, load_policy
from agents.methods import UNTRAINED, parse_method


@pytest.mark.parametrize("name", ["untrained", "base", " base "])
def test_the_model_as_it_is_has_two_names(name: str) -> None:
    method = parse_method(name)
    assert (method.name, method.make, method.credit) == (UNTRAINED, None, None)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("greedy", "greedy"),
        ("KStep:3", "kstep:3"),
        ("segment", "segment"),
        ("segment:2", "segment:2"),
        ("segment:0,3,6", "segment:0,3,6"),
        ("discounted:0.9", "discounted:0.9"),
        ("trajectory", "trajectory"),
        ("full", "full"),
    ],
)
def test_every_credit_is_a_method_of_its_name(name: str, canonical: str) -> None:
    method = parse_method(name)
    assert method.name == canonical
    assert method.credit is not None and method.make is not None
    agent = method.make(load_policy("nano"), None, seed=3)
    assert type(agent) is PPGAgent and agent.credit.name == canonical and agent.seed == 3


def test_ppo_is_the_actor_critic_and_has_no_credit() -> None:
    method = parse_method("ppo")
    assert method.credit is None and method.make is PPOAgent


def test_a_class_of_ones_own_is_a_method() -> None:
    from tests.own_methods import Own

    assert parse_method("tests.own_methods:Own").make is Own


def test_a_credit_of_ones_own_is_a_method() -> None:
    method = parse_method("tests.own_methods:Opening")
    assert method.name == "tests.own_methods:Opening" and method.credit is not None
    assert np.array_equal(method.credit.weights(3)[0], [1.0, 1.0, 1.0])
    assert method.make is not None
    agent = method.make(load_policy("nano"), None)
    assert agent.credit.name == "opening"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gredy", r"Unknown method 'gredy'.*'greedy'.*untrained, ppo, or a class"),
        ("kstep", r"Unknown method 'kstep'.*kstep:3"),
        ("kstep:abc", r"Unknown method 'kstep:abc'"),
        ("", r"Unknown method ''"),
        ("no_such_module:Agent", r"Cannot import 'no_such_module'.*PYTHONPATH"),
        ("tests.own_methods:Missing", r"'tests.own_methods' has no 'Missing'"),
        ("tests.own_methods:NOTHING", r"is a int without `learn`"),
        (":Agent", r"Cannot import ''"),
    ],
)
def test_a_slip_is_told_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(name)
