from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import (
    CHATML,
    REWRITING,
    THOUGHTLESS,
    goes_on,
    openings,
    play,
    tiny_policy,
    tiny_tokenizer,
)

from agents.credit import Discounted, advantages, credit_weights, partial_returns
from agents.integrations.dialogue_tokens import DialogueTokens, LineReader
from agents.integrations.turn_credit import (
    TurnCredit,
    on_tokens,
    rewards_of_turns,
    turns_of_mask,
)

MASK = np.array([[1, 1, 0, 0, 1, 0, 1, 1], [0, 1, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
TURN = np.array(
    [[0, 0, -1, -1, 1, -1, 2, 2], [-1, 0, -1, 1, 1, -1, -1, -1], [-1, -1, -1, -1, -1, -1, -1, -1]]
)


def test_every_run_of_ones_is_a_turn() -> None:
    np.testing.assert_array_equal(turns_of_mask(MASK), TURN)
    np.testing.assert_array_equal(turns_of_mask(MASK.astype(bool)), TURN)


def test_a_turn_gets_the_rewards_up_to_the_next_one() -> None:
    token_reward_BL = np.zeros(MASK.shape)
    token_reward_BL[0] = [0, 0.5, 0, 0.25, 0, 1.0, 0.125, 0.125]
    token_reward_BL[1, 7] = 2.0  # on padding behind the last turn
    reward_BT, alive_BT = rewards_of_turns(token_reward_BL, TURN)
    np.testing.assert_array_equal(reward_BT, [[0.75, 1.0, 0.25], [0, 2.0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(alive_BT, [[1, 1, 1], [1, 1, 0], [0, 0, 0]])


def test_a_batch_without_turns_has_one_dead_column() -> None:
    reward_BT, alive_BT = rewards_of_turns(np.zeros((2, 3)), np.full((2, 3), -1))
    assert reward_BT.shape == (2, 1) and not alive_BT.any()
    advantage_BT, _ = TurnCredit("full").advantages(reward_BT, alive_BT, ["a", "a"])
    assert not advantage_BT.any()


def test_tokens_carry_the_value_of_their_turn() -> None:
    value_BT = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    np.testing.assert_array_equal(
        on_tokens(value_BT, TURN),
        [[1, 1, 0, 0, 2, 0, 3, 3], [0, 4, 0, 5, 5, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]],
    )


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "batch_mean", "none"])
@pytest.mark.parametrize("scale", ["none", "window", "mean_window"])
@pytest.mark.parametrize("divide_by_std", [False, True])
def test_turn_credit_is_agents_credit(baseline: str, scale: str, divide_by_std: bool) -> None:
    rng = np.random.default_rng(0)
    reward_BT = rng.random((6, 4))
    alive_BT = np.arange(4) < np.array([4, 2, 3, 4, 1, 4])[:, None]
    reward_BT[2, 1] = np.nan
    credit = Discounted(0.5)
    settings: dict[str, Any] = {"max_turns": 5, "divide_by_std": divide_by_std}

    found = TurnCredit(credit, baseline, scale, **settings).advantages(
        reward_BT, alive_BT, ["x", "x", "y", "y", "x", "y"]
    )

    weight_TT = credit_weights(credit, 5, scale=scale)[:4, :4]
    return_BT = partial_returns(reward_BT, weight_TT, alive_BT)
    want_BT = advantages(
        return_BT,
        baseline=baseline,
        group_B=np.array([3, 3, 9, 9, 3, 9]),
        alive_BT=alive_BT,
        scorable_BT=~np.isnan(reward_BT),
        divide_by_std=divide_by_std,
    )
    np.testing.assert_array_equal(found[0], want_BT)
    np.testing.assert_array_equal(found[1], return_BT)


def test_boundaries_may_differ_from_dialogue_to_dialogue() -> None:
    reward_BT, alive_BT = np.array([[1.0, 2.0, 4.0]] * 2), np.ones((2, 3), dtype=bool)
    _, return_BT = TurnCredit("segment", "none").advantages(
        reward_BT, alive_BT, None, [(0, 1), (0, 2)]
    )
    np.testing.assert_array_equal(return_BT, [[1, 6, 4], [3, 2, 4]])
    _, return_BT = TurnCredit("segment", "none").advantages(reward_BT, alive_BT, None, (0, 1))
    np.testing.assert_array_equal(return_BT, [[1, 6, 4], [1, 6, 4]])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"credit": "gredy"}, "Did you mean 'greedy'"),
        ({"baseline": "leave"}, "leave_one_out"),
        ({"scale": "windo"}, "Did you mean 'window'"),
        ({"scale": "window"}, "needs max_turns"),
        ({"max_turns": 0}, "at least 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TurnCredit(**settings)


def test_more_turns_than_max_turns_are_refused() -> None:
    reward_BT, alive_BT = np.zeros((2, 4)), np.arange(4) < np.array([[2], [4]])
    with pytest.raises(ValueError, match="A dialogue has 4 turns, but max_turns is 3"):
        TurnCredit(max_turns=3).advantages(reward_BT, alive_BT, [0, 0])
    TurnCredit(max_turns=4).advantages(reward_BT, alive_BT, [0, 0])


@pytest.mark.parametrize("groups", [None, ["a"]])
def test_a_group_baseline_needs_a_group_for_each_dialogue(groups: list[str] | None) -> None:
    reward_BT, alive_BT = np.zeros((2, 1)), np.ones((2, 1), dtype=bool)
    with pytest.raises(ValueError, match="one group id for each of the 2 dialogues"):
        TurnCredit().advantages(reward_BT, alive_BT, groups)
    TurnCredit(baseline="batch_mean").advantages(reward_BT, alive_BT, groups)


@pytest.mark.parametrize("mask", [np.array([[0, 2]]), np.array([0, 1])])
def test_a_mask_of_something_else_is_refused(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="matrix of 0 and 1"):
        turns_of_mask(mask)


@pytest.mark.parametrize("reward", [np.nan, np.inf])
def test_token_rewards_that_are_not_finite_are_refused(reward: float) -> None:
    token_reward_BL = np.zeros(TURN.shape)
    token_reward_BL[1, 4] = reward
    with pytest.raises(ValueError, match=rf"at \[1, 4\] is {reward}: rewards are finite"):
        rewards_of_turns(token_reward_BL, TURN)


@pytest.mark.parametrize("row, token", [(1, 0), (2, 3)])
def test_a_reward_before_the_first_turn_is_refused(row: int, token: int) -> None:
    token_reward_BL = np.zeros(TURN.shape)
    token_reward_BL[row, token] = 0.5
    with pytest.raises(ValueError, match=rf"\[{row}, {token}\] is 0.5: no turn has begun there"):
        rewards_of_turns(token_reward_BL, TURN)


def test_rewards_of_another_shape_than_the_mask_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 7\) do not fit .* \(3, 8\)"):
        rewards_of_turns(np.zeros((3, 7)), TURN)


# --- a dialogue in tokens -------------------------------------------------------------------------


def test_a_dialogue_has_the_tokens_that_our_own_policy_reads_and_says() -> None:
    policy = tiny_policy()
    conversation, said = play(policy, [0, 1], num_turns=3)
    tape = conversation.tape()
    reader = LineReader(policy.tokenizer, "the engine")
    for slot in (0, 1):
        dialogue, chat = DialogueTokens(reader), openings(8)[slot]
        for turn, (ids, logprobs) in enumerate(tape.lines(slot)):
            dialogue.read(dialogue.unread(chat))
            text = dialogue.say(ids.tolist(), logprobs.tolist())
            assert text == said[slot][turn]
            chat = goes_on(chat, text, turn, slot)
        length = tape.length_S[slot]
        assert dialogue.ids == tape.token_SL[slot, :length].tolist()
        assert dialogue.turns == tape.turn_SL[slot, :length].tolist()
        np.testing.assert_allclose(dialogue.logprobs, tape.old_logprob_SL[slot, :length])
        assert dialogue.prompt_length == tape.turn_SL[slot].tolist().index(0)


@pytest.mark.parametrize("cut", [False, True])
def test_a_dialogue_reads_as_its_template_whether_the_line_said_its_end_mark_or_not(
    cut: bool,
) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    reader = LineReader(tokenizer, "the engine")
    dialogue, chat = DialogueTokens(reader), openings(1)[0]
    for turn, text in enumerate(("I like tea.", "No rain.")):
        dialogue.read(dialogue.unread(chat))
        line = reader.format.encode(text) + ([] if cut else sorted(reader.end_ids))
        assert dialogue.say(line) == text
        chat = goes_on(chat, text, turn, slot=0)
    dialogue.read(dialogue.unread(chat))
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(dialogue.ids) == rendered


def test_thoughts_stay_where_they_were_sampled() -> None:
    reader = LineReader(tiny_tokenizer(THOUGHTLESS), "the engine")
    dialogue = DialogueTokens(reader)
    chat = [{"role": "user", "content": "Hello."}]
    dialogue.read(dialogue.unread(chat))
    line = [*reader.format.encode("<think>hm</think>Tea."), *sorted(reader.end_ids)[:1]]
    assert dialogue.say(line) == "Tea."
    assert dialogue.ids[-len(line) :] == line and dialogue.turns[-len(line) :] == [0] * len(line)


def test_a_template_that_rewrites_is_refused() -> None:
    with pytest.raises(ValueError, match="rewrites what was said before, but verl trains"):
        LineReader(tiny_tokenizer(REWRITING), "verl")


def test_an_end_mark_of_several_tokens_is_refused() -> None:
    template = CHATML.replace("<|im_end|>", "[END]")
    with pytest.raises(ValueError, match=r"ends a line with '\[END\]', which is no single token"):
        LineReader(tiny_tokenizer(template), "verl")


def test_an_end_mark_at_which_the_engine_does_not_stop_is_refused() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    with pytest.raises(ValueError, match=r"set tokenizer.eos_token = '<\|im_end\|>'"):
        LineReader(tokenizer, "TRL", stops_at=[0])


def test_an_observation_that_does_not_end_with_the_partner_is_refused() -> None:
    dialogue = DialogueTokens(LineReader(tiny_tokenizer(CHATML), "verl"))
    with pytest.raises(ValueError, match="must end with the partner's message"):
        dialogue.unread([{"role": "assistant", "content": "Me."}])
