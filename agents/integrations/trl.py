"""TRL's GRPOTrainer with per-turn credit: generation, vLLM, PEFT, Accelerate and so on stay TRL's.

    envs = gym.make_vec("ppg_env:PersonaDialogue-v0", num_envs=64, domain="therapy")
    trainer = PartialCreditTrainer(
        "Qwen/Qwen2.5-0.5B-Instruct",
        envs=envs,
        credit="kstep:3",
        args=GRPOConfig("runs/trl", per_device_train_batch_size=8, gradient_accumulation_steps=8),
    )
    trainer.train()

GRPO gives a conversation one advantage; here each token has that of its turn. TRL's loss takes
advantages of shape (dialogues, tokens), so one method is overridden and the loss is TRL's own.
See docs/engines.md for what that makes exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from gymnasium.vector import SyncVectorEnv, VectorEnv

from ..credit import Credit
from .trl_rollout import DialogueRollout
from .turn_credit import TurnCredit, on_tokens

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError(f'TRL is not there ({error}): pip install -e ".[trl]"') from error

RolloutFunc = Callable[[list[Any], Any], dict[str, Any]]


class PartialCreditTrainer(GRPOTrainer):
    """GRPOTrainer whose tokens carry their turn's advantage instead of the conversation's.

    What the environment says is the reward, so there are no `reward_funcs`; the rows of the data
    set only stand for groups of `num_generations` dialogues, and one is made if none is given. An
    epoch is then one batch of dialogues: set `args.max_steps`.

    Args:
        model, args, processing_class, peft_config, ...: as for GRPOTrainer. `scale_rewards` and the
            like shape GRPO's advantages, which are replaced, and so have no effect.
            `max_completion_length` is the longest line in tokens, not that of a dialogue.
        envs: a vector environment of chat messages with as many slots as a process plays at a time:
            `per_device_train_batch_size` x `steps_per_generation`.
        credit: which rewards a turn answers for: a Credit, or text such as "kstep:3".
        baseline, scale, divide_by_std: see `PPGAgent`.
        max_turns: the most turns that a dialogue can have; None = what the environment tells.
        rollout_func: plays the dialogues instead of `envs`. Besides TRL's `prompt_ids`,
            `completion_ids`, `logprobs` and `env_mask` it returns lists of one entry a dialogue:
            `turn_ids` (for each completion token the turn that spoke it, -1 for others),
            `turn_rewards` (one number a turn, None or NaN = unscorable), `group_id`, and, where a
            credit follows the dialogue's phases, `boundaries`.

    Raises:
        ValueError: settings under which per-turn advantages would not reach their turns; a number
            of slots other than TRL asks for.
    """

    def __init__(
        self,
        model: Any,
        *,
        envs: VectorEnv[Any, Any, Any] | None = None,
        credit: Credit | str = "full",
        baseline: str = "leave_one_out",
        scale: str = "mean_window",
        divide_by_std: bool = False,
        max_turns: int | None = None,
        args: GRPOConfig | None = None,
        rollout_func: RolloutFunc | None = None,
        train_dataset: Any = None,
        **settings: Any,
    ) -> None:
        if (envs is None) == (rollout_func is None):
            raise ValueError("Give envs, or a rollout_func that plays them; one of the two.")
        for name in ("reward_funcs", "tools", "environment_factory", "eval_dataset"):
            if settings.get(name):
                raise ValueError(_USELESS[name])
        args = GRPOConfig("trainer_output") if args is None else args
        _refuse_unsuitable(args)
        if envs is not None:
            _refuse_other_sizes(args, envs)
            rollout_func = DialogueRollout(envs)
            max_turns = _max_turns(envs) if max_turns is None else max_turns
        self.turn_credit = TurnCredit(credit, baseline, scale, max_turns, divide_by_std)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(
                model,
                reward_funcs=episode_reward,
                args=args,
                train_dataset=_stand_ins(args) if train_dataset is None else train_dataset,
                rollout_func=rollout_func,
                **settings,
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch with advantages (dialogues, tokens); TRL calls it once a batch."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        turns = _turns(inputs, mask.cpu().numpy())
        advantage_BL = self._token_advantages(inputs, turns)
        output["advantages"] = torch.as_tensor(advantage_BL).to(output["advantages"])
        return output

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss; refuse advantages that are not ours."""
        if inputs["advantages"].shape != inputs["completion_ids"].shape:
            raise RuntimeError(
                f"Advantages of shape {tuple(inputs['advantages'].shape)} reached the loss instead "
                f"of {tuple(inputs['completion_ids'].shape)}: this version of TRL makes them "
                "elsewhere. PartialCreditTrainer is tested with trl 1.16."
            )
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _token_advantages(self, inputs: Sequence[dict[str, Any]], turn_BL: np.ndarray) -> Any:
        """Return advantage_BL of this process; peers in other processes count as those in it."""
        keys = ("turn_rewards", "group_id", "boundaries")
        own = [{key: example.get(key) for key in keys} for example in inputs]
        first = self.accelerator.process_index * len(own)
        everyone = gather_object(own)
        reward_BT, alive_BT = _padded([_numbers(one["turn_rewards"]) for one in everyone])
        groups = [one["group_id"] for one in everyone]
        advantage_BT, _ = self.turn_credit.advantages(
            reward_BT,
            alive_BT,
            None if None in groups else groups,
            _boundaries([one["boundaries"] for one in everyone]),
        )
        return on_tokens(advantage_BT[first : first + len(own)], turn_BL)


_USELESS = {
    "reward_funcs": "The rewards are the environment's, one a turn; reward_funcs have no place.",
    "tools": "Dialogues are played by envs or rollout_func; tools have no place in them.",
    "environment_factory": (
        "TRL's environment_factory gives one reward a conversation; pass a vector environment as "
        "envs, or a rollout_func that returns turn_ids and turn_rewards."
    ),
    "eval_dataset": (
        "TRL would evaluate on the training environment. Save the model and use "
        "agents.evaluate.evaluate_policy with held-out personas."
    ),
}


def episode_reward(
    completions: Sequence[Any],
    turn_rewards: Sequence[Sequence[float | None] | None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float]:
    """Return the sum of each dialogue's rewards: what TRL logs as `reward`, and no more."""
    found = [_numbers(each) for each in turn_rewards or [] if each is not None]
    if len(found) != len(completions):
        raise ValueError(
            f"{len(found)} of {len(completions)} dialogues have turn_rewards: rollout_func returns "
            "a list of them for each dialogue, under this name."
        )
    scored = np.concatenate(found)
    scored = scored[~np.isnan(scored)]
    if log_metric is not None and len(scored):
        log_metric("reward_per_turn", float(scored.mean()))
    return [float(np.nansum(each)) for each in found]


# --- checks at the door ---------------------------------------------------------------------------


def _refuse_unsuitable(args: GRPOConfig) -> None:
    """Refuse settings that would smear a turn's advantage over others, or bias the gradient."""
    if args.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level={args.importance_sampling_level!r} has one ratio a "
            "conversation, which gives all its tokens the same weight: per-turn credit would be "
            "lost. Use 'token'."
        )
    full = {
        "temperature": (args.temperature,),
        "top_p": (1.0,),
        "top_k": (0, -1),
        "min_p": (None, 0.0),
        "repetition_penalty": (1.0,),
    }
    for name, allowed in full.items():
        value = (args.generation_kwargs or {}).get(name, getattr(args, name))
        if value not in allowed:
            raise ValueError(
                f"{name}={value} samples from another distribution than the loss supposes; "
                f"take {allowed[0]}."
            )


def _refuse_other_sizes(args: GRPOConfig, envs: VectorEnv[Any, Any, Any]) -> None:
    wanted = args.per_device_train_batch_size * args.steps_per_generation
    if envs.num_envs != wanted:
        raise ValueError(
            f"envs has {envs.num_envs} slots, but a process plays per_device_train_batch_size x "
            f"steps_per_generation = {args.per_device_train_batch_size} x "
            f"{args.steps_per_generation} = {wanted} dialogues at a time; make them equal."
        )
    if wanted % args.num_generations:
        raise ValueError(
            f"num_generations={args.num_generations} is the size of a group and must divide the "
            f"{wanted} dialogues that a process plays at a time."
        )


def _turns(inputs: Sequence[dict[str, Any]], mask_BL: np.ndarray) -> np.ndarray:
    """Return turn_BL of what TRL trains on, -1 elsewhere.

    Raises:
        ValueError: no turn ids; ids that do not fit rewards or mask.
    """
    turn_BL = np.full(mask_BL.shape, -1, dtype=np.int64)
    for row, example in enumerate(inputs):
        if example.get("turn_ids") is None:
            raise ValueError(
                f"Dialogue {row} has no turn_ids: rollout_func returns a list of them for each "
                "dialogue, under this name."
            )
        turn_L = np.asarray(example["turn_ids"], dtype=np.int64)
        said = turn_L[turn_L >= 0]
        spoken, num_rewards = np.unique(said), len(example["turn_rewards"])
        if not np.array_equal(spoken, np.arange(num_rewards)) or (np.diff(said) < 0).any():
            raise ValueError(
                f"Dialogue {row} has {num_rewards} turn_rewards, but its turn_ids name the turns "
                f"{spoken.tolist()}. They count from 0 to {num_rewards - 1}, never falling, and "
                "every turn has tokens."
            )
        if (
            len(turn_L) > len(mask_BL[row])
            or ((turn_L < 0) & (mask_BL[row, : len(turn_L)] == 1)).any()
        ):
            raise ValueError(
                f"The turn_ids of dialogue {row} do not fit its completion: give one a token, and "
                "-1 exactly where env_mask is 0."
            )
        turn_BL[row, : len(turn_L)] = turn_L
        if mask_BL[row, len(turn_L) :].any():
            raise ValueError(
                f"Dialogue {row} has {len(turn_L)} turn_ids for {int(mask_BL[row].sum())} or more "
                "completion tokens; give one a token."
            )
    return np.where(mask_BL == 1, turn_BL, -1)


def _numbers(rewards: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if r is None else r for r in rewards], dtype=np.float64)


def _padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (reward_BT, alive_BT)."""
    length_B = np.array([len(row) for row in rows])
    alive_BT = np.arange(max(1, length_B.max())) < length_B[:, None]
    reward_BT = np.zeros(alive_BT.shape)
    reward_BT[alive_BT] = np.concatenate(rows)
    return reward_BT, alive_BT


def _boundaries(each: Sequence[Sequence[int] | None]) -> Sequence[Sequence[int]] | None:
    found = [tuple(one) for one in each if one is not None]
    return found if len(found) == len(each) else None


def _max_turns(envs: VectorEnv[Any, Any, Any]) -> int | None:
    plain: Any = envs.unwrapped
    if isinstance(plain, SyncVectorEnv):
        plain = plain.envs[0].unwrapped
    return getattr(plain, "max_turns", None)


def _stand_ins(args: GRPOConfig) -> Any:
    """Return a data set with one row for each group of a batch; the environment makes prompts."""
    rows = [[{"role": "user", "content": ""}]] * (
        args.generation_batch_size // args.num_generations
    )
    return Dataset.from_dict({"prompt": rows})
