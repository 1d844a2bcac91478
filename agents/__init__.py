"""THE LEARNERS: agents that reach any dialogue environment through reset/step.

    from agents import KStepAgent
    agent = KStepAgent("nano", envs, k=3).learn(10_000)

Names that need torch are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .credit import (
    Credit,
    Discounted,
    FullPlanning,
    Greedy,
    KStep,
    Segment,
    Subset,
    Trajectory,
    advantages,
    credit_weights,
    generalized_advantages,
    leave_one_out,
    parse_credit,
    partial_returns,
)
from .policy import Policy, RandomPolicy, ScriptedPolicy

if TYPE_CHECKING:
    from .evaluate import Evaluation, evaluate_policy, evaluate_steps
    from .lm_policy import LMPolicy
    from .loading import load_policy
    from .logs import (
        LoggedDialogue,
        decompose,
        from_dataset,
        join_lines,
        parse_dialogue,
        read_log,
        score_log,
        to_dataset,
        write_log,
    )
    from .ppg import FullPlanningAgent, GreedyAgent, KStepAgent, PPGAgent, SegmentAgent
    from .ppo import PPOAgent
    from .rollout import RolloutBatch, collect_rollouts
    from .splits import split_by_persona

_LATE = {
    "Evaluation": "evaluate",
    "FullPlanningAgent": "ppg",
    "GreedyAgent": "ppg",
    "KStepAgent": "ppg",
    "LMPolicy": "lm_policy",
    "LoggedDialogue": "logs",
    "PPGAgent": "ppg",
    "PPOAgent": "ppo",
    "RolloutBatch": "rollout",
    "SegmentAgent": "ppg",
    "collect_rollouts": "rollout",
    "decompose": "logs",
    "evaluate_policy": "evaluate",
    "evaluate_steps": "evaluate",
    "from_dataset": "logs",
    "join_lines": "logs",
    "load_policy": "loading",
    "parse_dialogue": "logs",
    "read_log": "logs",
    "score_log": "logs",
    "split_by_persona": "splits",
    "to_dataset": "logs",
    "write_log": "logs",
}

__all__ = [
    "Credit",
    "Discounted",
    "Evaluation",
    "FullPlanning",
    "FullPlanningAgent",
    "Greedy",
    "GreedyAgent",
    "KStep",
    "KStepAgent",
    "LMPolicy",
    "LoggedDialogue",
    "PPGAgent",
    "PPOAgent",
    "Policy",
    "RandomPolicy",
    "RolloutBatch",
    "ScriptedPolicy",
    "Segment",
    "SegmentAgent",
    "Subset",
    "Trajectory",
    "advantages",
    "collect_rollouts",
    "credit_weights",
    "decompose",
    "evaluate_policy",
    "evaluate_steps",
    "from_dataset",
    "generalized_advantages",
    "join_lines",
    "leave_one_out",
    "load_policy",
    "parse_credit",
    "parse_dialogue",
    "partial_returns",
    "read_log",
    "score_log",
    "split_by_persona",
    "to_dataset",
    "write_log",
]


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f".{_LATE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
