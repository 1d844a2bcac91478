"""Train one agent into a run folder: metrics and checkpoints as it learns, the agent at the end.

ppg train --domain therapy --credit kstep --k 3
ppg train --offline runs/train/transcripts.jsonl --offline-settings.epochs 3 --run runs/offline
accelerate launch --multi_gpu --num_processes 2 -m agents.cli train --domain therapy

The same command goes on where a run was stopped, bit for bit; learning from a log starts again.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any

import gymnasium as gym
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object

from .lm_policy import LMPolicy
from .loading import load_policy, weights_fingerprint
from .logs import LogError, read_log
from .offline_settings import OfflineSettings
from .optimization import all_processes
from .ppg import DivergedError, PPGAgent
from .ppo import PPOAgent
from .provenance import file_hash
from .runs import RunFolder

ENV_ID = "ppg_env:PersonaDialogue-v0"
"""Named with its module, so that Gymnasium imports the world and this package need not."""

_ABOUT_PLAYING = {"total_timesteps", "episodes", "group_size", "n_epochs", "batch_size"}
_ABOUT_PLAYING |= {"clip_range", "ratio_level", "ent_coef", "personas", "max_turns", "noise"}
_ABOUT_PLAYING |= {"partner", "judge", "unscorable_reward"}


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, for how long."""

    domain: str | None = None
    """Domain of PersonaDialogue-v0. None = chatting; offline the log's own, which may be any."""
    credit: str | None = None
    """Which rewards a turn answers for: full, greedy, kstep:K, segment, segment:N, discounted:G,
    trajectory (as GRPO). None = kstep:3."""
    k: int | None = None
    """Lookahead of --credit kstep, which then needs no :K."""
    algorithm: str = "ppg"
    """"ppg" (any credit), or "ppo" (a critic takes the credit's place)."""
    model: str = "nano"
    """The language model to start from: "nano", a folder, or a Hugging Face name."""
    run: str = "runs/train"
    """Run folder: new, empty, or of this very run, which then goes on."""
    total_timesteps: int = 10_240
    """Turns to learn from (1 timestep = 1 turn)."""
    episodes: int = 64
    """Dialogues an update, over all processes."""
    group_size: int = 8
    """Dialogues that share persona, opening and partner seed."""
    learning_rate: float | None = None
    """Of AdamW at the start; falls linearly. None: 3e-4 for nano, 1e-4 for adapters, else 1e-6."""
    adam_eps: float | None = None
    """AdamW's epsilon. None = 1e-4 for nano, else 1e-8."""
    n_epochs: int | None = None
    """Passes over each batch, with clipped ratios if more than 1. None = 1, for ppo 2."""
    batch_size: int | None = None
    """Dialogues in a gradient step, in each process; None = all."""
    clip_range: float = 0.2
    """Of importance ratios, where a batch gives several steps."""
    ratio_level: str | None = None
    """Importance ratios per "turn" or per "token". None = turn, for ppo token."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the initial model."""
    lora_rank: int = 0
    """Rank of a LoRA adapter to train in place of the model (needs peft); 0 = none."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1" ..."""
    dtype: str = "auto"
    """Of the weights: "float32", "bfloat16" (float32 masters); "auto" = bfloat16 on CUDA."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time in updates."""
    token_budget: int = 4096
    """Tokens in one forward and backward pass; more is faster on a GPU."""
    shard: bool = False
    """Under accelerate launch: spread layers, gradients and optimizer over all processes."""
    personas: str = "train"
    """A split of the bundled personas, or the path of a persona file."""
    max_new_tokens: int | None = None
    """Longest line in tokens; None = 32 for nano, 64 otherwise."""
    max_turns: int = 8
    """Agent turns in a dialogue."""
    noise: float = 0.1
    """How often the scripted partner is distracted, a probability."""
    partner: str = "scripted"
    """Who speaks with the agent: "scripted", "openai:MODEL@URL", "hf:FOLDER"."""
    judge: str = "rules"
    """Who scores: "rules", "openai:MODEL@URL", "hf:FOLDER", "nli:FOLDER"."""
    unscorable_reward: float | None = None
    """Reward of a turn that the judge cannot score; None leaves it out of the gradient."""
    verdict_cache: str | None = None
    """SQLite file that keeps the judge's verdicts, for this run and later ones."""
    keep_transcripts: bool = True
    """Write every dialogue to the run folder, about 4 KB each."""
    offline: str | None = None
    """Learn from this log (agents/logs.py) instead of playing; settings of playing are ignored, and
    no checkpoints are written."""
    validation: str | None = None
    """Log of other personas (ppg split), on which every pass over --offline is measured."""
    offline_settings: OfflineSettings = field(default_factory=OfflineSettings)
    checkpoint_every: int = 10
    """Updates between two checkpoints, the last two of which are kept; 0 = none."""
    tracker: str | None = None
    """Also log to "tensorboard" (into the run folder), "wandb", ... as Accelerate names them."""
    seed: int = 0
    """Seeds dialogues and sampling."""

    def __post_init__(self) -> None:
        if self.algorithm not in ("ppg", "ppo"):
            raise ValueError(f"algorithm is 'ppg' or 'ppo', got {self.algorithm!r}.")
        if self.algorithm == "ppo" and (self.credit or self.k) is not None:
            raise ValueError("algorithm='ppo' has a critic and no credit; leave out credit and k.")
        if self.total_timesteps < 1:
            raise ValueError(f"total_timesteps must be at least 1, got {self.total_timesteps}.")
        if self.checkpoint_every < 0:
            raise ValueError(
                f"checkpoint_every must be at least 1 (0 = none), got {self.checkpoint_every}."
            )
        if self.k is not None and self.credit not in ("kstep", None):
            raise ValueError(f"k={self.k} belongs to credit='kstep', got {self.credit!r}.")
        if self.k is None and self.credit == "kstep":
            raise ValueError("credit='kstep' needs k, e.g. --credit kstep --k 3 or kstep:3.")

        if self.offline is None:
            if self.validation is not None or self.offline_settings != OfflineSettings():
                raise ValueError(
                    "validation and offline_settings are for learning from a log: give offline."
                )
            return
        if self.algorithm == "ppo":
            raise ValueError(
                "algorithm='ppo' learns from its own dialogues only; leave it out to learn from "
                "a log with a credit."
            )
        if self.n_epochs is not None or self.batch_size is not None:
            raise ValueError(
                "n_epochs and batch_size are about playing; to learn from a log say "
                "--offline-settings.epochs and --offline-settings.batch-size."
            )

    @property
    def credit_name(self) -> str:
        """The credit as agents.credit.parse_credit reads it."""
        return f"kstep:{self.k}" if self.k is not None else self.credit or "kstep:3"


def train(c: TrainConfig, progress_bar: bool = True) -> PPGAgent:
    """Train an agent, or go on; it is saved in RUN/agent, also when Ctrl-C interrupts learning.

    Raises:
        FileExistsError: the run folder holds another run, or this one is finished.
        CheckpointError: its newest checkpoint is damaged or foreign.
        DivergedError: learning broke down; the batch is in the run folder.
        ChatError, UnparsableJudgeError: an endpoint failed for good, or its judge is of no use.
        MemoryError, OSError: no memory, no disk space; checkpoints written so far are untouched.
    """
    _refuse_missing_tracker(c.tracker)
    if c.offline is not None:
        c = replace(c, domain=_domain_of(c.offline, c.domain))
    processes = all_processes(on_cpu=c.device == "cpu")
    agent = make_agent(c)
    if c.offline is not None:
        agent.check_offline(c.offline, c.validation, **vars(c.offline_settings))
    data = _data_hashes(c, agent)
    folder = None
    if processes.is_main_process:
        folder = RunFolder(c.run, _settings(c), data)
        if folder.result is not None:
            raise FileExistsError(
                f"{c.run} holds a finished run; choose another folder. To train its agent further: "
                f"--model {c.run}/agent."
            )
    processes.wait_for_everyone()
    checkpoints = f"{c.run}/checkpoints"
    if c.offline is not None:
        return _train_offline(c, agent, folder, progress_bar)
    goes_on = agent.restore(checkpoints)
    if folder is not None:
        folder.keep_metrics(agent.history)
        folder.keep_transcripts(agent.num_updates)

    with _tracker(c) as log:

        def after_update(learner: PPGAgent) -> None:
            records = _records(learner) if c.keep_transcripts else []
            if folder is not None:
                folder.log(learner.log)
                if records:
                    folder.add_transcripts(records, learner.num_updates)
            log(learner.log, learner.num_timesteps)
            if c.checkpoint_every and learner.num_updates % c.checkpoint_every == 0:
                learner.checkpoint(checkpoints, data=data)

        with _saved_on_failure(agent, folder):
            agent.learn(
                None if goes_on else c.total_timesteps,
                callback=after_update,
                progress_bar=progress_bar,
            )
    _save(agent, folder)
    if folder is not None:
        folder.finish({"num_timesteps": agent.num_timesteps, "last": agent.log})
    return agent


def _domain_of(log: str, asked: str | None) -> str | None:
    """Return the domain that the log tells, else the one asked for."""
    found = next(read_log(log)).domain
    if asked and found not in ("", asked):
        raise LogError(
            f"{log} is of the domain {found!r}, this run of {asked!r}; leave out --domain."
        )
    return found or asked


def _train_offline(
    c: TrainConfig, agent: PPGAgent, folder: RunFolder | None, progress_bar: bool
) -> PPGAgent:
    """Learn from a log; a run that was stopped starts again."""
    assert c.offline is not None
    if folder is not None:
        folder.keep_metrics([])
    with _tracker(c) as log:

        def after_update(learner: PPGAgent) -> None:
            if folder is not None:
                folder.log(learner.log)
            log(learner.log, learner.num_timesteps)

        with _saved_on_failure(agent, folder):
            agent.learn_offline(
                c.offline,
                validation=c.validation,
                callback=after_update,
                progress_bar=progress_bar,
                **vars(c.offline_settings),
            )
    _save(agent, folder)
    if folder is not None:
        result = {"num_timesteps": agent.num_timesteps, "last": agent.log}
        if c.offline_settings.patience is not None:
            result["kept_epoch"] = agent.log["offline/best_epoch"]
        folder.finish(result)
    return agent


@contextmanager
def _saved_on_failure(agent: PPGAgent, folder: RunFolder | None) -> Iterator[None]:
    """Save the agent if learning is interrupted or fails; of a breakdown also the batch."""
    try:
        yield
    except BaseException as error:
        # After an error of one process alone the others would never come to save.
        together = isinstance(error, KeyboardInterrupt | DivergedError)
        if together or agent.processes.num_processes == 1:
            _save(agent, folder)
        if folder is None or not isinstance(error, DivergedError):
            raise
        batch = folder.write_batch("diverged_batch", error.batch)
        raise DivergedError(f"{error} The batch is in {batch}.", error.batch) from error


def make_agent(c: TrainConfig) -> PPGAgent:
    """Return the untrained agent with its environment, this process's share of the slots.

    To learn from a log it needs none, but for the phases that `segment` follows.
    """
    policy = make_policy(c)
    settings = agent_settings(c, policy)
    if c.offline is not None:
        agent = PPGAgent(policy, None, c.credit_name, **settings)
        agent.env = _env_with_phases(c, c.offline) if c.credit_name == "segment" else None
        return agent
    if c.algorithm == "ppo":
        return PPOAgent(policy, make_envs(c), **settings)
    return PPGAgent(policy, make_envs(c), c.credit_name, **settings)


def make_envs(c: TrainConfig) -> gym.vector.VectorEnv[Any, Any, Any]:
    """Return the environment to learn in, this process's share of the slots."""
    num_processes = all_processes().num_processes
    if c.episodes % (num_processes * c.group_size):
        raise ValueError(
            f"episodes={c.episodes} must be a multiple of processes x group_size = "
            f"{num_processes} x {c.group_size}."
        )
    return gym.make_vec(
        ENV_ID,
        num_envs=c.episodes // num_processes,
        domain=c.domain or "chatting",
        personas=c.personas,
        max_turns=c.max_turns,
        noise=c.noise,
        partner=c.partner,
        judge=c.judge,
        unscorable_reward=float("nan") if c.unscorable_reward is None else c.unscorable_reward,
        verdict_cache=c.verdict_cache,
    )


def _env_with_phases(c: TrainConfig, log: str) -> gym.vector.VectorEnv[Any, Any, Any]:
    """Return an environment whose dialogues are as long as the longest logged one."""
    logs = [path for path in (log, c.validation) if path is not None]
    longest = max(dialogue.num_turns for path in logs for dialogue in read_log(path))
    try:
        if not c.domain:
            raise ValueError(f"{log} names no domain.")
        return gym.make_vec(ENV_ID, num_envs=1, domain=c.domain, max_turns=longest)
    except ValueError as error:
        raise LogError(
            "credit='segment' follows the phases of the log's domain, and there are none known: "
            f"{error} Take segments of N turns, segment:N, or say where they begin, segment:0,3,6."
        ) from error


def make_policy(c: TrainConfig) -> LMPolicy:
    """Return the language model to start from."""
    return load_policy(
        c.model,
        max_new_tokens=c.max_new_tokens,
        device=c.device,
        dtype=c.dtype,
        lora_rank=c.lora_rank,
        gradient_checkpointing=c.gradient_checkpointing,
        seed=c.seed,
    )


def agent_settings(c: TrainConfig, policy: LMPolicy) -> dict[str, Any]:
    """Return what an agent is made with besides policy, environment and credit."""
    nano = c.model == "nano"
    default_rate = 1e-4 if policy.has_adapter else 3e-4 if nano else 1e-6
    settings: dict[str, Any] = {
        "learning_rate": default_rate if c.learning_rate is None else c.learning_rate,
        "adam_eps": (1e-4 if nano else 1e-8) if c.adam_eps is None else c.adam_eps,
        "lr_schedule": "linear",
        "group_size": c.group_size,
        "batch_size": c.batch_size,
        "clip_range": c.clip_range,
        "ent_coef": c.ent_coef,
        "kl_coef": c.kl_coef,
        "token_budget": c.token_budget,
        "shard": c.shard,
        "seed": c.seed,
    }
    if c.n_epochs is not None:
        settings["n_epochs"] = c.n_epochs
    if c.ratio_level is not None:
        settings["ratio_level"] = c.ratio_level
    return settings


def _records(agent: PPGAgent) -> list[dict[str, Any]]:
    """Return the dialogues of the latest update, those of all processes."""
    assert agent.batch is not None
    own = agent.batch.records()
    return own if agent.processes.num_processes == 1 else list(gather_object(own))


def _save(agent: PPGAgent, folder: RunFolder | None) -> None:
    """Save the agent if it has learned; only the first process has a folder, all have to ask."""
    if agent.num_updates == 0:
        return
    if folder is None:
        agent.save("")
    else:
        folder.write_agent(agent.save)


def _settings(c: TrainConfig) -> dict[str, Any]:
    """Return what makes a run this run, in one spelling.

    Where it is kept and shown is no part of it, nor what one changes when memory runs out.
    """
    elsewhere = {"run", "tracker", "k", "device", "checkpoint_every", "offline_settings"}
    elsewhere |= {"token_budget", "gradient_checkpointing", "verdict_cache", "keep_transcripts"}
    more: dict[str, Any] = {}
    if c.offline is None:
        more = {"domain": c.domain or "chatting"}
    else:
        elsewhere |= _ABOUT_PLAYING
        more = {f"offline_settings.{name}": v for name, v in asdict(c.offline_settings).items()}
    kept = {name: value for name, value in asdict(c).items() if name not in elsewhere}
    return {**kept, **more, "credit": None if c.algorithm == "ppo" else c.credit_name}


def _data_hashes(c: TrainConfig, agent: PPGAgent) -> dict[str, str]:
    """Return what the run depends on besides its settings."""
    revision = getattr(agent.policy.model.config, "_commit_hash", None)
    weights = {"weights": weights_fingerprint(c.model) or str(revision or "")}
    if c.offline is not None:
        logs = {"log": c.offline} | ({} if c.validation is None else {"validation": c.validation})
        return weights | {name: file_hash(path) for name, path in logs.items()}
    ids = getattr(agent.env.unwrapped, "persona_ids", ()) if agent.env is not None else ()
    personas = file_hash(c.personas) or sha256("\n".join(ids).encode()).hexdigest()
    return weights | {"personas": personas}


def _refuse_missing_tracker(tracker: str | None) -> None:
    known = sorted(LOGGER_TYPE_TO_CLASS)
    if tracker is None or tracker in map(str, get_available_trackers()):
        return
    if tracker in known:
        raise ValueError(f"The tracker {tracker!r} is not installed: pip install {tracker}.")
    near = difflib.get_close_matches(tracker, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown tracker {tracker!r}.{hint} There are {', '.join(known)}.")


@contextmanager
def _tracker(c: TrainConfig) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """Yield a function that logs (metrics, step) to the tracker asked for, in one process only."""
    if c.tracker is None:
        yield lambda metrics, step: None
        return
    accelerator = Accelerator(log_with=c.tracker, project_dir=c.run)
    accelerator.init_trackers("ppg", config={k: str(v) for k, v in asdict(c).items()})
    try:
        yield lambda metrics, step: accelerator.log(dict(metrics), step=step)
    finally:
        accelerator.end_training()
