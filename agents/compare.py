"""Ways to learn side by side: domains x methods x budgets x seeds, in parallel and resumable.

A cell trains one method in one domain on so many dialogues with one seed and evaluates it on
held-out personas; "untrained" only evaluates. Cells of one seed meet the same personas with the
same partners. They run in processes of one torch thread each and leave their result in
RUN/<domain>/noise-<noise>/<method>/<budget>/seed-<seed>; RUN/plan.json lists them all. Interrupted,
a comparison goes on with the cells that are missing or damaged; a cell that fails leaves its error
there and stops no other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .evaluate import Evaluation, evaluate_policy
from .loading import check_model_name, weights_fingerprint
from .methods import UNTRAINED, parse_method
from .policy import Policy
from .ppg import PPGAgent
from .runs import DamagedRunError, RunFolder, read_metrics
from .train import TrainConfig, agent_settings, make_envs, make_policy

DOMAINS = ("chatting", "education", "therapy")
PLAN = "plan.json"
"""Of a run folder: the cells that belong to it, begun or not."""


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, and under which budgets."""

    run: str = "runs/compare"
    """Run folder; cells that are complete in it are not run again."""
    domains: tuple[str, ...] = DOMAINS
    """Domains of PersonaDialogue-v0; "all" = the three bundled ones."""
    methods: tuple[str, ...] = ("greedy", "kstep:3", "segment", "full")
    """Credits (greedy, kstep:3, segment, segment:2, discounted:0.9, full, trajectory), ppo, or
    module:Class of your own; the untrained model always takes part."""
    budgets: tuple[int, ...] = (1024,)
    """Dialogues to learn from; a model is trained for each."""
    seeds: int = 5
    """Training runs of each, with the seeds 0, 1, ...; one alone gives no intervals."""
    noise: tuple[float, ...] = (0.1,)
    """How often the scripted partner is distracted, probabilities; cells for each."""
    model: str = "nano"
    """The language model to start from: "nano", a folder, or a Hugging Face name."""
    episodes: int = 64
    """Dialogues an update; budgets are multiples of it."""
    group_size: int = 8
    """Dialogues that share persona, opening and partner seed."""
    learning_rate: float | None = None
    """Of AdamW at the start; falls linearly. None: as in ppg train."""
    eval_episodes: int = 2
    """Dialogues per held-out persona in an evaluation."""
    max_turns: int = 8
    """Agent turns in a dialogue."""
    partner: str = "scripted"
    """Who speaks with the agent: "scripted", "openai:MODEL@URL", "hf:FOLDER"."""
    judge: str = "rules"
    """Who scores: "rules", "openai:MODEL@URL", "hf:FOLDER", "nli:FOLDER"."""
    verdict_cache: str | None = None
    """SQLite file that keeps the judge's verdicts."""
    keep_agents: bool = False
    """Keep every trained agent (nano: 5 MB each)."""
    workers: int = field(default_factory=lambda: max(1, min(os.cpu_count() or 1, 16)))
    """Processes, one torch thread each; 1 for a model on a GPU."""

    def __post_init__(self) -> None:
        domains = (
            name for given in self.domains for name in (DOMAINS if given == "all" else [given])
        )
        named = (parse_method(method).name for method in self.methods)
        object.__setattr__(self, "domains", tuple(dict.fromkeys(domains)))
        methods = tuple(name for name in dict.fromkeys(named) if name != UNTRAINED)
        object.__setattr__(self, "methods", methods)
        check_model_name(self.model)
        for name in ("seeds", "workers", "episodes", "group_size", "eval_episodes", "max_turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.episodes % self.group_size:
            raise ValueError(
                f"episodes={self.episodes} must be a multiple of group_size={self.group_size}."
            )
        for budget in self.budgets:
            if budget < 1 or budget % self.episodes:
                raise ValueError(
                    f"budget {budget} is no multiple of the {self.episodes} dialogues of an update "
                    "(episodes)."
                )


@dataclass(frozen=True)
class Cell:
    """One training run of one method."""

    domain: str
    method: str
    budget: int = 0
    """Dialogues to learn from; 0 = untrained."""
    seed: int = 0
    noise: float = 0.1

    def folder(self, run: str | Path) -> Path:
        """Return the cell's run folder."""
        method = self.method.replace(":", "-")
        noise = f"noise-{self.noise:g}"
        return Path(run) / self.domain / noise / method / str(self.budget) / f"seed-{self.seed}"

    def __str__(self) -> str:
        """Return e.g. "therapy kstep:3 1024 seed 0"."""
        budget = f" {self.budget}" if self.budget else ""
        return f"{self.domain} {self.method}{budget} seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its result, or why there is none."""

    result: Mapping[str, Any] | None
    error: str = ""


def cells(c: CompareConfig) -> list[Cell]:
    """Return all cells in the order in which they run: a whole comparison for one seed first."""
    found = [
        Cell(domain, method, budget, seed, noise)
        for seed in range(c.seeds)
        for budget in (0, *sorted(c.budgets))
        for noise in c.noise
        for domain in c.domains
        for method in (c.methods if budget else (UNTRAINED,))
    ]
    return list(dict.fromkeys(found))


def planned_cells(run: str | Path) -> list[Cell]:
    """Return the cells that belong to a run folder, as far as it says so.

    Raises:
        ValueError: its plan cannot be read.
    """
    file = Path(run) / PLAN
    if not file.exists():
        return []
    try:
        return [Cell(**cell) for cell in json.loads(file.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); remove it, it only tells which cells are missing."
        ) from error


def run_cell(cell: Cell, c: CompareConfig) -> dict[str, Any]:
    """Train and evaluate one cell; return its result (from disk if it is complete already)."""
    folder = _run_folder(cell, c)
    if folder.result is not None:
        return folder.result
    folder.clear()

    settings = _train_config(cell, c)
    learner: Policy = (policy := make_policy(settings))
    seconds, num_timesteps = 0.0, 0
    make = parse_method(cell.method).make
    if make is not None:
        agent = make(policy, make_envs(settings), **agent_settings(settings, policy))
        started = time.perf_counter()
        agent.learn(cell.budget * c.max_turns, callback=_log_to(folder, cell.budget // c.episodes))
        seconds = time.perf_counter() - started
        num_timesteps = getattr(agent, "num_timesteps", cell.budget * c.max_turns)
        learner = _speaker(agent)
        if c.keep_agents and hasattr(agent, "save"):
            folder.write_agent(agent.save)
    found = evaluate_policy(
        make_envs(replace(settings, personas="test")),
        learner,
        episodes_per_persona=c.eval_episodes,
        seed=10_000 + 1_000 * cell.seed,
    )
    folder.write_transcripts(found.records)
    result = _result(cell, found, seconds, num_timesteps, folder.metrics())
    folder.finish(result)
    return result


def compare(
    c: CompareConfig, progress: Callable[[Mapping[Cell, float]], None] | None = None
) -> dict[Cell, Outcome]:
    """Run the cells that are missing, in parallel, and return what became of all.

    Args:
        c: what to compare.
        progress: called about twice a second with the share of each cell that is done.

    Raises:
        KeyboardInterrupt: passed on; complete cells stay complete.
        FileExistsError: the run folder holds another comparison.
        ValueError: there is no such domain, partner or judge.
    """
    everything = cells(c)
    for domain in c.domains:
        _check_world(domain, c)
    known = {
        cell: Outcome(result) for cell in everything if (result := _finished(cell, c)) is not None
    }
    _write_plan(Path(c.run), everything)
    pending = deque(cell for cell in everything if cell not in known)
    suspects: deque[Cell] = deque()

    def show(running: Sequence[Cell]) -> None:
        if progress is not None:
            share = {cell: _share(cell, c) for cell in running}
            progress({**dict.fromkeys(everything, 0.0), **dict.fromkeys(known, 1.0), **share})

    while pending or suspects:
        # Who of several brought their processes down shows when each runs alone.
        queue, workers = (suspects, 1) if suspects else (pending, c.workers)
        died = _run(queue, workers, c, known, show)
        if len(died) == 1:
            known[died[0]] = _process_died(died[0], c)
        else:
            suspects.extend(died)
    show(())
    return {cell: known[cell] for cell in everything}


def _write_plan(run: Path, new: Sequence[Cell]) -> None:
    """Add cells to the run folder's plan."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"Cannot make the run folder {run}: {error}.") from error
    cells_of_run = dict.fromkeys([*planned_cells(run), *new])
    draft = run / f"{PLAN}.part"
    draft.write_text(json.dumps([asdict(cell) for cell in cells_of_run]), encoding="utf-8")
    draft.replace(run / PLAN)


def _run(
    queue: deque[Cell],
    workers: int,
    c: CompareConfig,
    known: dict[Cell, Outcome],
    show: Callable[[Sequence[Cell]], None],
) -> list[Cell]:
    """Run the queue's cells; if a process dies, return those that were running and stop."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)
    running: dict[Future[Outcome], Cell] = {}
    try:
        while queue or running:
            while queue and len(running) < workers:
                running[pool.submit(_attempt, queue[0], c)] = queue[0]
                queue.popleft()
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                known[running[future]] = future.result()
                del running[future]
            show(list(running.values()))
    except BrokenProcessPool:
        return list(running.values())
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return []


def _attempt(cell: Cell, c: CompareConfig) -> Outcome:
    """Run a cell; a failure is an outcome, too, and kept in its folder."""
    try:
        return Outcome(run_cell(cell, c))
    except (Exception, SystemExit) as error:
        _run_folder(cell, c).fail(traceback.format_exc())
        return Outcome(None, f"{type(error).__name__}: {error}")


def _process_died(cell: Cell, c: CompareConfig) -> Outcome:
    error = "Its process died: out of memory, or killed."
    _run_folder(cell, c).fail(error)
    return Outcome(None, error)


def _finished(cell: Cell, c: CompareConfig) -> dict[str, Any] | None:
    """Return the cell's result if it is complete; a folder of another run is refused.

    A damaged one is removed: the cell is done again.
    """
    folder = cell.folder(c.run)
    if not folder.exists():
        return None
    try:
        return _run_folder(cell, c).result
    except DamagedRunError:
        shutil.rmtree(folder)
        return None


def _run_folder(cell: Cell, c: CompareConfig) -> RunFolder:
    """Return the cell's run folder; a cell of a class whose file has changed is another one."""
    source = parse_method(cell.method).source
    return RunFolder(
        cell.folder(c.run), cell_settings(cell, c), {"source": source} if source else {}
    )


def _speaker(agent: Any) -> Policy:
    """Return what speaks for an agent: the agent itself where it can, else its policy."""
    return agent if hasattr(agent, "predict") else agent.policy


def _share(cell: Cell, c: CompareConfig) -> float:
    return len(read_metrics(cell.folder(c.run))) / (cell.budget // c.episodes + 1)


def _check_world(domain: str, c: CompareConfig) -> None:
    """Refuse in good time what no cell could be run with."""
    for noise in c.noise:
        settings = _train_config(Cell(domain, UNTRAINED, noise=noise), c)
        make_envs(replace(settings, episodes=c.group_size)).close()


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
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, killed or out of memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _log_to(folder: RunFolder, updates: int) -> Callable[[PPGAgent], bool]:
    def log(agent: PPGAgent) -> bool:
        folder.log(agent.log)
        return getattr(agent, "num_updates", 0) < updates

    return log


def _train_config(cell: Cell, c: CompareConfig) -> TrainConfig:
    """Return the settings of the cell's world, model and agent; the credit is the method's own."""
    return TrainConfig(
        domain=cell.domain,
        model=c.model,
        episodes=c.episodes,
        group_size=c.group_size,
        learning_rate=c.learning_rate,
        max_turns=c.max_turns,
        noise=cell.noise,
        partner=c.partner,
        judge=c.judge,
        verdict_cache=c.verdict_cache,
        seed=cell.seed,
    )


def cell_settings(cell: Cell, c: CompareConfig) -> dict[str, Any]:
    """Return what makes the cell this cell."""
    kept = asdict(c)
    for name in ("run", "domains", "methods", "budgets", "seeds", "workers", "verdict_cache"):
        del kept[name]
    del kept["keep_agents"]
    return {**kept, **asdict(cell), "weights": weights_fingerprint(c.model)}


def _result(
    cell: Cell,
    found: Evaluation,
    seconds: float,
    num_timesteps: int,
    metrics: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    name = "time/tokens_per_second"
    speeds = [row[name] for row in metrics if name in row]
    return {
        **asdict(cell),
        "metrics": {name: asdict(value) for name, value in found.metrics.items()},
        "reward_T": found.reward_T.tolist(),
        "boundaries": found.boundaries,
        "by_persona": {metric: dict(values) for metric, values in found.by_persona.items()},
        "num_timesteps": num_timesteps,
        "train_seconds": seconds,
        "tokens_per_second": sum(speeds) / len(speeds) if speeds else None,
    }
