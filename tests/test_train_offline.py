"""ppg train --offline: from a log file to an agent on disk, and what goes wrong on the way."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from test_cli import Terminal
from test_offline import small_log
from test_reading import chat_of, told
from test_train import ROOT, changed, go, spoil_gradients
from tiny_models import tiny_policy

from agents import PPGAgent, cli, evaluate_policy
from agents import offline as offline_module
from agents import train as train_module
from agents.credit import credit_weights
from agents.logs import LogError, read_log, write_log
from agents.offline_settings import OfflineSettings
from agents.ppg import DivergedError
from agents.runs import RunFolder, read_metrics
from agents.train import TrainConfig, make_agent, train
from ppg_env import get_domain


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and two runs of it: as training and as held-out personas."""
    folder = tmp_path_factory.mktemp("logs")
    tiny_policy().save(folder / "model")
    for name, personas in (("run", "train"), ("held_out", "test")):
        config = TrainConfig(
            model=str(folder / "model"),
            run=str(folder / name),
            device="cpu",
            personas=personas,
            episodes=6,
            group_size=2,
            max_turns=2,
            max_new_tokens=6,
            total_timesteps=2 * 6 * 2,
            checkpoint_every=0,
            learning_rate=1e-3,
        )
        train(config, progress_bar=False)
        # The tiny model earns nothing: rewards to learn from are made up.
        log = read_log(folder / name / "transcripts.jsonl")
        scored = [replace(t, rewards=(i % 5 / 5, i % 3 / 3)) for i, t in enumerate(log)]
        write_log(folder / f"{name}.jsonl", scored)
    return folder


@pytest.fixture
def config(logs: Path, tmp_path: Path) -> TrainConfig:
    """Two passes of three steps each."""
    return TrainConfig(
        model=str(logs / "model"),
        offline=str(logs / "run.jsonl"),
        validation=str(logs / "held_out.jsonl"),
        run=str(tmp_path / "run"),
        device="cpu",
        learning_rate=1e-3,
        offline_settings=OfflineSettings(epochs=2, batch_size=4),
    )


def with_settings(config: TrainConfig, **settings: Any) -> TrainConfig:
    """Return the run with other settings of learning from logs."""
    return changed(config, offline_settings=replace(config.offline_settings, **settings))


def weights_of(agent: PPGAgent) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.model.parameters()])


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.setattr(cli.console, "_width", 200)
    return Terminal(monkeypatch, capsys)


def manifest_of(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(config.run) / "manifest.json").read_text())
    return found


# --- what a run is --------------------------------------------------------------------------------


def test_a_run_leaves_metrics_the_agent_and_a_result(config: TrainConfig) -> None:
    agent, run = go(config), Path(config.run)
    assert {path.name for path in run.iterdir()} == {
        "agent",
        "manifest.json",
        "metrics.jsonl",
        "result.json",
    }
    rows = read_metrics(run)
    assert rows == agent.history and len(rows) == 6
    assert [row["offline/epoch"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert ["offline/validation_loss" in row for row in rows] == [False, False, True] * 2
    assert all(math.isfinite(value) for row in rows for value in row.values())
    result = json.loads((run / "result.json").read_text())
    assert result == {"num_timesteps": 48, "last": agent.log}
    loaded = PPGAgent.load(run / "agent")
    assert torch.equal(weights_of(loaded), weights_of(agent))
    assert not torch.equal(weights_of(agent), weights_of(PPGAgent(tiny_policy(), None)))
    assert (loaded.num_updates, loaded.num_timesteps) == (6, 48)


def test_the_manifest_knows_the_logs_by_their_contents(config: TrainConfig) -> None:
    go(config)
    data = manifest_of(config)["data"]
    for name, path in (("log", config.offline), ("validation", config.validation)):
        assert data[name] == sha256(Path(str(path)).read_bytes()).hexdigest()
    settings = manifest_of(config)["settings"]
    assert settings["offline"] == config.offline
    assert settings["offline_settings.method"] == "ppg" and settings["domain"] == "chatting"


def test_the_log_of_a_training_run_is_read_as_it_is(logs: Path, config: TrainConfig) -> None:
    written = str(logs / "run" / "transcripts.jsonl")
    log, policy = list(read_log(written)), make_agent(config).policy
    assert len(log) == 12 and len({dialogue.group for dialogue in log}) == 6
    assert {dialogue.tokenizer for dialogue in log} == {policy.tokenizer_fingerprint}
    imitating = with_settings(changed(config, offline=written, validation=None), method="sft")
    assert go(imitating).history[0]["offline/dropped_turns"] == 0.0


def test_importance_weights_of_a_run_that_has_just_spoken_are_about_one(
    config: TrainConfig,
) -> None:
    config = changed(config, validation=None)
    agent = go(with_settings(config, importance=True, baseline="leave_one_out"))
    # Played with the weights at the start, or one update later.
    assert agent.history[0]["offline/ess"] > 0.9


def test_plain_and_gzipped_logs_are_one_log(config: TrainConfig, tmp_path: Path) -> None:
    plain = go(config)
    zipped = tmp_path / "log.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(str(config.offline)).read_bytes()))
    found = go(changed(config, offline=str(zipped), run=str(tmp_path / "zipped")))
    assert torch.equal(weights_of(found), weights_of(plain))


@pytest.mark.parametrize("method", ["sft", "filtered"])
def test_baselines_of_imitation_are_a_flag_away(method: str, config: TrainConfig) -> None:
    agent = go(with_settings(changed(config, validation=None), method=method))
    means = [row["offline/weight_mean"] for row in agent.history[:3]]
    assert sum(means) / 3 == pytest.approx({"sft": 1.0, "filtered": 0.25}[method])


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Return two logs of lines that the model would not say itself, and can learn to."""
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("offline", "validation")}
    write_log(paths["offline"], small_log(6))
    write_log(paths["validation"], small_log(6, 30))
    return paths


def test_an_early_stop_keeps_the_best_pass_and_says_which(
    config: TrainConfig, texts: dict[str, str]
) -> None:
    config = changed(config, learning_rate=0.01, **texts)
    config = with_settings(config, epochs=40, patience=2, method="sft")
    agent = go(config)
    losses = [v for row in agent.history if (v := row.get("offline/validation_loss")) is not None]
    best = losses.index(min(losses)) + 1
    assert best > 1 and len(losses) == best + 2 < 40
    result = json.loads((Path(config.run) / "result.json").read_text())
    assert result["kept_epoch"] == best == result["last"]["offline/best_epoch"]
    bests = [row["offline/best_epoch"] for row in agent.history if "offline/best_epoch" in row]
    assert bests == [1 + losses.index(min(losses[: n + 1])) for n in range(len(losses))]
    saved = PPGAgent.load(Path(config.run) / "agent")
    found = saved.offline_loss(str(config.validation), method="sft")
    assert found == pytest.approx(min(losses), rel=1e-4)


def test_the_trained_agent_can_be_evaluated(
    config: TrainConfig, texts: dict[str, str], terminal: Terminal, tmp_path: Path
) -> None:
    flags = ("--offline", texts["offline"], "--model", config.model, "--device", "cpu")
    run = tmp_path / "by command"
    more = ("--validation", texts["validation"], "--offline-settings.batch-size", "6")
    patient = ("--offline-settings.epochs", "2", "--offline-settings.patience", "9")
    more += ("--offline-settings.method", "sft", "--learning-rate", "1e-3")
    code = terminal.run("train", *flags, *more, *patient, "--run", str(run))
    assert code == 0, terminal.output
    best = json.loads((run / "result.json").read_text())["kept_epoch"]
    assert (
        best and f"It is that of epoch {best:.0f}, the best on the validation log" in terminal.words
    )
    assert str(run / "agent") in terminal.words
    personas = tmp_path / "personas.jsonl"
    lines = (ROOT / "ppg_env/data/chatting.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    personas.write_text("\n".join(lines), encoding="utf-8")
    few = ("--personas", str(personas), "--episodes", "1", "--max-turns", "1")
    assert terminal.run("evaluate", "--agent", str(run / "agent"), *few) == 0, terminal.output
    envs = gym.make_vec("PersonaDialogue-v0", num_envs=2, max_turns=1, personas=str(personas))
    assert len(evaluate_policy(envs, PPGAgent.load(run / "agent")).transcripts) == 3


def test_that_no_pass_was_better_than_the_start_is_said(
    config: TrainConfig, terminal: Terminal, tmp_path: Path
) -> None:
    """The tiny model cannot get better at imitating itself."""
    flags = ("--offline", str(config.offline), "--model", config.model, "--device", "cpu")
    more = ("--validation", str(config.validation), "--offline-settings.patience", "2")
    more += ("--offline-settings.method", "sft", "--learning-rate", "0.01")
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="No epoch had a lower validation loss"):
        assert terminal.run("train", *flags, *more, "--run", str(run)) == 0, terminal.output
    assert json.loads((run / "result.json").read_text())["kept_epoch"] == 0
    assert "no epoch was better on the validation log" in terminal.words
    assert torch.equal(
        weights_of(PPGAgent.load(run / "agent")), weights_of(PPGAgent(config.model, None))
    )


# --- stopping and going on ------------------------------------------------------------------------


def test_ctrl_c_saves_the_agent_and_the_same_command_starts_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunFolder.log

    def log_until_the_third(folder: RunFolder, row: Any) -> None:
        if len(folder.metrics()) == 2:
            raise KeyboardInterrupt
        log(folder, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log_until_the_third)
        with pytest.raises(KeyboardInterrupt):
            go(config)
    run = Path(config.run)
    assert PPGAgent.load(run / "agent").num_updates == 3
    assert len(read_metrics(run)) == 2 and not (run / "result.json").exists()
    again = go(config)
    whole = go(changed(config, run=str(tmp_path / "whole")))
    assert torch.equal(weights_of(again), weights_of(whole))
    assert len(read_metrics(run)) == 6
    assert torch.equal(weights_of(PPGAgent.load(run / "agent")), weights_of(whole))


def test_a_finished_run_is_refused_and_left_alone(config: TrainConfig) -> None:
    go(config)
    files = {path: path.stat().st_mtime_ns for path in Path(config.run).rglob("*")}
    with pytest.raises(FileExistsError, match=r"holds a finished run; choose another folder"):
        go(config)
    assert {path: path.stat().st_mtime_ns for path in Path(config.run).rglob("*")} == files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "sft"}, r"offline_settings\.method is 'ppg' there and 'sft' now"),
        ({"epochs": 3}, r"offline_settings\.epochs is 2 there and 3 now"),
        ({"sft_coef": 0.5}, r"offline_settings\.sft_coef is 0\.0 there and 0\.5 now"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_run_with_other_settings_is_refused(
    change: dict[str, Any], message: str, config: TrainConfig
) -> None:
    go(config)
    with pytest.raises(FileExistsError, match=rf"holds another run \({message}\)"):
        go(with_settings(config, **change))


def test_settings_of_playing_neither_refuse_nor_change_a_run(
    config: TrainConfig, tmp_path: Path
) -> None:
    plain = go(config)
    playing: dict[str, Any] = {
        "episodes": 7,
        "group_size": 3,
        "max_turns": 1,
        "noise": 0.5,
        "personas": "nowhere.jsonl",
        "judge": "openai:x@http://127.0.0.1:9",
        "total_timesteps": 1,
    }
    other = changed(config, run=str(tmp_path / "other"), **playing)
    assert torch.equal(weights_of(go(other)), weights_of(plain))
    assert manifest_of(other)["settings"] == manifest_of(config)["settings"]
    with pytest.raises(FileExistsError, match="holds a finished run"):  # it is this very run
        go(changed(config, **playing))


def test_a_run_on_another_log_of_the_same_name_is_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(Path(str(config.offline)).read_bytes())
    config = changed(config, offline=str(path))
    go(config)
    write_log(path, list(read_log(path))[1:])
    with pytest.raises(FileExistsError, match=r"holds another run \(log is '\w+' there and"):
        go(config)


# --- what is refused before there is a run --------------------------------------------------------


def test_a_log_of_another_domain_is_refused_before_the_run_folder_is_made(
    config: TrainConfig,
) -> None:
    with pytest.raises(
        LogError, match=r"of the domain 'chatting', .*'therapy'; leave out --domain"
    ):
        go(changed(config, domain="therapy"))
    assert not Path(config.run).exists()


@pytest.mark.parametrize("domain", ["customer_service", "therapy", ""])
def test_a_run_takes_its_domain_from_the_log_whatever_it_is(
    domain: str, config: TrainConfig, tmp_path: Path, terminal: Terminal
) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path, (replace(t, domain=domain) for t in read_log(str(config.offline))))
    config = changed(config, offline=str(path), validation=None)
    go(config)
    assert manifest_of(config)["settings"]["domain"] == (domain or None)
    flags = ("--offline", str(path), "--model", config.model, "--device", "cpu")
    code = terminal.run("train", *flags, "--run", str(tmp_path / "by command"))
    assert code == 0, terminal.output


@pytest.mark.parametrize("turns", [2, 5])
def test_segments_follow_the_phases_of_the_logs_domain_for_dialogues_as_long_as_logged(
    turns: int, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [turns, 1, turns, 1, turns, 1]
    log = [
        told(chat_of([f"No. {i}"] * number), domain="therapy", persona=f"p{i}")
        for i, number in enumerate(numbers)
    ]
    log[-1] = replace(log[-1], rewards=(0.5,))  # held out, two earn differently
    write_log(tmp_path / "log.jsonl", log[:4])
    write_log(tmp_path / "held_out.jsonl", log[4:])
    config = changed(
        config,
        offline=str(tmp_path / "log.jsonl"),
        validation=str(tmp_path / "held_out.jsonl"),
        credit="segment",
    )
    used = []
    monkeypatch.setattr(
        offline_module,
        "credit_weights",
        lambda credit, number, phases, **more: (
            used.append((number, tuple(phases))) or credit_weights(credit, number, phases, **more)
        ),
    )
    go(config)
    assert set(used) == {(turns, tuple(get_domain("therapy").phase_boundaries(turns)))}


@pytest.mark.parametrize("domain", ["customer_service", ""])
def test_segments_of_a_domain_without_phases_are_refused_with_the_remedy(
    domain: str, config: TrainConfig, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path, (replace(t, domain=domain) for t in read_log(str(config.offline))))
    config = changed(config, offline=str(path), validation=None, credit="segment")
    why = "Unknown domain 'customer_service'" if domain else "names no domain"
    with pytest.raises(LogError, match=rf"phases of the log's domain.*{why}.*segment:N"):
        go(config)
    assert not Path(config.run).exists()
    go(changed(config, credit="segment:1"))


def test_a_log_that_does_not_exist_is_refused_before_the_run_folder_is_made(
    config: TrainConfig,
) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        go(changed(config, offline="nowhere.jsonl"))
    assert not Path(config.run).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": "nowhere.jsonl"}, "nowhere"),
        ({"offline_settings": {"patience": 1}, "validation": None}, "patience=1 needs validation"),
        ({"offline_settings": {"baseline": "group_mean", "batch_size": 1}}, "a batch_size above 1"),
        ({"offline_settings": {"max_weight": 0.0}}, "Nothing can be learned from"),
        ({"algorithm": "ppo"}, "learns from its own dialogues only"),
        ({"n_epochs": 3}, r"about playing; .*--offline-settings\.epochs"),
        ({"batch_size": 3}, r"about playing; .*--offline-settings\.batch-size"),
    ],
    ids=str,
)
def test_what_cannot_be_learned_from_leaves_a_clean_place(
    change: dict[str, Any], message: str, config: TrainConfig
) -> None:
    settings = replace(config.offline_settings, **change.get("offline_settings", {}))
    with pytest.raises((ValueError, OSError), match=message):
        go(changed(config, **{**change, "offline_settings": settings}))
    assert not Path(config.run).exists()  # the corrected command finds a clean place
    go(config)


def test_a_folder_in_place_of_a_log_is_answered_with_the_log_in_it(
    logs: Path, config: TrainConfig
) -> None:
    with pytest.raises(LogError, match=r"is a folder; its log is .*run/transcripts\.jsonl"):
        go(changed(config, offline=str(logs / "run")))


def test_a_leak_leaves_a_clean_place(config: TrainConfig) -> None:
    with pytest.raises(LogError, match="share the persona"):
        go(changed(config, validation=config.offline))
    assert not Path(config.run).exists()


def test_settings_of_offline_learning_without_a_log_are_refused() -> None:
    for change in ({"validation": "x.jsonl"}, {"offline_settings": OfflineSettings(method="sft")}):
        with pytest.raises(ValueError, match="are for learning from a log: give offline"):
            TrainConfig(**change)


def test_a_run_that_diverges_leaves_the_agent_and_the_batch_for_inspection(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_spoilt_agent(config: TrainConfig) -> PPGAgent:
        agent = make_agent(config)
        spoil_gradients(agent, math.nan, {2, 3, 4})
        return agent

    monkeypatch.setattr(train_module, "make_agent", make_spoilt_agent)
    run = Path(config.run)
    with pytest.raises(DivergedError, match=rf"The batch is in {run}/diverged_batch"):
        go(config)
    assert (run / "diverged_batch" / "arrays.npz").exists()
    assert PPGAgent.load(run / "agent").num_updates == 4
    assert not (run / "result.json").exists()
