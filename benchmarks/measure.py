"""Contenders side by side: each in its own process, asked in turn, one at a time.

Ratios are taken between measurements of the same round, which lie next to each other in time, so
that a machine that is slower for a while slows both sides. Each process has one torch thread. Time
on the CPU is CPU time of the process, which other work on the machine disturbs less than the clock
on the wall; on a free machine the two agree. Time on a GPU is by the clock on the wall.

Memory is what a phase adds at its highest point: on the CPU the peak of resident memory (VmHWM,
reset through /proc/self/clear_refs; ru_maxrss, which cannot be reset, where that is refused) minus
resident memory before the phase, freed memory having been given back; on a GPU torch's peak of
allocated memory minus what was allocated before.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MIB = 2**20
WARM_UP_TURNS = 2


@dataclass(frozen=True)
class Phase:
    """What a rollout or an update cost."""

    seconds: float
    """CPU time of the process; on a GPU wall-clock time."""
    wall_seconds: float
    """Wall-clock time."""
    memory_mib: float
    """Highest memory during the phase minus memory before it, MiB."""


@dataclass(frozen=True)
class Step:
    """One answer of a contender; phases that were not asked for are None."""

    rollout: Phase | None
    """Play all dialogues from start to end."""
    update: Phase | None
    """Advantages, gradient and optimizer step."""
    new_tokens: int
    """Tokens that the agent sampled."""
    line_tokens: tuple[int, int]
    """Shortest and longest line in tokens."""
    tokens: int
    """Tokens of all dialogues, from the persona to the agent's last token."""
    keys_read: int
    """Sum over the sampled tokens of the number of tokens before each."""


def rollout_seconds(step: Step) -> float:
    """Return the time of the rollout."""
    return _asked_for(step.rollout).seconds


def update_seconds(step: Step) -> float:
    """Return the time of the update."""
    return _asked_for(step.update).seconds


def step_seconds(step: Step) -> float:
    """Return the time of both."""
    return rollout_seconds(step) + update_seconds(step)


def rollout_mib(step: Step) -> float:
    """Return the memory of the rollout."""
    return _asked_for(step.rollout).memory_mib


def update_mib(step: Step) -> float:
    """Return the memory of the update."""
    return _asked_for(step.update).memory_mib


def step_mib(step: Step) -> float:
    """Return the memory of the hungrier phase."""
    return max(rollout_mib(step), update_mib(step))


def _asked_for(phase: Phase | None) -> Phase:
    if phase is None:
        raise ValueError("This phase was not part of the order, so it was not measured.")
    return phase


@dataclass(frozen=True)
class Order:
    """What the parent asks of a contender: dialogues of `turns` turns, and which phases to do."""

    turns: int = 0
    rollout: bool = True
    update: bool = True


class Orders:
    """A contender's end of the line to the parent."""

    def __init__(self, line: Connection) -> None:
        self._line = line

    def wait(self) -> Order | None:
        """Sleep until the next order; None when there is no more."""
        order = self._line.recv()
        assert order is None or isinstance(order, Order)
        return order

    def __iter__(self) -> Iterator[Order]:
        return iter(self.wait, None)

    def report(self, step: Step) -> None:
        """Answer the order."""
        self._line.send(step)


Contender = Callable[[Orders], None]
"""Takes orders one after the other and reports each; picklable."""


# -- in the contender's process --------------------------------------------------------------------


class Meter:
    """Measures one phase at a time on one device, from `start` to `stop`."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda if device.startswith("cuda") else None

    def start(self) -> None:
        """Begin a phase."""
        gc.collect()
        if self._cuda is not None:
            self._cuda.synchronize()
            self._cuda.reset_peak_memory_stats()
            self._before = self._cuda.memory_allocated() / MIB
        else:
            _give_back_memory()
            self._was_reset = _reset_peak()
            self._before = _status_mib("VmRSS")
        self._started = time.process_time(), time.perf_counter()

    def stop(self) -> Phase:
        """End the phase and return what it cost."""
        if self._cuda is not None:
            self._cuda.synchronize()
        cpu, wall = self._started
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if self._cuda is not None:
            return Phase(wall, wall, self._cuda.max_memory_allocated() / MIB - self._before)
        lifelong = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peak = _status_mib("VmHWM") if self._was_reset else lifelong
        return Phase(cpu, wall, peak - self._before)


def _give_back_memory() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Let VmHWM begin anew; return whether that was allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"/proc/self/status has no {name}.")


def _serve(contender: Contender, line: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    contender(Orders(line))


# -- in the parent ---------------------------------------------------------------------------------


class Worker:
    """One contender in a process of its own."""

    def __init__(self, contender: Contender) -> None:
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(contender, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, order: Order) -> Step:
        """Have the order done and return what it cost.

        Raises:
            RuntimeError: if the process died.
        """
        try:
            self._line.send(order)
            step = self._line.recv()
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError("A contender's process died; its message is above.") from error
        assert isinstance(step, Step)
        return step

    def dismiss(self) -> None:
        """End the process."""
        self._line.send(None)
        self._process.join()


Round = Mapping[str, Step]
"""What each contender needed in one round, by name."""


def side_by_side(
    contenders: Mapping[str, tuple[Contender, Order]], num_rounds: int, say: Callable[[str], None]
) -> list[Round]:
    """Ask all contenders in turn, `num_rounds` times, after one short warm-up each.

    Args:
        contenders: by name, with the order that is measured.
        num_rounds: rounds; each contender is asked once a round.
        say: called with a line of progress after every answer.
    """
    workers = {name: Worker(contender) for name, (contender, _) in contenders.items()}
    for name, (_, order) in contenders.items():
        warm = replace(order, turns=min(order.turns, WARM_UP_TURNS))
        say(f"warm-up  {name:<12} {_costs(workers[name].ask(warm))}")

    rounds: list[Round] = []
    for number in range(1, num_rounds + 1):
        steps = {}
        for name, (_, order) in contenders.items():
            steps[name] = workers[name].ask(order)
            say(f"round {number}  {name:<12} {_costs(steps[name])}")
        rounds.append(steps)

    for worker in workers.values():
        worker.dismiss()
    return rounds


def _costs(step: Step) -> str:
    phases = {"rollout": step.rollout, "update": step.update}
    costs = [
        f"{name} {phase.seconds:.2f} s (wall {phase.wall_seconds:.2f}) {phase.memory_mib:.0f} MiB"
        for name, phase in phases.items()
        if phase is not None
    ]
    return ", ".join(costs)


# -- what was found --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The median of several rounds and their range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1
        if self.low == self.high:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of one value per round."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(rounds: Sequence[Round], name: str, over: str, cost: Callable[[Step], float]) -> Spread:
    """Return how often `over`'s cost goes into `name`'s, from the pairs of each round."""
    return spread([cost(steps[name]) / cost(steps[over]) for steps in rounds])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Return the measurements as plain data."""
    return [{name: asdict(step) for name, step in steps.items()} for steps in rounds]


def machine() -> dict[str, str]:
    """Return what the figures depend on besides the code."""
    import torch
    import transformers

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "accelerator": accelerator,
        "resident memory by": "VmHWM" if _reset_peak() else "ru_maxrss",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
