"""Logged dialogues as tokens: what the policy itself left behind, or what its template writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_chat_templates import (
    BRACKETS,
    LLAMA2,
    PLAIN_LINES,
    STYLES,
    TIGHT,
    Style,
    converse,
    folded,
    place_of,
)
from tiny_models import (
    CHATML,
    PLAIN,
    REWRITING,
    THOUGHTLESS,
    Chat,
    Script,
    assert_same_logprobs,
    follow_scripts,
    plain_logprobs,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
)
from tiny_worlds import EchoDialogues

from agents.lm_policy import LMPolicy
from agents.logs import OPENING, LogError, parse_dialogue
from agents.reading import read_dialogues, refuse_unreadable
from agents.rollout import RolloutBatch, collect_rollouts
from agents.tape import Tape

several_sequences = pytest.mark.filterwarnings("ignore:.*several token sequences")

_TEXT_MARK = ("<|endoftext|>",)
MORE_STYLES = {
    **STYLES,
    "brackets": Style(BRACKETS, _TEXT_MARK, "<|endoftext|>", "[END]"),
    "tight": Style(TIGHT, _TEXT_MARK, "<|endoftext|>", "[END]"),
    "llama2": Style(LLAMA2, ("<s>", "</s>"), "</s>", " </s>", "<s>", folds=True),
    "rewriting": Style(REWRITING, STYLES["chatml"].special_tokens, "<|im_end|>", "<|im_end|>"),
}
each_style = pytest.mark.parametrize("style", MORE_STYLES.values(), ids=MORE_STYLES)


def through_json(record: dict[str, Any]) -> Any:
    """Return the logged dialogue of a record that was written and read."""
    return parse_dialogue(json.loads(json.dumps(record)))


def logged(batch: RolloutBatch) -> list[Any]:
    return [through_json(record) for record in batch.records()]


def told(chat: Sequence[dict[str, str]], **more: Any) -> Any:
    """Return a logged dialogue that is known as text."""
    own = sum(message["role"] == "assistant" for message in chat)
    return parse_dialogue({"messages": list(chat), "rewards": [1.0] * own, **more})


def chat_of(lines: Sequence[str], system: bool = True) -> Chat:
    chat = [{"role": "system", "content": "You like tea."}] if system else []
    for turn, line in enumerate(lines):
        chat += [
            {"role": "user", "content": f"Hello {turn}?"},
            {"role": "assistant", "content": line},
        ]
    return chat


def assert_same_tape(found: Tape, expected: Tape) -> None:
    for name in ("token_SL", "turn_SL", "length_S", "episode_S"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.old_logprob_SL, expected.old_logprob_SL, atol=1e-6)


# --- ids that were sampled ------------------------------------------------------------------------


@each_style
@several_sequences
def test_the_tape_of_logged_dialogues_is_the_one_that_the_policy_left(style: Style) -> None:
    policy = style.policy(max_new_tokens=9, temperature=0.9)
    batch = collect_rollouts(EchoDialogues(4), policy, seed=1)
    assert len(set(batch.alive_BT.sum(axis=1))) > 1 and batch.cut_BT.any()
    tape = read_dialogues(policy, logged(batch))
    assert_same_tape(tape, batch.tape)
    assert_same_logprobs(policy, tape)


@each_style
@several_sequences
def test_lines_with_end_marks_and_thoughts_are_read_as_they_were_played(
    style: Style, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_scripts(monkeypatch)
    policy = style.policy()
    lines = style.written(policy)
    scripts = [Script(*lines[b:], *lines[:b]) for b in range(2)]
    expected, history = converse(policy, scripts)
    assert not expected.cut_BT.any()
    log = []
    for b in range(2):
        spoken = expected.lines(b)
        log.append(
            told(
                history[-1][b],
                token_ids=[ids.tolist() for ids, _ in spoken],
                logprobs=[logprobs.tolist() for _, logprobs in spoken],
                tokenizer=policy.tokenizer_fingerprint,
            )
        )
    assert_same_tape(read_dialogues(policy, log), expected)


@pytest.mark.parametrize("kind", ["qwen2", "mixed", "gemma2", "cohere", "gpt2", "falcon", "mamba"])
def test_any_kind_of_model_scores_its_logged_lines_as_it_sampled_them(kind: str) -> None:
    policy = tiny_policy(kind, temperature=0.8)
    batch = collect_rollouts(EchoDialogues(3), policy, seed=2)
    tape = read_dialogues(policy, logged(batch))
    assert_same_tape(tape, batch.tape)
    with torch.no_grad():
        found = policy.logprobs(tape.token_SL, tape.turn_SL).numpy()
    np.testing.assert_allclose(found, tape.old_logprob_SL, atol=1e-4)
    np.testing.assert_allclose(plain_logprobs(policy, tape), tape.old_logprob_SL, atol=1e-4)


@several_sequences
def test_a_policy_that_starts_a_sequence_each_turn_reads_logs_that_way() -> None:
    policy = tiny_policy(sequences="turn")
    batch = collect_rollouts(EchoDialogues(3), policy, seed=2)
    assert len(batch.tape.length_S) == batch.num_turns > 3
    assert_same_tape(read_dialogues(policy, logged(batch)), batch.tape)


def test_a_dialogue_is_read_alike_in_any_company() -> None:
    policy = tiny_policy()
    log = logged(collect_rollouts(EchoDialogues(4), policy, seed=2))
    texts = [replace(t, token_ids=None, logprobs=None) for t in log]
    mixed = read_dialogues(policy, [log[0], texts[1], log[2], texts[3]])
    assert mixed.episode_S.tolist() == [0, 1, 2, 3]
    for b, trajectory in enumerate((log[0], texts[1], log[2], texts[3])):
        alone = read_dialogues(policy, [trajectory])
        length = alone.length_S[0]
        assert mixed.length_S[b] == length
        np.testing.assert_array_equal(mixed.token_SL[b, :length], alone.token_SL[0])
        np.testing.assert_array_equal(mixed.turn_SL[b, :length], alone.turn_SL[0])
        assert (mixed.turn_SL[b, length:] == -1).all()
        known = mixed.old_logprob_SL[b][mixed.turn_SL[b] >= 0] < 0
        assert known.all() if b % 2 == 0 else not known.any()


def test_no_dialogues_are_an_empty_tape() -> None:
    tape = read_dialogues(tiny_policy(), [])
    assert tape.token_SL.shape == (0, 0) and tape.cut_BT.shape == (0, 0) and not len(tape.length_S)


# --- ids that are missing or of another tokenizer -------------------------------------------------


def test_ids_of_another_tokenizer_are_refused() -> None:
    log = logged(collect_rollouts(EchoDialogues(2), tiny_policy(), seed=2))
    policy = STYLES["llama3"].policy()
    message = (
        rf"^x\.jsonl, dialogue 3: logged as ids of the tokenizer {log[0].tokenizer}, \S+ has "
        rf"{policy.tokenizer_fingerprint}.*tokenise_again"
    )
    with pytest.raises(LogError, match=message):
        refuse_unreadable(policy, log[0], "x.jsonl, dialogue 3")
    with pytest.raises(LogError, match="tokenizer of an unknown model"):
        refuse_unreadable(policy, replace(log[0], tokenizer=""), "")
    refuse_unreadable(policy, log[0], "", tokenise_again=True)
    assert STYLES["chatml"].policy().tokenizer_fingerprint != policy.tokenizer_fingerprint


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    policy = tiny_policy()
    (one, *_) = logged(collect_rollouts(EchoDialogues(2), policy, seed=2))
    ids = [[*one.token_ids[0][:-1], 320], *one.token_ids[1:]]
    broken = replace(one, token_ids=ids, logprobs=None)
    with pytest.raises(LogError, match=r"^here: token id 320, and \S+ knows 320 tokens\. .*again"):
        refuse_unreadable(policy, broken, "here")
    refuse_unreadable(policy, broken, "here", tokenise_again=True)
    texts = replace(one, token_ids=None, logprobs=None)
    found = read_dialogues(policy, [broken], tokenise_again=True)
    assert_same_tape(found, read_dialogues(policy, [texts]))


@each_style
@several_sequences
def test_ids_that_say_another_line_than_the_log_are_refused(
    style: Style, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = style.policy(max_new_tokens=9, temperature=0.9)
    for dialogue in logged(collect_rollouts(EchoDialogues(4), policy, seed=1)):
        refuse_unreadable(policy, dialogue, "here")
    follow_scripts(monkeypatch)
    lines = style.written(policy)
    tape, history = converse(policy, [Script(*lines)])
    ids = [ids.tolist() for ids, _ in tape.lines(0)]
    one = told(history[-1][0], token_ids=ids, tokenizer=policy.tokenizer_fingerprint)
    refuse_unreadable(policy, one, "here")
    # Blanks around a line are no other line, a letter is.
    own = [i for i, message in enumerate(one.messages) if message["role"] == "assistant"]
    for text, is_other in ((" {} ", False), ("{}!", True), ("No.", True)):
        chat = [dict(message) for message in one.messages]
        chat[own[1]]["content"] = text.format(chat[own[1]]["content"])
        if is_other:
            with pytest.raises(LogError, match=r"^here: the ids of line 1 say '.*', the log has"):
                refuse_unreadable(policy, replace(one, messages=chat), "here")
        else:
            refuse_unreadable(policy, replace(one, messages=chat), "here")


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_half_a_character_is_refused_before_a_tokenizer_meets_it(role: str) -> None:
    chat = chat_of(["No."])
    for message in chat:
        message["content"] += "\ud83d" if message["role"] == role else "\u2019"
    with pytest.raises(LogError, match=rf"^here: a line of '{role}' holds half a character"):
        refuse_unreadable(tiny_policy(), told(chat), "here")


def test_texts_stand_in_for_ids_of_another_tokenizer_if_asked_for() -> None:
    log = logged(collect_rollouts(EchoDialogues(2), tiny_policy(), seed=2))
    policy = STYLES["llama3"].policy()
    found = read_dialogues(policy, log, tokenise_again=True)
    texts = [replace(t, token_ids=None, logprobs=None, tokenizer="") for t in log]
    assert_same_tape(found, read_dialogues(policy, texts))
    assert not found.old_logprob_SL.any()
    # Where the ids are the policy's own, they are used all the same.
    own = read_dialogues(tiny_policy(), log, tokenise_again=True)
    assert_same_tape(own, read_dialogues(tiny_policy(), log))


def test_one_end_mark_is_read_where_the_log_has_another_template() -> None:
    # Same tokenizer, other template: the ids stay, what stands between them is the policy's own.
    log = logged(collect_rollouts(EchoDialogues(2), tiny_policy(), seed=2))
    policy = tiny_policy(template=PLAIN)
    tape = read_dialogues(policy, log)
    for b, trajectory in enumerate(log):
        lines = [ids.tolist() for ids, _ in tape.lines(b)]
        assert lines == [list(ids) for ids in trajectory.token_ids]
    assert "user: " in policy.tokenizer.decode(tape.token_SL[0])


# --- texts ----------------------------------------------------------------------------------------


def template_text(policy: LMPolicy, style: Style, chat: Chat) -> str:
    """Return what transformers writes for the chat, without any of this project's code."""
    folds = style.folds and chat[0]["role"] == "system"
    return str(
        policy.tokenizer.apply_chat_template(
            folded(chat) if folds else chat, tokenize=False, add_generation_prompt=True
        )
    )


@pytest.mark.parametrize("system", [True, False], ids=["system", "no system"])
@each_style
def test_lines_known_as_text_follow_what_the_template_writes_and_end_once(
    style: Style, system: bool
) -> None:
    policy = style.policy()
    encode, decode = policy.format.encode, policy.tokenizer.decode
    trajectory = told(chat_of(PLAIN_LINES, system))
    tape = read_dialogues(policy, [trajectory])
    assert len(tape.length_S) == (1 if policy.format.append_only else 4)
    blank = style.lines[0].startswith(" ") or style.template is LLAMA2
    thought = "\n</think>\n\n" if policy.format.opens_thought else ""
    for turn, line in enumerate(PLAIN_LINES):
        sequence, at = place_of(tape, 0, turn)
        expected = template_text(policy, style, list(trajectory.history(turn)))
        before = tape.token_SL[sequence, : at[0]].tolist()
        if policy.format.text_mark is None:
            assert before == encode(expected)
        else:  # a mark in plain text may share its tokens with its neighbours
            assert decode(before) == expected
        written = f"{thought}{' ' if blank else ''}{line}{style.mark}"
        assert decode(tape.token_SL[sequence, at]) == written
        if policy.format.text_mark is None:
            assert tape.token_SL[sequence, at].tolist() == encode(written)
    assert not tape.old_logprob_SL.any()


def test_a_line_known_as_text_is_the_line_that_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    follow_scripts(monkeypatch)
    policy = STYLES["chatml"].policy()
    expected, history = converse(policy, [Script(*STYLES["chatml"].written(policy))])
    tape = read_dialogues(policy, [told(history[-1][0])])
    for name in ("token_SL", "turn_SL", "length_S", "episode_S"):
        np.testing.assert_array_equal(getattr(tape, name), getattr(expected, name))


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma"])
def test_nobody_ends_a_logged_line_by_naming_its_mark(name: str) -> None:
    style = MORE_STYLES[name]
    policy = style.policy()
    named = "".join(style.special_tokens)
    lines = [f"I{named} like {named}tea.{style.mark}", "So.", f"{named}", "No."]
    clean = ["I like tea.", "So.", "", "No."]
    found = read_dialogues(policy, [told(chat_of(lines))])
    assert_same_tape(found, read_dialogues(policy, [told(chat_of(clean))]))
    (end,) = policy.format.encode(style.mark)
    own = found.token_SL[found.turn_SL >= 0]
    assert (own == end).sum() == 4


def test_an_empty_line_is_its_end_mark_alone() -> None:
    policy = tiny_policy()
    tape = read_dialogues(policy, [told(chat_of(["", "No.", ""]))])
    assert [ids.tolist() for ids, _ in tape.lines(0)] == [
        [policy.tokenizer.eos_token_id],
        policy.format.encode("No.<|im_end|>"),
        [policy.tokenizer.eos_token_id],
    ]


def test_blanks_around_a_line_are_trimmed_where_the_template_trims_them() -> None:
    for name, kept in (("llama3", "No."), ("gemma", "No."), ("chatml", "  No. \n")):
        style = STYLES[name]
        policy = style.policy()
        trajectory = told(chat_of(["  No. \n", "So."]))
        tape = read_dialogues(policy, [trajectory])
        sequence, at = place_of(tape, 0, 0)
        assert policy.tokenizer.decode(tape.token_SL[sequence, at]) == kept + style.mark
        sequence, at = place_of(tape, 0, 1)
        before = policy.tokenizer.decode(tape.token_SL[sequence, : at[0]])
        assert before == template_text(policy, style, list(trajectory.history(1)))


def test_words_that_the_template_sets_before_a_line_are_not_the_agents() -> None:
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' %}(says) {% endif %}{{ message['content'] }}",
    )
    policy = tiny_policy(template=template)
    trajectory = told(chat_of(["No.", "So."]))
    tape = read_dialogues(policy, [trajectory])
    assert [policy.tokenizer.decode(ids) for ids, _ in tape.lines(0)] == [
        "No.<|im_end|>",
        "So.<|im_end|>",
    ]
    sequence, at = place_of(tape, 0, 1)
    before = policy.tokenizer.decode(tape.token_SL[sequence, : at[0]])
    assert before == template_text(policy, STYLES["chatml"], list(trajectory.history(1)))
    assert "(says) No." in before


@pytest.mark.parametrize("name", ["chatml", "qwen3", "deepseek-r1", "mistral"])
def test_a_thought_in_a_text_belongs_to_its_line_and_is_in_nobodys_sight_afterwards(
    name: str,
) -> None:
    style = STYLES[name]
    policy = style.policy()
    lines = ["<think>\nRain?\n</think>\n\nI like rain.", "No."]
    tape = read_dialogues(policy, [told(chat_of(lines))])
    assert len(tape.length_S) == 2  # what the next turn sees is another text
    texts = [policy.tokenizer.decode(ids) for ids, _ in tape.lines(0)]
    opened = policy.format.opens_thought
    blank = " " if style.lines[0].startswith(" ") else ""
    thought = "Rain?\n</think>\n\n" if opened else "<think>\nRain?\n</think>\n\n"
    assert texts[0] == f"{blank}{thought}I like rain.{style.mark}"
    heard = template_text(policy, style, chat_of(["I like rain.", "No."])[:-1])
    sequence, at = place_of(tape, 0, 1)
    assert policy.tokenizer.decode(tape.token_SL[sequence, : at[0]]) == heard


def test_where_the_marks_of_a_thought_cannot_be_written_it_is_not_said_aloud() -> None:
    style = replace(STYLES["chatml"], special_tokens=(*STYLES["chatml"].special_tokens, "</think>"))
    policy = style.policy()
    tape = read_dialogues(policy, [told(chat_of(["<think>Rain?</think>\n\nI like rain."]))])
    (line, _) = tape.lines(0)[0]
    assert policy.tokenizer.decode(line) == "I like rain.<|im_end|>"


@several_sequences
def test_thoughts_that_were_sampled_are_read_from_their_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    follow_scripts(monkeypatch)
    policy = tiny_policy(template=THOUGHTLESS, max_new_tokens=60)
    line = policy.format.encode("<think>Rain?</think>I do.<|im_end|>")
    expected, history = converse(policy, [Script(line, line, line, line)])
    assert history[-1][0][2]["content"] == "I do."
    log = told(
        history[-1][0],
        token_ids=[line] * 4,
        logprobs=[logprobs.tolist() for _, logprobs in expected.lines(0)],
        tokenizer=policy.tokenizer_fingerprint,
    )
    assert_same_tape(read_dialogues(policy, [log]), expected)


# --- who begins, and who is told what -------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
@pytest.mark.parametrize("system", [True, False], ids=["system", "no system"])
def test_an_agent_that_speaks_first_answers_a_stand_in(name: str, system: bool) -> None:
    style = STYLES[name]
    policy = style.policy()
    chat = chat_of(["I like the rain.", "No."], system)
    del chat[1 if system else 0]
    trajectory = told(chat)
    assert trajectory.history(0) == chat[: 1 if system else 0]
    tape = read_dialogues(policy, [trajectory])
    opened = [*chat[: 1 if system else 0], {"role": "user", "content": OPENING}]
    for turn, more in ((0, []), (1, chat[-3:-1])):
        sequence, at = place_of(tape, 0, turn)
        before = tape.token_SL[sequence, : at[0]].tolist()
        assert before == policy.format.encode(template_text(policy, style, [*opened, *more]))


def test_what_the_partner_says_last_is_not_read() -> None:
    policy = tiny_policy()
    chat = chat_of(["I like the rain.", "No."])
    longer = [*chat, {"role": "user", "content": "I see."}]
    assert_same_tape(read_dialogues(policy, [told(longer)]), read_dialogues(policy, [told(chat)]))


# --- a context that is too short ------------------------------------------------------------------


def short_policy(limit: int, template: str = CHATML) -> LMPolicy:
    model = tiny_model("llama", max_position_embeddings=limit)
    return LMPolicy(model, tiny_tokenizer(template), max_new_tokens=12, seed=0)


@several_sequences
@pytest.mark.parametrize("template", [CHATML, REWRITING], ids=["appends", "rewrites"])
def test_whole_turns_are_dropped_from_where_the_context_is_full(template: str) -> None:
    log = [told(chat_of(PLAIN_LINES)), told(chat_of(PLAIN_LINES[:1]))]
    whole = read_dialogues(short_policy(1024, template), log)
    ends = [place_of(whole, 0, turn)[1][-1] + 1 for turn in range(4)]
    for kept in range(5):
        for limit in {0 if kept == 0 else ends[kept - 1], ends[kept] - 1 if kept < 4 else 999}:
            if limit < 20:
                continue
            tape = read_dialogues(short_policy(int(limit), template), log)
            assert len(tape.lines(0)) == kept
            for (ids, _), (all_ids, _) in zip(tape.lines(0), whole.lines(0), strict=False):
                np.testing.assert_array_equal(ids, all_ids)
            assert (tape.length_S <= limit).all()
            assert len(tape.lines(1)) == (1 if limit >= ends[0] else 0)
            assert tape.truncated_B.tolist() == [kept < 4, limit < ends[0]]
            short_policy(int(limit), template).logprobs(tape.token_SL, tape.turn_SL)


def test_a_dialogue_that_filled_the_context_is_read_to_its_last_token() -> None:
    policy = short_policy(52)
    batch = collect_rollouts(EchoDialogues(6), policy, seed=4)
    spoke = np.flatnonzero(batch.alive_BT.any(axis=1))
    assert batch.overflow_B.all() and 0 < len(spoke) < 6  # some prompts leave no room at all
    tape = read_dialogues(policy, logged(batch))
    for b, number in enumerate(spoke):
        found, expected = tape.lines(b), batch.tape.lines(int(number))
        assert [ids.tolist() for ids, _ in found] == [ids.tolist() for ids, _ in expected]
    assert tape.length_S.max() == 52
