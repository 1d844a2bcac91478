"""Logs: what is read, what is refused and how, what is written, splits, rewards of prefixes."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import itertools
import json
import math
import os
import random
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_reading import chat_of
from tiny_models import tiny_policy
from tiny_worlds import EchoDialogues

from agents import cli
from agents.logs import (
    LogError,
    LoggedDialogue,
    _record_of,
    _rows,
    decompose,
    from_dataset,
    join_lines,
    parse_dialogue,
    read_log,
    score_log,
    to_dataset,
    write_log,
)
from agents.policy import ScriptedPolicy
from agents.rollout import collect_rollouts
from agents.runs import RunFolder, read_transcripts
from agents.splits import refuse_leaks, split_by_persona, split_log
from agents.train import TrainConfig, train

SYSTEM = {"role": "system", "content": "You are Ada."}
FULL: dict[str, Any] = {
    "messages": [
        SYSTEM,
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi: I am Ada."},
        {"role": "user", "content": "Any pets?"},
        {"role": "assistant", "content": "A dog."},
    ],
    "rewards": [1.0, None],
    "domain": "chatting",
    "persona": "ada",
    "dialogue": "d1",
    "behaviour": "gpt",
    "judge": "rules",
    "tokenizer": "f00d",
    "group": 3,
    "reward_parts": {"prompt_to_line": [1.0, None], "length": [7.0, -2.5]},
    "reasons": ["fits", ""],
    "token_ids": [[5, 6, 1], [7, 1]],
    "logprobs": [[-0.5, -1.0, 0.0], [-2.0, -0.25]],
    "flags": ["other_judge"],
    "update": 4,
    "source": {"file": "x.json", "nested": [None, {"a": 1.5}]},
}


def record(**changes: Any) -> dict[str, Any]:
    """FULL with other values; ... takes a field out."""
    return {name: value for name, value in {**FULL, **changes}.items() if value is not ...}


def told(messages: list[tuple[str, str]], **more: Any) -> LoggedDialogue:
    lines = [{"role": role, "content": text} for role, text in messages]
    own = sum(role == "assistant" for role, _ in messages)
    return parse_dialogue({"messages": lines, "rewards": [1.0] * own, **more})


def short(persona: str, said: str = "", system: str = "", **more: Any) -> LoggedDialogue:
    """One turn and a farewell; its texts are this persona's own unless given."""
    opening = [("system", system or f"You are {persona}.")]
    lines = [("user", "Hello!"), ("assistant", said or f"I am {persona}."), ("user", "Bye.")]
    return told([*opening, *lines], persona=persona, **more)


def write(path: Path, *records: Any) -> Path:
    path.write_bytes(b"".join(json.dumps(one).encode() + b"\n" for one in records))
    return path


def read_until_refused(path: Path) -> tuple[list[LoggedDialogue], str]:
    """Return what is yielded before the error, and the error's message."""
    good = []
    with pytest.raises(LogError) as caught:
        good.extend(read_log(path))  # extend keeps what came before the error
    return good, str(caught.value)


# ---- what is read --------------------------------------------------------------------------------


def test_every_field_is_read(tmp_path: Path) -> None:
    (found,) = read_log(write(tmp_path / "log.jsonl", FULL))
    assert found.num_turns == 2 and found.lines == ["Hi: I am Ada.", "A dog."]
    assert found.rewards == (1.0, None)
    assert (found.domain, found.persona, found.dialogue) == ("chatting", "ada", "d1")
    assert (found.behaviour, found.judge, found.tokenizer) == ("gpt", "rules", "f00d")
    assert found.group == 3 and found.flags == ("other_judge",)
    assert found.reward_parts == {"prompt_to_line": (1.0, None), "length": (7.0, -2.5)}
    assert found.reasons == ("fits", "")
    assert found.token_ids == ((5, 6, 1), (7, 1))
    assert found.logprobs == ((-0.5, -1.0, 0.0), (-2.0, -0.25))
    assert found.extra == {"update": 4, "source": FULL["source"]}
    np.testing.assert_array_equal(found.reward_T, [1.0, np.nan])
    assert found.reward_T.dtype == np.float64


def test_messages_and_rewards_are_enough_and_null_is_not_known() -> None:
    least = {"messages": FULL["messages"], "rewards": [0, 1]}
    null = {**dict.fromkeys(FULL), **least}
    del null["update"], null["source"]
    assert parse_dialogue(least) == parse_dialogue(null)
    assert parse_dialogue(least).record() == {"messages": FULL["messages"], "rewards": [0.0, 1.0]}


def test_the_agent_may_speak_first_and_the_partner_last() -> None:
    lines = [("assistant", "Hi."), ("user", "Hello."), ("assistant", "So?"), ("user", "Bye.")]
    for opening in ([], [("system", "You are Ada.")]):
        found = told([*opening, *lines])
        assert found.lines == ["Hi.", "So?"]
        assert [len(found.history(turn)) for turn in range(2)] == [
            len(opening),
            len(opening) + 2,
        ]
        assert found.history(1)[-1]["content"] == "Hello."


def test_further_keys_of_messages_are_kept(tmp_path: Path) -> None:
    messages = [{**m, "name": "Ada", "time": None} for m in FULL["messages"]]
    (found,) = read_log(write(tmp_path / "log.jsonl", record(messages=messages)))
    write_log(tmp_path / "again.jsonl", [found])
    assert json.loads((tmp_path / "again.jsonl").read_bytes())["messages"] == messages


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_no_harm(tmp_path: Path) -> None:
    line = json.dumps(FULL).encode()
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [t.record() for t in read_log(path)] == [FULL, FULL]


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz", "log", "log.gz.txt"])
def test_gzip_is_told_by_content_when_reading(tmp_path: Path, name: str) -> None:
    plain = write(tmp_path / name, FULL).read_bytes()
    assert [t.record() for t in read_log(tmp_path / name)] == [FULL]
    (tmp_path / name).write_bytes(gzip.compress(plain) + gzip.compress(plain))
    assert [t.record() for t in read_log(str(tmp_path / name))] == [FULL, FULL]


def test_a_file_that_is_not_there_is_no_empty_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        next(read_log(tmp_path / "nowhere.jsonl"))


def test_a_folder_and_a_pipe_are_no_logs(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"run is a folder; give the log in it"):
        (tmp_path / "run").mkdir()
        next(read_log(tmp_path / "run"))
    write(tmp_path / "run" / "transcripts.jsonl", FULL)
    with pytest.raises(LogError, match=r"run is a folder; its log is .*run/transcripts\.jsonl\."):
        next(read_log(tmp_path / "run"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LogError, match=r"pipe is a pipe or a device.*more than once; write it"):
        next(read_log(tmp_path / "pipe"))


# ---- what is refused -----------------------------------------------------------------------------

HELLO = FULL["messages"][1]
HI = FULL["messages"][2]

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    # rewards
    ({"rewards": ...}, "field 'rewards' is missing: .* each of the agent's 2 lines"),
    ({"rewards": None}, "field 'rewards': expected a list, got None"),
    ({"rewards": 1.0}, r"field 'rewards': expected a list, got 1\.0"),
    ({"rewards": "11"}, "field 'rewards': expected a list, got '11'"),
    ({"rewards": {"0": 1, "1": 1}}, "field 'rewards': expected a list"),
    ({"rewards": []}, "field 'rewards': 0 values for 2 lines"),
    ({"rewards": [1.0]}, "field 'rewards': 1 values for 2 lines of the agent; write null"),
    ({"rewards": [1.0, 1.0, 1.0]}, "field 'rewards': 3 values for 2 lines"),
    ({"rewards": [1.0, 1.01]}, r"field 'rewards\[1\]': expected .*\[-1, 1\] or null, got 1\.01"),
    ({"rewards": [-1.5, 0]}, r"field 'rewards\[0\]': .*, got -1\.5"),
    ({"rewards": [math.nan, 0]}, r"field 'rewards\[0\]': .*, got nan"),
    ({"rewards": [0, math.inf]}, r"field 'rewards\[1\]': .*, got inf"),
    ({"rewards": [0, 10**400]}, r"field 'rewards\[1\]': .*, got 1000"),
    ({"rewards": [0, True]}, r"field 'rewards\[1\]': .*, got True"),
    ({"rewards": ["1", 0]}, r"field 'rewards\[0\]': .*, got '1'"),
    ({"rewards": [[1], 0]}, r"field 'rewards\[0\]': .*, got \[1\]"),
    # messages
    ({"messages": ...}, "field 'messages' is missing: .*; there are 'rewards'"),
    ({"messages": None}, "field 'messages': expected a list of chat messages, got None"),
    ({"messages": []}, r"field 'messages': expected a list of chat messages, got \[\]"),
    ({"messages": "Hi."}, "field 'messages': expected a list"),
    ({"messages": {"role": "user"}}, "field 'messages': expected a list"),
    ({"messages": ["Hi."]}, r"field 'messages\[0\]': expected .*, got 'Hi\.'"),
    ({"messages": [HELLO, None]}, r"field 'messages\[1\]': expected .*, got None"),
    ({"messages": [{"content": "Hi."}]}, r"field 'messages\[0\]\.role': unknown role None"),
    ({"messages": [HELLO, {"role": "assistant"}]}, r"field 'messages\[1\]': expected"),
    ({"messages": [{**HI, "content": None}]}, r"field 'messages\[0\]': expected"),
    ({"messages": [{**HI, "content": [{"text": "Hi."}]}]}, r"field 'messages\[0\]': expected"),
    (
        {"messages": [HELLO, {**HI, "role": "bot"}]},
        r"field 'messages\[1\]\.role': .* 'bot'",
    ),
    ({"messages": [{**HI, "role": ["user"]}]}, r"field 'messages\[0\]\.role': unknown role \['u"),
    ({"messages": [HELLO, {**HI, "role": "tool"}]}, "field .*; there are system, user, assistant"),
    (
        {"messages": [HELLO, HELLO, HI]},
        r"field 'messages\[1\]\.role': two lines of 'user' in",
    ),
    ({"messages": [HELLO, HI, HI]}, r"field 'messages\[2\]\.role': two lines of 'assistant'"),
    (
        {"messages": [HELLO, SYSTEM, HI]},
        r"field 'messages\[1\]\.role': a system message comes",
    ),
    ({"messages": [SYSTEM, SYSTEM, HI]}, r"field 'messages\[1\]\.role': a system message"),
    (
        {"messages": [SYSTEM, HELLO]},
        r"field 'messages': the agent \(role 'assistant'\) says",
    ),
    ({"messages": [SYSTEM]}, "field 'messages': the agent"),
    # texts
    *(
        ({name: wrong}, f"field '{name}': expected a text, got")
        for name in ("domain", "persona", "dialogue", "behaviour", "judge", "tokenizer")
        for wrong in (7, ["a"], {"a": 1}, False)
    ),
    # group
    ({"group": 1.5}, r"field 'group': expected a whole number or a text, got 1\.5"),
    ({"group": True}, "field 'group': .*, got True"),
    ({"group": [1]}, "field 'group': "),
    # parts
    ({"reward_parts": []}, "field 'reward_parts': expected an object"),
    ({"reward_parts": 0}, "field 'reward_parts': expected an object, got 0"),
    ({"reward_parts": [1, 1]}, "field 'reward_parts': expected an object"),
    ({"reward_parts": {"a": 1}}, r"field 'reward_parts\.a': expected a list"),
    ({"reward_parts": {"a": None}}, r"field 'reward_parts\.a': expected a list"),
    ({"reward_parts": {"a": [1]}}, r"field 'reward_parts\.a': 1 values for 2 lines"),
    ({"reward_parts": {"a": [1, "x"]}}, r"field 'reward_parts\.a\[1\]': expected a number or null"),
    ({"reward_parts": {"a": [math.nan, 1]}}, r"field 'reward_parts\.a\[0\]': .*, got nan"),
    ({"reward_parts": {"a": [-(10**400), 1]}}, r"field 'reward_parts\.a\[0\]': "),
    # texts a line, flags
    ({"reasons": "ab"}, "field 'reasons': expected a list of texts"),
    ({"reasons": ["a"]}, "field 'reasons': 1 texts for 2 lines"),
    ({"reasons": ["a", None]}, "field 'reasons': expected a list of texts"),
    ({"flags": ""}, "field 'flags': expected a list of texts, got ''"),
    ({"flags": 0}, "field 'flags': expected a list of texts, got 0"),
    ({"flags": [1]}, "field 'flags': expected a list of texts"),
    # tokens
    ({"token_ids": ...}, "field 'logprobs': there are no token_ids"),
    ({"token_ids": 5}, "field 'token_ids': expected 2 lists"),
    ({"token_ids": [[1]]}, "field 'token_ids': expected 2 lists"),
    ({"token_ids": [[5, 6, 1], []]}, r"field 'token_ids\[1\]': expected token ids, got \[\]"),
    ({"token_ids": [[5, 6, 1], 7]}, r"field 'token_ids\[1\]': expected token ids, got 7"),
    ({"token_ids": [[5, -6, 1], [7, 1]]}, r"field 'token_ids\[0\]': .*, got -6"),
    ({"token_ids": [[5, 6.0, 1], [7, 1]]}, r"field 'token_ids\[0\]': .*, got 6\.0"),
    ({"token_ids": [[5, True, 1], [7, 1]]}, r"field 'token_ids\[0\]': .*, got True"),
    ({"token_ids": [[5, 2**31, 1], [7, 1]]}, r"field 'token_ids\[0\]': .*, got 2147483648"),
    ({"logprobs": -1.0}, "field 'logprobs': expected 2 lists"),
    ({"logprobs": [[-1.0]]}, "field 'logprobs': expected 2 lists"),
    (
        {"logprobs": [[-1.0], [-1.0, -1.0]]},
        r"field 'logprobs\[0\]': expected 3 numbers, one a",
    ),
    ({"logprobs": [[-1, -1, -1], -1]}, r"field 'logprobs\[1\]': expected 2 numbers"),
    ({"logprobs": [[-1, -1, 0.5], [-1, -1]]}, r"field 'logprobs\[0\]': .* log-prob.*, got 0\.5"),
    ({"logprobs": [[-1, -1, None], [-1, -1]]}, r"field 'logprobs\[0\]': .*, got None"),
    ({"logprobs": [[-1, -1, -1], [math.nan, -1]]}, r"field 'logprobs\[1\]': .*, got nan"),
    ({"logprobs": [[-1, -1, -1], [-math.inf, -1]]}, r"field 'logprobs\[1\]': .*, got -inf"),
    ({"logprobs": [[-1, -1, -(10**400)], [-1, -1]]}, r"field 'logprobs\[0\]': "),
]


@pytest.mark.parametrize(("change", "named"), BAD_FIELDS)
def test_a_bad_field_is_named_with_file_and_line_and_the_lines_before_it_are_read(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = write(tmp_path / "log.jsonl", FULL, FULL, record(**change), FULL)
    with pytest.raises(LogError, match=rf"log\.jsonl, line 3, {named}"):
        list(read_log(path))
    good, _ = read_until_refused(path)
    assert [t.record() for t in good] == [FULL, FULL]


@pytest.mark.parametrize(
    ("change", "named"), [case for case in BAD_FIELDS if ... not in case[0].values()]
)
def test_a_dialogue_made_without_a_file_is_checked_like_one_that_is_read(
    change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        dataclasses.replace(parse_dialogue(FULL), **change)


def test_a_dialogue_holds_tuples_and_messages_of_its_own() -> None:
    messages, ids = [dict(m) for m in FULL["messages"]], [[5, 6, 1], [7, 1]]
    made = LoggedDialogue(messages, [1, None], token_ids=ids, flags=["x"])  # type: ignore[arg-type]
    messages[2]["content"] = ids[0][0] = "changed"
    assert made.lines[0] == FULL["messages"][2]["content"] and made.rewards == (1.0, None)
    assert (made.token_ids, made.flags) == (((5, 6, 1), (7, 1)), ("x",))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"Hello!", "line 2: not a JSON object on one line .*Expecting value at column 1"),
        (b"[", "line 2: not a JSON object on one line"),
        (b'{"messages": [],', "line 2: not a JSON object on one line"),
        (b"{'messages': []}", "line 2: not a JSON object on one line"),
        (b"{} {}", "line 2: not a JSON object on one line .*Extra data"),
        (b'{"a": "\x00"}', "line 2: not a JSON object on one line .*control character"),
        (b"[]", "line 2, expected a JSON object, got list"),
        (b'"Hello!"', "line 2, expected a JSON object, got str"),
        (b"null", "line 2, expected a JSON object, got NoneType"),
        (b"\xef\xbb\xbf{}", "line 2: not a JSON object on one line"),
        ('{"persona": "Zoë"}'.encode("latin-1"), r"line 2: not UTF-8 \(byte 15 of the line\)"),
        (b'{"persona": "\xed\xa0\xbd"}', "line 2: not UTF-8"),  # half a character
        ('{"persona": "Ada"}'.encode("utf-16"), "line 2: not UTF-8"),
        (b"[" * 100_000, "line 2: nested too deeply"),
        (b'{"a":' * 100_000, "line 2: nested too deeply"),
        (b'{"messages": ' + b"[" * 100_000, "line 2: nested too deeply"),
        (b'{"group": ' + b"9" * 5000 + b"}", r"line 2: a whole number of more than \d+ digits"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, line: bytes, named: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(json.dumps(FULL).encode() + b"\n" + line + b"\n")
    with pytest.raises(LogError, match=rf"log\.jsonl, {named}"):
        list(read_log(path))
    assert len(read_until_refused(path)[0]) == 1


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_log_of_nothing_is_refused(tmp_path: Path, content: bytes, packed: bool) -> None:
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(LogError, match=r"log\.jsonl\.gz is empty: it holds no dialogues"):
        list(read_log(path))


@pytest.mark.parametrize("left", [1, 100, -2])
def test_a_plain_log_that_ends_in_the_middle_of_a_line_is_refused(
    tmp_path: Path, left: int
) -> None:
    path = write(tmp_path / "log.jsonl", FULL, FULL)
    line = len(path.read_bytes()) // 2
    path.write_bytes(path.read_bytes()[: line + left if left > 0 else left])
    with pytest.raises(LogError, match=r"line 2: not a JSON .*within this line, it may be trunc"):
        list(read_log(path))
    assert len(read_until_refused(path)[0]) == 1
    path.write_bytes(write(path, FULL, FULL).read_bytes()[:-1])  # only the end mark is missing
    assert len(list(read_log(path))) == 2


def test_a_plain_log_that_ends_in_the_middle_of_a_character_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes('{"persona": "Zoë'.encode()[:-1])
    with pytest.raises(LogError, match=r"line 1: not UTF-8 .*it may be truncated"):
        list(read_log(path))


def incompressible(number: int) -> Iterator[LoggedDialogue]:
    rng = random.Random(0)
    for i in range(number):
        text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=600))
        yield short(f"p{i}", text)


def test_a_truncated_gzip_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    write_log(path, incompressible(300))
    whole, counts = path.read_bytes(), []
    for kept in (1, 2, 5, 9, 10, 11, 1000, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:kept])
        good, message = read_until_refused(path)
        assert f"{path} is truncated or damaged after line {len(good)} (" in message
        assert [t.persona for t in good] == [f"p{i}" for i in range(len(good))]
        counts.append(len(good))
    assert counts == sorted(counts)
    assert counts[0] == 0 and counts[-1] == 300
    assert 130 < counts[-3] < 150  # nearly all lines of the half that is there


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    write_log(path, incompressible(100))
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (
        whole[:middle] + bytes(200) + whole[middle + 200 :],
        whole[:-6] + b"xx" + whole[-4:],  # checksum
        whole + b"more",
        whole[:2] + b"\x07" + whole[3:],  # unknown method
    ):
        path.write_bytes(damaged)
        with pytest.raises(LogError, match=r"log\.jsonl\.gz(, line| is truncated or damaged)"):
            list(read_log(path))


def test_an_error_of_the_reader_is_its_own(tmp_path: Path) -> None:
    """An EOFError of the loop's body is no truncated file."""
    path = write(tmp_path / "log.jsonl", FULL)
    with pytest.raises(EOFError, match="mine"):
        for _ in read_log(path):
            raise EOFError("mine")


# ---- larger than memory --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [200 * 2**20])
def test_memory_does_not_grow_with_the_log(tmp_path: Path, size: int) -> None:
    line = json.dumps(record(source="x" * 800_000)).encode() + b"\n"
    number, path = size // len(line), tmp_path / "log.jsonl.gz"
    packer = zlib.compressobj(level=1, wbits=31)
    with path.open("wb") as file:
        for _ in range(number):
            file.write(packer.compress(line))
        file.write(packer.flush())
    assert path.stat().st_size < size // 100
    again = tmp_path / "again.jsonl.gz"
    tracemalloc.start()
    try:
        found = sum(trajectory.num_turns for trajectory in read_log(path))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        write_log(again, itertools.islice(read_log(path), number // 8))
        _, peak_copying = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == 2 * number > 400
    assert peak < 8 * 2**20  # a few copies of one line
    assert peak_copying < 12 * 2**20


def test_many_short_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path, (short(f"p{i % 5}") for i in range(3000)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_log(path)) == 3000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 3


def test_reading_begins_before_the_log_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", FULL, "broken")
    first = next(read_log(path))
    assert first.persona == "ada"


# ---- what is written -----------------------------------------------------------------------------

HARD_TEXTS = [
    "",
    " ",
    "Role: text: with: colons",
    "two\nlines\r\nand\u2028more\u2029\x85\x0b\x0c",
    "\x00 a NUL and \x1f",
    "emoji 🙂 👩‍👩‍👧 e\u0301",
    'quotes " and \\ and \\u0041 and \\ud800',
    "\ufeff",
    "\uffff \U0010ffff",
    "</s><|im_end|>{{7*7}}",
    "half a character \ud83d",
    "\ude42 the other half",
    "\\\ud83d after a backslash",
]


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_every_text_comes_back_to_the_letter(tmp_path: Path, name: str) -> None:
    written = [
        told(
            [("system", text), ("user", text), ("assistant", text)],
            persona=text,
            reasons=[text],
            flags=[text],
            source={text: [text]},
        )
        for text in HARD_TEXTS
    ]
    assert write_log(tmp_path / name, written) == len(HARD_TEXTS)
    assert list(read_log(tmp_path / name)) == written
    first = (tmp_path / name).read_bytes()
    write_log(tmp_path / name, read_log(tmp_path / name))
    assert (tmp_path / name).read_bytes() == first


def test_what_is_written_is_utf8_and_json_for_everybody(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", [told([("assistant", text)]) for text in HARD_TEXTS])
    lines = (tmp_path / "log.jsonl").read_bytes().decode("utf-8", "strict").split("\n")
    assert len(lines) == len(HARD_TEXTS) + 1
    assert "🙂" in lines[5] and "\\ud83d" in lines[10]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec=None), max_size=30), min_size=1, max_size=5))
@example(["\ud83d", "\ude42"])
def test_any_text_comes_back(tmp_path: Path, texts: list[str]) -> None:
    # Both halves in a row are the whole character, in JSON as in UTF-16.
    texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    written = [told([("user", text), ("assistant", text)]) for text in texts]
    write_log(tmp_path / "log.jsonl", written)
    assert list(read_log(tmp_path / "log.jsonl")) == written


def test_fields_that_are_not_known_are_kept(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", [parse_dialogue(FULL)])
    assert json.loads((tmp_path / "log.jsonl").read_bytes()) == FULL


def test_the_same_dialogues_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl.gz", tmp_path / "other.jsonl.gz"
    for path in (one, other):
        write_log(path, incompressible(20))
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes().startswith(b"\x1f\x8b")
    assert one.read_bytes()[3:8] == bytes(5)  # no name, no time


def test_a_log_can_be_written_from_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", FULL, record(rewards=[None, None]))
    scored = (t for t in read_log(path) if t.rewards[0] is not None)
    assert write_log(path, scored) == 1
    assert len(list(read_log(path))) == 1


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (partial(dataclasses.replace, extra={"a": math.nan}), "Dialogue 3 .*float values"),
        (partial(dataclasses.replace, extra={"a": {1, 2}}), "Dialogue 3 .*set"),
    ],
)
def test_a_failure_in_the_middle_leaves_the_old_log(
    tmp_path: Path, name: str, bad: Any, named: str
) -> None:
    path = write(tmp_path / name, FULL)
    good = parse_dialogue(FULL)
    with pytest.raises(LogError, match=named):
        write_log(path, [good, good, bad(good)])
    assert [t.record() for t in read_log(path)] == [FULL]
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_source_goes_through_and_leaves_the_old_log(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", FULL)

    def broken() -> Iterator[LoggedDialogue]:
        yield parse_dialogue(FULL)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_log(path, broken())
    assert len(list(read_log(path))) == 1 and list(tmp_path.iterdir()) == [path]


def test_an_empty_log_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="There are no dialogues to write"):
        write_log(tmp_path / "log.jsonl", [])
    assert list(tmp_path.iterdir()) == []


def test_extra_fields_do_not_hide_known_ones() -> None:
    with pytest.raises(ValueError, match="judge, rewards are fields of a dialogue"):
        dataclasses.replace(parse_dialogue(FULL), extra={"rewards": [0, 0], "judge": "me"})


# ---- what the trainers write ---------------------------------------------------------------------


def test_what_a_rollout_records_is_a_log(tmp_path: Path) -> None:
    batch = collect_rollouts(EchoDialogues(6), tiny_policy(max_new_tokens=6), seed=0)
    scripted = collect_rollouts(EchoDialogues(6), ScriptedPolicy(["Hello.", "I like tea."]), seed=0)
    for played in (batch, scripted):
        path = write(tmp_path / "log.jsonl", *played.records())
        for b, found in enumerate(read_log(path)):
            assert found.messages == played.transcripts[b]
            np.testing.assert_array_equal(found.reward_T, played.reward_BT[b][played.alive_BT[b]])
            assert found.group == played.group_B[b]
            assert set(found.reward_parts) == set(played.part_BT)
            recorded = played.records()[b]
            assert found.record() == {k: v for k, v in recorded.items() if v not in ({}, [], "")}


@pytest.mark.parametrize("domain", ["chatting", "therapy"])
def test_what_ppg_train_leaves_behind_is_a_log(tmp_path: Path, domain: str) -> None:
    tiny_policy().save(tmp_path / "model")
    config = TrainConfig(
        model=str(tmp_path / "model"),
        run=str(tmp_path / "run"),
        domain=domain,
        device="cpu",
        episodes=4,
        group_size=2,
        max_turns=2,
        max_new_tokens=6,
        total_timesteps=2 * 4 * 2,
        checkpoint_every=0,
    )
    train(config, progress_bar=False)
    raw = list(read_transcripts(config.run))
    found = list(read_log(f"{config.run}/transcripts.jsonl"))
    assert len(found) == len(raw) == 8
    for one, trajectory in zip(raw, found, strict=True):
        assert trajectory.domain == domain and trajectory.persona == one["persona"] != ""
        assert trajectory.extra == {"update": one["update"]}
        assert (trajectory.behaviour, trajectory.judge) == ("model", "rules")
        assert trajectory.num_turns == 2 and trajectory.reward_parts
        assert trajectory.reasons == tuple(one["reasons"])
        assert trajectory.messages == one["messages"]
        assert trajectory.messages[0]["role"] == "system"
    write_log(tmp_path / "copy.jsonl.gz", found)
    assert list(read_log(tmp_path / "copy.jsonl.gz")) == found


def test_dialogues_of_an_evaluation_are_a_log(tmp_path: Path) -> None:
    batch = collect_rollouts(EchoDialogues(4), ScriptedPolicy(["Hi.", "Yes."]), seed=0)
    folder = RunFolder(tmp_path / "run", {})
    folder.write_transcripts(batch.records())
    assert len(list(read_log(tmp_path / "run/transcripts.jsonl"))) == 4


# ---- splits --------------------------------------------------------------------------------------

NAMES = st.sampled_from(["", "a", "b", "c", "d", "e"])


@st.composite
def dialogues(draw: st.DrawFn) -> LoggedDialogue:
    opening = draw(st.sampled_from([[], [("system", "x")], [("system", "y")], [("system", "z")]]))
    lines = [("user", "Hello!"), ("assistant", draw(st.sampled_from("stuvw")))]
    return told(
        [*opening, *lines, *draw(st.sampled_from([[], [("user", "Bye.")]]))],
        persona=draw(NAMES),
        dialogue=draw(NAMES),
        group=draw(st.sampled_from([None, 0, 1, "0"])),
    )


def marks_of(t: LoggedDialogue, told_to_nameless: set[str]) -> set[tuple[str, Any]]:
    """What must not be on both sides, told independently of the code."""
    texts = [m["content"] for m in t.messages]
    system = t.messages[0]["role"] == "system"
    long = len(texts) - system > 2
    marks = {("said", tuple(texts[system:]))} if long or not (system or t.persona) else set()
    marks |= {("persona", t.persona)} if t.persona else set()
    marks |= {("dialogue", t.dialogue)} if t.dialogue else set()
    marks |= {("told", texts[0])} if system and texts[0] in told_to_nameless else set()
    marks |= {("group", str(t.group))} if not (system or t.persona or t.group is None) else set()
    return marks


def families(everything: list[LoggedDialogue]) -> list[set[int]]:
    """Connected components by repeated joining, slowly."""
    found: list[tuple[set[int], set[Any]]] = []
    nameless = {t.messages[0]["content"] for t in everything if not t.persona}
    for i, t in enumerate(everything):
        members, marks = {i}, marks_of(t, nameless)
        for other in [f for f in found if f[1] & marks]:
            found.remove(other)
            members, marks = members | other[0], marks | other[1]
        found.append((members, marks))
    return [members for members, _ in found]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(dialogues(), max_size=14),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_a_split_keeps_families_together_and_everything(
    everything: list[LoggedDialogue], share: float, seed: int
) -> None:
    expected = families(everything)
    if len(expected) < 2:
        with pytest.raises(ValueError, match=r"cannot be split|no dialogues"):
            split_by_persona(everything, share, seed)
        return
    train_set, test_set = split_by_persona(everything, share, seed)
    ids = [id(t) for t in everything]
    sides = [[ids.index(id(t)) for t in side] for side in (train_set, test_set)]
    assert all(sides) and all(side == sorted(side) for side in sides)
    assert sorted(sides[0] + sides[1]) == list(range(len(everything)))
    for family in expected:
        assert family <= set(sides[0]) or family <= set(sides[1])
    largest = max(map(len, expected))
    assert abs(len(test_set) - share * len(everything)) <= largest
    refuse_leaks(train_set, test_set)
    again = split_by_persona(everything, share, seed)
    assert [list(map(id, side)) for side in again] == [
        list(map(id, side)) for side in (train_set, test_set)
    ]


def test_a_persona_with_an_id_on_one_side_only_is_a_leak() -> None:
    named = short("alice", system="You like tea.")
    nameless = short("", "I do.", system="You like tea.")
    other = short("bob", system="You like tea.")
    for train_set, test_set in (([named], [nameless]), ([nameless], [named])):
        with pytest.raises(LogError, match=r"share the persona text 'You like tea\.'"):
            refuse_leaks(train_set, test_set)
    refuse_leaks([named], [other])  # both have ids and may be told the same
    with pytest.raises(ValueError, match="cannot be split"):
        split_by_persona([named, nameless, other], 0.5)
    assert split_by_persona([named, other], 0.5)


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, usual[1]))
    try:
        with pytest.raises(OSError, match=r"log\.jsonl'$"):
            write_log(tmp_path / "log.jsonl", [short(f"p{i}") for i in range(500)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not list(tmp_path.iterdir())


def test_an_error_of_where_dialogues_come_from_is_not_one_of_the_file(tmp_path: Path) -> None:
    def unreachable() -> Iterator[LoggedDialogue]:
        yield short("p")
        raise ConnectionRefusedError(111, "the judge is down")

    with pytest.raises(ConnectionRefusedError, match="the judge is down") as caught:
        write_log(tmp_path / "log.jsonl", unreachable())
    assert caught.value.filename is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pipe", "folder", "no folder", "taken"])
def test_a_log_is_not_written_where_no_file_can_be(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "no folder":
        path = tmp_path / "no" / "log.jsonl"
    else:
        (tmp_path / "log.jsonl.part").mkdir()  # what is written to first
    message = "no folder .*no to write" if kind == "no folder" else "log.jsonl"
    with pytest.raises(OSError if kind == "taken" else LogError, match=message):
        write_log(path, [short("p")])
    assert kind not in ("pipe", "taken") or not path.is_file()
    if kind == "pipe":
        assert path.is_fifo()


def test_what_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    write_log(tmp_path / "link.jsonl", [short("p")])
    assert (tmp_path / "link.jsonl").is_symlink()
    assert [t.persona for t in read_log(tmp_path / "real.jsonl")] == ["p"]


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    line = json.dumps(short("p").record())
    (tmp_path / "log.jsonl").write_text(line[:-1] + ', "rewards": [0.0]}\n')
    with pytest.raises(LogError, match=r"line 1: the field 'rewards' stands there twice"):
        list(read_log(tmp_path / "log.jsonl"))


def test_a_field_that_json_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        LogError, match=r"Dialogue 2 cannot be written: JSON does not know .* 'score'"
    ):
        write_log(tmp_path / "x.jsonl", [short("p"), short("q", score=math.nan)])
    assert not list(tmp_path.iterdir())


def test_lines_in_a_row_become_one_and_nothing_else_changes() -> None:
    chat = [
        ("system", "Be."),
        ("user", "Hi."),
        ("user", "You?"),
        ("assistant", "Yes."),
        ("user", ""),
    ]
    chat += [("user", "So.\n"), ("user", "Well.")]
    messages = [{"role": role, "content": text} for role, text in chat]
    before = json.dumps(messages)
    with pytest.raises(ValueError, match=r"messages\[2\].*join_lines"):
        parse_dialogue({"messages": messages}, unscored=True)
    joined = parse_dialogue({"messages": join_lines(messages)}, unscored=True)
    assert [(m["role"], m["content"]) for m in joined.messages] == [
        ("system", "Be."),
        ("user", "Hi.\nYou?"),
        ("assistant", "Yes."),
        ("user", "\nSo.\n\nWell."),
    ]
    assert json.dumps(messages) == before
    assert join_lines(joined.messages) == joined.messages


def test_of_a_dataset_dict_one_is_asked_for() -> None:
    with pytest.raises(TypeError, match="Give one dataset of 'train', 'test'"):
        list(from_dataset({"train": [], "test": []}))


def unscored(path: Path) -> Path:
    records = [short(f"p{i}").record() for i in range(3)]
    for record in records:
        del record["rewards"]
    return write(path, *records)


def test_dialogues_that_nobody_scored_are_read_if_asked_for(tmp_path: Path) -> None:
    path = unscored(tmp_path / "log.jsonl")
    assert [t.rewards for t in read_log(path, unscored=True)] == [(None,)] * 3
    with pytest.raises(LogError, match=r"'rewards' is missing.*score_log"):
        list(read_log(path))
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(LogError, match="field 'messages'"):
        list(read_log(tmp_path / "bad.jsonl", unscored=True))


def test_a_function_scores_every_line_as_the_dialogue_stood() -> None:
    chats = [chat_of([f"I am {i}.", "No.", "Bye."][: 1 + i % 3]) for i in range(100)]
    records = [{"messages": c, "persona": f"p{i}", "ticket": i} for i, c in enumerate(chats)]
    log = [parse_dialogue(record, unscored=True) for record in records]
    calls: list[int] = []

    def score(records: Any) -> list[float | None]:
        calls.append(len(records))
        return [None if r["ticket"] == 5 else len(r["messages"]) / 10 for r in records]

    found = list(score_log(iter(log), score))
    assert [t.persona for t in found] == [t.persona for t in log]
    assert [t.rewards for t in found[:6]] == [
        *[(0.3,), (0.3, 0.5), (0.3, 0.5, 0.7), (0.3,), (0.3, 0.5)],
        (None, None, None),
    ]
    assert len(calls) == 2 and sum(calls) == sum(t.num_turns for t in log)
    for wrong in (3.0, math.nan, "0.5", [0.5]):
        with pytest.raises(
            ValueError, match=r"score returned .*; it returns a reward in \[-1, 1\]"
        ):
            list(score_log(log, lambda records, wrong=wrong: [wrong] * len(records)))
    numbers = score_log(log, lambda records: np.linspace(0, 1, len(records), dtype=np.float32))
    assert next(numbers).rewards == (0.0,)
    with pytest.raises(ValueError, match="returned 1 values for"):
        list(score_log(log, lambda _: [1.0]))


def test_a_split_says_who_it_knows_nothing_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [chat_of([f"I am {i}.", "No."], system=i % 2 == 0) for i in range(6)]
    for i, chat in enumerate(chats):
        chat[0]["content"] += str(i)
    log = [parse_dialogue({"messages": chat}, unscored=True) for chat in chats]
    write_log(tmp_path / "log.jsonl", log)
    outs = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    arguments = ["ppg", "split", str(tmp_path / "log.jsonl"), "--train", outs[0], "--test", outs[1]]
    monkeypatch.setattr(sys, "argv", arguments)
    cli.main()
    assert "3 of them tell neither persona nor system message" in capsys.readouterr().out


def test_the_share_is_met_where_personas_are_many() -> None:
    everything = [short(f"p{i}", f"Line {j} of {i}.") for i in range(200) for j in range(3)]
    tests = set()
    for seed in range(5):
        train_set, test_set = split_by_persona(everything, 0.2, seed)
        assert len(test_set) == 120 and len(train_set) == 480
        tests.add(frozenset(t.persona for t in test_set))
    assert len(tests) == 5  # another seed, another split


def test_one_large_persona_does_not_become_the_test_set() -> None:
    everything = [short("big", f"Line {j}.") for j in range(90)]
    everything += [short(f"p{i}") for i in range(10)]
    for seed in range(20):
        _, test_set = split_by_persona(everything, 0.2, seed)
        assert {t.persona for t in test_set} == {f"p{i}" for i in range(10)}


def test_where_every_persona_is_too_large_the_smallest_is_for_testing() -> None:
    sizes = {"a": 50, "b": 30, "c": 40}
    everything = [short(name, f"Line {j}.{name}") for name, n in sizes.items() for j in range(n)]
    for seed in range(6):
        _, test_set = split_by_persona(everything, 0.05, seed)
        assert {t.persona for t in test_set} == {"b"}


def test_families_are_connected_through_others() -> None:
    """a and b share a dialogue, b and c their words, c and d (without an id) a text."""
    chain = [
        short("a", "One.", dialogue="x"),
        short("b", "Two.", dialogue="x"),
        short("", "Two.", "You like tea."),
        short("", "Three.", "You like tea."),
    ]
    with pytest.raises(ValueError, match="All 4 dialogues belong together"):
        split_by_persona(chain)
    for seed in range(10):
        train_set, test_set = split_by_persona([*chain, short("e")], 0.5, seed)
        assert {len(train_set), len(test_set)} == {1, 4}


def test_personas_that_cannot_be_told_apart_are_named() -> None:
    same = [short("", f"Line {i}.", "You are a helpful assistant.") for i in range(4)]
    with pytest.raises(
        ValueError, match=r"4 of them share the persona text 'You are a helpful.*ids"
    ):
        split_by_persona(same)
    with pytest.raises(ValueError, match="There are no dialogues to split"):
        split_by_persona([])
    for share in (0, 1, -0.5, math.nan):
        with pytest.raises(ValueError, match="test_share lies between 0 and 1"):
            split_by_persona(same, share)


def test_a_system_message_that_is_the_same_for_all_does_not_join_personas_with_ids() -> None:
    same = [short(f"p{i}", system="You are a helpful assistant.") for i in range(10)]
    train_set, test_set = split_by_persona(same)
    assert (len(train_set), len(test_set)) == (8, 2)
    refuse_leaks(train_set, test_set)


def test_a_file_is_split_as_its_dialogues_are(tmp_path: Path) -> None:
    everything = [short(f"p{i // 2}", f"Line {i}.") for i in range(20)]
    path = tmp_path / "log.jsonl"
    write_log(path, everything)
    parts = [tmp_path / "train.jsonl.gz", tmp_path / "test.jsonl"]
    assert split_log(path, *parts, test_share=0.3, seed=1) == (14, 6)
    assert tuple(list(read_log(part)) for part in parts) == split_by_persona(everything, 0.3, 1)
    for same in ((path, parts[1]), (parts[0], path), (parts[0], parts[0])):
        with pytest.raises(ValueError, match="The log and its two parts are three files"):
            split_log(path, *same)
    assert len(list(read_log(path))) == 20


def test_the_command_splits_as_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = [short(f"p{i // 2}", f"Line {i}.") for i in range(20)]
    path, train_part, test_part = (tmp_path / f"{name}.jsonl" for name in ("log", "train", "test"))
    write_log(path, everything)
    words = ["ppg", "split", str(path), "--train", str(train_part), "--test", str(test_part)]
    monkeypatch.setattr(sys, "argv", [*words, "--test-share", "0.3", "--seed", "1"])
    cli.main()
    parts = tuple(list(read_log(part)) for part in (train_part, test_part))
    assert parts == split_by_persona(everything, 0.3, 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "train.jsonl: 14 dialogues" in shown and "test.jsonl: 6 dialogues" in shown
    monkeypatch.setattr(sys, "argv", [*words[:4], str(path), *words[5:]])
    with pytest.raises(SystemExit):
        cli.main()
    assert "are three files" in " ".join(capsys.readouterr().out.split())
    assert len(list(read_log(path))) == 20


def test_both_views_of_a_dialogue_are_one_dialogue_also_without_ids() -> None:
    lines = ["Hi.", "Hello.", "And you?"]
    views = [
        told([(role, text) for role, text in zip(itertools.cycle(roles), lines, strict=False)])
        for roles in (("user", "assistant"), ("assistant", "user"))
    ]
    with pytest.raises(LogError, match=r"share a dialogue, word by word \('Hi\.'\)"):
        refuse_leaks(views[:1], views[1:])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (short("a", "Else.", "You are else."), "share the persona 'a'"),
        (short("b", dialogue="d"), "share the dialogue 'd'"),
        (short("", "Else.", "You are x."), r"share the persona text 'You are x\.'"),
        (short("b", "I am a.", "You are else."), r"share a dialogue, word by word \('Hello!'\)"),
    ],
)
def test_a_leak_is_refused_and_named(other: LoggedDialogue, named: str) -> None:
    train_set = [short("c"), short("a", dialogue="d"), short("", "Hm.", "You are x.")]
    refuse_leaks(train_set, [short("z")])
    for sides in ((train_set, [short("z"), other]), ([short("z"), other], train_set)):
        with pytest.raises(LogError, match=r"split by persona .*never by line"):
            refuse_leaks(*map(iter, sides))
    with pytest.raises(LogError, match=named):
        refuse_leaks(train_set, [other])


def test_one_exchange_in_the_same_words_is_no_leak_between_personas() -> None:
    greetings = [
        told([("system", f"You are {name}."), ("user", "Hi!"), ("assistant", "Hi.")], persona=name)
        for name in ("a", "b")
    ]
    refuse_leaks(greetings[:1], greetings[1:])
    assert split_by_persona(greetings, 0.5)
    nobody = told([("user", "Hi!"), ("assistant", "Hi.")])
    with pytest.raises(LogError, match="word by word"):
        refuse_leaks([nobody], [nobody])


def test_dialogues_of_which_nothing_is_known_go_by_group() -> None:
    lines = [[("user", "Hi."), ("assistant", f"{i}")] for i in range(4)]
    everything = [told(each, group=i // 2) for i, each in enumerate(lines)]
    train_set, test_set = split_by_persona(everything, 0.5)
    assert {t.group for t in train_set} ^ {t.group for t in test_set} == {0, 1}
    with pytest.raises(LogError, match="share the group 0"):
        refuse_leaks(everything[:1], everything[1:])
    refuse_leaks([short("a", group=0)], [short("b", group=0)])  # of two runs


# ---- rewards of whole dialogues and prefixes -----------------------------------------------------

# Multiples of 1/64: sums and differences are exact.
SCORES = st.lists(st.integers(-64, 64).map(lambda n: n / 64), max_size=12)


def test_scores_are_decomposed_as_by_hand() -> None:
    scores = [0.25, 0.75, 0.5, 1.0]
    assert decompose(scores) == [0.25, 0.5, -0.25, 0.5]
    assert decompose(scores, "running_maximum") == [0.25, 0.5, 0.0, 0.25]
    assert decompose([0, 0, 0.5]) == [0, 0, 0.5]
    assert decompose([0.5, 0.25], "running_maximum") == [0.5, 0.0]
    assert decompose([-0.5, 0.25]) == [-0.5, 0.75]
    assert decompose([-0.5, 0.25], "running_maximum") == [0.0, 0.25]
    assert decompose([]) == [] and decompose((1,)) == [1.0]
    assert decompose(np.array([0.5, 1.0], dtype=np.float32)) == [0.5, 0.5]


@given(SCORES)
def test_differences_telescope_to_the_final_score(scores: list[float]) -> None:
    rewards = decompose(scores)
    assert len(rewards) == len(scores)
    assert list(itertools.accumulate(rewards)) == scores


@given(SCORES)
def test_the_running_maximum_changes_rewards_exactly_where_the_score_has_fallen(
    scores: list[float],
) -> None:
    rewards, plain = decompose(scores, "running_maximum"), decompose(scores)
    best = max([0.0, *scores])
    assert sum(rewards) == best
    assert all(reward >= 0 for reward in rewards)
    assert (sum(rewards) != sum(plain)) == (bool(scores) and scores[-1] < best)
    falls = any(a > b for a, b in itertools.pairwise([0.0, *scores]))
    assert (rewards != plain) == falls


@pytest.mark.parametrize(
    "scores",
    [[math.nan], [0.5, math.inf], [None, 0.5], ["0.5"], "0.5", [[0.5]], 0.5, {"a": 1}, [10**400]],
)
def test_scores_that_are_no_numbers_are_refused(scores: Any) -> None:
    with pytest.raises(ValueError, match="prefix_scores are finite numbers, one a turn, got"):
        decompose(scores)


def test_an_unknown_decomposition_is_refused() -> None:
    with pytest.raises(ValueError, match="'difference' or 'running_maximum', got 'max'"):
        decompose([0.5], "max")  # type: ignore[arg-type]


# ---- Hugging Face datasets -----------------------------------------------------------------------

MIXED = [
    FULL,
    {"messages": [HI], "rewards": [None]},
    record(group="g", reward_parts={"other": [None, 0.5]}, update=None),
    record(group=...),
    record(reasons=..., logprobs=..., flags=..., reward_parts=..., source={"rest_json": [1.5]}),
    record(messages=[{**m, "name": "Ada", "at": None} for m in FULL["messages"]], rest_json="x"),
    record(group=10**30, extra={"extra": 1}),
]
GROUPS = [record(group=1), record(group=...), record(group=-5)]
LARGE = [record(group=1), record(group=-(2**63))]


@pytest.mark.parametrize("records", [MIXED, GROUPS, LARGE, MIXED[:1], MIXED[1:2]])
def test_rows_of_a_table_and_back_lose_nothing(records: list[dict[str, Any]]) -> None:
    written = [parse_dialogue(one) for one in records]
    rows = _rows(written)
    assert len({tuple(row) for row in rows}) == 1  # the same columns
    groups = [row["group"] for row in rows if row.get("group") is not None]
    assert len(set(map(type, groups))) < 2  # and one type
    assert all(isinstance(group, str) or abs(group) < 2**63 for group in groups)
    # Arrow fills objects of a column up to the same keys.
    names = {name for row in rows for name in row.get("reward_parts") or ()}
    for row in rows:
        if row.get("reward_parts"):
            row["reward_parts"] = {name: row["reward_parts"].get(name) for name in names}
    assert list(from_dataset(rows)) == written
    if records is GROUPS:
        assert groups == [1, -5]


@pytest.mark.skipif(
    not importlib.util.find_spec("datasets"), reason="datasets is not installed (extra: bench)"
)
@pytest.mark.parametrize("records", [MIXED, GROUPS, LARGE, MIXED[:1], MIXED[1:2]])
def test_a_dataset_and_back_loses_nothing(records: list[dict[str, Any]]) -> None:
    written = [parse_dialogue(one) for one in records]
    table = to_dataset(iter(written))
    assert len(table) == len(records)
    assert {"role", "content"} == set(table[0]["messages"][0])
    assert list(from_dataset(table)) == written
    with pytest.raises(LogError, match="lone surrogate"):
        to_dataset([told([("assistant", "\ud83d")])])


def test_a_dataset_of_ones_own_is_read_by_column() -> None:
    messages = [{**m, "name": None} for m in FULL["messages"]]
    rows = [{"messages": messages, "rewards": [1.0, 0.0], "group": None, "score": 0.5}]
    (found,) = from_dataset(rows)
    assert found.rewards == (1.0, 0.0) and found.group is None
    assert found.extra == {"score": 0.5}
    assert found.messages == FULL["messages"]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (record(rewards=[2.0, 0.0]), r"row 1, field 'rewards\[0\]'"),
        (record(messages=None), "row 1, field 'messages'"),
        (record(messages="Hi."), "row 1, field 'messages'"),
        (record(messages=["Hi.", "Ho."]), r"row 1, field 'messages\[0\]'"),
        (record(reward_parts="x"), "row 1, field 'reward_parts'"),
        (record(rest_json="no JSON"), "row 1, "),
        (record(rest_json="[1]"), "row 1, field 'rest_json': expected a JSON object"),
        (record(rest_json=5), "row 1, field 'rest_json': expected a JSON object"),
        (record(rest_json="[" * 100_000), "row 1, "),
        (record(rest_json='{"messages": [{}]}'), "row 1, "),
    ],
)
def test_a_row_that_is_no_dialogue_is_named(row: dict[str, Any], named: str) -> None:
    rows = from_dataset([FULL, row])
    assert next(rows) == parse_dialogue(FULL)
    with pytest.raises(LogError, match=named):
        next(rows)


def test_rows_are_records_again() -> None:
    (row,) = _rows([parse_dialogue(FULL)])
    assert _record_of(row) == FULL


def test_without_datasets_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        to_dataset([parse_dialogue(FULL)])
