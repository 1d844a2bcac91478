"""ppg train: what a run is, what it refuses, what it reports, and what it does when things fail.

Kills are in test_resume.py, several processes in test_processes.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import tiny_policy
from tiny_worlds import EchoDialogues

import ppg_env  # noqa: F401  (registers PersonaDialogue-v0)
from agents import PPGAgent, PPOAgent
from agents import train as train_module
from agents.checkpoint import CheckpointError
from agents.lm_policy import LMPolicy
from agents.logs import parse_dialogue
from agents.ppg import DivergedError
from agents.runs import RunFolder, read_metrics
from agents.train import TrainConfig, make_agent, train
from ppg_env import ChatJudge, Completion

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_policy().save(folder)
    return folder


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> TrainConfig:
    """Three updates of a tiny model, a checkpoint after each."""
    return TrainConfig(
        model=str(tiny_folder),
        run=str(tmp_path / "run"),
        device="cpu",
        episodes=4,
        group_size=2,
        max_turns=2,
        max_new_tokens=6,
        total_timesteps=3 * 4 * 2,
        checkpoint_every=1,
        learning_rate=1e-3,
    )


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**vars(config), **changes})


def go(config: TrainConfig) -> PPGAgent:
    return train(config, progress_bar=False)


def stop_before_the_end(config: TrainConfig, patch: pytest.MonkeyPatch) -> None:
    """Leave a run that has learned all and is not complete."""

    def interrupt(folder: RunFolder, result: Any) -> None:
        raise KeyboardInterrupt

    with patch.context() as inner:
        inner.setattr(RunFolder, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(config)
    assert not (Path(config.run) / "result.json").exists()


def weights_of(agent: PPGAgent) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.model.parameters()])


# --- what a run is --------------------------------------------------------------------------------


def test_a_run_leaves_metrics_checkpoints_the_agent_and_a_result(config: TrainConfig) -> None:
    agent, run = go(config), Path(config.run)
    assert {path.name for path in run.iterdir()} == {
        "agent",
        "checkpoints",
        "manifest.json",
        "metrics.jsonl",
        "result.json",
        "transcripts.jsonl",
    }
    assert [row["time/total_timesteps"] for row in read_metrics(run)] == [8, 16, 24]
    assert read_metrics(run) == agent.history
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000002", "00000003"]
    result = json.loads((run / "result.json").read_text())
    assert result == {"num_timesteps": 24, "last": agent.log}
    assert torch.equal(weights_of(PPGAgent.load(run / "agent")), weights_of(agent))


def test_no_checkpoints_are_written_if_none_are_asked_for(config: TrainConfig) -> None:
    go(changed(config, checkpoint_every=0))
    assert not (Path(config.run) / "checkpoints").exists()


def test_the_manifest_says_what_was_run_with_what_on_what(config: TrainConfig) -> None:
    go(config)
    manifest = json.loads((Path(config.run) / "manifest.json").read_text())
    settings = manifest["settings"]
    assert settings["seed"] == 0 and settings["episodes"] == 4 and settings["domain"] == "chatting"
    assert settings["credit"] == "kstep:3" and settings["learning_rate"] == 1e-3
    memory = {"device", "checkpoint_every", "token_budget", "gradient_checkpointing"}
    memory |= {"verdict_cache", "keep_transcripts"}
    assert set(vars(config)) - set(settings) == {"run", "tracker", "k", "offline_settings"} | memory
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"].keys() >= {"python", "numpy", "transformers", "accelerate"}
    assert re.fullmatch("[0-9a-f]{16}", manifest["data"]["weights"])
    assert manifest["hardware"]["cores"] >= 1
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        assert manifest["git_commit"].removesuffix("-dirty") == commit.stdout.strip()
    else:
        assert manifest["git_commit"] is None


def test_a_finished_run_is_refused_and_left_alone(config: TrainConfig) -> None:
    go(config)
    files = {path: path.stat().st_mtime_ns for path in Path(config.run).rglob("*")}
    with pytest.raises(FileExistsError, match=r"holds a finished run; choose another folder"):
        go(config)
    assert {path: path.stat().st_mtime_ns for path in Path(config.run).rglob("*")} == files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 now"),
        ({"learning_rate": 0.5}, r"learning_rate is 0\.001 there and 0\.5 now"),
        ({"credit": "full"}, "credit is 'kstep:3' there and 'full' now"),
        ({"k": 2}, "credit is 'kstep:3' there and 'kstep:2' now"),
        ({"algorithm": "ppo"}, "algorithm is 'ppg' there and 'ppo' now"),
        ({"domain": "therapy"}, "domain is 'chatting' there and 'therapy' now"),
        ({"lora_rank": 2}, "lora_rank is 0 there and 2 now"),
        ({"total_timesteps": 99}, "total_timesteps is 24 there and 99 now"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_run_with_other_settings_is_refused_and_the_difference_named(
    change: dict[str, Any], message: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before_the_end(config, monkeypatch)
    metrics = read_metrics(config.run)
    with pytest.raises(FileExistsError, match=rf"holds another run \({message}\); choose another"):
        go(changed(config, **change))
    assert read_metrics(config.run) == metrics
    assert go(config).num_updates == 3  # and the old settings still go on


def test_a_run_from_other_weights_is_refused(
    config: TrainConfig, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    config = changed(config, model=str(model))
    stop_before_the_end(config, monkeypatch)
    tensors = load_file(model / "model.safetensors")
    original = (model / "model.safetensors").read_bytes()
    next(iter(tensors.values())).mul_(1.01)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileExistsError, match=r"holds another run \(weights is '\w+' there and"):
        go(config)
    (model / "model.safetensors").write_bytes(original)
    assert go(config).num_updates == 3


def test_a_run_on_other_personas_is_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (ROOT / "ppg_env/data/chatting.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    personas = tmp_path / "personas.jsonl"
    personas.write_text("\n".join(lines), encoding="utf-8")
    config = changed(config, personas=str(personas))
    stop_before_the_end(config, monkeypatch)
    personas.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"holds another run \(personas is '\w+' there and"):
        go(config)


def test_where_a_run_is_shown_is_no_setting_of_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before_the_end(config, monkeypatch)
    assert go(changed(config, tracker="tensorboard", credit="kstep", k=3)).num_updates == 3


def test_metrics_that_were_lost_come_back_with_the_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before_the_end(config, monkeypatch)
    rows = read_metrics(config.run)
    (Path(config.run) / "metrics.jsonl").write_text('{"time')  # a power cut: not yet on the disk
    go(config)
    assert read_metrics(config.run) == rows and len(rows) == 3


def test_a_damaged_checkpoint_stops_the_run_before_anything_is_changed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before_the_end(config, monkeypatch)
    run = Path(config.run)
    state = run / "checkpoints" / "00000003" / "state.json"
    state.write_bytes(state.read_bytes()[:-9])
    metrics = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"state\.json is damaged\. Remove the folder"):
        go(config)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(state.parent)
    assert go(config).num_updates == 3
    assert len(read_metrics(run)) == 3


# --- defaults -------------------------------------------------------------------------------------


def what_is_set(config: TrainConfig) -> dict[str, Any]:
    agent = make_agent(config)
    names = ("learning_rate", "adam_eps", "lr_schedule", "n_epochs", "ratio_level", "group_size")
    found = {name: agent.settings[name] for name in names}
    (rate, *_), (eps, *_) = zip(
        *((group["lr"], group["eps"]) for group in agent.optimization.adam.param_groups),
        strict=True,
    )
    assert (rate, eps) == (found["learning_rate"], found["adam_eps"])
    return {**found, "kind": type(agent), "longest": agent.policy.max_new_tokens}


def test_the_defaults_are_those_that_the_settings_name(tiny_folder: Path) -> None:
    small = {"episodes": 4, "group_size": 2, "device": "cpu"}
    common = {"lr_schedule": "linear", "group_size": 2}
    ppg = {**common, "kind": PPGAgent, "n_epochs": 1, "ratio_level": "turn"}
    ppo = {**common, "kind": PPOAgent, "n_epochs": 2, "ratio_level": "token"}
    nano = {"learning_rate": 3e-4, "adam_eps": 1e-4, "longest": 32}
    other = {"learning_rate": 1e-6, "adam_eps": 1e-8, "longest": 64}
    adapter = {"learning_rate": 1e-4, "adam_eps": 1e-8, "longest": 64}
    assert what_is_set(TrainConfig(**small)) == {**ppg, **nano}
    assert what_is_set(TrainConfig(**small, algorithm="ppo")) == {**ppo, **nano}
    small["model"] = str(tiny_folder)
    assert what_is_set(TrainConfig(**small)) == {**ppg, **other}
    assert what_is_set(TrainConfig(**small, algorithm="ppo")) == {**ppo, **other}
    assert what_is_set(TrainConfig(**small, lora_rank=2)) == {**ppg, **adapter}
    chosen = {"learning_rate": 0.5, "adam_eps": 0.1, "n_epochs": 7, "ratio_level": "token"}
    expected = {**ppg, **chosen, "longest": 9}
    assert what_is_set(TrainConfig(**small, **chosen, max_new_tokens=9)) == expected


def test_kstep_and_k_are_one_setting_in_two_spellings() -> None:
    assert TrainConfig(credit="kstep", k=4).credit_name == "kstep:4"
    assert TrainConfig(k=4).credit_name == "kstep:4"
    assert TrainConfig(credit="segment:2").credit_name == "segment:2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"credit": "kstep"}, "credit='kstep' needs k, e.g. --credit kstep --k 3"),
        ({"credit": "full", "k": 3}, "k=3 belongs to credit='kstep', got 'full'"),
        ({"algorithm": "sarsa"}, "algorithm is 'ppg' or 'ppo', got 'sarsa'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_episodes_that_cannot_be_shared_out_are_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="episodes=5 must be a multiple of processes x group_size"):
        go(changed(config, episodes=5))


# --- trackers and metrics -------------------------------------------------------------------------


def test_tensorboard_gets_every_metric_under_its_name_with_turns_as_steps(
    config: TrainConfig,
) -> None:
    go(changed(config, tracker="tensorboard"))
    rows = read_metrics(config.run)
    folders = {path.parent for path in Path(config.run, "ppg").rglob("events.out.*")}
    found: dict[str, list[tuple[int, float]]] = {}
    for folder in folders:
        events = EventAccumulator(str(folder))
        events.Reload()
        for key in events.Tags()["scalars"]:
            found[key] = [(event.step, event.value) for event in events.Scalars(key)]
    assert found.keys() == rows[0].keys()
    for key, values in found.items():
        assert [step for step, _ in values] == [8, 16, 24]
        written = [row[key] for row in rows]
        np.testing.assert_allclose([value for _, value in values], written, rtol=1e-6)


def test_a_misspelt_tracker_is_refused_with_what_there_is(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"Unknown tracker 'tensorbord'\. Did you mean 'tensorb"):
        go(changed(config, tracker="tensorbord"))
    with pytest.raises(ValueError, match=r"Unknown tracker 'x'\. There are .*mlflow, .*wandb"):
        go(changed(config, tracker="x"))
    assert not Path(config.run).exists()  # the corrected command finds a clean place


def test_a_tracker_that_is_not_installed_is_refused_with_the_remedy(config: TrainConfig) -> None:
    names = ("clearml", "comet_ml", "mlflow", "dvclive", "swanlab", "aim", "wandb")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("every tracker is installed")
    with pytest.raises(ValueError, match=rf"'{missing[0]}' is not installed: pip install"):
        go(changed(config, tracker=missing[0]))


def documented_metrics() -> list[str]:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [key for cell in cells for key in re.findall("`([^`]+)`", cell)]


class Babble:
    """A chat model that never comes to a verdict."""

    name, remote, nondeterministic = "babble", False, False

    def __call__(self, chats: list[Any], seeds: list[int], **settings: Any) -> list[Completion]:
        return [Completion("Well.", True)] * len(chats)


def test_every_metric_is_documented_and_every_documented_metric_is_logged() -> None:
    kinds: list[tuple[type[PPGAgent], dict[str, Any]]] = [
        (PPGAgent, {}),
        (PPGAgent, {"kl_coef": 0.1}),
        (PPGAgent, {"ent_coef": 0.1, "n_epochs": 2}),
        (PPOAgent, {"batch_size": 2}),
    ]
    logged: list[set[str]] = []
    for kind, settings in kinds:
        envs = gym.make_vec("PersonaDialogue-v0", num_envs=4, max_turns=2)
        agent = kind(tiny_policy(), envs, group_size=2, seed=0, **settings)
        agent.learn(1)
        logged.append(set(agent.log))
        assert all(math.isfinite(value) for value in agent.log.values())
    log = [
        parse_dialogue({**record, "persona": f"{i}", "rewards": [i % 2] * len(record["rewards"])})
        for i, record in enumerate(agent.batch.records())
    ]
    offline = PPGAgent(tiny_policy(), None, "full", seed=0, learning_rate=0.05)
    with pytest.warns(UserWarning, match="effective sample size"):
        offline.learn_offline(
            log[:2],
            validation=log[2:],
            epochs=9,
            patience=9,
            importance=True,
            sft_coef=1.0,
            min_ess=1.0,
        )
    logged.append(set().union(*offline.history))
    talking = gym.make_vec(
        "PersonaDialogue-v0", num_envs=2, max_turns=1, judge=ChatJudge(Babble(), "chatting")
    )
    logged.append(set(PPGAgent(tiny_policy(), talking, group_size=2).learn(1).log))
    documented = documented_metrics()
    assert len(documented) == len(set(documented))
    assert set.union(*logged) == set(documented)
    assert logged[1] - logged[0] == {"train/kl"}
    assert logged[2] - logged[0] == {"train/entropy", "train/clip_fraction"}
    assert logged[3] - logged[0] == {"train/value_loss", "train/clip_fraction"}
    assert logged[5] - logged[0] == {"judge/parse_rate"}


def test_metrics_are_means_over_gradient_steps() -> None:
    # Without a step size every pass measures the same, so that sums would show.
    rows = []
    for n_epochs in (1, 3):
        settings = {"n_epochs": n_epochs, "learning_rate": 0.0, "critic_learning_rate": 0.0}
        agent = PPOAgent(
            tiny_policy(), EchoDialogues(8), seed=0, ent_coef=0.1, kl_coef=0.1, **settings
        )
        rows.append(agent.learn(1).log)
    for key in ("train/grad_norm", "train/entropy", "train/value_loss"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-4)
        assert rows[0][key] > 0
    # Without a step, sampling and training are the same policy.
    for row in rows:
        assert row["train/approx_kl"] == pytest.approx(0, abs=1e-6)
        assert row["train/kl"] == pytest.approx(0, abs=1e-6)


# --- interruptions --------------------------------------------------------------------------------


def test_ctrl_c_saves_the_agent_and_the_same_command_goes_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunFolder.log

    def log_until_the_second(folder: RunFolder, row: Any) -> None:
        if len(folder.metrics()) == 1:
            raise KeyboardInterrupt
        log(folder, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log_until_the_second)
        with pytest.raises(KeyboardInterrupt):
            go(config)
    run = Path(config.run)
    assert PPGAgent.load(run / "agent").num_updates == 2
    assert not (run / "result.json").exists()
    resumed = go(config)
    whole = go(changed(config, run=str(tmp_path / "whole")))
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert PPGAgent.load(run / "agent").num_updates == 3


# --- no memory ------------------------------------------------------------------------------------

Failure = Callable[[], Any]


def use_up_the_hosts_memory() -> Any:
    return torch.empty(2**62, dtype=torch.uint8)


def use_up_the_devices_memory() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore advice.")


def use_up_pythons_memory() -> Any:
    return bytearray(2**62)


def fail(agent: PPGAgent, failure: Failure, *, learning: bool, at: int) -> Any:
    """Let the model fail in the at-th forward pass of learning, or of speaking."""
    calls = 0
    network = agent.policy.network
    _ = network.split, network.serves_cache  # what is tried out once is tried before

    def hook(*args: Any) -> None:
        nonlocal calls
        calls += torch.is_grad_enabled() == learning
        if calls == at:
            calls = 0
            failure()

    return agent.policy.model.model.layers[0].register_forward_hook(hook)


def echo_agent(**settings: Any) -> PPGAgent:
    settings = {"group_size": 4, "seed": 0, "learning_rate": 1e-3, "token_budget": 900, **settings}
    return PPGAgent(tiny_policy(), EchoDialogues(8), **settings)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (use_up_the_hosts_memory, r"\[enforce fail at .*can't allocate memory.*\)"),
        (use_up_the_devices_memory, r"\(CUDA out of memory\. Tried to allocate 20\.00 GiB\.\)"),
        (use_up_pythons_memory, r"\(MemoryError\)"),
    ],
)
@pytest.mark.parametrize("learning", [True, False], ids=["update", "rollout"])
def test_used_up_memory_is_told_with_remedies_and_learning_can_go_on(
    learning: bool, failure: Failure, reason: str, tmp_path: Path
) -> None:
    whole = echo_agent().learn(90)
    assert whole.num_updates >= 3
    agent = echo_agent()
    agent.learn(90, lambda learner: bool(learner.checkpoint(tmp_path)) and False)
    hook = fail(agent, failure, learning=learning, at=2)  # half of the gradient is there
    with pytest.raises(MemoryError) as told:
        agent.learn()
    hook.remove()
    message = str(told.value)
    assert re.search(rf"Out of memory on cpu in update 2 .*{reason}", message)
    order = ("token_budget (now 900)", "gradient_checkpointing", "lora_rank", "now 8", "now 12")
    places = [message.index(remedy) for remedy in order]
    assert places == sorted(places)
    assert "More advice" not in message and "\n" not in message

    other = echo_agent()
    assert other.restore(tmp_path)  # the last checkpoint is as good as before
    for learner in (agent, other):
        learner.learn()
        assert torch.equal(weights_of(learner), weights_of(whole))


@pytest.mark.parametrize("learning", [True, False], ids=["update", "rollout"])
def test_other_errors_are_passed_on_as_they_are(learning: bool) -> None:
    broken = RuntimeError("The size of tensor a must match the size of tensor b.")

    def failure() -> None:
        raise broken

    agent = echo_agent()
    fail(agent, failure, learning=learning, at=1)
    with pytest.raises(RuntimeError) as told:
        agent.learn(1)
    assert told.value is broken


def test_a_run_without_memory_goes_on_from_its_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_failing_agent(config: TrainConfig) -> PPGAgent:
        agent = make_agent(config)
        fail(agent, use_up_the_hosts_memory, learning=True, at=3)
        return agent

    config = changed(config, token_budget=10_000)  # one pass an update
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "make_agent", make_failing_agent)
        with pytest.raises(MemoryError, match="in update 3 "):
            go(config)
    resumed = go(config)
    whole = go(changed(config, run=str(tmp_path / "whole")))
    assert torch.equal(weights_of(resumed), weights_of(whole))


# --- gradients that are no use --------------------------------------------------------------------


def spoil_gradients(agent: PPGAgent, factor: float, updates: set[int]) -> None:
    """Multiply one weight's gradient in these updates, counted from 1."""

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        return gradient * factor if agent.num_updates + 1 in updates else None

    agent.policy.model.get_input_embeddings().weight.register_hook(hook)


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e9], ids=str)
def test_a_useless_gradient_is_skipped_and_learning_goes_on(factor: float) -> None:
    agent, ends = echo_agent(), [weights_of(echo_agent())]
    spoil_gradients(agent, factor, {2, 3})
    agent.learn(10_000, lambda a: ends.append(weights_of(a)) or a.num_updates < 5)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(ends)]
    assert moved == [True, False, False, True, True]
    assert [row["train/skipped_steps"] for row in agent.history] == [0, 1, 2, 2, 2]
    norms = [row["train/grad_norm"] for row in agent.history]
    assert [0 < norm <= 1e4 for norm in norms] == moved
    assert torch.isfinite(ends[-1]).all()


def test_learning_stops_after_too_many_useless_gradients_in_a_row() -> None:
    agent = echo_agent(max_skips=2)
    spoil_gradients(agent, math.nan, {2, 4, 5, 6})
    with pytest.raises(DivergedError) as told:
        agent.learn(10_000)
    assert agent.num_updates == 5  # the one of update 2 stood alone
    message = str(told.value)
    assert "2 gradients in a row were not finite or larger than skip_grad_norm=10000" in message
    assert "last norm nan, update 5" in message
    assert "Lower learning_rate (now 0.001), use dtype float32, or look at the rewards" in message
    assert told.value.batch.num_turns > 0
    assert torch.isfinite(weights_of(agent)).all()


def test_a_run_that_diverges_leaves_the_batch_for_inspection(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_spoilt_agent(config: TrainConfig) -> PPGAgent:
        agent = make_agent(config)
        spoil_gradients(agent, math.nan, {2, 3, 4})
        return agent

    monkeypatch.setattr(train_module, "make_agent", make_spoilt_agent)
    config = changed(config, total_timesteps=10_000)
    run = Path(config.run)
    with pytest.raises(DivergedError, match=rf"The batch is in {run}/diverged_batch") as told:
        go(config)
    batch = told.value.batch
    with np.load(run / "diverged_batch" / "arrays.npz", allow_pickle=False) as arrays:
        for name in ("reward_BT", "alive_BT", "group_B"):
            np.testing.assert_array_equal(arrays[name], getattr(batch, name))
        for name in ("token_SL", "turn_SL", "old_logprob_SL"):
            np.testing.assert_array_equal(arrays[name], getattr(batch.tape, name))
    lines = (run / "diverged_batch" / "transcripts.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == batch.transcripts
    assert [row["train/skipped_steps"] for row in read_metrics(run)] == [0, 1, 2, 3]
    assert PPGAgent.load(run / "agent").num_updates == 4
    assert not (run / "result.json").exists()


def test_a_run_out_of_memory_goes_on_with_smaller_pieces(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(agent: PPGAgent, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as inner:
        update = PPGAgent.update
        inner.setattr(
            PPGAgent,
            "update",
            lambda agent, *a: (update if agent.num_updates == 0 else no_memory)(agent, *a),
        )
        with pytest.raises(MemoryError, match="lower token_budget"):
            go(config)
    agent = go(changed(config, token_budget=200, gradient_checkpointing=True, checkpoint_every=2))
    assert agent.num_updates == 3 and agent.settings["token_budget"] == 200


def test_an_adapters_checkpoint_belongs_to_its_base_model(
    tiny_folder: Path, tmp_path: Path
) -> None:
    def adapted(seed: int) -> PPGAgent:
        policy = LMPolicy.from_pretrained(tiny_folder, device="cpu", lora_rank=2, seed=0)
        with torch.no_grad():
            policy.model.get_input_embeddings().weight += seed
        return PPGAgent(policy, None, seed=0)

    adapted(0).checkpoint(tmp_path)
    assert adapted(0).restore(tmp_path)
    with pytest.raises(CheckpointError, match="frozen_weights"):
        adapted(1).restore(tmp_path)


def test_a_second_adapter_on_an_adapter_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    LMPolicy.from_pretrained(tiny_folder, device="cpu", lora_rank=2).save(tmp_path)
    with pytest.raises(ValueError, match="is an adapter already; leave out lora_rank"):
        LMPolicy.from_pretrained(tmp_path, device="cpu", lora_rank=2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "launch with --multi_gpu and train with --shard"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "ACCELERATE_USE_DEEPSPEED is set"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train with --dtype bfloat16"),
    ],
)
def test_what_the_launcher_promises_in_vain_is_refused(
    name: str, value: str, message: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        go(config)


def test_the_config_file_for_two_machines_is_one_that_accelerate_reads() -> None:
    file = Path(__file__).parent.parent / "examples" / "accelerate_two_machines.yaml"
    found = load_config_from_file(str(file))
    assert (found.num_machines, found.num_processes, found.mixed_precision) == (2, 16, "no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "ppo", "credit": "greedy"}, "has a critic and no credit"),
        ({"total_timesteps": 0}, "total_timesteps must be at least 1, got 0"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
