from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from agents.credit import advantages, credit_weights, parse_credit, partial_returns
from agents.integrations.verl_estimators import ESTIMATORS, Estimator

BY_NAME = {estimator.name: estimator for estimator in ESTIMATORS}
EXAMPLES = Path(__file__).parent.parent / "examples"

# estimator, algorithm.ppg, the same credit in our words
CHOICES: list[tuple[str, dict[str, Any], str]] = [
    ("ppg_greedy", {}, "greedy"),
    ("ppg_kstep", {"k": 2}, "kstep:2"),
    ("ppg_segment", {"segment_length": 2}, "segment:2"),
    ("ppg_segment", {"boundaries": [0, 1, 3]}, "segment:0,1,3"),
    ("ppg_full", {}, "full"),
]
LENGTHS = [4, 2, 3, 0, 1, 4]  # turns of each dialogue; verl fills up with rows of none
UIDS = ["b-7", "b-7", "a-1", "a-1", "a-1", "b-7"]


class Batch:
    """Dialogues whose turns are runs of 1 to 3 tokens, two words of the partner between them."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        width = 4 * (3 + 2) + 3  # some padding
        self.mask = np.zeros((len(LENGTHS), width), dtype=np.int64)
        self.turn_BL = np.full(self.mask.shape, -1)
        self.reward_BL = np.zeros(self.mask.shape)
        self.reward_BT = np.zeros((len(LENGTHS), max(LENGTHS)))
        self.alive_BT = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
        for b, num_turns in enumerate(LENGTHS):
            at = 0
            for t in range(num_turns):
                said = slice(at, at + int(rng.integers(1, 4)))
                self.mask[b, said], self.turn_BL[b, said] = 1, t
                self.reward_BT[b, t] = rng.random()
                self.reward_BL[b, said.stop - 1] = self.reward_BT[b, t]
                at = said.stop + 2

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "token_level_rewards": torch.tensor(self.reward_BL, dtype=torch.float32),
            "response_mask": torch.tensor(self.mask),
        }

    def expected(self, credit: str, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
        """(advantage_BL, return_BL) by agents.credit, laid on the tokens one by one."""
        scale, size = settings.pop("scale", "none"), settings.pop("max_turns", max(LENGTHS))
        weight_TT = credit_weights(parse_credit(credit), size, scale=scale)[:4, :4]
        return_BT = partial_returns(self.reward_BT, weight_TT, self.alive_BT)
        group_B = np.unique(UIDS, return_inverse=True)[1]
        advantage_BT = advantages(return_BT, group_B=group_B, alive_BT=self.alive_BT, **settings)
        laid = []
        for value_BT in (advantage_BT, return_BT):
            value_BL = np.zeros(self.mask.shape)
            for b, token in np.argwhere(self.turn_BL >= 0):
                value_BL[b, token] = value_BT[b, self.turn_BL[b, token]]
            laid.append(value_BL)
        return laid[0], laid[1]


# --- the function itself --------------------------------------------------------------------------


@pytest.mark.parametrize("name, ppg, credit", CHOICES)
def test_an_estimator_gives_the_numbers_of_agents_credit(
    name: str, ppg: dict[str, Any], credit: str
) -> None:
    batch = Batch()
    found = BY_NAME[name](**batch.tensors(), config={"ppg": ppg}, index=np.array(UIDS, object))
    for value, want_BL in zip(found, batch.expected(credit), strict=True):
        assert value.dtype == torch.float32 and value.shape == batch.mask.shape
        np.testing.assert_allclose(value.numpy(), want_BL, rtol=1e-5, atol=1e-6)
        assert (value.numpy()[batch.mask == 0] == 0).all() and (value != 0).any()


def test_the_four_estimators_differ() -> None:
    batch, seen = Batch(), set()
    for name, ppg, _ in CHOICES:
        value, _ = BY_NAME[name](**batch.tensors(), config={"ppg": ppg}, index=UIDS)
        seen.add(tuple(value.flatten().tolist()))
    assert len(seen) == len(CHOICES)


@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "group_mean"},
        {"baseline": "batch_mean"},
        {"baseline": "none", "scale": "mean_window", "max_turns": 6},
        {"divide_by_std": True},
    ],
)
def test_settings_are_those_of_agents_credit(settings: dict[str, Any]) -> None:
    batch = Batch()
    config = {"ppg": {"k": 3, **settings}}
    found, _ = BY_NAME["ppg_kstep"](**batch.tensors(), config=config, index=UIDS)
    want_BL, _ = batch.expected("kstep:3", **settings)
    np.testing.assert_allclose(found.numpy(), want_BL, rtol=1e-5, atol=1e-6)


def test_rewards_spread_over_a_turn_add_up() -> None:
    """As a KL penalty inside the reward does."""
    batch = Batch()
    spread = batch.tensors()
    penalty = 0.01 * spread["response_mask"]
    spread["token_level_rewards"] = spread["token_level_rewards"] - penalty
    for b, t in np.argwhere(batch.alive_BT):
        batch.reward_BT[b, t] -= 0.01 * (batch.turn_BL[b] == t).sum()
    found, _ = BY_NAME["ppg_full"](**spread, index=UIDS)
    np.testing.assert_allclose(found.numpy(), batch.expected("full")[0], rtol=1e-4, atol=1e-6)


def test_filling_rows_change_nothing() -> None:
    batch = Batch()
    some = [b for b, length in enumerate(LENGTHS) if length]
    tensors = batch.tensors()
    whole, _ = BY_NAME["ppg_full"](**tensors, index=UIDS)
    part, _ = BY_NAME["ppg_full"](
        **{key: value[some] for key, value in tensors.items()}, index=[UIDS[b] for b in some]
    )
    torch.testing.assert_close(whole[some], part)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, ppg, message",
    [
        ("ppg_kstep", {}, r"write \+algorithm.ppg.k=3"),
        ("ppg_kstep", {"k": 0}, "at least 1, got 0"),
        ("ppg_kstep", {"k": 2, "bseline": "none"}, "Did you mean 'baseline'"),
        ("ppg_full", {"k": 2}, "ppg.k means nothing to ppg_full"),
        ("ppg_segment", {}, r"\+algorithm.ppg.segment_length=3"),
        ("ppg_segment", {"boundaries": [1, 2]}, "put 0 in front"),
        ("ppg_segment", {"boundaries": [0], "segment_length": 1}, "not both"),
        ("ppg_full", {"baseline": "critic"}, "leave_one_out"),
        ("ppg_full", {"scale": "window"}, "needs max_turns"),
        ("ppg_full", {"max_turns": 3}, "A dialogue has 4 turns, but max_turns is 3"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    name: str, ppg: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BY_NAME[name](**Batch().tensors(), config={"ppg": ppg}, index=UIDS)


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
def test_a_group_baseline_without_uids_is_refused(baseline: str) -> None:
    config = {"ppg": {"baseline": baseline}}
    with pytest.raises(ValueError, match=r"one group id for each of the 6 dialogues.* 'uid'"):
        BY_NAME["ppg_full"](**Batch().tensors(), config=config)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_are_refused(reward: float) -> None:
    tensors = Batch().tensors()
    tensors["token_level_rewards"][2, 0] = reward
    with pytest.raises(ValueError, match=rf"at \[2, 0\] is {reward}"):
        BY_NAME["ppg_full"](**tensors, index=UIDS)


def test_without_verl_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "agents.integrations.verl", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[verl\]"'):
        __import__("agents.integrations.verl")


def test_without_trl_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "agents.integrations.trl", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[trl\]"'):
        __import__("agents.integrations.trl")


# --- inside verl ----------------------------------------------------------------------------------


@pytest.fixture
def integration() -> Any:
    pytest.importorskip("verl", reason='pip install -e ".[verl]"')
    from agents.integrations import verl

    return verl


@pytest.mark.parametrize("name, ppg, credit", CHOICES)
def test_verls_own_compute_advantage_gives_the_numbers_of_agents_credit(
    name: str, ppg: dict[str, Any], credit: str, integration: Any
) -> None:
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    batch = Batch()
    data = DataProto.from_dict(batch.tensors(), {"uid": np.array(UIDS, dtype=object)})
    data = compute_advantage(
        data, adv_estimator=name, config=OmegaConf.create({"gamma": 1.0, "ppg": ppg})
    )
    want = dict(zip(("advantages", "returns"), batch.expected(credit), strict=True))
    for key, want_BL in want.items():
        np.testing.assert_allclose(data.batch[key].numpy(), want_BL, rtol=1e-5, atol=1e-6)


def test_verl_without_uids_is_told_so(integration: Any) -> None:
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    data = DataProto.from_dict(Batch().tensors())
    with pytest.raises(ValueError, match="'uid'"):
        compute_advantage(data, adv_estimator="ppg_full", config={})


def output(integration: Any, mask: list[int], rewards: list[float]) -> Any:
    return integration.TurnRewardsOutput(
        prompt_ids=[5],
        response_ids=[7] * len(mask),
        response_mask=mask,
        turn_rewards=rewards,
        reward_score=sum(rewards),
        metrics=integration.AgentLoopMetrics(),
    )


def test_each_turns_reward_stands_on_its_last_token(integration: Any) -> None:
    fields = output(integration, [1, 1, 0, 1, 0, 0, 1, 1], [0.5, 0.0, 0.25]).as_dict()
    assert fields["rm_scores"].tolist() == [0, 0.5, 0, 0.0, 0, 0, 0, 0.25]
    assert "turn_rewards" not in fields and "reward_score" not in fields


@pytest.mark.parametrize("rewards", [[0.5], [0.5, 0.5, 0.5]])
def test_rewards_that_do_not_match_the_turns_are_refused(
    rewards: list[float], integration: Any
) -> None:
    with pytest.raises(ValueError, match=f"has 2 turns .* there are {len(rewards)} rewards"):
        output(integration, [1, 0, 1], rewards).as_dict()


class TinyServer:
    """A language model server as verl's agent loops see it, with a tiny model behind it."""

    def __init__(self) -> None:
        from tiny_models import tiny_model

        self.model = tiny_model("llama")
        self.asked: list[dict[str, Any]] = []

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]
    ) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        self.asked.append({"id": request_id, "prompt": prompt_ids, **sampling_params})
        with torch.no_grad():
            ids = self.model.generate(
                torch.tensor([prompt_ids]),
                attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
                do_sample=True,
                max_new_tokens=sampling_params["max_tokens"],
                eos_token_id=sampling_params["stop_token_ids"],
                pad_token_id=0,
            )
        said = ids[0, len(prompt_ids) :].tolist()
        version = {"min_global_steps": len(self.asked), "max_global_steps": len(self.asked)}
        return TokenOutput(token_ids=said, log_probs=[-1.0] * len(said), extra_fields=version)


def loop_of(integration: Any, server: TinyServer, **settings: Any) -> Any:
    from omegaconf import OmegaConf
    from tiny_models import tiny_tokenizer
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap

    lengths = {"prompt_length": 1500, "response_length": 600, **settings.pop("lengths", {})}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": lengths}, "data": {}})
    return integration.DialogueAgentLoop(
        trainer_config=DictConfigWrap(config),
        server_manager=server,
        tokenizer=tiny_tokenizer(),
        processor=None,
        dataset_cls=SimpleNamespace,
        data_config=DictConfigWrap(config.data),
        **{"env_settings": {"domain": "therapy", "max_turns": 3}, "max_new_tokens": 8, **settings},
    )


def play(loop: Any, seed: int) -> Any:
    return asyncio.run(loop.run({"temperature": 1.0}, extra_info={"seed": seed}))


@pytest.fixture
def fresh_loop(monkeypatch: pytest.MonkeyPatch, integration: Any) -> None:
    """verl asks for the running event loop when it makes an agent loop."""
    module = sys.modules["verl.experimental.agent_loop.agent_loop"]

    class Running:
        def run_in_executor(self, *args: Any) -> Any:
            return asyncio.get_running_loop().run_in_executor(*args)

    monkeypatch.setattr(module, "get_event_loop", Running)


@pytest.mark.usefixtures("fresh_loop")
def test_played_dialogues_reach_verls_advantages_with_their_turns(integration: Any) -> None:
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    torch.manual_seed(0)
    outputs = [play(loop_of(integration, TinyServer()), seed) for seed in (3, 3, 4, 4)]
    fields = [each.as_dict() for each in outputs]
    assert outputs[0].prompt_ids == outputs[1].prompt_ids != outputs[2].prompt_ids
    assert [len(each.turn_rewards) for each in outputs] == [3] * 4

    def padded(key: str) -> torch.Tensor:
        rows = [one[key] for one in fields]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    data = DataProto.from_dict(
        {"token_level_rewards": padded("rm_scores"), "response_mask": padded("response_mask")},
        {"uid": np.array(["x", "x", "y", "y"], dtype=object)},
    )
    data = compute_advantage(data, adv_estimator="ppg_kstep", config={"ppg": {"k": 2}})

    reward_BT = np.array([each.turn_rewards for each in outputs])
    return_BT = partial_returns(reward_BT, credit_weights(parse_credit("kstep:2"), 3))
    want_BT = advantages(return_BT, group_B=np.array([0, 0, 1, 1]))
    for row, each in enumerate(outputs):
        mask_L = np.array(each.response_mask)
        at = np.flatnonzero(mask_L)
        turns = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        assert len(turns) == 3 and mask_L[0] == mask_L[-1] == 1
        for turn, positions in enumerate(turns):
            found = data.batch["advantages"][row, positions].numpy()
            np.testing.assert_allclose(found, want_BT[row, turn], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_loop")
def test_the_loop_sends_what_was_said_and_never_tokenises_it_again(integration: Any) -> None:
    server = TinyServer()
    done = play(loop_of(integration, server), seed=1)
    whole = done.prompt_ids + done.response_ids
    assert server.asked[0]["prompt"] == done.prompt_ids
    for request in server.asked:
        assert whole[: len(request["prompt"])] == request["prompt"]
        assert request["max_tokens"] == 8 and request["stop_token_ids"] == [1]
        assert request["temperature"] == 1.0 and request["id"] == server.asked[0]["id"]
    assert done.extra_fields["min_global_steps"] == 1
    assert done.extra_fields["max_global_steps"] == 3
    assert len(done.response_logprobs) == len(done.response_mask) == len(done.response_ids)
    assert [-lp for lp in done.response_logprobs] == [float(m) for m in done.response_mask]


@pytest.mark.usefixtures("fresh_loop")
def test_a_dialogue_ends_where_the_next_line_might_not_fit(integration: Any) -> None:
    whole = play(loop_of(integration, TinyServer()), seed=1)
    room = {"lengths": {"response_length": len(whole.response_ids) - 1}}
    cut = play(loop_of(integration, TinyServer(), **room), seed=1)
    assert 1 <= len(cut.turn_rewards) < 3
    assert len(cut.response_ids) <= room["lengths"]["response_length"]
    assert cut.response_mask[-1] == 1


@pytest.mark.usefixtures("fresh_loop")
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lengths": {"prompt_length": 9}}, r"raise data\.max_prompt_length"),
        ({"lengths": {"response_length": 7}}, r"raise data\.max_response_length"),
    ],
)
def test_lengths_that_hold_no_dialogue_are_refused(
    settings: dict[str, Any], message: str, integration: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        play(loop_of(integration, TinyServer(), **settings), seed=1)


@pytest.mark.usefixtures("fresh_loop")
def test_a_row_without_a_seed_is_refused(integration: Any) -> None:
    loop = loop_of(integration, TinyServer())
    with pytest.raises(ValueError, match=r"needs extra_info\['seed'\]"):
        asyncio.run(loop.run({}, extra_info={"index": 3}))


@pytest.mark.usefixtures("fresh_loop")
def test_a_turn_without_a_score_is_refused(
    integration: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loop_of(integration, TinyServer())
    step = loop.env.step
    monkeypatch.setattr(loop.env, "step", lambda text: (step(text)[0], np.nan, False, False, {}))
    with pytest.raises(ValueError, match=r"reward of turn 0 is nan.*'unscorable_reward': 0.0"):
        play(loop, seed=1)


@pytest.mark.slow
def test_verls_trainer_computes_our_advantages_on_a_ray_cluster(tmp_path: Path) -> None:
    pytest.importorskip("verl", reason='pip install -e ".[verl]"')
    from verl_on_ray import MASKS, REWARDS

    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "verl_on_ray.py")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (EXAMPLES.parent, Path(__file__).parent))),
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    alive_BT = np.array([[True] * len(row) + [False] * (3 - len(row)) for row in REWARDS])
    reward_BT = np.zeros((4, 3))
    reward_BT[alive_BT] = np.concatenate(REWARDS)
    return_BT = partial_returns(reward_BT, credit_weights(parse_credit("kstep:2"), 3), alive_BT)
    want_BT = advantages(return_BT, group_B=np.array([0, 0, 1, 1]), alive_BT=alive_BT)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["agent_loop"] == "agents.integrations.verl.DialogueAgentLoop"
    assert len(result["advantages"]) == len(MASKS)
    for b, found in enumerate(result["advantages"]):
        want, turn = [], -1
        for i, said in enumerate(MASKS[b]):
            turn += said == 1 and (i == 0 or MASKS[b][i - 1] == 0)
            want.append(want_BT[b, turn] if said else 0.0)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


# --- the launch file ------------------------------------------------------------------------------


def launch_settings() -> list[str]:
    """The overrides of examples/verl_partial_credit.sh, its variables filled in."""
    text = (EXAMPLES / "verl_partial_credit.sh").read_text(encoding="utf-8")
    block = re.search(r"settings=\(\n(.*?)\n\)", text, flags=re.DOTALL)
    assert block is not None
    lines = [line.strip() for line in block[1].splitlines()]
    values = {
        "$PWD": str(EXAMPLES.parent),
        "$RUN": "runs/verl",
        "$MODEL": "some/model",
        "$NNODES": "2",
        "$GPUS": "8",
        "$modules": "agents.integrations.verl",
    }
    found = []
    for line in (line for line in lines if line and not line.startswith("#")):
        for name, value in values.items():
            line = line.replace(name, value)
        assert "$" not in line
        found.append(line.replace('"', ""))
    return found


def test_the_launch_file_asks_verl_for_settings_that_it_has(integration: Any) -> None:
    import verl
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.utils import need_critic
    from verl.utils.config import omega_conf_to_dataclass

    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        config = compose("ppo_trainer", overrides=launch_settings())
    rollout = config.actor_rollout_ref.rollout
    assert config.trainer.use_v1 and config.trainer.nnodes == 2
    assert not need_critic(config)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.validate(16, config.data.train_batch_size, config.actor_rollout_ref.model)
    variables = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert variables.VERL_USE_EXTERNAL_MODULES == "agents.integrations.verl"
    assert config.actor_rollout_ref.actor.loss_agg_mode == "seq-mean-token-sum"
    assert Path(rollout.agent.agent_loop_config_path).is_file()

    estimator: Estimator = BY_NAME[config.algorithm.adv_estimator]
    batch = Batch()
    found, _ = estimator(**batch.tensors(), config=config.algorithm, index=UIDS)
    want_BL, _ = batch.expected("kstep:3", scale="mean_window", max_turns=8)
    np.testing.assert_allclose(found.numpy(), want_BL, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_loop")
def test_the_launch_files_rows_name_agent_loops_that_verl_can_make(
    integration: Any, tmp_path: Path
) -> None:
    import pandas
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from tiny_models import tiny_tokenizer
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap

    script = (EXAMPLES / "verl_partial_credit.sh").read_text(encoding="utf-8")
    program = re.search(r"<<'PYTHON'\n(.*?)\nPYTHON\n", script, flags=re.DOTALL)
    assert program is not None
    subprocess.run([sys.executable, "-c", program[1], str(tmp_path)], check=True)
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {}}, "data": {}})
    loops = {one.name: one for one in OmegaConf.load(EXAMPLES / "verl_dialogues.yaml")}
    personas = []
    for name in ("train", "test"):
        rows = pandas.read_parquet(tmp_path / f"{name}.parquet")
        seeds = {row["seed"] for row in rows["extra_info"]}
        [agent_name] = set(rows["agent_name"])
        loop = instantiate(
            config=loops[agent_name],
            trainer_config=DictConfigWrap(config),
            server_manager=TinyServer(),
            tokenizer=tiny_tokenizer(),
            processor=None,
            dataset_cls=SimpleNamespace,
            data_config=DictConfigWrap(config.data),
        )
        assert len(seeds) == len(rows) and isinstance(loop, integration.DialogueAgentLoop)
        assert loop.env.unwrapped.max_turns == 8 and loop.max_new_tokens == 64
        personas.append({persona.id for persona in loop.env.unwrapped.world.personas})
    assert personas[0] and personas[1] and not personas[0] & personas[1]
