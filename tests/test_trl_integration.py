from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from test_processes import launch
from tiny_models import CHATML, REWRITING, tiny_model, tiny_tokenizer
from tiny_worlds import EchoDialogue, EchoDialogues

from agents.credit import advantages, credit_weights, parse_credit, partial_returns
from agents.losses import policy_gradient_loss

pytest.importorskip("trl", reason='pip install -e ".[trl]"')

from trl import GRPOConfig

from agents.integrations.trl import PartialCreditTrainer
from agents.integrations.trl_rollout import DialogueRollout

SLOTS, GROUP, LINE, TURNS = 8, 4, 6, 4
TESTS = Path(__file__).parent


class Watched(PartialCreditTrainer):
    """Keeps what was played and what reached the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        play = self.rollout_func
        self.played: list[dict[str, Any]] = []
        self.losses: list[dict[str, Any]] = []

        def kept(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            self.played.append(play(prompts, trainer))
            return copy.deepcopy(self.played[-1])

        self.rollout_func = kept

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        weights = copy.deepcopy(model.state_dict())
        self.losses.append({"inputs": inputs, "weights": weights})
        return super().compute_loss(model, inputs, *args, **kwargs)


def config(folder: Path, **changes: Any) -> GRPOConfig:
    return GRPOConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": SLOTS,
            "num_generations": GROUP,
            "max_completion_length": LINE,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "loss_type": "dr_grpo",
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }
    )


def trainer(folder: Path, template: str = CHATML, **changes: Any) -> Watched:
    settings: dict[str, Any] = {"credit": "kstep:2", "max_turns": TURNS, **changes}
    if "rollout_func" not in settings:
        settings.setdefault("envs", EchoDialogues(SLOTS, TURNS))
    settings.setdefault("args", config(folder))
    settings.setdefault("processing_class", tiny_tokenizer(template))
    return Watched(settings.pop("model", tiny_model("llama")), **settings)


def turns_of(mask_L: np.ndarray) -> list[np.ndarray]:
    """The positions of each run of ones."""
    at = np.flatnonzero(mask_L)
    return np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)


def mask_of(inputs: dict[str, Any]) -> np.ndarray:
    mask: np.ndarray = (inputs["completion_mask"] * inputs["tool_mask"]).numpy()
    return mask


def advantages_of(played: dict[str, Any], credit: str) -> np.ndarray:
    """advantage_BT from the rewards alone."""
    rows = played["turn_rewards"]
    reward_BT, alive_BT = np.zeros((len(rows), TURNS)), np.zeros((len(rows), TURNS), dtype=bool)
    for b, rewards in enumerate(rows):
        reward_BT[b, : len(rewards)] = rewards
        alive_BT[b, : len(rewards)] = True
    weight_TT = credit_weights(
        parse_credit(credit), TURNS, played["boundaries"][0], scale="mean_window"
    )
    return advantages(
        partial_returns(reward_BT, weight_TT, alive_BT),
        group_B=np.array(played["group_id"]),
        alive_BT=alive_BT,
        scorable_BT=~np.isnan(reward_BT),
    )


def slots_in(inputs: dict[str, Any], played: dict[str, Any]) -> list[int]:
    """The slot of each row: TRL shuffles them."""

    def key(prompt: list[int], completion: list[int]) -> str:
        return str((list(prompt), list(completion)))

    keys = list(map(key, played["prompt_ids"], played["completion_ids"]))
    assert len(set(keys)) == len(keys)
    return [
        keys.index(key(prompt[mask == 1].tolist(), completion[said == 1].tolist()))
        for prompt, mask, completion, said in zip(
            inputs["prompt_ids"],
            inputs["prompt_mask"],
            inputs["completion_ids"],
            inputs["completion_mask"],
            strict=True,
        )
    ]


def assert_credited(inputs: dict[str, Any], played: dict[str, Any], credit: str) -> list[int]:
    """Check every token's advantage; return the slots of the rows."""
    want_BT, slots = advantages_of(played, credit), slots_in(inputs, played)
    want_BL = np.zeros(inputs["completion_ids"].shape)
    for row, slot in enumerate(slots):
        turns = turns_of(mask_of(inputs)[row])
        assert len(turns) == len(played["turn_rewards"][slot])
        for turn, positions in enumerate(turns):
            want_BL[row, positions] = want_BT[slot, turn]
    assert inputs["advantages"].dtype == torch.float32
    np.testing.assert_allclose(inputs["advantages"].numpy(), want_BL, rtol=1e-6, atol=1e-9)
    return slots


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    made = trainer(tmp_path_factory.mktemp("trl"))
    made.train()
    return made


# --- what reaches the loss ------------------------------------------------------------------------


def test_two_training_steps_move_every_weight(trained: Watched) -> None:
    before, after = tiny_model("llama").state_dict(), trained.model.state_dict()
    assert trained.state.global_step == 2 and len(trained.losses) == 2
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not [name for name in after if torch.equal(before[name], after[name])]


@pytest.mark.parametrize("step", [0, 1])
def test_the_loss_gets_the_advantages_of_agents_credit_token_by_token(
    trained: Watched, step: int
) -> None:
    inputs = trained.losses[step]["inputs"]
    slots = assert_credited(inputs, trained.played[step], "kstep:2")
    assert sorted(slots) == list(range(SLOTS)) and slots != list(range(SLOTS))
    assert len({len(rewards) for rewards in trained.played[step]["turn_rewards"]}) > 1


def test_the_partners_words_and_padding_have_no_weight(trained: Watched) -> None:
    inputs = trained.losses[0]["inputs"]
    silent_BL, real_BL = mask_of(inputs) == 0, inputs["completion_mask"].numpy() == 1
    assert (silent_BL & real_BL).any() and not real_BL.all()
    assert (inputs["advantages"].numpy()[silent_BL] == 0).all()
    assert (inputs["advantages"].numpy()[~silent_BL] != 0).any()


def test_a_turn_that_could_not_be_scored_has_no_weight(trained: Watched) -> None:
    inputs = trained.losses[0]["inputs"]
    for row in range(SLOTS):  # the second turn of an EchoDialogue has no score
        second = turns_of(mask_of(inputs)[row])[1]
        assert (inputs["advantages"][row, second] == 0).all()


def test_with_dr_grpo_the_gradient_is_the_partial_policy_gradient(trained: Watched) -> None:
    """Up to the constant 1 / max_completion_length."""
    inputs, weights = trained.losses[0]["inputs"], trained.losses[0]["weights"]
    model, start = tiny_model("llama"), inputs["prompt_ids"].shape[1]
    model.load_state_dict(weights)
    logits = model(
        input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    ).logits[:, start - 1 : -1]
    logprob_BL = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    turn_BL = torch.full(logprob_BL.shape, -1)
    for row in range(SLOTS):
        for turn, positions in enumerate(turns_of(mask_of(inputs)[row])):
            turn_BL[row, positions] = turn
    slots = slots_in(inputs, trained.played[0])
    advantage_BT = torch.as_tensor(advantages_of(trained.played[0], "kstep:2")[slots]).float()
    ours = policy_gradient_loss(logprob_BL, advantage_BT, turn_BL) / LINE
    expected = torch.autograd.grad(ours, list(model.parameters()))

    trained.model.load_state_dict(weights)
    trained.model.zero_grad()
    PartialCreditTrainer.compute_loss(trained, trained.model, inputs).backward()

    for want, parameter in zip(expected, trained.model.parameters(), strict=True):
        assert parameter.grad is not None and want.abs().max() > 0
        tolerance = 1e-4 * float(want.abs().max())
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("credit", ["full", "greedy", "segment", "trajectory"])
def test_other_credits_reach_the_loss_too(credit: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, credit=credit, args=config(tmp_path, max_steps=1))
    made.train()
    assert_credited(made.losses[0]["inputs"], made.played[0], credit)


def test_batches_used_in_parts_and_twice_keep_their_advantages(tmp_path: Path) -> None:
    parts = {"per_device_train_batch_size": SLOTS // 2, "steps_per_generation": 2}
    made = trainer(tmp_path, args=config(tmp_path, **parts, num_iterations=2, max_steps=4))
    made.train()
    assert len(made.played) == 1 and len(made.losses) == 4
    halves = [assert_credited(one["inputs"], made.played[0], "kstep:2") for one in made.losses]
    assert sorted(halves[0] + halves[1]) == list(range(SLOTS))


def test_an_adapter_learns_and_the_model_below_it_does_not(tmp_path: Path) -> None:
    from peft import LoraConfig

    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = trainer(tmp_path, peft_config=settings)
    before = copy.deepcopy(made.model.state_dict())
    made.train()
    moved = {n for n, value in made.model.state_dict().items() if not torch.equal(before[n], value)}
    assert moved and all("lora_" in name for name in moved)


# --- what is played -------------------------------------------------------------------------------


def test_it_trains_on_persona_dialogue(tmp_path: Path) -> None:
    envs = gym.make_vec("ppg_env:PersonaDialogue-v0", num_envs=4, domain="therapy", max_turns=2)
    sizes = {"per_device_train_batch_size": 4, "num_generations": 2}
    made = trainer(
        tmp_path,
        envs=envs,
        max_turns=None,
        credit="greedy",
        model=tiny_model("llama", max_position_embeddings=2048),
        args=config(tmp_path, **sizes),
    )
    made.train()
    assert made.turn_credit.max_turns == 2
    first, second = made.played
    assert [len(rewards) for rewards in first["turn_rewards"]] == [2] * 4
    assert first["group_id"][0] == first["group_id"][1] != first["group_id"][2]
    assert first["prompt_ids"][0] == first["prompt_ids"][1] != first["prompt_ids"][2]
    assert first["prompt_ids"] != second["prompt_ids"]


def test_the_same_seed_plays_the_same_dialogues(trained: Watched, tmp_path: Path) -> None:
    again = trainer(tmp_path)
    again.train()
    other = trainer(tmp_path, args=config(tmp_path, seed=7, max_steps=1))
    other.train()
    for first, second in zip(trained.played, again.played, strict=True):
        assert first["completion_ids"] == second["completion_ids"]
        assert first["prompt_ids"] == second["prompt_ids"]
    assert trained.played[0]["prompt_ids"] != trained.played[1]["prompt_ids"]
    assert other.played[0]["prompt_ids"] != trained.played[0]["prompt_ids"]


def test_gymnasiums_own_vector_environment_is_played_as_well(tmp_path: Path) -> None:
    envs = SyncVectorEnv(
        [lambda: EchoDialogue(TURNS) for _ in range(SLOTS)], autoreset_mode=AutoresetMode.DISABLED
    )
    made = trainer(tmp_path, envs=envs, max_turns=None, args=config(tmp_path, max_steps=1))
    made.train()
    assert made.turn_credit.max_turns == TURNS
    assert len(set(made.played[0]["group_id"])) == SLOTS  # it knows no groups
    assert_credited(made.losses[0]["inputs"], made.played[0], "kstep:2")


def test_a_dialogue_stops_before_its_context_is_full(tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=100)
    made = trainer(tmp_path, model=model, args=config(tmp_path, max_steps=1))
    made.train()
    lengths = [
        len(prompt) + len(completion)
        for prompt, completion in zip(
            made.played[0]["prompt_ids"], made.played[0]["completion_ids"], strict=True
        )
    ]
    assert max(lengths) <= 100
    turns = [len(rewards) for rewards in made.played[0]["turn_rewards"]]
    assert set(turns) == {1, 2}  # of at least two


@pytest.mark.slow
def test_two_processes_share_their_baseline_and_wait_for_each_other(tmp_path: Path) -> None:
    """The dialogues of one process are shorter; the other one goes on alone."""
    done = launch(str(TESTS / "two_trl_processes.py"), str(tmp_path), home=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank {rank}.pt") for rank in (0, 1)]
    assert ranks[0]["asked"] == ranks[1]["asked"]  # as often, for as many lines
    assert len(ranks[0]["asked"]) == sum(one["rewards"].shape[1] for one in ranks[1]["records"])
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name]), name
    for step in (0, 1):
        records = [rank["records"][step] for rank in ranks]
        assert records[0]["rewards"].shape[1] == 2 < records[1]["rewards"].shape[1]
        assert ranks[1]["seeds"][step] == ranks[0]["seeds"][step] + 2  # groups in a process
        reward_BT, alive_BT = (
            np.concatenate(
                [np.pad(r[key], ((0, 0), (0, TURNS - r[key].shape[1]))) for r in records]
            )
            for key in ("rewards", "alive")
        )
        weight_TT = credit_weights(parse_credit("kstep:2"), TURNS, scale="mean_window")
        want_BT = advantages(
            partial_returns(reward_BT, weight_TT, alive_BT),
            baseline="batch_mean",
            alive_BT=alive_BT,
            scorable_BT=~np.isnan(reward_BT),
        )
        for rank, record in enumerate(records):
            rows = [
                [float(advantage_L[at[0]]) for at in turns_of(mask_L)]
                for advantage_L, mask_L in zip(
                    record["advantages"].numpy(), record["mask"].numpy(), strict=True
                )
            ]
            size = len(rows)
            want = [
                advantage_T[alive_T].tolist()
                for advantage_T, alive_T in zip(
                    want_BT[rank * size :][:size], alive_BT[rank * size :][:size], strict=True
                )
            ]
            for found, expected in zip(sorted(rows), sorted(want), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_log_probabilities_of_the_engine_stay_with_their_tokens(tmp_path: Path) -> None:
    """vLLM returns some; TRL weighs tokens by them."""
    made = trainer(tmp_path, args=config(tmp_path, max_steps=1))
    generate = made._generate_single_turn

    def with_logprobs(*args: Any, **kwargs: Any) -> Any:
        lines, _ = generate(*args, **kwargs)
        return lines, [[-1.0 - token for token in line] for line in lines]

    made._generate_single_turn = with_logprobs
    made.train()
    inputs = made.losses[0]["inputs"]
    said_BL, ids_BL = mask_of(inputs) == 1, inputs["completion_ids"].numpy()
    want_BL = np.where(said_BL, -1.0 - ids_BL, 0.0)
    np.testing.assert_array_equal(inputs["sampling_per_token_logps"].numpy(), want_BL)


# --- bad input ------------------------------------------------------------------------------------


def spoilt(change: Callable[[dict[str, Any]], Any]) -> Callable[[list[Any], Any], dict[str, Any]]:
    """A rollout_func that changes what an honest one returns."""
    rollout = DialogueRollout(EchoDialogues(SLOTS, TURNS))

    def play(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        played = rollout(prompts, trainer)
        change(played)
        return played

    return play


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.pop("turn_ids"), "Dialogue 0 has no turn_ids"),
        (lambda p: p["turn_rewards"].__setitem__(2, None), "7 of 8 dialogues have turn_rewards"),
        (lambda p: p.pop("turn_rewards"), "0 of 8 dialogues have turn_rewards"),
        (lambda p: p["turn_rewards"][3].append(0.5), "Dialogue 3 has . turn_rewards, but its turn"),
        (lambda p: p["turn_ids"][1].reverse(), "Dialogue 1 has . turn_rewards.*never falling"),
        (lambda p: p["turn_ids"][1].pop(), "Dialogue 1 has .* one a token"),
        (
            lambda p: p["env_mask"].__setitem__(0, [1] * len(p["env_mask"][0])),
            "turn_ids of dialogue 0 do not fit",
        ),
        (lambda p: p.pop("group_id"), "needs one group id for each of the 8 dialogues"),
        (lambda p: p["turn_rewards"][4].__setitem__(0, float("inf")), "rewards are finite"),
    ],
)
def test_a_rollout_that_does_not_fit_together_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    made = trainer(tmp_path, rollout_func=spoilt(change), args=config(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match=message):
        made.train()


def test_a_missing_score_may_be_none_or_nan(tmp_path: Path) -> None:
    def to_none(played: dict[str, Any]) -> None:
        for rewards in played["turn_rewards"]:
            rewards[:] = [None if np.isnan(reward) else reward for reward in rewards]

    made = trainer(tmp_path, rollout_func=spoilt(to_none), args=config(tmp_path, max_steps=1))
    made.train()
    for rewards in made.played[0]["turn_rewards"]:
        assert rewards[1] is None
        rewards[1] = float("nan")
    made.played[0]["boundaries"] = [None] * SLOTS
    assert_credited(made.losses[0]["inputs"], made.played[0], "kstep:2")


def test_a_batch_without_any_score_changes_nothing(tmp_path: Path) -> None:
    def to_nan(played: dict[str, Any]) -> None:
        for rewards in played["turn_rewards"]:
            rewards[:] = [float("nan")] * len(rewards)

    made = trainer(tmp_path, rollout_func=spoilt(to_nan), args=config(tmp_path, max_steps=1))
    made.train()
    assert not made.losses[0]["inputs"]["advantages"].any()
    before, after = tiny_model("llama").state_dict(), made.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_a_phase_credit_needs_boundaries(tmp_path: Path) -> None:
    rollout = spoilt(lambda played: played.pop("boundaries"))
    made = trainer(
        tmp_path, rollout_func=rollout, credit="segment", args=config(tmp_path, max_steps=1)
    )
    with pytest.raises(ValueError, match="Pass boundaries"):
        made.train()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"credit": "kstop:2"}, "Did you mean 'kstep'"),
        ({"baseline": "leave_two_out"}, "leave_one_out"),
        ({"scale": "windows"}, "mean_window"),
        ({"max_turns": None}, "needs max_turns"),
        ({"envs": None}, "one of the two"),
        ({"envs": EchoDialogues(4, TURNS)}, "envs has 4 slots.* 8 x 1 = 8"),
        ({"reward_funcs": [lambda **_: [0.0]]}, "reward_funcs have no place"),
        ({"eval_dataset": [1]}, "evaluate_policy"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"importance_sampling_level": "sequence"}, "per-turn credit would be"),
        ({"top_p": 0.9}, "top_p=0.9 samples from another distribution"),
        ({"top_k": 50}, "top_k=50 samples"),
        ({"generation_kwargs": {"top_p": 0.5}}, "top_p=0.5 samples"),
        ({"generation_kwargs": {"temperature": 0.5}}, r"temperature=0.5 samples.* take 1\.0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 samples"),
    ],
)
def test_settings_of_trl_that_would_lose_the_credit_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, args=config(tmp_path, **changes))


def test_groups_that_a_process_cannot_hold_are_refused(tmp_path: Path) -> None:
    args = config(
        tmp_path, per_device_train_batch_size=6, num_generations=4, generation_batch_size=12
    )
    with pytest.raises(ValueError, match=r"envs has 6 slots.* 6 x 2 = 12"):
        trainer(tmp_path, envs=EchoDialogues(6, TURNS), args=args)


@pytest.mark.parametrize(
    "template, message",
    [
        (REWRITING, "rewrites what was said"),
        (CHATML.replace("<|im_end|>", "[END]"), "no single token"),
    ],
)
def test_a_template_that_trl_cannot_train_on_is_refused(
    template: str, message: str, tmp_path: Path
) -> None:
    made = trainer(tmp_path, template=template, args=config(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match=message):
        made.train()


def test_an_end_mark_at_which_trl_does_not_stop_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML, eos_token="<s>", pad_token="<s>")
    model = tiny_model("llama", eos_token_id=2)
    made = trainer(tmp_path, processing_class=tokenizer, model=model)
    with pytest.raises(ValueError, match=r"does not stop: set tokenizer\.eos_token"):
        made.train()


def test_a_first_prompt_that_fills_the_context_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=tiny_model("llama", max_position_embeddings=24))
    with pytest.raises(ValueError, match="leaves no room for a line of 6 tokens"):
        made.train()


def test_advantages_of_another_shape_never_reach_the_loss(trained: Watched) -> None:
    inputs = {**trained.losses[0]["inputs"], "advantages": torch.zeros(SLOTS)}
    with pytest.raises(RuntimeError, match=r"Advantages of shape \(8,\) reached the loss"):
        trained.compute_loss(trained.model, inputs)
