"""The command line: ppg demo | compare | report | train | evaluate | play | limits | ...

Every flag is a field of a config dataclass.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import ppg_env
from ppg_env.quiz import ChatQuiz, FactQuiz
from ppg_env.world import World

from .compare import Cell, CompareConfig, Outcome, cells, compare
from .credit import parse_credit
from .pilot import PilotConfig
from .ppg import DivergedError
from .train import TrainConfig, train

if TYPE_CHECKING:
    from .live import LiveDialogue
    from .logs import LoggedDialogue

_BREAKDOWNS = (
    DivergedError,
    torch.OutOfMemoryError,
    ppg_env.ChatError,
    ppg_env.UnparsableJudgeError,
)
# No emoji: ":x:" in a text is no picture.
console = Console(width=None if sys.stdout.isatty() else 170, emoji=False)


@dataclass(frozen=True)
class DemoConfig(CompareConfig):
    """What the demo shows: one training run of every policy class."""

    run: str = "runs/demo"
    """Run folder; cells that are complete in it are not run again."""
    seeds: int = 1
    """One; for more see ppg compare."""
    keep_agents: bool = True
    """Keep every trained agent (nano: 5 MB each)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds != 1 or len(self.budgets) != 1 or len(self.noise) != 1:
            raise ValueError(
                "The demo shows one run of every method; several seeds, budgets or noise levels "
                "are what ppg compare is for."
            )


@dataclass(frozen=True)
class ReportConfig:
    """Which comparison is reported."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders of ppg compare that were made under the same conditions."""
    out: str | None = None
    """Folder to write to; None = "report" in the first run folder."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Which agent is evaluated, and on whom."""

    agent: str = "nano"
    """Folder of a saved agent or model, or "nano"."""
    log: str | None = None
    """A log of dialogues: measure single turns that go on from its histories, not whole dialogues.
    Only agent, domain, personas (a file), judge, verdict_cache, deterministic and seed count then.
    """
    domain: str | None = None
    """Domain of PersonaDialogue-v0, or module:NAME of a Domain of your own; None = the log's own,
    else chatting."""
    personas: str = "test"
    """A split of the bundled personas, or the path of a persona file."""
    episodes: int = 2
    """Dialogues per persona."""
    deterministic: bool = False
    """The most likely line instead of a sampled one."""
    max_turns: int = 8
    """Agent turns in a dialogue."""
    noise: float = 0.1
    """How often the scripted partner is distracted, a probability."""
    partner: str = "scripted"
    """Who speaks with the agent: "scripted", "openai:MODEL@URL", "hf:FOLDER"."""
    judge: str = "rules"
    """Who scores: "rules", "openai:MODEL@URL", "hf:FOLDER", "nli:FOLDER"."""
    verdict_cache: str | None = None
    """SQLite file that keeps the judge's verdicts, for this run and later ones."""
    quiz: str | None = None
    """Ask the agent about its persona after each dialogue: "facts" (by rule), or a language model
    that writes and grades the questions: "openai:MODEL@URL", "hf:FOLDER"."""
    seed: int = 10_000
    """Seeds dialogues and sampling."""


@dataclass(frozen=True)
class RejudgeConfig:
    """Which stored dialogues are scored, by whom."""

    run: tyro.conf.Positional[str]
    """Run folder, a folder of runs, or a log of your own, scored or not (then name out)."""
    judge: str
    """Who scores now: "rules", "openai:MODEL@URL", "hf:FOLDER", "nli:FOLDER"."""
    out: str | None = None
    """Of a log: the log to write; gzipped if it ends in .gz."""
    domain: str | None = None
    """What the dialogues are of: a name, or module:NAME of a Domain of your own; None = what the
    dialogues or the run name."""
    personas: str | None = None
    """Persona file of the dialogues; None = the run's own, or the bundled ones."""
    dialogues: int | None = None
    """Only so many dialogues of each run; None = all."""
    verdict_cache: str | None = None
    """SQLite file that keeps the judge's verdicts."""


@dataclass(frozen=True)
class CalibrateConfig:
    """Which two judges are compared, on which stored dialogues."""

    run: tyro.conf.Positional[str]
    """Run folder, or a folder of runs."""
    judges: tuple[str, str]
    """Two judges, as in `ppg rejudge`; "stored" = the verdicts that the run already holds."""
    domain: str | None = None
    """What the dialogues are of, as in `ppg rejudge`."""
    personas: str | None = None
    """Persona file of the dialogues; None = the run's own, or the bundled ones."""
    dialogues: int | None = None
    """Only so many dialogues of each run; None = all."""
    verdict_cache: str | None = None
    """SQLite file that keeps the judges' verdicts."""


@dataclass(frozen=True)
class ImportConfig:
    """Which published dialogues become a log."""

    source: tyro.conf.Positional[Literal["consistent-llms"]]
    """The format: dialogue files of Consistent-LLMs, as published."""
    folder: tyro.conf.Positional[str]
    """A folder of such files (or one file)."""
    out: str
    """The log to write; gzipped if it ends in .gz."""
    agents: Literal["judged", "both", "P1", "P2"] = "judged"
    """Whose views become records: those that were judged (both in chatting, else the student or
    patient), both, the first or the second speaker's."""
    domain: str | None = None
    """Only dialogues of this domain."""
    other_judge: bool = False
    """Keep the rewards of files that another judge scored with mixed polarity."""


@dataclass(frozen=True)
class SplitConfig:
    """Which log becomes two: no persona, dialogue or copy of one is in both."""

    log: tyro.conf.Positional[str]
    """The log; it is streamed and stays as it is."""
    train: str
    """The log to write for learning; gzipped if it ends in .gz."""
    test: str
    """The log to write for validation or evaluation."""
    test_share: float = 0.2
    """Share of the dialogues in it, as near as whole personas allow."""
    seed: int = 0
    """Seeds which personas it holds."""


@dataclass(frozen=True)
class PlayConfig:
    """Who you are, and with whom you speak."""

    role: Literal["agent", "partner"] = "agent"
    """Whom you play: the agent, whose persona you are told, or its partner."""
    domain: str = "therapy"
    """Domain of PersonaDialogue-v0."""
    persona: str | None = None
    """Id of the agent's persona; None draws one."""
    agent: str = "nano"
    """Who answers where you are the partner: folder of a saved agent or model, or "nano"."""
    partner: str = "scripted"
    """Who speaks with you where you are the agent: "scripted", "openai:MODEL@URL", "hf:FOLDER"."""
    judge: str = "rules"
    """Who scores the agent: "rules", "openai:MODEL@URL", "hf:FOLDER", "nli:FOLDER"."""
    max_turns: int = 8
    """The agent's turns in the dialogue."""
    seed: int | None = None
    """Seeds persona, partner and agent."""
    web: bool = False
    """Talk in a browser; role, domain, persona and seed can be chosen anew there."""
    host: str = "127.0.0.1"
    """Address of the page; all but 127.0.0.1 let others talk, at the cost of your endpoint."""
    port: int = 7860
    """Port of the page; the first free one from here on."""


@dataclass(frozen=True)
class LimitsConfig:
    """Whose limits are computed."""

    domains: tuple[str, ...] = ("chatting", "education", "therapy")
    """Embedded domains."""
    credits: tuple[str, ...] = ("greedy", "kstep:2", "kstep:3", "kstep:4", "segment", "full")
    """Policy classes, see agents.credit.parse_credit."""
    max_turns: int = 8
    """Agent turns in a dialogue."""
    noise: float = 0.1
    """How often the scripted partner is distracted, a probability."""


def demo(c: DemoConfig) -> None:
    """Train every policy class in every domain, compare on held-out personas, write a report."""
    from .demo import COLUMNS, findings, save_demo, table_rows

    started = time.perf_counter()
    outcomes = _compared(c)
    results = {cell: found.result for cell, found in outcomes.items() if found.result is not None}
    header = ("domain", "method", *COLUMNS)
    _print_table("Held-out personas, mean [95 % interval]", header, table_rows(results))
    for sentence in findings(results):
        console.print(sentence, highlight=False)
    for path in save_demo(results, c):
        console.print(f"wrote {path}")
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    _exit_if_failed(outcomes)


def compare_methods(c: CompareConfig) -> None:
    """Train every method on every budget with every seed, compare on held-out personas."""
    started = time.perf_counter()
    outcomes = _compared(c)
    make_report(ReportConfig((c.run,)))
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    _exit_if_failed(outcomes)


def make_report(c: ReportConfig) -> None:
    """Write the page, the tables and the figures of a comparison; print what it found."""
    from .report import DIFFERENCES, EARNED, difference_rows, earned_rows, findings, write_report
    from .results import read_comparison

    found = read_comparison(*c.runs)
    for title, header, rows in (
        ("What every method earned, mean [95 % interval]", EARNED, earned_rows(found)),
        ("What separates them", DIFFERENCES, difference_rows(found)),
    ):
        _print_table(title, header, rows)
    for warning in found.warnings:
        console.print(warning, style="yellow", markup=False)
    for sentence in findings(found):
        console.print(sentence, highlight=False, markup=False)
    for path in write_report(c.runs, c.out):
        console.print(f"wrote {path}", highlight=False)


def _compared(c: CompareConfig) -> dict[Cell, Outcome]:
    """Run a comparison with a progress bar."""
    for domain in c.domains:
        ppg_env.get_domain(domain)
    everything = cells(c)
    console.print(
        f"{len(everything)} cells: {', '.join(c.domains)} x untrained, {', '.join(c.methods)}; "
        f"{', '.join(map(str, c.budgets))} dialogues, {c.seeds} seeds, {c.workers} processes"
    )
    with _progress() as progress:
        overall = progress.add_task("[bold]all cells", total=len(everything))
        tasks = {
            cell: progress.add_task(str(cell), total=1.0, visible=False) for cell in everything
        }

        def show(share: Mapping[Cell, float]) -> None:
            progress.update(overall, completed=sum(share.values()))
            for cell, done in share.items():
                progress.update(tasks[cell], completed=done, visible=0.0 < done < 1.0)

        try:
            return compare(c, show)
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                "Stopped. Finished cells are kept; the same command goes on with the rest."
            )
            sys.exit(130)


def _exit_if_failed(outcomes: Mapping[Cell, Outcome]) -> None:
    """End with an error if a cell failed; what is complete has been reported."""
    failed = {cell: found.error for cell, found in outcomes.items() if found.result is None}
    for cell, error in failed.items():
        console.print(f"failed: {cell}: {error}", style="red", markup=False)
    if failed:
        sys.exit(1)


def train_agent(c: TrainConfig) -> None:
    """Train one agent into a run folder."""
    if c.offline is None and c.domain is not None:
        ppg_env.get_domain(c.domain)
    try:
        agent = train(c)
    except KeyboardInterrupt:
        where = "from the last checkpoint" if c.offline is None else "from the start of the log"
        console.print(f"Stopped. The same command goes on {where}.")
        raise
    if agent.processes.is_main_process:
        console.print(f"The agent is in {c.run}/agent")
        best = [row["offline/best_epoch"] for row in agent.history if "offline/best_epoch" in row]
        if best and best[-1] == 0:
            console.print("It is what it was before: no epoch was better on the validation log.")
        elif best:
            console.print(f"It is that of epoch {best[-1]:.0f}, the best on the validation log.")


def evaluate_agent(c: EvaluateConfig) -> None:
    """Evaluate a saved agent, "nano" or any Hugging Face model folder; print the metrics."""
    from .evaluate import evaluate_policy
    from .loading import load_policy

    if c.log is not None:
        _evaluate_steps(c, c.log)
        return
    domain = _own_domain(c.domain or "chatting")
    envs = gym.make_vec(
        "PersonaDialogue-v0",
        num_envs=32,
        domain=domain,
        personas=c.personas,
        max_turns=c.max_turns,
        noise=c.noise,
        partner=c.partner,
        judge=c.judge,
        verdict_cache=c.verdict_cache,
    )
    found = evaluate_policy(
        envs,
        load_policy(c.agent),
        episodes_per_persona=c.episodes,
        seed=c.seed,
        deterministic=c.deterministic,
        quiz=_quiz(c.quiz, envs.unwrapped.world),  # type: ignore[attr-defined]
    )
    table = Table(title=f"{c.agent} in {domain.name}, {len(found.persona_reward)} personas")
    table.add_column("metric")
    table.add_column("mean [95 % interval]")
    for name, value in found.metrics.items():
        table.add_row(name, str(value))
    console.print(table)
    by_turn = "  ".join(f"{reward:.2f}" for reward in found.reward_T)
    console.print(f"reward by turn: {by_turn}", highlight=False)
    for name, part_T in found.part_T.items():
        by_turn = "  ".join(f"{part:.2f}" for part in part_T)
        console.print(f"{name} by turn: {by_turn}", highlight=False)


def _evaluate_steps(c: EvaluateConfig, log: str) -> None:
    """Print what the agent's single turns earn after logged histories, and the logged ones."""
    from ppg_env.rejudge import last_line
    from ppg_env.world import make_judge

    from .evaluate import evaluate_steps
    from .loading import load_policy

    domain, dialogues = _log_and_domain(log, c.domain)
    judge = make_judge(c.judge, domain, c.verdict_cache)
    found = evaluate_steps(
        None,
        load_policy(c.agent),
        dialogues,
        score=last_line(judge, domain, _personas_of(domain, c.personas)),
        seed=c.seed,
        deterministic=c.deterministic,
    )
    rows = [("its lines", str(found.reward)), ("the logged lines there", str(found.logged))]
    _print_table(f"{c.agent} in {found.num_steps} logged turns", ("", "reward a turn"), rows)
    by_turn = "  ".join(f"{reward:.2f}" for reward in found.reward_T)
    console.print(f"its reward by turn: {by_turn}", highlight=False)


def _quiz(spec: str | None, world: World) -> FactQuiz | ChatQuiz | None:
    """Return the quiz that `spec` names, about the world's personas."""
    if spec is None:
        return None
    if spec == "facts":
        return FactQuiz(world.domain, world.personas)
    return ChatQuiz(ppg_env.open_chat(spec), world.domain, world.personas)


def play(c: PlayConfig) -> None:
    """Let a person play agent or partner, in the terminal or a browser; show every verdict."""
    from .live import Setting, Stage
    from .loading import load_policy

    ppg_env.get_domain(c.domain)
    settings = {}
    for domain in ppg_env.DOMAINS.values():
        briefs = {p.id: domain.partner_prompt(p) for p in ppg_env.bundled_personas(domain)}
        settings[domain.name] = Setting(domain.agent_role, domain.partner_role, briefs)
    needs_agent = c.web or c.role == "partner"
    stage = Stage(
        settings,
        load_policy(c.agent) if needs_agent else None,
        agent=c.agent,
        partner=c.partner,
        judge=c.judge,
        max_turns=c.max_turns,
    )
    if not c.web:
        _talk(stage.begin(c.role, c.domain, c.persona, c.seed))
        return
    try:
        from .web import Start, serve
    except ImportError as error:
        raise ImportError(
            f"The page needs {error.name}: pip install 'partial-policy-gradients[web]'."
        ) from error
    serve(stage, Start(c.role, c.domain, c.persona, c.seed), c.host, c.port, _say)


def _talk(dialogue: LiveDialogue) -> None:
    """Talk in the terminal until the dialogue is over or the person ends it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused below
    setting, is_agent = dialogue.setting, dialogue.role == "agent"
    console.print(
        dialogue.system if is_agent else dialogue.brief, style="dim", markup=False, highlight=False
    )
    console.print("[dim]Speak in this role; an empty line or Ctrl-D ends.[/dim]")
    while True:
        if dialogue.pending is not None:
            _say(dialogue.pending, setting.partner_role)
        if dialogue.over:
            break
        try:
            line = input(f"{setting.agent_role if is_agent else setting.partner_role}: ")
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line.strip():
            break
        try:
            turn = dialogue.say(line)
        except (ValueError, RuntimeError) as error:
            console.print(str(error), style="red", markup=False)
            continue
        if not is_agent:
            _say(turn.agent, setting.agent_role)
        parts = ", ".join(
            f"{name} {'-' if value is None else f'{value:.2f}'}"
            for name, value in turn.parts.items()
        )
        reward = "unscorable" if turn.reward is None else f"{turn.reward:.2f}"
        colour = "green" if (turn.reward or 0.0) >= 0.5 else "red"
        console.print(f"   {reward}  {turn.reason}  ({parts})", style=colour, markup=False)
    if not is_agent and dialogue.turns:
        console.print(f"It was {dialogue.persona}: {dialogue.system}", style="dim", markup=False)
    if dialogue.mean_reward is not None:
        console.print(f"mean reward {dialogue.mean_reward:.2f} over {len(dialogue.turns)} turns")


def _say(text: str, speaker: str = "") -> None:
    """Print a text as it is, after who says it."""
    if speaker:
        console.print(f"[bold]{speaker}:[/bold] ", end="")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def suggest(c: PilotConfig) -> None:
    """Measure the gradients of a pilot's dialogues; print which lookahead they speak for."""
    from .pilot import pilot_record, run_pilot
    from .report import GRADIENTS, pilot_findings, pilot_rows

    ppg_env.get_domain(c.domain)
    record = pilot_record(run_pilot(c, progress_bar=sys.stderr.isatty()))
    _print_table(f"Gradients of {c.agent} in {c.domain}", GRADIENTS, pilot_rows([record]))
    for sentence in pilot_findings([record]):
        console.print(sentence, highlight=False, markup=False)


def _print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; intervals get a line of their own."""
    table = Table(title=title)
    for name in header:
        table.add_column(name.replace("_to_", " to\n"), overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace(" [", "\n[") for cell in row))
    console.print(table)


def limits(c: LimitsConfig) -> None:
    """Print what ascent along each class's expected partial gradient reaches; exact."""
    credits = {text: parse_credit(text) for text in c.credits}
    table = Table(title="Shares of the optimal mean reward per turn")
    for name in ("domain", "optimum", "uniform", *credits):
        table.add_column(name)
    for domain in map(ppg_env.get_domain, c.domains):
        boundaries = domain.phase_boundaries(c.max_turns)
        personas = ppg_env.bundled_personas(domain)
        kinds = {domain.dynamics(p): " ".join(p.traits.values()) for p in personas}
        for dynamics, kind in kinds.items():
            process = ppg_env.ActProcess(dynamics, c.max_turns, c.noise)
            optimum = process.optimal_value()
            shares = [process.value(process.uniform_policy()) / optimum]
            for credit in credits.values():
                shares.append(process.limit(credit.weights(c.max_turns, boundaries)).share)
            row = [f"{domain.name} {kind}".strip(), f"{optimum:.3f}"]
            table.add_row(*row, *(f"{share:.3f}" for share in shares))
    console.print(table)


def rejudge(c: RejudgeConfig) -> None:
    """Score stored dialogues with another judge; write them beside the old ones, show the means."""
    if not Path(c.run).exists():
        raise FileNotFoundError(f"There is no run and no log {c.run}.")
    if Path(c.run).is_file():
        _rejudge_log(c)
        return
    if c.out is not None:
        raise ValueError(
            f"--out {c.out} is for a log; {c.run} is a folder, and what is scored is written "
            "into it."
        )
    from ppg_env.rejudge import rescored

    from .runs import TRANSCRIPTS, dialogue_folders, read_records, write_rejudged

    table = Table(title=f"Scored again by {c.judge}")
    names = ("run", "dialogues", "reward before", "reward now", "unscorable", "degenerate", "read")
    for name in names:
        table.add_column(name)
    for folder in dialogue_folders(c.run):
        scored = _rejudged(folder, c.judge, c)
        file = write_rejudged(folder, c.judge, (rescored(*pair, c.judge) for pair in scored))
        rewards = [record["rewards"] for record in read_records(file)]
        before = [
            record.get("rewards") or []
            for record in islice(read_records(folder / TRANSCRIPTS), len(rewards))
        ]
        unscorable = [[float(reward is None) for reward in dialogue] for dialogue in rewards]
        formed, read = (
            [record["reward_parts"].get(part, []) for record in read_records(file)]
            for part in ("well_formed", "parsed")
        )
        degenerate = [[None if part is None else 1.0 - part for part in parts] for parts in formed]
        means = map(_turn_mean, (before, rewards, unscorable, degenerate, read))
        table.add_row(str(folder), str(len(rewards)), *means)
        console.print(f"wrote {file}", highlight=False)
    console.print(table)


def _rejudge_log(c: RejudgeConfig) -> None:
    """Score the dialogues of a log into another log."""
    from ppg_env.rejudge import rejudge as score_again
    from ppg_env.rejudge import rescored
    from ppg_env.world import make_judge

    from .logs import parse_dialogue, write_log

    if c.out is None:
        raise ValueError(f"{c.run} is a log: name the log to write, --out scored.jsonl.")
    if Path(c.out).resolve() == Path(c.run).resolve():
        raise ValueError(f"--out {c.out} is the log itself; name another file.")
    domain, log = _log_and_domain(c.run, c.domain)
    records = (dialogue.record() for dialogue in log)
    scored = score_again(
        islice(records, c.dialogues),
        make_judge(c.judge, domain, c.verdict_cache),
        domain,
        _personas_of(domain, c.personas),
    )
    rewards: list[Sequence[float | None]] = []

    def written() -> Iterator[LoggedDialogue]:
        for record, verdicts in scored:
            dialogue = parse_dialogue(rescored(record, verdicts, c.judge))
            rewards.append(dialogue.rewards)
            yield dialogue

    number = write_log(c.out, written())
    unscorable = sum(reward is None for own in rewards for reward in own)
    console.print(
        f"wrote {c.out}: {number} dialogues, mean reward {_turn_mean(rewards)}, {unscorable} of "
        f"{sum(map(len, rewards))} lines unscorable",
        highlight=False,
    )


def calibrate(c: CalibrateConfig) -> None:
    """Show how far two judges agree on stored dialogues: accuracy, kappa and confusion."""
    from ppg_env.rejudge import LABELS, agreement, label

    from .runs import dialogue_folders, read_transcripts

    lines: dict[str, list[tuple[str, str, str]]] = {}
    for folder in dialogue_folders(c.run):
        columns: list[list[str]] = []
        for judge in c.judges:
            if judge == "stored":
                stored = islice(read_transcripts(folder), c.dialogues)
                parts = [record["reward_parts"]["prompt_to_line"] for record in stored]
            else:
                parts = [
                    [verdict.parts.get("prompt_to_line") for verdict in verdicts]
                    for _, verdicts in _rejudged(folder, judge, c)
                ]
            columns.append([label(part) for dialogue in parts for part in dialogue])
        speakers = islice(read_transcripts(folder), c.dialogues)
        columns.append(
            [
                record["persona"]
                for record in speakers
                for message in record["messages"]
                if message["role"] == "assistant"
            ]
        )
        domain = _own_domain(c.domain or _domain_of(folder)).name
        lines.setdefault(domain, []).extend(zip(*columns, strict=True))

    first, second = c.judges
    table = Table(title=f"Agreement of {first} (rows) and {second} (columns)")
    for name in ("domain", "lines", "both scored", "accuracy [95 %]", "kappa [95 %]"):
        table.add_column(name)
    confusions = {}
    for domain, labelled in lines.items():
        one, other, people = zip(*labelled, strict=True)
        found = agreement(one, other, people)
        confusions[domain] = found.confusion
        counts = (str(found.num_lines), str(found.num_scored))
        table.add_row(domain, *counts, str(found.accuracy), str(found.kappa))
    console.print(table)
    for domain, confusion in confusions.items():
        table = Table(title=f"{domain}: lines by label")
        for name in (first, *LABELS):
            table.add_column(name)
        for name, row in zip(LABELS, confusion, strict=True):
            table.add_row(name, *map(str, row))
        console.print(table)


def import_log(c: ImportConfig) -> None:
    """Turn published dialogues into a log that `ppg train --offline` reads."""
    from ppg_env.consistent_dialogues import published_records

    from .logs import parse_dialogue, write_log

    if c.domain is not None:
        ppg_env.get_domain(c.domain)
    dialogues: set[str] = set()

    def chosen() -> Iterator[Mapping[str, Any]]:
        for record in published_records(c.folder, agents=c.agents, other_judge=c.other_judge):
            if c.domain in (None, record["domain"]):
                dialogues.add(record["dialogue"])
                yield record
        if not dialogues:
            raise ValueError(f"{c.folder} holds no dialogues of the domain {c.domain!r}.")

    number = write_log(c.out, map(parse_dialogue, chosen()))
    console.print(f"wrote {c.out}: {number} records of {len(dialogues)} dialogues", highlight=False)


def split_a_log(c: SplitConfig) -> None:
    """Write a log as one to learn from and one of other personas."""
    from .logs import read_log
    from .splits import is_alone, split_log

    numbers = split_log(c.log, c.train, c.test, c.test_share, c.seed)
    for path, number in zip((c.train, c.test), numbers, strict=True):
        console.print(f"wrote {path}: {number} dialogues", highlight=False)
    alone = sum(is_alone(dialogue) for dialogue in read_log(c.log))
    if alone:
        console.print(
            f"{alone} of them tell neither persona nor system message nor group: each counts as "
            "somebody else. If some are of the same people, give them ids (field 'persona').",
            style="yellow",
            highlight=False,
        )


def _rejudged(
    folder: Path, judge: str, c: RejudgeConfig | CalibrateConfig
) -> Iterator[tuple[Mapping[str, Any], list[ppg_env.Verdict]]]:
    """Yield the folder's dialogues with the verdicts of `judge`."""
    from ppg_env.rejudge import rejudge as score_again
    from ppg_env.world import make_judge

    from .runs import read_settings, read_transcripts

    domain = _own_domain(c.domain or _domain_of(folder))
    own = str(read_settings(folder).get("personas", ""))
    personas = _personas_of(domain, c.personas or (own if Path(own).exists() else None))
    records = islice(read_transcripts(folder), c.dialogues)
    yield from score_again(records, make_judge(judge, domain, c.verdict_cache), domain, personas)


def _domain_of(folder: Path) -> str:
    """Return the domain of a run's dialogues."""
    from .runs import read_settings, read_transcripts

    record = next(read_transcripts(folder), {})
    named = record.get("domain") or read_settings(folder).get("domain")
    return _named_domain(str(named or ""), str(folder))


def _named_domain(name: str, where: str) -> str:
    """Return a domain that dialogues name; raise if they name none, or one that is not bundled."""
    if name in ppg_env.DOMAINS:
        return name
    what = f"are of the domain {name!r}, which is not a bundled one" if name else "name no domain"
    raise ValueError(
        f"The dialogues of {where} {what}, and a judge is told what they are of: give --domain, "
        f"one of {', '.join(ppg_env.DOMAINS)}, or module:NAME of a Domain of your own."
    )


def _log_and_domain(
    path: str, named: str | None
) -> tuple[ppg_env.Domain, Iterator[LoggedDialogue]]:
    """Return what the dialogues of a log are of, and the dialogues, scored or not.

    Raises:
        ValueError: neither `named` nor the log tells it, or, when it is read, the log mixes two.
    """
    from .logs import read_log

    first = next(read_log(path, unscored=True)).domain
    domain = _own_domain(named or _named_domain(first, path))

    def dialogues() -> Iterator[LoggedDialogue]:
        for number, dialogue in enumerate(read_log(path, unscored=True), start=1):
            if dialogue.domain != first:
                raise ValueError(
                    f"{path} mixes domains, and the judge is told one: {first!r} in its first "
                    f"dialogue, {dialogue.domain!r} in number {number}. Write a log of each."
                )
            yield dialogue

    return domain, dialogues()


def _own_domain(text: str) -> ppg_env.Domain:
    """Return the domain of this name, or that module:NAME holds."""
    module, colon, name = text.partition(":")
    if not colon:
        return ppg_env.get_domain(text)
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"There is no domain {text} ({error}). module is a file of yours without .py in this "
            "folder, or an installed one; NAME a Domain in it."
        ) from error
    if not isinstance(found, ppg_env.Domain):
        raise ValueError(f"{text} is a {type(found).__name__}, not a Domain.")
    return found


def _personas_of(domain: ppg_env.Domain, file: str | None = None) -> list[ppg_env.Persona]:
    """Return the bundled personas of a domain, if it is a bundled one, and those of a file."""
    bundled = domain.name in ppg_env.DOMAINS
    personas = list(ppg_env.bundled_personas(domain)) if bundled else []
    if file and Path(file).suffix:  # else the name of a split
        personas += ppg_env.load_personas(file, domain)
    return personas


def _turn_mean(dialogues: Sequence[Sequence[float | None]]) -> str:
    """Return the mean over all turns that have a value, "-" if none has one."""
    known = [value for values in dialogues for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _told(error: BaseException) -> str:
    """Return what an error says; of files what is wrong with which."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _with_lists(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with "a,b" after a flag that takes several values as "a b".

    A comma before a number is part of a name, as in segment:0,3,6, but in budgets and noise.
    """
    found: list[str] = []
    split = ""
    for argument in arguments:
        if argument.startswith("--"):
            split = {"--methods": r",(?=[a-zA-Z_])", "--domains": ","}.get(argument, "")
            split = "," if argument in ("--budgets", "--noise", "--update-episodes") else split
        found += re.split(split, argument) if split else [argument]
    return found


def main() -> None:
    """Entry point of the `ppg` command."""
    sys.path.append(str(Path.cwd()))  # where a class of the user's own may be
    config = tyro.extras.subcommand_cli_from_dict(
        {
            "demo": DemoConfig,
            "compare": CompareConfig,
            "report": ReportConfig,
            "train": TrainConfig,
            "evaluate": EvaluateConfig,
            "play": PlayConfig,
            "suggest-k": PilotConfig,
            "limits": LimitsConfig,
            "rejudge": RejudgeConfig,
            "calibrate": CalibrateConfig,
            "import": ImportConfig,
            "split": SplitConfig,
        },
        prog="ppg",
        args=_with_lists(sys.argv[1:]),
        description="Partial policy gradients for persona dialogues.",
    )
    disable_progress_bar()  # of loading weights
    commands: dict[type, Callable[[Any], None]] = {
        DemoConfig: demo,
        CompareConfig: compare_methods,
        ReportConfig: make_report,
        TrainConfig: train_agent,
        EvaluateConfig: evaluate_agent,
        PlayConfig: play,
        PilotConfig: suggest,
        LimitsConfig: limits,
        RejudgeConfig: rejudge,
        CalibrateConfig: calibrate,
        ImportConfig: import_log,
        SplitConfig: split_a_log,
    }
    try:
        commands[type(config)](config)
    except (ValueError, OSError, ImportError, MemoryError, *_BREAKDOWNS) as error:
        console.print(f"error: {_told(error)}", style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
