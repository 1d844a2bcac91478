"""Collect whole dialogues from a vector environment through the standard reset/step loop.

    batch = collect_rollouts(envs, policy, seed=0, options={"group_size": 8})
    batch.reward_BT[batch.alive_BT].mean()

Works with any policy that has `predict`; a policy that has `begin` (`LMPolicy`) speaks for all
slots at once and leaves its tokens and log-probabilities in the batch. B slots = dialogues, T
turns, L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from .policy import Messages, Policy
from .tape import Tape

# Keeps the agent's random streams apart from those that an environment spawns from the same seed.
_AGENT_STREAM = 0x5BEA4

# What a slot whose dialogue is over "says" while others go on; environments ignore it.
_FILLER = "..."


@dataclass(frozen=True)
class RolloutBatch:
    """B dialogues of up to T turns. Entries after a dialogue's end are not alive."""

    reward_BT: np.ndarray
    """Reward of each turn, float64; NaN where the turn could not be scored, 0 where not alive."""
    alive_BT: np.ndarray
    """Whether the turn took place, bool."""
    group_B: np.ndarray
    """Group id of each dialogue, int64; its own number where the environment has no groups."""
    cut_BT: np.ndarray
    """Whether the line was cut by `max_new_tokens`, bool; all False for policies without tokens."""
    truncated_B: np.ndarray
    """Whether the environment, or a full model context, cut the dialogue off, bool."""
    overflow_B: np.ndarray
    """Whether the dialogue was stopped because it filled the model's context, bool."""
    part_BT: dict[str, np.ndarray]
    """The reward's components by name, float64 (B, T); NaN where there was none."""
    transcripts: list[Messages]
    """The last observation of each dialogue: all that was said."""
    boundaries: tuple[int, ...] | None
    """First turn of each phase, where the environment has phases."""
    seconds: float
    """Wall-clock time of the collection."""
    num_tokens: int = 0
    """Tokens that the agent sampled; 0 where the policy has no tokens or they were not kept."""
    tape: Tape | None = None
    """The dialogues in tokens; None where the policy has none."""
    unscorable_BT: np.ndarray | None = None
    """Whether the judge could not score the turn, bool, also where a fixed reward stands in for it;
    None = where the reward is NaN."""
    personas: tuple[str, ...] = ()
    """Persona id of each dialogue; "" where the environment tells none."""
    domains: tuple[str, ...] = ()
    """Domain of each dialogue; "" where the environment tells none."""
    reasons: tuple[tuple[str, ...], ...] = ()
    """The judge's reason for each turn that took place, a dialogue at a time; "" = none."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer that the tape's ids belong to."""
    behaviour: str = ""
    """Name of the policy that spoke; "" where it has none."""
    judge: str = ""
    """Name of the judge that scored; "" where the environment tells none."""

    @property
    def num_turns(self) -> int:
        """Agent turns in the batch: timesteps."""
        return int(self.alive_BT.sum())

    @property
    def unscorable_rate(self) -> float:
        """Share of turns that the judge could not score."""
        marked_BT = self.unscorable_BT
        unscorable_BT = np.isnan(self.reward_BT) if marked_BT is None else marked_BT
        return float(unscorable_BT[self.alive_BT].mean())

    def without_tape(self) -> RolloutBatch:
        """Return the batch without its tokens."""
        return replace(self, tape=None)

    def records(self, first: int | None = None) -> list[dict[str, Any]]:
        """Return the dialogues as JSON objects, see logs.py; those without a turn are left out.

        What is NaN here is None there. With `first`, only of the first so many slots.
        """
        return [self._record(int(b)) for b in np.flatnonzero(self.alive_BT[:first].any(axis=1))]

    def _record(self, b: int) -> dict[str, Any]:
        def spoken(value_T: np.ndarray) -> list[float | None]:
            return [None if np.isnan(v) else float(v) for v in value_T[self.alive_BT[b]]]

        record: dict[str, Any] = {}
        if self.domains:
            record["domain"] = self.domains[b]
        if self.personas:
            record["persona"] = self.personas[b]
        record["group"] = int(self.group_B[b])
        if self.behaviour:
            record["behaviour"] = self.behaviour
        if self.judge:
            record["judge"] = self.judge
        record["messages"] = self.transcripts[b]
        record["rewards"] = spoken(self.reward_BT[b])
        record["reward_parts"] = {name: spoken(p_BT[b]) for name, p_BT in self.part_BT.items()}
        if self.reasons:
            record["reasons"] = list(self.reasons[b])
        if self.tape is not None:
            spoken_lines = self.tape.lines(b)
            record["token_ids"] = [ids.tolist() for ids, _ in spoken_lines]
            record["logprobs"] = [
                [round(logprob, 6) for logprob in logprobs.tolist()] for _, logprobs in spoken_lines
            ]
            record["tokenizer"] = self.tokenizer
        return record


def join_batches(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Return the dialogues of several batches as one, without tokens; `seconds` is the longest.

    Groups get new ids: those of different batches stay apart, whatever their ids were.
    """
    num_turns = max(batch.reward_BT.shape[1] for batch in batches)
    groups = [np.unique(batch.group_B, return_inverse=True)[1] for batch in batches]
    first_ids = np.cumsum([0, *(index_B.max(initial=-1) + 1 for index_B in groups)])

    def joined(arrays: Sequence[np.ndarray], fill: Any) -> np.ndarray:
        wide = [
            np.pad(a, ((0, 0), (0, num_turns - a.shape[1])), constant_values=fill) for a in arrays
        ]
        return np.concatenate(wide)

    names = dict.fromkeys(name for batch in batches for name in batch.part_BT)
    none = {id(batch): np.full(batch.reward_BT.shape, np.nan) for batch in batches}
    return RolloutBatch(
        reward_BT=joined([b.reward_BT for b in batches], 0.0),
        alive_BT=joined([b.alive_BT for b in batches], False),
        group_B=np.concatenate(
            [first + b for first, b in zip(first_ids[:-1], groups, strict=True)]
        ),
        cut_BT=joined([b.cut_BT for b in batches], False),
        truncated_B=np.concatenate([b.truncated_B for b in batches]),
        overflow_B=np.concatenate([b.overflow_B for b in batches]),
        part_BT={
            name: joined([b.part_BT.get(name, none[id(b)]) for b in batches], np.nan)
            for name in names
        },
        transcripts=[transcript for b in batches for transcript in b.transcripts],
        boundaries=batches[0].boundaries,
        seconds=max(b.seconds for b in batches),
        num_tokens=sum(b.num_tokens for b in batches),
        unscorable_BT=joined(
            [
                np.isnan(b.reward_BT) if b.unscorable_BT is None else b.unscorable_BT
                for b in batches
            ],
            False,
        ),
        personas=tuple(persona for b in batches for persona in b.personas),
        domains=tuple(domain for b in batches for domain in b.domains),
        reasons=tuple(reasons for b in batches for reasons in b.reasons),
        behaviour=batches[0].behaviour,
        judge=batches[0].judge,
    )


class _Speaker(Protocol):
    """Speaks for B dialogues side by side; `lm_policy.Conversation` is one."""

    @property
    def truncated_B(self) -> np.ndarray: ...
    @property
    def spoke_B(self) -> np.ndarray: ...

    def reply(
        self, observations: Sequence[Messages], active_B: np.ndarray, deterministic: bool
    ) -> list[str]: ...

    def tape(self) -> Tape | None: ...


@runtime_checkable
class _BatchPolicy(Protocol):
    """A policy that holds many dialogues at once."""

    def begin(self, batch_size: int, rngs: Sequence[np.random.Generator]) -> _Speaker: ...


class _OneByOne:
    """A speaker made of a policy that only has `predict`."""

    def __init__(self, policy: Policy, size: int) -> None:
        self._policy = policy
        self.truncated_B = np.zeros(size, dtype=bool)
        self.spoke_B = np.ones(size, dtype=bool)

    def reply(
        self, observations: Sequence[Messages], active_B: np.ndarray, deterministic: bool
    ) -> list[str]:
        """Return one line per active dialogue, "" for the others."""
        return [
            self._policy.predict(observation, deterministic)[0] if active else ""
            for observation, active in zip(observations, active_B, strict=True)
        ]

    def tape(self) -> None:
        """Return None: there are no tokens."""
        return None


def collect_rollouts(
    envs: VectorEnv[Any, Any, Any],
    policy: Policy | _BatchPolicy,
    *,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
    deterministic: bool = False,
    first_slot: int = 0,
    keep_tokens: bool = True,
) -> RolloutBatch:
    """Play one dialogue from start to end in every slot of `envs` and return what happened.

    Args:
        envs: a vector environment of dialogues: this project's own, or Gymnasium's
            Sync/AsyncVectorEnv.
        policy: has `predict`; if it has `begin` too, its batched conversation is used.
        seed: of the environment's reset and, in a stream of its own, of one generator per slot for
            the agent. Policies without `begin` have their own seed.
        options: passed to `reset`, e.g. {"group_size": 8}.
        deterministic: the agent takes its most likely line.
        first_slot: number of the first slot where several processes play parts of one batch:
            slot i here is then slot first_slot + i of the whole, with its seeds.
        keep_tokens: keep the policy's token record; False for mere acting.
    """
    start = time.perf_counter()
    size = envs.num_envs
    speaker = speaker_for(policy, size, seed, first_slot)
    first_group = first_slot // (options or {}).get("group_size", 1)
    observations, infos = envs.reset(
        seed=None if seed is None else seed + first_group,
        options=None if options is None else dict(options),
    )
    transcripts: list[Messages] = list(observations)
    group_B = _groups(infos, first_slot, size)
    alive_B = np.ones(size, dtype=bool)
    truncated_B = np.zeros(size, dtype=bool)
    personas, domains = _texts(infos, "persona", size), _texts(infos, "domain", size)
    rewards, alives, parts, unscorables = [], [], [], []
    reasons: list[list[str]] = [[] for _ in range(size)]

    while True:
        texts = speaker.reply(transcripts, alive_B, deterministic)
        alive_B &= speaker.spoke_B
        if not alive_B.any():
            break
        actions = tuple(
            text if alive else _FILLER for text, alive in zip(texts, alive_B, strict=True)
        )
        observations, reward_B, terminated_B, cut_off_B, infos = envs.step(actions)

        rewards.append(np.where(alive_B, reward_B, 0.0))
        alives.append(alive_B.copy())
        parts.append(_turn_parts(infos, alive_B))
        unscorables.append(alive_B & _marked(infos, "unscorable", np.isnan(rewards[-1])))
        why = _texts(infos, "reason", size)
        for slot in np.flatnonzero(alive_B):
            reasons[slot].append(why[slot])
            transcripts[slot] = _last_observation(observations, infos, int(slot))
        truncated_B |= alive_B & cut_off_B
        done_B = terminated_B | cut_off_B
        alive_B &= ~done_B
        if not alive_B.any():
            break
        _reset_finished(envs, done_B)

    alive_BT = _stack(alives, size, bool)
    tape = speaker.tape() if keep_tokens else None
    return RolloutBatch(
        reward_BT=_stack(rewards, size, np.float64),
        alive_BT=alive_BT,
        group_B=group_B,
        cut_BT=np.zeros_like(alive_BT) if tape is None else tape.cut_BT[:, : alive_BT.shape[1]],
        truncated_B=truncated_B | speaker.truncated_B,
        overflow_B=speaker.truncated_B.copy(),
        part_BT=_stack_parts(parts, size),
        transcripts=transcripts,
        boundaries=_boundaries(envs),
        seconds=time.perf_counter() - start,
        num_tokens=0 if tape is None else tape.num_sampled,
        tape=tape,
        unscorable_BT=_stack(unscorables, size, bool),
        personas=tuple(personas),
        domains=tuple(domains),
        reasons=tuple(map(tuple, reasons)),
        tokenizer=getattr(policy, "tokenizer_fingerprint", ""),
        behaviour=_name_of(policy),
        judge=str(getattr(getattr(envs.unwrapped, "world", None), "judge_name", "")),
    )


def _name_of(policy: object) -> str:
    """Return a policy's name; of a model in a folder the folder's, without where it lies."""
    name = str(getattr(policy, "name", ""))
    return Path(name).name if Path(name).is_dir() else name


def agent_generators(
    seed: int | None, number: int, first_slot: int = 0
) -> list[np.random.Generator]:
    """Return one generator per slot; slot b's depends on the seed and b alone, not on `number`."""
    sequence = np.random.SeedSequence(
        seed, spawn_key=(_AGENT_STREAM,), n_children_spawned=first_slot
    )
    return [np.random.default_rng(child) for child in sequence.spawn(number)]


def speaker_for(
    policy: Policy | _BatchPolicy, size: int, seed: int | None, first_slot: int
) -> _Speaker:
    """Return what speaks for `size` dialogues: the policy's own conversation, or one by one.

    A subclass that changes `predict` and not `begin` is asked line by line: it has its reasons.
    """
    if isinstance(policy, _BatchPolicy) and _speaks_as_it_predicts(type(policy)):
        return policy.begin(size, agent_generators(seed, size, first_slot))
    return _OneByOne(policy, size)  # type: ignore[arg-type]


def _speaks_as_it_predicts(kind: type) -> bool:
    """Whether no subclass has changed `predict` alone, which `begin` would know nothing of."""
    first = next((each for each in kind.__mro__ if {"begin", "predict"} & vars(each).keys()), kind)
    return "begin" in vars(first) or "predict" not in vars(first)


def _groups(infos: Mapping[str, Any], first_slot: int, size: int) -> np.ndarray:
    if "group_id" not in infos:
        return np.arange(first_slot, first_slot + size)
    return np.asarray(infos["group_id"], dtype=np.int64).copy()


def _texts(infos: Mapping[str, Any], key: str, size: int) -> list[str]:
    """Return a text of each slot's info, "" where there is none; of the turn just spoken."""
    found = [infos.get("final_info", {}).get(key), infos.get(key)]
    texts = [""] * size
    for slot in range(size):
        given = [values[slot] for values in found if values is not None and values[slot]]
        texts[slot] = str(given[0]) if given else ""
    return texts


def _marked(infos: Mapping[str, Any], key: str, otherwise_B: np.ndarray) -> np.ndarray:
    """Return a flag of each slot's info, bool (B,)."""
    if key not in infos:
        return otherwise_B
    marked_B = np.asarray(infos[key], dtype=bool)
    final = infos.get("final_info", {})
    if key in final:
        over_B = np.asarray(infos["_final_info"], dtype=bool)
        marked_B = np.where(over_B, np.asarray(final[key], dtype=bool), marked_B)
    return marked_B


def _turn_parts(infos: Mapping[str, Any], alive_B: np.ndarray) -> dict[str, np.ndarray]:
    """Return this turn's parts; a slot that was reset at once has them in `final_info`."""
    parts = _reward_parts(infos, alive_B)
    final = infos.get("final_info")
    if final is None:
        return parts
    over_B = alive_B & np.asarray(infos["_final_info"], dtype=bool)
    for name, last_B in _reward_parts(final, over_B).items():
        parts[name] = np.where(over_B, last_B, parts.get(name, np.nan))
    return parts


def _reward_parts(infos: Mapping[str, Any], alive_B: np.ndarray) -> dict[str, np.ndarray]:
    """Return the components of this turn's reward, float64 (B,), NaN where a slot has none.

    Vector environments hold them as a dict of arrays with `_name` masks, or as an array of dicts.
    """
    found = infos.get("reward_parts")
    if found is None:
        return {}
    if isinstance(found, Mapping):
        names = [name for name in found if f"_{name}" in found or not name.startswith("_")]
        masks = {name: found.get(f"_{name}", alive_B) & alive_B for name in names}
        return {name: _masked(found[name], masks[name]) for name in names}

    parts: dict[str, np.ndarray] = {}
    for slot in np.flatnonzero(alive_B):
        for name, value in (found[slot] or {}).items():
            part_B = parts.setdefault(name, np.full(len(alive_B), np.nan))
            part_B[slot] = np.nan if value is None else value
    return parts


def _masked(values: Any, mask_B: np.ndarray) -> np.ndarray:
    part_B = np.full(len(mask_B), np.nan)
    for slot in np.flatnonzero(mask_B):
        part_B[slot] = np.nan if values[slot] is None else values[slot]
    return part_B


def _last_observation(observations: Any, infos: Mapping[str, Any], slot: int) -> Messages:
    """Return the slot's observation of this dialogue, not of one that has begun since."""
    final = infos.get("final_obs")
    if final is not None and final[slot] is not None:
        return final[slot]
    return observations[slot]


def _reset_finished(envs: VectorEnv[Any, Any, Any], done_B: np.ndarray) -> None:
    """Reset finished slots where Gymnasium's own vector environments would refuse to step them."""
    plain = envs.unwrapped
    if not isinstance(plain, SyncVectorEnv | AsyncVectorEnv) or not done_B.any():
        return
    if plain.autoreset_mode == AutoresetMode.DISABLED:
        envs.reset(options={"reset_mask": done_B.copy()})


def _boundaries(envs: VectorEnv[Any, Any, Any]) -> tuple[int, ...] | None:
    """Return the first turn of each phase; None where the environment tells none.

    A process of an AsyncVectorEnv that is asked for what it lacks dies, so those are not asked.
    """
    plain = envs.unwrapped
    world: gym.Env[Any, Any] | VectorEnv[Any, Any, Any] = plain
    if isinstance(plain, SyncVectorEnv):
        world = plain.envs[0].unwrapped
    found = getattr(world, "phase_boundaries", None)
    return None if found is None else tuple(int(turn) for turn in found)


def _stack(columns: list[np.ndarray], size: int, dtype: Any) -> np.ndarray:
    return np.array(columns, dtype=dtype).reshape(len(columns), size).T


def _stack_parts(parts: list[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for part in parts for name in part)
    missing = np.full(size, np.nan)
    return {
        name: _stack([part.get(name, missing) for part in parts], size, np.float64)
        for name in names
    }
