"""Turns per second of the environments on one core, scripted partner and rule judge.

    python -m benchmarks.env_speed

What is measured: `reset` and `step` with all they return, over whole dialogues, in CPU seconds of
this one process, so that other work on the machine disturbs little. What is not: the agent. Its
lines are recorded beforehand by the domain's own speaker, which performs random acts.

The environments remember what they have read. So that no pass lives on an earlier one's memory,
everything is forgotten before every timed pass and every pass has a new environment. Two kinds of
lines:

    spoken    the recorded lines as they are: templates, so some come back in other dialogues and
              are found in memory, as with any agent that has learned to speak in few ways;
    unique    each line made different from all others by a number word, so every one is read anew:
              the worst case.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np

import ppg_env  # registers PersonaDialogue-v0
from ppg_env import DOMAINS

ENV_ID = "PersonaDialogue-v0"


@dataclass(frozen=True)
class Recording:
    """What agents say in batches of dialogues: lines[batch][turn][slot]; a seed for each batch."""

    domain: str
    seeds: tuple[int, ...]
    lines: tuple[tuple[tuple[str, ...], ...], ...]

    @property
    def num_turns(self) -> int:
        """Return the number of agent turns in all dialogues."""
        return sum(len(turn) for batch in self.lines for turn in batch)


def record(domain: str, num_envs: int, num_batches: int, unique: bool) -> Recording:
    """Return the lines of random acts, performed by the domain's speaker."""
    speaker = DOMAINS[domain]
    env = gym.make_vec(ENV_ID, num_envs=num_envs, domain=domain)
    assert isinstance(env, ppg_env.PersonaDialogueVectorEnv)
    rng = np.random.default_rng(0)
    seeds = tuple(num_envs * batch for batch in range(num_batches))
    batches, spoken = [], 0
    for seed in seeds:
        env.reset(seed=seed)
        turns = []
        for _ in range(env.max_turns):
            lines = []
            for transcript in env.transcripts:
                acts = speaker.dynamics(transcript.persona).acts
                line = speaker.speak(acts[int(rng.integers(len(acts)))], transcript, rng)
                spoken += 1
                lines.append(f"{line[:-1]} x{spoken}{line[-1]}" if unique else line)
            turns.append(tuple(lines))
            env.step(lines)
        batches.append(tuple(turns))
    return Recording(domain, seeds, tuple(batches))


def play_vector(recording: Recording) -> None:
    """Play all dialogues of the recording, a batch at a time."""
    env = gym.make_vec(ENV_ID, num_envs=len(recording.lines[0][0]), domain=recording.domain)
    for seed, batch in zip(recording.seeds, recording.lines, strict=True):
        env.reset(seed=seed)
        for lines in batch:
            env.step(lines)


def play_single(recording: Recording) -> None:
    """Play the same dialogues one after the other in one single environment."""
    env = gym.make(ENV_ID, domain=recording.domain)
    for seed, batch in zip(recording.seeds, recording.lines, strict=True):
        for slot in range(len(batch[0])):
            env.reset(seed=seed + slot)
            for lines in batch:
                env.step(lines[slot])


def turns_per_second(play: Callable[[Recording], None], recording: Recording) -> float:
    """Return the speed of one pass from a cold start."""
    for domain in DOMAINS.values():
        domain.forget()
    start = time.process_time()
    play(recording)
    return recording.num_turns / (time.process_time() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Turns per second of PersonaDialogue-v0.")
    parser.add_argument("--num-envs", type=int, default=64, help="dialogues in a batch")
    parser.add_argument("--batches", type=int, default=24, help="batches in one pass")
    parser.add_argument("--repeats", type=int, default=3, help="passes; the median is shown")
    args = parser.parse_args()

    turns = args.num_envs * args.batches * 8
    print(
        f"turns per CPU second on one core: median of {args.repeats} cold passes over {turns} "
        f"turns (slowest-fastest), vector environment of {args.num_envs}"
    )
    print(f"{'domain':<10} {'lines':<7} {'vector':>24} {'single':>24} {'single/vector':>14}")
    for domain in DOMAINS:
        for unique in (False, True):
            recording = record(domain, args.num_envs, args.batches, unique)
            pairs = [
                (turns_per_second(play_vector, recording), turns_per_second(play_single, recording))
                for _ in range(args.repeats)
            ]
            vector, single = zip(*pairs, strict=True)
            ratio = statistics.median(s / v for v, s in pairs)
            kind = "unique" if unique else "spoken"
            print(f"{domain:<10} {kind:<7} {_spread(vector)} {_spread(single)} {ratio:>14.2f}")


def _spread(speeds: tuple[float, ...]) -> str:
    low, high = min(speeds), max(speeds)
    return f"{f'{statistics.median(speeds):,.0f} ({low:,.0f}-{high:,.0f})':>24}"


if __name__ == "__main__":
    main()
