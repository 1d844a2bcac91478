"""A model spread over two processes learns what one process learns from the double batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_policy
from tiny_worlds import EchoDialogues
from torch.nn import Parameter
from transformers import AutoModelForCausalLM

from agents import PPGAgent
from agents.sharding import clip_gradients, shard_layers

SETTINGS = {"group_size": 2, "kl_coef": 0.1, "seed": 3, "token_budget": 700}
SCRIPT = """
import json, sys
from pathlib import Path

import torch
from tiny_models import tiny_policy
from tiny_worlds import EchoDialogues

from agents import PPGAgent

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])


def make():
    return PPGAgent(tiny_policy(), EchoDialogues(4), shard=True, **settings)


def note(agent):
    if agent.num_updates == 1:
        agent.checkpoint(folder / "checkpoints")
    return agent.num_updates < 2


agent = make().learn(1000, callback=note)
agent.save(folder / "agent")
again = make()
assert again.restore(folder / "checkpoints") and again.num_updates == 1
again.learn(callback=note)
for name, tensor in again._weights().items():
    assert torch.equal(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor,
                       agent._weights()[name].full_tensor()
                       if hasattr(tensor, "full_tensor") else agent._weights()[name]), name
shares = {n: p.to_local().numel() for n, p in agent.policy.model.named_parameters()
          if hasattr(p, "to_local")}
record = {"history": agent.history, "shares": shares, "again": again.history}
(folder / f"rank{agent.processes.process_index}.json").write_text(json.dumps(record))
agent.processes.destroy_process_group()
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "learn.py").write_text(SCRIPT, encoding="utf-8")
    tests = str(Path(__file__).parent)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *(str(folder / "learn.py"), str(folder), json.dumps(SETTINGS)),
        ],
        env={**os.environ, "PYTHONPATH": f"{Path(tests).parent}:{tests}", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
        capture_output=True,
    )
    return folder


@pytest.mark.slow
def test_two_processes_with_half_a_model_each_learn_as_one_with_all(launched: Path) -> None:
    agent = PPGAgent(tiny_policy(), EchoDialogues(8), **SETTINGS)  # type: ignore[arg-type]
    agent.learn(1000, callback=lambda learner: learner.num_updates < 2)
    found = load_file(launched / "agent" / "model.safetensors")
    start = dict(tiny_model("llama").named_parameters())
    for name, parameter in agent.policy.model.named_parameters():
        assert not torch.equal(parameter, start[name])
        torch.testing.assert_close(found[name], parameter.detach(), atol=2e-6, rtol=0)
    first, second = (json.loads((launched / f"rank{r}.json").read_text()) for r in (0, 1))
    for one, other, alone in zip(first["history"], second["history"], agent.history, strict=True):
        for key in ("rollout/turn_rew_mean", "train/policy_loss", "train/grad_norm", "train/kl"):
            assert one[key] == other[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_each_process_holds_half_of_every_layer(launched: Path) -> None:
    shares = json.loads((launched / "rank0.json").read_text())["shares"]
    whole = dict(tiny_model("llama").named_parameters())
    assert {name for name in whole if ".layers." in name} == set(shares)
    assert all(2 * share == whole[name].numel() for name, share in shares.items())


@pytest.mark.slow
def test_a_sharded_agent_is_saved_whole_and_goes_on_from_its_checkpoint(launched: Path) -> None:
    record = json.loads((launched / "rank0.json").read_text())
    assert record["again"][-1]["train/grad_norm"] == record["history"][-1]["train/grad_norm"]
    model = AutoModelForCausalLM.from_pretrained(launched / "agent")
    weights = load_file(launched / "agent" / "model.safetensors")
    assert torch.equal(
        model.model.layers[0].mlp.up_proj.weight, weights["model.layers.0.mlp.up_proj.weight"]
    )


def test_gradients_are_clipped_to_their_common_norm() -> None:
    parameters = [Parameter(torch.zeros(2)), Parameter(torch.zeros(1)), Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, 10.0) == 5.0
    assert parameters[1].grad.item() == 4.0
    assert clip_gradients(parameters, 1.0) == 5.0
    assert parameters[1].grad.item() == pytest.approx(0.8)
    assert clip_gradients(parameters[2:], 1.0) == 0.0


def test_a_model_whose_layers_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="layers of Linear cannot be told"):
        shard_layers(torch.nn.Linear(2, 2), 2)  # type: ignore[arg-type]
