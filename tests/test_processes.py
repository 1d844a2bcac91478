"""Two processes learn what one process learns from the double batch.

They are started as a user starts them on a machine without GPUs, and speak over gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_policy
from two_processes import NUM_SLOTS, SCENARIOS, UnevenDialogues, learn, make_agent

from agents import PPGAgent
from agents.rollout import RolloutBatch, join_batches
from agents.runs import read_metrics
from agents.train import TrainConfig, train

TESTS = Path(__file__).parent


def launch(*command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Start a command in two processes; `home` holds no settings of Accelerate's."""
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    return subprocess.run(
        [sys.executable, *launcher, "--main_process_port", "0", *command],
        cwd=TESTS.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(home),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def flags(config: dict[str, Any]) -> list[str]:
    return [part for k, v in config.items() for part in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what two processes learned and a whole run of theirs."""
    folder = tmp_path_factory.mktemp("launched")
    tiny_policy().save(folder / "model")
    config = {
        "model": str(folder / "model"),
        "run": str(folder / "run"),
        "device": "cpu",
        "domain": "therapy",
        "episodes": 8,
        "group_size": 2,
        "max_turns": 2,
        "max_new_tokens": 6,
        "total_timesteps": 4 * 8 * 2,
        "checkpoint_every": 2,
        "learning_rate": 1e-3,
        "tracker": "tensorboard",
    }
    (folder / "config.json").write_text(json.dumps(config))
    done = launch(str(TESTS / "two_processes.py"), str(folder), home=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def records_of(folder: Path, rank: int) -> dict[str, Any]:
    records: dict[str, Any] = json.loads((folder / f"rank {rank}" / "records.json").read_text())
    return records


def timeless(row: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in row.items() if not k.startswith("time/")}


# --- what is learned ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_learn_as_one_with_the_double_batch(scenario: str, launched: Path) -> None:
    alone, record = learn(scenario, NUM_SLOTS)
    start = tiny_policy().model.state_dict()
    first, second = (
        load_file(launched / f"rank {rank}" / scenario / "tensors.safetensors") for rank in (0, 1)
    )
    assert first.keys() == second.keys() == alone.keys()
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        # First moments are a tenth of the summed gradient; Adam moves weights by up to 1e-3.
        tolerance = 3e-6 if name in start else 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(first[name], expected, rtol=0, atol=tolerance)
        assert name not in start or not torch.equal(expected, start[name])

    records = [records_of(launched, rank)[scenario] for rank in (0, 1)]
    assert [found["processes"] for found in records] == [2, 2] and record["processes"] == 1
    for ours, others, expected in zip(
        records[0]["history"], records[1]["history"], record["history"], strict=True
    ):
        assert timeless(ours) == timeless(others)
        assert ours["time/total_timesteps"] == expected["time/total_timesteps"]
        assert timeless(ours) == pytest.approx(timeless(expected), rel=1e-4, abs=2e-7)


@pytest.mark.slow
def test_processes_may_need_different_numbers_of_passes(launched: Path) -> None:
    passes = [records_of(launched, rank)["leave one out"]["passes"] for rank in (0, 1)]
    assert passes[0] != passes[1], passes


@pytest.mark.parametrize("scenario", ["leave one out", "batch mean"])
def test_in_these_dialogues_peers_of_the_other_process_matter(scenario: str) -> None:
    agent = make_agent(scenario, NUM_SLOTS)
    batch = agent.collect()
    alive_BT, half = batch.alive_BT, NUM_SLOTS // 2
    assert np.isnan(batch.reward_BT[alive_BT]).any()
    assert len(set(alive_BT.sum(axis=1))) > 1
    if scenario == "leave one out":  # someone lives on alone in its group
        living_GT = alive_BT.reshape(half, 2, -1).sum(axis=1)
        assert ((living_GT == 1) & (alive_BT.sum(axis=0) > 1)).any()
    whole_BT = agent.credited(batch)
    halves = [agent.credited(part_of(batch, rows)) for rows in (slice(half), slice(half, None))]
    assert np.abs(whole_BT - np.concatenate(halves)).max() > 0.01


def part_of(batch: RolloutBatch, rows: slice) -> RolloutBatch:
    return replace(
        batch,
        reward_BT=batch.reward_BT[rows],
        alive_BT=batch.alive_BT[rows],
        group_B=batch.group_B[rows],
    )


def test_groups_of_different_processes_stay_apart_whatever_their_numbers() -> None:
    agent = PPGAgent(tiny_policy(), UnevenDialogues(4), group_size=2, seed=0)
    batch = agent.collect().without_tape()
    assert batch.group_B.tolist() == [0, 0, 1, 1]
    other = replace(batch, group_B=np.array([7, 7, 0, 0]))
    group_B = join_batches([batch, other, batch]).group_B
    assert [len(set(group_B[i : i + 2])) for i in range(0, 12, 2)] == [1] * 6
    assert len(set(group_B)) == 6


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_the_first_process_writes(launched: Path) -> None:
    for scenario in SCENARIOS:
        own, other = (launched / f"rank {rank}" / scenario for rank in (0, 1))
        written = {path.name for path in own.iterdir()}
        assert written == {"tensors.safetensors", "agent", "checkpoints"}
        assert {path.name for path in other.iterdir()} == {"tensors.safetensors"}
        assert [records_of(launched, rank)[scenario]["wrote"] for rank in (0, 1)] == [True, False]
        manifest = own / "checkpoints" / "00000001" / "manifest.json"
        assert json.loads(manifest.read_text())["origin"]["num_processes"] == 2
        assert len(json.loads((manifest.parent / "state.json").read_text())["random_states"]) == 2


@pytest.mark.slow
def test_processes_that_find_different_checkpoints_refuse_to_go_on(launched: Path) -> None:
    # Each looked into a folder of its own, as on two machines that share no file system.
    for rank in (0, 1):
        refusal = records_of(launched, rank)["epochs"]["refusal"]
        assert "different checkpoints" in refusal and "(00000001, none)" in refusal
        assert "put the run folder on a file system that all machines share" in refusal


@pytest.mark.slow
def test_a_run_of_two_processes_is_one_run_and_that_of_one_process(
    launched: Path, tmp_path: Path
) -> None:
    run, config = launched / "run", config_of(launched)
    assert {path.name for path in run.iterdir()} == {
        "agent",
        "checkpoints",
        "manifest.json",
        "metrics.jsonl",
        "result.json",
        "transcripts.jsonl",
        "ppg",
    }
    events = list((run / "ppg").glob("events.out.*"))
    assert len(events) == 1
    rows = read_metrics(run)
    assert [row["time/total_timesteps"] for row in rows] == [16, 32, 48, 64]

    config = {**config, "run": str(tmp_path / "run"), "tracker": None}
    alone = train(TrainConfig(**config), progress_bar=False)
    for row, expected in zip(rows, alone.history, strict=True):
        assert timeless(row) == pytest.approx(timeless(expected), rel=1e-4, abs=2e-7)
    found = load_file(run / "agent" / "model.safetensors")
    for name, parameter in alone.policy.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=3e-6)


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill_as_if_nothing_had_happened(
    launched: Path, tmp_path: Path
) -> None:
    config = {**config_of(launched), "run": str(tmp_path / "run")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "kill").write_text("6")  # the second process, while it speaks in the third update
    killed = launch(str(TESTS / "two_processes.py"), str(tmp_path), home=tmp_path)
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr
    run, whole = tmp_path / "run", launched / "run"
    assert not (run / "result.json").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000002"]

    with pytest.raises(ValueError, match="num_processes is 2 there and 1 now"):
        train(TrainConfig(**config), progress_bar=False)
    done = launch("-m", "agents.cli", "train", *flags(config), home=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The agent is in") == 1
    for name in ("agent/model.safetensors", "checkpoints/00000004/optimizer.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert list(map(timeless, read_metrics(run))) == list(map(timeless, read_metrics(whole)))
