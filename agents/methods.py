"""What can be compared, by name: "untrained", "ppo", any credit, or a class of your own.

untrained (or base)     the model as it is
greedy  kstep:3  segment  segment:2  discounted:0.9  full  trajectory     see agents.credit
ppo                     the actor-critic baseline
my_module:MyCredit      a credit without arguments (or an instance of one)
my_module:MyAgent       called as MyAgent(policy, envs, **settings), as PPGAgent is. It has
                        learn(total_timesteps, callback); the callback reads `log` (numbers of the
                        last update) and ends learning by False. It is evaluated by its own predict,
                        without one by its `policy`; `num_timesteps` and `num_updates` may be there
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym

from .credit import CREDIT_NAMES, Credit, parse_credit
from .lm_policy import LMPolicy
from .ppg import PPGAgent
from .ppo import PPOAgent
from .provenance import file_hash

UNTRAINED = "untrained"
VectorEnv = gym.vector.VectorEnv[Any, Any, Any]


@dataclass(frozen=True)
class Method:
    """A way to learn, by its canonical name.

    Attributes:
        name: e.g. "kstep:3"; equal names are equal methods.
        credit: which rewards a turn answers for; None where that is not a matrix.
        make: (policy, envs, **settings) -> agent; None for the untrained model.
        source: hash of the file of a class of one's own, "" for what is bundled.
    """

    name: str
    credit: Credit | None = None
    make: Callable[..., PPGAgent] | None = None
    source: str = ""


def parse_method(text: str) -> Method:
    """Return the method of that name.

    Raises:
        ValueError: there is none; says what there is.
    """
    name = text.strip()
    if name in (UNTRAINED, "base"):
        return Method(UNTRAINED)
    if name == "ppo":
        return Method("ppo", make=PPOAgent)
    module, _, attribute = name.partition(":")
    if attribute.isidentifier() and module.lower() not in CREDIT_NAMES:
        return _own(name, module, attribute)
    try:
        credit = parse_credit(name)
    except ValueError as error:
        raise ValueError(
            f"Unknown method {text!r}. {error} Besides: untrained, ppo, or a class of your own as "
            "module:Class."
        ) from None
    return _with(credit.name, credit)


def _with(name: str, credit: Credit, source: str = "") -> Method:
    def make(policy: LMPolicy, envs: VectorEnv | None, **settings: Any) -> PPGAgent:
        return PPGAgent(policy, envs, credit, **settings)

    return Method(name, credit, make, source)


def _own(name: str, module: str, attribute: str) -> Method:
    """Return the method of a user's class."""
    try:
        imported = importlib.import_module(module)
        found = getattr(imported, attribute)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise ValueError(
            f"Cannot import {module!r} for the method {name!r} ({error}); run the command where "
            "the module is, or put its folder into PYTHONPATH."
        ) from error
    except AttributeError:
        raise ValueError(f"{module!r} has no {attribute!r} for the method {name!r}.") from None
    if isinstance(found, type) and hasattr(found, "weights"):
        found = found()
    source = file_hash(imported.__file__ or "")
    if hasattr(found, "weights"):
        return _with(name, found, source)
    if callable(found) and hasattr(found, "learn"):
        return Method(name, make=found, source=source)
    raise ValueError(
        f"The method {name!r} is a {type(found).__name__} without `learn` (an agent's class) and "
        "without `weights` (a credit)."
    )
