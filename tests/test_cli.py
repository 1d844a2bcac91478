"""The command line: every command runs, says what it wrote, answers slips with one clear line."""

from __future__ import annotations

import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ppg_env
from agents import KStep, PPGAgent, PPOAgent, cli, train
from agents.conversation import Conversation
from agents.runs import RunFolder, read_metrics

ROOT = Path(__file__).parent.parent
TINY = ("--budgets", "4", "--episodes", "4", "--group-size", "2", "--eval-episodes", "1")


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agents.cli", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


class Terminal:
    """Runs a command in this process.

    What it `printed` stays here, and as `output` together with what went to stderr.
    """

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capture = patch, capture
        self.printed = self.output = ""

    def run(self, *arguments: str, stdin: str | bytes = "") -> int:
        """Return the exit code."""
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        self.patch.setattr(sys, "argv", ["ppg", *arguments])
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        captured = self.capture.readouterr()
        self.printed = captured.out
        self.output = captured.out + captured.err
        return code

    @property
    def words(self) -> str:
        """The output as one line, wherever the terminal broke it."""
        return " ".join(self.output.split())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli.console, "_width", 200)
    return Terminal(monkeypatch, capsys)


# --- help -----------------------------------------------------------------------------------------


def test_help_lists_the_commands() -> None:
    done = in_a_process("--help")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("demo", "train", "evaluate", "play"))
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("demo", ["--run", "--domains", "--methods", "--budgets", "--workers"]),
        ("compare", ["--run", "--domains", "--methods", "--budgets", "--seeds", "--noise"]),
        ("report", ["Which comparison is reported", "--out"]),
        (
            "train",
            ["--domain", "--credit", "--k", "--algorithm", "--model", "--total-timesteps"],
        ),
        ("evaluate", ["--agent", "--personas", "--episodes", "--deterministic"]),
        ("play", ["--domain", "--persona", "--max-turns", "--seed"]),
        ("limits", ["--domains", "--credits", "--max-turns", "--noise"]),
    ],
)
def test_every_command_explains_its_flags(
    command: str, flags: list[str], terminal: Terminal
) -> None:
    assert terminal.run(command, "--help") == 0
    for flag in flags:
        assert flag in terminal.output


# --- demo -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_prints_the_table_and_writes_table_plots_and_transcripts(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    budget = (*TINY, "--max-turns", "2", "--workers", "1")
    done = in_a_process(
        "demo", "--run", str(run), "--domains", "therapy", "--methods", "greedy", *budget
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for name in ("table.md", "drift.png", "learning_curves.png", "transcripts.md"):
        assert (run / name).stat().st_size > 100
        assert name in done.stdout
    for word in ("untrained", "greedy", "reward/turn", "drift/turn", "tokens/s"):
        assert word in done.stdout
        assert word in (run / "table.md").read_text(encoding="utf-8")
    assert "therapy: greedy leads" in " ".join(done.stdout.split())
    assert "## therapy, dialogue 1, greedy" in (run / "transcripts.md").read_text(encoding="utf-8")


def test_ctrl_c_in_the_demo_tells_how_to_go_on(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compare", interrupted)
    assert terminal.run("demo", "--domains", "therapy") == 130
    assert "Finished cells are kept; the same command goes on" in terminal.words


@pytest.mark.slow
def test_ctrl_c_in_a_real_terminal_stops_everything_and_keeps_what_is_done(
    tmp_path: Path, heeds_ctrl_c: None
) -> None:
    budget = ("--budgets", "4000000", *TINY[2:], "--max-turns", "1", "--workers", "2")
    command = ("demo", "--run", str(tmp_path), "--domains", "chatting", "--methods", "greedy")
    finished = tmp_path / "chatting/noise-0.1/untrained/0/seed-0/result.json"
    learning = tmp_path / "chatting/noise-0.1/greedy/4000000/seed-0/metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "agents.cli", *command, *budget],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not (finished.exists() and learning.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does, children included
        shown, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Finished cells are kept; the same command goes on" in " ".join(shown.split())
    assert "Traceback" not in shown and "Warning" not in shown
    assert finished.exists() and not (learning.parent / "result.json").exists()
    size = learning.stat().st_size
    time.sleep(0.5)
    assert learning.stat().st_size == size  # nobody learns on


# --- limits ---------------------------------------------------------------------------------------


def test_limits_are_shares_of_the_optimum(terminal: Terminal) -> None:
    few = ("--domains", "chatting", "--credits", "greedy", "full", "--max-turns", "3")
    assert terminal.run("limits", *few) == 0
    shares = [float(number) for number in re.findall(r"\d\.\d{3}", terminal.output)]
    assert len(shares) == 4  # the optimum, then uniform, greedy and full as shares of it
    assert 0 < shares[1] < shares[2] < shares[3] <= 1


# --- train and evaluate ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_agent_can_be_evaluated(tmp_path: Path, terminal: Terminal) -> None:
    run = tmp_path / "run"
    small = ("--episodes", "4", "--group-size", "2", "--max-turns", "2", "--total-timesteps", "16")
    assert terminal.run("train", "--run", str(run), "--credit", "kstep:2", *small) == 0
    assert f"The agent is in {run}/agent" in terminal.words
    assert [row["time/total_timesteps"] for row in read_metrics(run)] == [8, 16]

    agent = str(run / "agent")
    assert terminal.run("evaluate", "--agent", agent, "--episodes", "1", "--max-turns", "2") == 0
    for word in ("reward", "drift", "prompt_to_line", "degenerate_rate", "reward by turn:"):
        assert word in terminal.words
    first = terminal.printed
    assert terminal.run("evaluate", "--agent", agent, "--episodes", "1", "--max-turns", "2") == 0
    assert terminal.printed == first

    assert terminal.run("train", "--run", str(run), "--credit", "kstep:2", *small) == 2
    assert "holds a finished run; choose another folder" in terminal.words


SMALL_RUN = ("--episodes", "4", "--group-size", "2", "--max-turns", "2", "--max-new-tokens", "6")


def unfinished(run: Path, terminal: Terminal, patch: pytest.MonkeyPatch, *flags: str) -> str:
    """Begin a run, press Ctrl-C after its second update; return what was said."""
    log, rows = RunFolder.log, 0

    def log_twice(folder: RunFolder, row: dict[str, float]) -> None:
        nonlocal rows
        if rows == 2:
            raise KeyboardInterrupt
        rows += 1
        log(folder, row)

    with patch.context() as inner:
        inner.setattr(RunFolder, "log", log_twice)
        assert terminal.run("train", "--run", str(run), *SMALL_RUN, *flags) == 130
    return terminal.words


@pytest.mark.slow
def test_ctrl_c_in_training_tells_how_to_go_on_and_the_same_command_does(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--total-timesteps", "32", "--checkpoint-every", "2", "--algorithm", "ppo")
    said = unfinished(tmp_path, terminal, monkeypatch, *flags)
    assert "Stopped. The same command goes on from the last checkpoint." in said
    assert "Traceback" not in said
    assert PPOAgent.load(tmp_path / "agent").num_updates == 3
    assert terminal.run("train", "--run", str(tmp_path), *SMALL_RUN, *flags) == 0
    assert [row["time/total_timesteps"] for row in read_metrics(tmp_path)] == [8, 16, 24, 32]
    assert PPOAgent.load(tmp_path / "agent").num_updates == 4


@pytest.mark.slow
def test_k_is_another_spelling_of_the_credit(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--total-timesteps", "24", "--checkpoint-every", "1")
    unfinished(tmp_path, terminal, monkeypatch, *flags, "--credit", "kstep", "--k", "2")
    command = ("train", "--run", str(tmp_path), *SMALL_RUN, *flags)
    assert terminal.run(*command, "--credit", "kstep:3") == 2
    assert "credit is 'kstep:2' there and 'kstep:3' now" in terminal.words
    assert terminal.run(*command, "--credit", "kstep:2") == 0
    assert PPGAgent.load(tmp_path / "agent").credit == KStep(2)


@pytest.mark.slow
def test_learning_that_breaks_down_is_told_in_one_line(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_spoilt_agent(config: train.TrainConfig) -> PPGAgent:
        agent = make_agent(config)
        weight = agent.policy.model.get_input_embeddings().weight
        weight.register_hook(lambda gradient: gradient * math.nan)
        return agent

    make_agent = train.make_agent
    monkeypatch.setattr(train, "make_agent", make_spoilt_agent)
    run = tmp_path / "run"
    assert terminal.run("train", "--run", str(run), *SMALL_RUN) == 2
    lines = [line for line in terminal.printed.splitlines() if line.strip()]
    assert lines[0].startswith("error: 3 gradients in a row were not finite")
    assert f"The batch is in {run}/diverged_batch." in terminal.words
    assert terminal.output.count("error") == 1 and "Traceback" not in terminal.output
    with np.load(run / "diverged_batch" / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays["reward_BT"].shape == (4, 2)


def test_used_up_memory_is_told_in_one_line_with_the_remedies(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_too_much(*arguments: object, **more: object) -> None:
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(Conversation, "reply", read_too_much)
    assert terminal.run("train", "--run", str(tmp_path / "run"), *SMALL_RUN) == 2
    assert re.search(r"error: Out of memory on \S+ in update 1 ", terminal.words)
    assert "lower token_budget (now 4096), turn gradient_checkpointing on" in terminal.words
    assert "Traceback" not in terminal.output


# --- play -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", sorted(ppg_env.DOMAINS))
def test_a_played_dialogue_shows_the_verdict_of_every_line(domain: str, terminal: Terminal) -> None:
    lines = "I would rather not say.\nThat is a good question.\nI never thought of it.\n"
    code = terminal.run("play", "--domain", domain, "--seed", "1", "--max-turns", "3", stdin=lines)
    assert code == 0
    world = ppg_env.get_domain(domain)
    assert terminal.output.count(f"{world.partner_role}:") == 3
    assert terminal.output.count("well_formed") == 3
    assert "mean reward" in terminal.output and "over 3 turns" in terminal.output


@pytest.mark.parametrize("end", ["", "\n", "   \n"])
def test_an_empty_line_or_the_end_of_the_input_ends_the_dialogue(
    end: str, terminal: Terminal
) -> None:
    assert terminal.run("play", "--seed", "1", stdin=f"I feel tired.\n{end}") == 0
    assert "over 1 turns" in terminal.output
    assert terminal.run("play", "--seed", "1", stdin=end) == 0
    assert "mean reward" not in terminal.output


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (b"with a \0 NUL", "is no text (a NUL"),
        (b"x" * 2001, "at most 2,000 are heard"),
        (b"half a letter: \xff", "is no text (a NUL"),
    ],
    ids=["NUL", "long", "bytes"],
)
def test_a_line_that_cannot_be_said_is_explained_and_the_dialogue_goes_on(
    bad: bytes, told: str, terminal: Terminal
) -> None:
    code = terminal.run("play", "--seed", "1", stdin=bad + b"\nI feel tired.\n")
    assert code == 0
    assert told in terminal.words
    assert "over 1 turns" in terminal.output


def test_a_named_persona_is_played(terminal: Terminal) -> None:
    persona = ppg_env.bundled_personas("therapy", "test")[3]
    assert terminal.run("play", "--persona", persona.id) == 0
    assert " ".join(persona.text.split()) in terminal.words


# --- slips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("play --domain therapie", "Unknown domain 'therapie'. Did you mean 'therapy'? There are"),
        ("demo --domains chattin", "Unknown domain 'chattin'. Did you mean 'chatting'? There are"),
        ("train --domain educaton", "Unknown domain 'educaton'. Did you mean 'education'?"),
        ("evaluate --domain therap", "Unknown domain 'therap'. Did you mean 'therapy'? There are"),
        ("evaluate --agent nanoo", "'nanoo'. Did you mean 'nano'? There are 'nano' (bundled)"),
        ("evaluate --agent runs/none/agent", "There are 'nano' (bundled), folders such as"),
        ("train --model nanoo", "Did you mean 'nano'? There are 'nano' (bundled)"),
        ("train --offline nope.jsonl", "No such file or directory: nope.jsonl"),
        ("demo --model nanoo", "Did you mean 'nano'? There are 'nano' (bundled)"),
        ("train --credit kstpe:3", "Did you mean"),
        ("train --credit kstep:0", "kstep:0"),
        ("train --credit kstep", "credit='kstep' needs k, e.g. --credit kstep --k 3 or kstep:3."),
        ("train --credit full --k 3", "k=3 belongs to credit='kstep', got 'full'."),
        ("train --credit kstep --k 0", "kstep:0"),
        ("train --algorithm x", "algorithm is 'ppg' or 'ppo', got 'x'."),
        ("train --tracker tensorbord", "Unknown tracker 'tensorbord'. Did you mean 'tensorboard'?"),
        ("demo --methods fulll", "full"),
        ("limits --domains therapie", "Unknown domain 'therapie'. Did you mean 'therapy'?"),
        ("limits --credits gredy", "'greedy'"),
        ("train --personas tset", "Unknown split 'tset'. Did you mean 'test'?"),
        ("train --episodes 6 --group-size 4", "multiple of processes x group_size = 1 x 4"),
        ("play --persona therapy-000", "Unknown persona id 'therapy-000'. Nearest: therapy-0"),
    ],
)
def test_a_slip_is_answered_with_what_exists_and_the_nearest(
    arguments: str, expected: str, terminal: Terminal, tmp_path: Path
) -> None:
    command, *rest = arguments.split()
    run = ["--run", str(tmp_path / "run")] if command in ("demo", "train") else []
    assert terminal.run(command, *rest, *run) == 2
    assert expected in terminal.words
    assert "Traceback" not in terminal.output
    assert not (tmp_path / "run").exists()  # the corrected command finds a clean place


def test_the_folder_of_a_run_is_answered_with_that_of_its_agent(
    terminal: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "run" / "agent").mkdir(parents=True)
    assert terminal.run("evaluate", "--agent", str(tmp_path / "run")) == 2
    assert "is a run folder; the agent that it trained is" in terminal.words


def test_a_run_folder_with_other_files_is_refused(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("Mine.")
    assert terminal.run("train", "--run", str(tmp_path)) == 2
    assert "is not empty and holds no run; choose a new or empty folder" in terminal.words


def test_a_run_folder_that_cannot_be_made_is_refused(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert terminal.run("train", "--run", str(tmp_path / "file" / "run")) == 2
    assert "Cannot make the run folder" in terminal.words
    assert terminal.run("train", "--run", str(tmp_path / "file")) == 2
    assert "is a file; name a folder" in terminal.words


@pytest.mark.slow
def test_what_stops_a_cell_of_the_demo_is_told_in_one_line(
    terminal: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    run = ("--run", str(tmp_path / "file"), "--workers", "1")
    assert terminal.run("demo", "--domains", "chatting", "--methods", "greedy", *run) == 2
    assert "error: Cannot make the run folder" in terminal.words
    assert "Traceback" not in terminal.output


def test_a_slip_in_a_real_terminal_leaves_no_traceback() -> None:
    done = in_a_process("play", "--domain", "therapie")
    assert done.returncode == 2
    assert "Did you mean 'therapy'?" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_flag_that_does_not_exist_is_refused(terminal: Terminal) -> None:
    assert terminal.run("play", "--doman", "therapy") == 2
    assert "--domain" in terminal.output


def test_limits_prints_the_exact_share_of_each_class() -> None:
    done = in_a_process("limits", "--domains", "chatting", "--credits", "greedy", "kstep:2")
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("│ chatting")]
    optimum, uniform, greedy, kstep = map(float, row.strip("│ ").split("│")[1:])
    assert (optimum, uniform, greedy, kstep) == (0.794, 0.355, 0.658, 1.0)
