"""Policy classes side by side: every method x domain under one budget, in parallel, resumable.

A cell trains one method in one domain and evaluates it on held-out personas; "untrained" only
evaluates. Cells run in processes of one torch thread each and leave their result in
RUN/<domain>/<method>; a comparison that was interrupted goes on with the cells that are missing.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym

from .credit import parse_credit
from .evaluate import Evaluation, evaluate_policy
from .loading import check_model_name, load_policy, weights_fingerprint
from .ppg import PPGAgent
from .runs import RunFolder, read_metrics

UNTRAINED = "untrained"
ENV_ID = "ppg_env:PersonaDialogue-v0"
"""Named with its module, so that Gymnasium imports the world and this package need not."""


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, and under which budget."""

    run: str = "runs/demo"
    """Run folder; cells that are complete in it are not run again."""
    domains: tuple[str, ...] = ("chatting", "education", "therapy")
    """Domains of PersonaDialogue-v0."""
    methods: tuple[str, ...] = ("greedy", "kstep:3", "segment", "full")
    """Credits, see agents.credit.parse_credit; the untrained model always takes part."""
    model: str = "nano"
    """The language model to start from: "nano", a folder, or a Hugging Face name."""
    updates: int = 16
    """Gradient steps a cell."""
    episodes: int = 64
    """Dialogues an update; every method gets updates x episodes."""
    group_size: int = 8
    """Dialogues that share persona, opening and partner seed."""
    learning_rate: float = 3e-4
    """Of AdamW at the start; falls linearly."""
    eval_episodes: int = 2
    """Dialogues per held-out persona in an evaluation."""
    noise: float = 0.1
    """How often the scripted partner is distracted, a probability."""
    max_turns: int = 8
    """Agent turns in a dialogue."""
    seed: int = 0
    """Seeds training and evaluation; the same partners meet every method."""
    workers: int = field(default_factory=lambda: max(1, min(os.cpu_count() or 1, 16)))
    """Processes, one torch thread each."""


@dataclass(frozen=True)
class Cell:
    """One method in one domain."""

    domain: str
    method: str

    def folder(self, c: CompareConfig) -> Path:
        """Return the cell's run folder."""
        return Path(c.run) / self.domain / self.method.replace(":", "-")


def cells(c: CompareConfig) -> list[Cell]:
    """Return all cells, the untrained model of each domain first.

    Raises:
        ValueError: for a method that is no credit, or a model that does not exist; lists what does.
    """
    check_model_name(c.model)
    if c.workers < 1:
        raise ValueError(f"workers must be at least 1, got {c.workers}.")
    for method in c.methods:
        parse_credit(method)
    return [Cell(domain, method) for domain in c.domains for method in (UNTRAINED, *c.methods)]


def run_cell(cell: Cell, c: CompareConfig) -> dict[str, Any]:
    """Train and evaluate one cell; return its result (from disk if it is complete already)."""
    folder = RunFolder(cell.folder(c), _cell_settings(cell, c))
    if folder.result is not None:
        return folder.result
    folder.keep_metrics([])

    settings: dict[str, Any] = {"domain": cell.domain, "noise": c.noise, "max_turns": c.max_turns}
    policy = load_policy(c.model)
    seconds, num_timesteps = 0.0, 0
    if cell.method != UNTRAINED:
        envs = gym.make_vec(ENV_ID, num_envs=c.episodes, **settings)
        agent = PPGAgent(
            policy,
            envs,
            cell.method,
            learning_rate=c.learning_rate,
            lr_schedule="linear",
            group_size=c.group_size,
            seed=c.seed,
        )
        started = time.perf_counter()
        turns = c.updates * c.episodes * c.max_turns
        agent.learn(turns, callback=_log_to(folder, c.updates))
        seconds, num_timesteps = time.perf_counter() - started, agent.num_timesteps
        folder.write_agent(agent.save)

    found = evaluate_policy(
        gym.make_vec(ENV_ID, num_envs=c.episodes, personas="test", **settings),
        policy,
        episodes_per_persona=c.eval_episodes,
        seed=10_000 + c.seed,
    )
    folder.write_transcripts(found.records)
    result = _result(cell, found, seconds, num_timesteps, folder.metrics())
    folder.finish(result)
    return result


def compare(
    c: CompareConfig, progress: Callable[[Mapping[Cell, float]], None] | None = None
) -> dict[Cell, dict[str, Any]]:
    """Run the cells that are missing, in parallel, and return the results of all.

    Args:
        c: what to compare.
        progress: called about twice a second with the share of each cell that is done.

    Raises:
        KeyboardInterrupt: passed on; complete cells stay complete.
        Exception: the first failure of a cell, after the others have finished.
    """
    everything = cells(c)
    known = {cell: result for cell in everything if (result := _finished(cell, c)) is not None}
    missing = [cell for cell in everything if cell not in known]
    if not missing:
        return known
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(c.workers, mp_context=context, initializer=_one_thread)
    try:
        futures = {cell: pool.submit(run_cell, cell, c) for cell in missing}
        for share in _shares(futures, c):
            if progress is not None:
                progress({**dict.fromkeys(known, 1.0), **share})
        known |= {cell: future.result() for cell, future in futures.items()}
        return {cell: known[cell] for cell in everything}
    except (KeyboardInterrupt, BrokenProcessPool):
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(cell: Cell, c: CompareConfig) -> dict[str, Any] | None:
    """Return the cell's result if it is complete; a folder of another run is refused."""
    if not cell.folder(c).exists():
        return None
    return RunFolder(cell.folder(c), _cell_settings(cell, c)).result


def _shares(
    futures: Mapping[Cell, Future[dict[str, Any]]], c: CompareConfig
) -> Iterator[dict[Cell, float]]:
    while True:
        share = {
            cell: 1.0 if future.done() else len(read_metrics(cell.folder(c))) / (c.updates + 1)
            for cell, future in futures.items()
        }
        yield share
        if all(future.done() for future in futures.values()):
            return
        time.sleep(0.5)


def _one_thread() -> None:
    """Keep processes out of each other's way: one torch thread each, Ctrl-C left to the parent.

    Bars for loading and saving weights would be drawn into the parent's. tqdm's own lock would be
    a semaphore shared between processes, which a process that is stopped leaves behind.
    """
    import signal
    import threading

    import torch
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _log_to(folder: RunFolder, updates: int) -> Callable[[PPGAgent], bool]:
    def log(agent: PPGAgent) -> bool:
        folder.log(agent.log)
        return agent.num_updates < updates

    return log


def _cell_settings(cell: Cell, c: CompareConfig) -> dict[str, Any]:
    kept = asdict(c)
    for name in ("run", "domains", "methods", "workers"):
        del kept[name]
    weights = weights_fingerprint(c.model)
    return {**kept, "domain": cell.domain, "method": cell.method, "weights": weights}


def _result(
    cell: Cell,
    found: Evaluation,
    seconds: float,
    num_timesteps: int,
    metrics: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    speeds = [row["time/tokens_per_second"] for row in metrics]
    return {
        "domain": cell.domain,
        "method": cell.method,
        "metrics": {name: asdict(value) for name, value in found.metrics.items()},
        "reward_T": found.reward_T.tolist(),
        "persona_reward": dict(found.persona_reward),
        "num_timesteps": num_timesteps,
        "train_seconds": seconds,
        "tokens_per_second": sum(speeds) / len(speeds) if speeds else None,
    }
