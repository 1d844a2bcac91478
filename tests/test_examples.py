"""What the README and the examples show is what runs."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from chat_servers import ChatServer, serving
from test_reading import chat_of
from tiny_models import tiny_model, tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM

from agents.logs import parse_dialogue, read_log, write_log
from agents.rollout import collect_rollouts
from agents.runs import read_metrics

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
README, SB3_PAGE = ROOT / "README.md", ROOT / "docs" / "sb3.md"
OFFLINE_PAGE = ROOT / "docs" / "offline.md"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def run_example(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_example_shows_one_dialogue() -> None:
    lines = run_example("01_one_dialogue.py").splitlines()
    assert sum(("patient" in line and "[0." in line) or "[1." in line for line in lines) == 8
    assert re.search(r"mean reward 0\.\d\d over 8 turns as therapy-", lines[-1])


def test_the_second_example_tells_an_honest_agent_from_a_yes_sayer() -> None:
    rewards = dict(
        re.findall(r"^(.+): mean reward (\d\.\d\d)$", run_example("02_your_own_agent.py"), re.M)
    )
    assert rewards.keys() == {"honest agent", "yes-sayer"}
    assert float(rewards["honest agent"]) > float(rewards["yes-sayer"]) + 0.2


@pytest.fixture
def server() -> Iterator[ChatServer]:
    yield from serving()


@pytest.mark.slow
def test_the_third_example_speaks_with_models_behind_an_endpoint(server: ChatServer) -> None:
    shown = run_example(
        "03_endpoint_partner_and_judge.py", "--model", server.model, "--url", server.url
    )
    assert re.search(r"^4 turns, [0-4] of them scored", shown, re.M)
    spoken = re.findall(r"patient.*: (.+?)\s+\S*\[", shown)
    assert len(spoken) == 4
    assert re.search(r"\[(1.00 consistent|0.00 contradicts|unscorable)", shown)


@pytest.mark.slow
def test_the_fourth_example_learns_from_a_log(tmp_path: Path) -> None:
    said = ["I like tea.", "My sister came by.", "It rained all day.", "I work at night."]
    log = [
        parse_dialogue(
            {
                "persona": f"p{i}",
                "messages": [
                    {"role": "system", "content": f"You are person number {i}."},
                    {"role": "user", "content": "Hello."},
                    {"role": "assistant", "content": said[i % 4]},
                    {"role": "user", "content": "And then?"},
                    {"role": "assistant", "content": said[(i + 1) % 4]},
                ],
                "rewards": [i // 4 % 2, None if i % 3 == 0 else 0.0],
            }
        )
        for i in range(24)
    ]
    write_log(tmp_path / "log.jsonl.gz", log)
    shown = run_example("04_published_dialogues.py", str(tmp_path / "log.jsonl.gz"))
    assert "24 dialogues, 48 lines of the agent: 12 consistent, 28 contradict, 8 unscor" in shown
    losses = [float(x) for x in re.findall(r"^epoch \d: loss +([\d.]+),", shown, re.M)]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["chatting", "education"])
def test_the_fifth_example_comes_within_five_percent_of_the_optimum(domain: str) -> None:
    shown = run_example("05_sb3_on_dialogue.py", "--domain", domain, "--steps", "30000")
    (share,) = re.findall(r"share (\d\.\d+)$", shown, re.M)
    assert float(share) > 0.95
    before, after = map(float, re.findall(r"(\d\.\d+) -> (\d\.\d+)", shown)[0])
    assert before < 0.6 * after


def test_the_sixth_example_tells_credits_apart() -> None:
    shown = run_example(
        "06_partial_pg_on_cartpole.py", "--steps", "30000", "--credits", "kstep:1", "kstep:20"
    )
    returns = dict(re.findall(r"^(kstep:\d+) +(\d+) \+-", shown, re.M))
    assert float(returns["kstep:20"]) > 2 * float(returns["kstep:1"])


def test_a_domain_of_ones_own_takes_less_than_thirty_lines() -> None:
    tree = ast.parse((EXAMPLES / "02_your_own_agent.py").read_text(encoding="utf-8"))
    parts = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in ("Attribute", "Domain", "Persona")
            for call in ast.walk(node)
        )
    ]
    names = [target.id for node in parts for target in node.targets if isinstance(target, ast.Name)]
    assert names == ["INSTRUMENT", "ORCHESTRA", "PERSONAS"]
    assert sum(node.end_lineno - node.lineno + 1 for node in parts if node.end_lineno) < 30


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    kernel = {"resources": {"metadata": {"path": str(tmp_path)}}, "timeout": 150}
    nbclient.NotebookClient(notebook, kernel_name="python3", **kernel).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(cell.execution_count for cell in cells)
    for cell in cells:
        assert not [output for output in cell.outputs if output.output_type == "error"]


def python_blocks(page: Path) -> list[str]:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [block for block in blocks if "no-test" not in block]


def test_the_pages_show_python() -> None:
    assert len(python_blocks(README)) >= 3 and len(python_blocks(SB3_PAGE)) == 2


@pytest.mark.parametrize(
    "block",
    [*python_blocks(README), *python_blocks(SB3_PAGE)],
    ids=lambda block: block.strip().splitlines()[0],
)
def test_python_in_the_pages_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what it writes is thrown away
    exec(compile(block, "page", "exec"), {"__name__": "__main__"})


def test_the_page_on_logs_can_be_typed_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks build on each other; the user brings two logs and a model."""
    monkeypatch.chdir(tmp_path)
    envs = gym.make_vec("PersonaDialogue-v0", num_envs=24, domain="therapy", max_turns=3)
    policy, log = tiny_policy(max_new_tokens=6), []
    for i, record in enumerate(collect_rollouts(envs, policy, seed=0).records()):
        dialogue = parse_dialogue(record)  # what it babbles earns nothing
        rewards = (i % 3 / 2, i % 4 / 3, i % 5 / 4)
        log.append(replace(dialogue, rewards=rewards, token_ids=None, logprobs=None))
    write_log("log.jsonl", log)
    lines = ["I like tea.", "No.", "My dog does.", "Good tea.", "Yes."]
    said = [[f"{lines[i % 5]} {i}", f"{lines[i // 5 % 5]} {i}"] for i in range(40)]
    chats = [
        {"messages": chat_of(each, system=False), "persona": f"p{i}"} for i, each in enumerate(said)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    policy.save("my-model")
    typed: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No epoch had a lower validation loss")
        for block in python_blocks(OFFLINE_PAGE):
            exec(compile(block, "page", "exec"), typed)
    shown = capsys.readouterr().out
    assert "its lines:" in shown and shown.count("over greedy") == 5
    assert len(list(read_log("scored.jsonl.gz"))) == 40


@pytest.mark.slow
def test_the_readmes_command_takes_a_hugging_face_model_to_a_trained_agent(tmp_path: Path) -> None:
    (command,) = re.findall(r"^ppg (train --model \S+/\S+ .*)$", README.read_text("utf-8"), re.M)
    words = command.split()
    model = tmp_path / "model"
    start = tiny_model("qwen2", max_position_embeddings=8192)
    start.save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    words[words.index("--model") + 1] = str(model)
    run = tmp_path / "run"
    small = [
        "--episodes",
        "8",
        "--total-timesteps",
        "20",
        "--max-new-tokens",
        "6",
        "--max-turns",
        "2",
    ]
    subprocess.run(
        [sys.executable, "-m", "agents.cli", *words, *small, "--run", str(run)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    settings = json.loads((run / "agent" / "ppg_agent.json").read_text(encoding="utf-8"))
    assert settings["credit"] == "kstep:3" and settings["num_timesteps"] >= 20
    trained = AutoModelForCausalLM.from_pretrained(run / "agent")
    assert sum(p.numel() for p in trained.parameters()) == start.num_parameters()
    assert len(read_metrics(run)) == 2
