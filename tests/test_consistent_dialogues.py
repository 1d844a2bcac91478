"""Published dialogue files as log records, and back to the byte. Everything here is invented but

for the tests that need a folder with the data set (environment variable CONSISTENT_LLMS, else
../shared/data/consistent_llms), which are skipped without.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import Terminal
from tiny_models import tiny_model, tiny_tokenizer

from agents import LMPolicy, LoggedDialogue, PPGAgent, cli
from agents.logs import parse_dialogue, read_log, write_log
from agents.splits import refuse_leaks, split_by_persona
from ppg_env.consistent_dialogues import (
    JUDGE,
    dialogue_records,
    find_published,
    published_dialogues,
    published_records,
    write_published,
)
from ppg_env.domains import CHATTING, EDUCATION, THERAPY
from ppg_env.published_verdicts import index_score, judged_lines, prompt_score

FOLDER = Path(
    os.environ.get("CONSISTENT_LLMS")
    or Path(__file__).parent.parent.parent / "shared/data/consistent_llms"
)
with_data = pytest.mark.skipif(
    not (FOLDER / "raw").is_dir(), reason="needs the Consistent-LLMs data set (CONSISTENT_LLMS)"
)

NO, YES = "It fits. NO", "It clashes. YES"
MEET = json.dumps('Meet Ada, a "baker".\n\nShe is 40.')
LIKE = json.dumps("Meet Ben.\n\nHe: sails.")


def chatting(**changes: Any) -> dict[str, Any]:
    """Return a dialogue of two speakers, both judged; ... takes a field out."""
    dialogue = {
        "task_name": "Chatting",
        "P1": MEET,
        "P2": LIKE,
        "conversation": [
            [0, "Ada: Hi: I bake.\n"],
            [1, "Ben: Ada: hello?\n"],
            [2, "Ada: \n"],
            [3, "Ben: I sail.\nNow: \u2028really\n\n"],
        ],
        "pturn": 1,
        "index": 0,
        "timestamp": "2025-05-15 12:16:42",
        "rounds": 4,
        "conversation_only": True,
        "eval_prompt_consistency": [[0, NO], [1, YES], [2, ""], [3, NO]],
        "P1_prompt_consistency_score": 1.0,
        "P2_prompt_consistency_score": 0.5,
        "eval_index_consistency": [[2, "No list."], [3, "They clash. [1]"]],
        "P1_index_consistency_score": 1.0,
        "P2_index_consistency_score": 0.0,
    }
    return {name: value for name, value in {**dialogue, **changes}.items() if value is not ...}


def therapy(answers: tuple[str, ...] = (YES, NO), **changes: Any) -> dict[str, Any]:
    """Return a dialogue in which P2 is judged."""
    roles = ("Therapist: {}?\n", "Patient: {}\n")
    lines = [role.format(i) for i in range(len(answers)) for role in roles]
    dialogue = {
        "task_name": "Therapy",
        "topic": "",
        "grade": "",
        "P1": "",
        "P2": "You are Eve, a singer who is ill.",
        "conversation": [[i, line] for i, line in enumerate(lines)],
        "eval_prompt_consistency": [[2 * i + 1, answer] for i, answer in enumerate(answers)],
        "P1_prompt_consistency_score": 0.0,
        "P2_prompt_consistency_score": prompt_score(["YES" not in answer for answer in answers]),
        "eval_survey_consistency": [["Patient: 0\n", 3, ["a"] * 5, ["NO"] * 5]],
    }
    return {name: value for name, value in {**dialogue, **changes}.items() if value is not ...}


def education(**changes: Any) -> dict[str, Any]:
    lines = ["Teacher: What is 2 + 2?\n", "Student: 5, or: 4.\n"]
    return therapy(
        (NO,),
        **{"task_name": "Education", "topic": "sums", "P2": "As a pupil, I draw."}
        | {"conversation": [[i, line] for i, line in enumerate(lines)]}
        | changes,
    )


def put(folder: Path, *dialogues: Any, name: str = "chatting/exp/dialogues/gpt-x_0_10_89") -> Path:
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(dialogues, indent=4).encode("ascii"))
    return path


def said(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in record["messages"]]


# ---- one file ------------------------------------------------------------------------------------


def test_both_chatting_speakers_have_a_view_and_lines_are_split_at_their_own_role(
    tmp_path: Path,
) -> None:
    one, two = dialogue_records(put(tmp_path, chatting()))
    texts = ["Hi: I bake.", "Ada: hello?", "", "I sail.\nNow: \u2028really\n"]
    system, *lines = said(one)
    assert lines == list(zip(["assistant", "user"] * 2, texts, strict=True))
    assert system[0] == "system" and system[1].endswith('\n\nMeet Ada, a "baker".\n\nShe is 40.')
    assert system[1].startswith(CHATTING.setting)
    system, *lines = said(two)
    assert lines == list(zip(["user", "assistant"] * 2, texts, strict=True))
    assert system[1].endswith("\n\nMeet Ben.\n\nHe: sails.")
    assert one["dialogue"] == two["dialogue"] == "chatting/exp/dialogues/gpt-x_0_10_89#0"
    assert one["persona"] != two["persona"]
    assert [r["source"]["speaker"] for r in (one, two)] == ["P1", "P2"]


def test_the_role_is_what_most_lines_of_a_speaker_begin_with(tmp_path: Path) -> None:
    lines = ["Ada: a\n", "Well\nyes: no\n", "Zoe: b\n", "Hi.\n", "Ada: Zoe: c\n"]
    conversation = [[i, line] for i, line in enumerate(lines)]
    one, _ = dialogue_records(put(tmp_path, chatting(conversation=conversation)))
    assert [text for _, text in said(one)[1:]] == ["a", "Well\nyes: no", "Zoe: b", "Hi.", "Zoe: c"]


def test_yes_is_a_contradiction_and_earns_nothing(tmp_path: Path) -> None:
    one, two = dialogue_records(put(tmp_path, chatting()))
    assert one["rewards"] == [1.0, None]  # no verdict is no reward
    assert two["rewards"] == [0.0, 1.0]
    assert one["reward_parts"] == {
        "prompt_to_line": [1.0, None],
        "prompt_to_line_published": [1.0, 1.0],
        "line_to_line": [None, None],
    }
    assert two["reward_parts"]["prompt_to_line_published"] == [0.0, 1.0]
    assert two["reward_parts"]["line_to_line"] == [None, 0.0]
    assert one["reasons"] == [NO, ""] and two["reasons"] == [YES, NO]
    assert one["judge"] == JUDGE and one["flags"] == []


def test_a_conflict_with_the_others_lines_is_no_verdict(tmp_path: Path) -> None:
    answers = [[2, "They clash. [1]"], [3, "They fit. []"]]
    one, two = dialogue_records(put(tmp_path, chatting(eval_index_consistency=answers)))
    assert one["reward_parts"]["line_to_line"] == [None, None]
    assert two["reward_parts"]["line_to_line"] == [None, 1.0]


def test_the_judged_speaker_of_therapy_and_education_is_p2(tmp_path: Path) -> None:
    (patient,) = dialogue_records(put(tmp_path, therapy(), name="therapy/exp/x_1"))
    (student,) = dialogue_records(put(tmp_path, education(), name="education/exp/x_1"))
    assert said(patient) == [
        ("system", f"{THERAPY.setting} You are Eve, a singer who is ill."),
        *[("user", "0?"), ("assistant", "0"), ("user", "1?"), ("assistant", "1")],
    ]
    assert said(student)[0][1].startswith(EDUCATION.setting)
    assert said(student)[0][1].endswith("\n\nAs a pupil, I draw.")
    assert said(student)[1:] == [("user", "What is 2 + 2?"), ("assistant", "5, or: 4.")]
    assert patient["rewards"] == [0.0, 1.0] and student["rewards"] == [1.0]
    assert (patient["domain"], student["domain"]) == ("therapy", "education")


def test_other_views_can_be_asked_for(tmp_path: Path) -> None:
    path = put(tmp_path, therapy(), name="therapy/exp/x_1")
    therapist, patient = dialogue_records(path, "both")
    assert [list(dialogue_records(path, side)) for side in ("P1", "P2")] == [[therapist], [patient]]
    assert said(therapist)[0] == ("assistant", "0?")  # no persona, no system message
    assert therapist["persona"] == "" and therapist["rewards"] == [None, None]
    assert therapist["flags"] == ["unjudged"] and therapist["judge"] == ""
    assert parse_dialogue(therapist).num_turns == 2
    (ben,) = dialogue_records(put(tmp_path, chatting()), "P2")
    assert ben["rewards"] == [0.0, 1.0]
    with pytest.raises(ValueError, match="agents is 'judged', 'both', 'P1' or 'P2', got 'patient'"):
        list(dialogue_records(path, "patient"))  # type: ignore[arg-type]


def test_the_same_persona_has_the_same_id_in_every_file(tmp_path: Path) -> None:
    path = put(tmp_path, chatting(), chatting(P1=LIKE, P2="Meet Zoe."), name="chatting/exp/y_5")
    ids = [r["persona"] for r in dialogue_records(path)]
    assert ids[1] == ids[2] and len(set(ids)) == 3
    (again, _) = dialogue_records(put(tmp_path, chatting(), name="chatting/exp/z_6"))
    assert again["persona"] == ids[0] and ids[0].startswith("chatting-")
    plain = put(tmp_path, chatting(P1=json.loads(MEET)), name="chatting/exp/w_7")  # not in quotes
    assert next(dialogue_records(plain))["persona"] == ids[0]
    (patient,) = dialogue_records(put(tmp_path, therapy(P2=LIKE), name="therapy/exp/x_1"))
    assert said(patient)[0][1].endswith(LIKE)  # quotes are taken off in chatting only


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gemma-2-2b-it_0_10_89", "gemma-2-2b-it"),
        ("long_Llama-3.1-8B-Instruct_0_336", "Llama-3.1-8B-Instruct"),
        ("kto_sft_new_Llama-3.1-8B-Instruct_0_133", "kto_sft_new_Llama-3.1-8B-Instruct"),
        ("sft_llama3-8b-sft_0_60_769", "sft_llama3-8b-sft"),
        ("mine", "mine"),
    ],
)
def test_the_behaviour_is_the_model_in_the_files_name(
    tmp_path: Path, name: str, model: str
) -> None:
    (record,) = dialogue_records(put(tmp_path, therapy(), name=f"therapy/exp/dialogues/{name}"))
    assert record["behaviour"] == model
    assert record["dialogue"] == f"therapy/exp/dialogues/{name}#0"
    (record,) = dialogue_records(put(tmp_path, therapy(), name=name))  # in no such folder
    assert record["behaviour"] == model and record["dialogue"] == f"{name}#0"


def test_lines_that_were_not_judged_have_no_reward(tmp_path: Path) -> None:
    (part,) = dialogue_records(
        put(tmp_path, therapy((NO, YES, NO), eval_prompt_consistency=[[3, YES]]), name="exp/a_1")
    )
    assert part["rewards"] == [None, 0.0, None] and part["flags"] == []
    assert part["reward_parts"]["prompt_to_line_published"] == [None, 0.0, None]
    for missing in (..., []):
        bare = therapy(
            eval_prompt_consistency=missing,
            P1_prompt_consistency_score=...,
            P2_prompt_consistency_score=...,
        )
        (none,) = dialogue_records(put(tmp_path, bare, name="therapy/exp/b_1"))
        assert none["rewards"] == [None, None] and none["flags"] == ["unjudged"]
        assert none["judge"] == "" and none.get("reasons", ["", ""]) == ["", ""]


OTHER = [
    therapy((YES, "Fine. YES", NO), P2_prompt_consistency_score=2 / 3),
    therapy((NO, NO, "Which line?"), P2_prompt_consistency_score=1 / 3),
]


def test_answers_of_another_judge_are_flagged_and_earn_nothing_unless_asked_for(
    tmp_path: Path,
) -> None:
    path = put(tmp_path, *OTHER, name="therapy/exp/dialogues/x_1")
    first, second = dialogue_records(path)
    for record in (first, second):
        assert record["flags"] == ["other_judge"] and record["judge"] == "unknown"
        assert record["rewards"] == [None] * 3
        assert record["reward_parts"]["prompt_to_line"] == [None] * 3
    assert first["reward_parts"]["prompt_to_line_published"] == [1.0, 1.0, 0.0]
    assert second["reward_parts"]["prompt_to_line_published"] == [0.0, 0.0, 1.0]
    first, second = dialogue_records(path, other_judge=True)
    assert first["rewards"] == [0.0, 0.0, 1.0] and second["rewards"] == [1.0, 1.0, None]
    assert first["flags"] == ["other_judge"]


def test_the_usual_judge_is_not_taken_for_another(tmp_path: Path) -> None:
    """All scores must be those of the other way of counting, and some not the usual ones."""
    for dialogues in (
        [therapy((YES, NO)), therapy((NO, NO))],
        [therapy((YES, NO))],  # 1/2 by both ways of counting
        [*OTHER, therapy((NO, NO))],
        [therapy((YES, NO), P2_prompt_consistency_score=0.25)],  # by neither
        [therapy((YES, YES, NO), P2_prompt_consistency_score=...)],
    ):
        path = put(tmp_path, *dialogues, name="therapy/exp/dialogues/x_1")
        assert all(record["flags"] == [] for record in dialogue_records(path))


def test_ids_are_those_of_a_manifest_beside_the_domains(tmp_path: Path) -> None:
    path = put(tmp_path, therapy(), therapy((NO,)), name="therapy/exp/dialogues/x_1")
    name = "therapy/exp/dialogues/x_1.json"

    def ids(manifest: Any) -> list[str]:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return [record["dialogue"] for record in dialogue_records(path)]

    assert ids({name: {"ids": ["x#3", "x#7"]}}) == ["x#3", "x#7"]
    by_place = ["therapy/exp/dialogues/x_1#0", "therapy/exp/dialogues/x_1#1"]
    for other in ({}, [], {name: {"ids": ["x#3"]}}, {name: {}}, {name: {"ids": [1, 2]}}, 5):
        assert ids(other) == by_place
    (tmp_path / "manifest.json").write_text("[" * 100_000, encoding="utf-8")
    assert [record["dialogue"] for record in dialogue_records(path)] == by_place


# ---- ppg import ----------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.setattr(cli.console, "_width", 200)
    return Terminal(monkeypatch, capsys)


def test_the_command_counts_records_and_dialogues(tmp_path: Path, terminal: Terminal) -> None:
    put(tmp_path, chatting(), chatting(P2="Meet Zoe."))
    put(tmp_path, therapy(), name="therapy/exp/x_1")
    out = tmp_path / "log.jsonl.gz"
    command = ("import", "consistent-llms", str(tmp_path), "--out", str(out))
    assert terminal.run(*command) == 0, terminal.output
    assert terminal.words.endswith("log.jsonl.gz: 5 records of 3 dialogues")
    assert len(list(read_log(out))) == 5
    assert terminal.run(*command, "--domain", "therapy") == 0, terminal.output
    assert [t.domain for t in read_log(out)] == ["therapy"]


def test_the_command_names_the_nearest_domain_and_leaves_the_old_log(
    tmp_path: Path, terminal: Terminal
) -> None:
    put(tmp_path, chatting())
    out = tmp_path / "log.jsonl"
    command = ("import", "consistent-llms", str(tmp_path), "--out", str(out))
    assert terminal.run(*command) == 0, terminal.output
    assert terminal.run(*command, "--domain", "educatoin") == 2
    assert "Unknown domain 'educatoin'. Did you mean 'education'?" in terminal.words
    assert terminal.run(*command, "--domain", "education") == 2
    assert f"{tmp_path} holds no dialogues of the domain 'education'" in terminal.words
    assert len(list(read_log(out))) == 2


# ---- bad files -----------------------------------------------------------------------------------

LINES = chatting()["conversation"]


@pytest.mark.parametrize(
    ("dialogue", "named"),
    [
        ("Hi.", "expected a JSON object, got 'Hi.'"),
        (chatting(task_name=...), "field 'task_name': expected a text, got None"),
        (chatting(task_name="Poker"), "field 'task_name': expected chatting, .*'poker'"),
        (chatting(P1=...), "field 'P1': expected a text, got None"),
        (chatting(P2=["a"]), "field 'P2': expected a text"),
        (chatting(P2='"a \\x"'), "field 'P2': in quotes, but no JSON string"),
        (chatting(conversation=...), "field 'conversation': expected a list, got None"),
        (chatting(conversation=[]), "field 'conversation': expected a list"),
        (chatting(conversation="Ada: Hi.\n"), "field 'conversation': expected a list"),
        (
            chatting(conversation=LINES[::-1]),
            r"'conversation\[0\]': expected \[0, line\], in",
        ),
        (chatting(conversation=LINES[1:]), r"'conversation\[0\]': expected .*, got \[1, 'Ben"),
        (chatting(conversation=[LINES[0], LINES[0]]), r"'conversation\[1\]': expected \[1, line\]"),
        (chatting(conversation=[LINES[0], [1]]), r"'conversation\[1\]': .*, got \[1\]"),
        (chatting(conversation=[LINES[0], [1, None]]), r"'conversation\[1\]': .*, got \[1, None\]"),
        (chatting(conversation=[LINES[0], [True, "Ben: Hi"]]), r"'conversation\[1\]': "),
        (chatting(conversation=["Ada: Hi.\n"]), r"'conversation\[0\]': "),
        (chatting(eval_prompt_consistency={}), "'eval_prompt_consistency': expected a list"),
        (chatting(eval_prompt_consistency=None), "'eval_prompt_consistency': expected a list"),
        (chatting(eval_prompt_consistency=[[4, NO]]), "'eval_prompt_consistency': .*got line 4"),
        (chatting(eval_prompt_consistency=[[-1, NO]]), "'eval_prompt_consistency': .*got line -1"),
        (chatting(eval_prompt_consistency=[[0, NO], [0, NO]]), "of the 4 lines once at most"),
        (chatting(eval_prompt_consistency=[[True, NO]]), "got line True"),
        (chatting(eval_prompt_consistency=[[0]]), r"eval_prompt_consistency\[0\]: expected \[line"),
        (
            chatting(eval_index_consistency=[[2, 5]]),
            r"eval_index_consistency\[0\]: expected",
        ),
        (chatting(eval_index_consistency=[[9, "[]"]]), "'eval_index_consistency': .*got line 9"),
    ],
)
def test_what_is_no_dialogue_is_named(tmp_path: Path, dialogue: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"gpt-x_0_10_89\.json, record 1, .*{named}"):
        list(dialogue_records(put(tmp_path, chatting(), dialogue)))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no JSON file"),
        (b"[{", "no JSON file"),
        (b"{}", r"expected a list of dialogues, got \{\}"),
        (b"[" * 100_000, "no JSON file"),
        (b'["\xff"]', "no JSON file .*utf-8"),
        (b"[NaN]", "no JSON file .*NaN is no JSON"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = put(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"gpt-x_0_10_89\.json.*{named}"):
        list(dialogue_records(path))


def test_a_speaker_who_says_nothing_has_no_view(tmp_path: Path) -> None:
    alone = chatting(
        conversation=LINES[:1], eval_prompt_consistency=[[0, NO]], eval_index_consistency=[]
    )
    (record,) = dialogue_records(put(tmp_path, alone))
    assert record["source"]["speaker"] == "P1"
    with pytest.raises(ValueError, match=r"Dialogue 'chatting/exp/.*#0' has no line of P2"):
        list(dialogue_records(put(tmp_path, alone), "P2"))


# ---- there and back ------------------------------------------------------------------------------

STRANGE = [
    [0, "Ada: Hi.\n"],
    [1, "no role here\n"],
    [2, "Bob: not my name"],
    [3, "Ben: \u2028x: \ud83d \x00 🙂\r\n"],
    [4, ""],
    [5, "Ben: Ben: Ben: \n\n\n"],
    [6, "Ada: b: \n"],
    [7, "\n"],
    [8, "Ada:"],
]


@pytest.mark.parametrize("side", ["judged", "both", "P1", "P2"])
def test_a_file_comes_back_to_the_byte_through_a_log(tmp_path: Path, side: Any) -> None:
    chat = [chatting(), chatting(conversation=STRANGE, extra={"a": [None, 1e-7]})]
    paths = [
        put(tmp_path / "raw", *chat),
        put(tmp_path / "raw", *OTHER, therapy(), name="therapy/exp/long_dialogues/long_x_1"),
        put(tmp_path / "raw", education(), name="education/exp/y_2"),
    ]
    write_log(
        tmp_path / "log.jsonl.gz",
        (parse_dialogue(r) for path in paths for r in dialogue_records(path, side)),
    )
    records = [t.record() for t in read_log(tmp_path / "log.jsonl.gz")]
    written = write_published(reversed(records), tmp_path / "again")
    assert sorted(written) == sorted(
        tmp_path / "again" / path.relative_to(tmp_path / "raw") for path in paths
    )
    for path in paths:
        again = tmp_path / "again" / path.relative_to(tmp_path / "raw")
        assert again.read_bytes() == path.read_bytes()


def test_texts_stand_in_the_record_once(tmp_path: Path) -> None:
    """What comes back is what the record says, not a copy beside it."""
    one, two = dialogue_records(put(tmp_path, chatting()))
    for record in (one, two):
        assert "I bake" not in json.dumps(record["source"])
    assert YES in json.dumps(one["source"]) and YES not in json.dumps(two["source"])
    two["messages"][2]["content"] = "Changed."
    two["reasons"][0] = "Changed, too."
    (restored,) = published_dialogues([two])["chatting/exp/dialogues/gpt-x_0_10_89.json"]
    assert restored["conversation"][1] == [1, "Ben: Changed.\n"]
    assert restored["eval_prompt_consistency"][1] == [1, "Changed, too."]
    with pytest.raises(ValueError, match=r"views of dialogue 'chatting/exp/.*#0' differ in texts"):
        published_dialogues([one, two])


def test_part_of_a_file_comes_back_in_its_order(tmp_path: Path) -> None:
    dialogues = [therapy((NO,) * n) for n in (1, 2, 3)]
    path = put(tmp_path, *dialogues, name="therapy/exp/x_1")
    first, _, third = dialogue_records(path)
    before = json.dumps(first)
    assert published_dialogues([third, first]) == {
        "therapy/exp/x_1.json": [dialogues[0], dialogues[2]]
    }
    assert json.dumps(first) == before  # the record stays as it is


@pytest.mark.parametrize("file", ["/etc/x.json", "../x.json", "a/../../x.json", ""])
def test_nothing_is_written_outside_of_the_folder(tmp_path: Path, file: str) -> None:
    good = next(dialogue_records(put(tmp_path / "raw", chatting())))
    bad = {**good, "source": {**good["source"], "file": file}}
    with pytest.raises(ValueError, match=r"source\.file is a path below"):
        write_published([good, bad], tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"source": {}},
        {"source": {"file": "x.json", "position": "first", "record": {}}},
        {"source": {"file": "x.json", "position": 0, "record": {}}},
        {"messages": []},
        {"reasons": []},
    ],
)
def test_a_record_that_cannot_come_back_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    record = next(dialogue_records(put(tmp_path, chatting(), name="chatting/exp/x_1")))
    with pytest.raises(ValueError, match="record of dialogue 'chatting/exp/x_1#0' is not what"):
        published_dialogues([{**record, **change}])
    with pytest.raises(ValueError, match="record of dialogue 5 is not what"):
        published_dialogues([5])  # type: ignore[list-item]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Ada: ", "Ben: ", "", ": ", "A: B: "]),
            st.text(st.characters(codec=None), max_size=12),
            st.sampled_from(["\n", "", "\n\n"]),
        ).map("".join),
        min_size=2,
        max_size=6,
    )
)
def test_any_lines_come_back(tmp_path: Path, lines: list[str]) -> None:
    lines = [line.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for line in lines]
    conversation = [[i, line] for i, line in enumerate(lines)]
    answers = [[i, line] for i, line in enumerate(lines)]
    path = put(
        tmp_path / "raw",
        chatting(conversation=conversation, eval_prompt_consistency=answers)
        | {"eval_index_consistency": []},
    )
    for side in ("P1", "P2"):
        log = tmp_path / "log.jsonl"
        write_log(log, map(parse_dialogue, dialogue_records(path, side)))  # type: ignore[arg-type]
        (again,) = write_published((t.record() for t in read_log(log)), tmp_path / "again")
        assert again.read_bytes() == path.read_bytes()


# ---- folders and the converted copy --------------------------------------------------------------


def copy_of(dialogue: dict[str, Any], name: str, position: int, **changes: Any) -> dict[str, Any]:
    """Return a dialogue as the copy has it, labels made from words at the answers' ends."""
    domain, answers = dialogue["task_name"].lower(), dict(dialogue["eval_prompt_consistency"])
    turns = []
    for i, line in dialogue["conversation"]:
        role, _, text = line.removesuffix("\n").partition(": ")
        turn = {"index": i, "speaker": f"P{i % 2 + 1}", "role": role, "text": text}
        turn |= {"prompt_consistency": None, "line_consistency": None, "conflicts": None}
        if i in answers:
            word = {NO: "NO", YES: "YES"}.get(answers[i], "NONE")
            turn["prompt_consistency"] = {"NO": 1, "YES": 0}.get(word)
            turn["prompt_verdict"] = word
        turns.append(turn)
    agent = "P1" if domain == "chatting" else "P2"
    return {
        "id": f"{name}#{position}",
        "domain": domain,
        "source_file": f"{name}.json",
        "source_index": position,
        "source_model": "x",
        "persona": dialogue[agent],
        "partner_persona": dialogue["P2"] if agent == "P1" else None,
        "persona_agent": agent,
        "prompt_label_status": "ok",
        "turns": turns,
        **changes,
    }


def put_copy(folder: Path, *dialogues: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "dev.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(dialogue) + "\n" for dialogue in dialogues)
    return folder / "dev.jsonl.gz"


def test_records_of_the_copy_are_those_of_the_file_without_answers(tmp_path: Path) -> None:
    for dialogue, name in (
        (chatting(eval_index_consistency=...), "chatting/exp/x_1"),
        (therapy((NO, YES, "Well?")), "therapy/exp/x_1"),
        (education(), "education/exp/x_1"),
    ):
        published = list(dialogue_records(put(tmp_path, dialogue, name=name), "both"))
        copied = list(dialogue_records(put_copy(tmp_path, copy_of(dialogue, name, 0)), "both"))
        assert len(published) == len(copied) == 2
        for one, other in zip(published, copied, strict=True):
            assert {**one, "source": 0, "reasons": 0} == {**other, "source": 0, "reasons": 0}
            assert "reasons" not in other


def test_labels_of_the_copys_other_judge_are_its_words(tmp_path: Path) -> None:
    turns = copy_of(OTHER[0], "therapy/exp/x_1", 4)["turns"]
    for turn in turns:
        turn["prompt_consistency"] = None
    other = copy_of(OTHER[0], "therapy/exp/x_1", 4, turns=turns, prompt_label_status="other_judge")
    turns[3]["prompt_verdict"] = "BOTH"
    (record,) = dialogue_records(put_copy(tmp_path, other))
    assert record["flags"] == ["other_judge"] and record["rewards"] == [None] * 3
    assert record["reward_parts"]["prompt_to_line_published"] == [1.0, 0.0, 0.0]
    (record,) = dialogue_records(put_copy(tmp_path, other), other_judge=True)
    assert record["rewards"] == [0.0, None, 1.0]


def test_conflicts_of_the_copy_are_line_to_line(tmp_path: Path) -> None:
    dialogue = copy_of(therapy((NO, NO, NO)), "therapy/exp/x_1", 0)
    for i, label in ((3, 1), (5, 0)):
        dialogue["turns"][i]["line_consistency"] = label
    (record,) = dialogue_records(put_copy(tmp_path, dialogue))
    assert record["reward_parts"]["line_to_line"] == [None, 1.0, 0.0]


def test_a_folder_is_read_whole_and_every_dialogue_once(tmp_path: Path) -> None:
    name = "therapy/exp/dialogues/x_1"
    put(tmp_path / "raw", therapy(), therapy((NO,)), name=name)
    put(tmp_path / "raw", chatting())
    put(tmp_path / "raw/chatting", {}, name="config_personas")
    put_copy(
        tmp_path,
        copy_of(therapy((NO, NO)), name, 0),  # the file is read, not this
        copy_of(education(), "education/exp/y_2", 0),
        copy_of(education(), "education/exp/y_2", 5),
    )
    assert [path.name for path in find_published(tmp_path)] == [
        *("gpt-x_0_10_89.json", "x_1.json", "dev.jsonl.gz"),
    ]
    records = list(published_records(tmp_path))
    assert [r["dialogue"].rpartition("/")[2] for r in records] == [
        *("gpt-x_0_10_89#0", "gpt-x_0_10_89#0", "x_1#0", "x_1#1", "y_2#0", "y_2#5"),
    ]
    assert records[2]["rewards"] == [0.0, 1.0]
    assert len(list(published_records(tmp_path / "raw", "both"))) == 6
    assert len(list(published_records(tmp_path / "raw/therapy"))) == 2
    one = list(published_records(tmp_path / "raw" / f"{name}.json"))
    for folder in ("raw/therapy/exp", "raw/therapy/exp/dialogues"):
        assert list(published_records(str(tmp_path / folder))) == one


def test_the_copy_comes_back_as_dialogues_but_not_as_a_file(tmp_path: Path) -> None:
    copies = [copy_of(d, "chatting/exp/x_1", i) for i, d in enumerate([chatting(), chatting()])]
    records = list(dialogue_records(put_copy(tmp_path, *copies)))
    assert all("I bake" not in json.dumps(record["source"]) for record in records)
    assert published_dialogues(records) == {"chatting/exp/x_1.json": copies}
    with pytest.raises(ValueError, match=r"chatting/exp/x_1\.json come from a converted copy"):
        write_published(records, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_without_dialogues_is_refused(tmp_path: Path) -> None:
    put(tmp_path, chatting(), name="chatting/dialogues/x")
    with pytest.raises(ValueError, match="no dialogues of Consistent-LLMs; expected <domain>"):
        list(published_records(tmp_path))
    with pytest.raises(ValueError, match="holds no dialogues"):
        list(published_records(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "change",
    [
        {"turns": None},
        {"turns": [{"index": 0}]},
        {"turns": [{"index": 1, "speaker": "P2", "text": "Hi."}]},
        {"turns": [{"index": 0, "speaker": "P1", "text": None}]},
        {"turns": [{"index": 0, "speaker": "P2", "text": "Hi."}]},
        {"domain": "poker"},
        {"persona": 5},
        {"persona_agent": "P3"},
        {"source_index": "first"},
        {"id": None},
        {"source_file": None},
    ],
)
def test_a_bad_line_of_the_copy_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    good = copy_of(chatting(), "chatting/exp/x_1", 0)
    path = put_copy(tmp_path, good, good | change)
    with pytest.raises(ValueError, match=r"dev\.jsonl\.gz, line 2: no dialogue of the converted"):
        list(dialogue_records(path))


def test_a_copy_that_is_cut_off_or_no_gzip_is_named(tmp_path: Path) -> None:
    path = put_copy(tmp_path, *[copy_of(chatting(), "chatting/exp/x_1", i) for i in range(9)])
    whole = path.read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], b"{}", whole[:-8] + bytes(8)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"dev\.jsonl\.gz is truncated or damaged after line"):
            list(dialogue_records(path))


# ---- the published dialogues ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> list[dict[str, Any]]:
    return list(published_records(FOLDER))


@with_data
def test_all_published_dialogues_load(published: list[dict[str, Any]]) -> None:
    counts: dict[str, Counter[str]] = {}
    for record in published:
        count = counts.setdefault(record["domain"], Counter())
        parts = record["reward_parts"]
        count["records"] += 1
        count["lines"] += len(record["rewards"])
        count["judged"] += sum(x is not None for x in parts["prompt_to_line_published"])
        for reward in record["rewards"]:
            count[str(reward)] += 1
        for flag in record["flags"]:
            count[flag] += 1
        assert parse_dialogue(record).num_turns == len(record["rewards"])
    assert len({record["dialogue"] for record in published}) == 352
    assert counts == {
        "chatting": {"records": 420, "lines": 3950, "judged": 3950}
        | {"1.0": 3347, "0.0": 356, "None": 247},
        "education": {"records": 63, "lines": 1010, "judged": 1010}
        | {"1.0": 670, "0.0": 319, "None": 21},
        "therapy": {"records": 79, "lines": 2210, "judged": 2110}
        | {"1.0": 649, "0.0": 885, "None": 676, "other_judge": 35, "unjudged": 1},
    }
    assert max(len(record["messages"]) for record in published) == 301
    assert len({record["persona"] for record in published}) == 100 + 13 + 5


@with_data
def test_the_files_of_another_judge_are_found(published: list[dict[str, Any]]) -> None:
    flagged = {r["source"]["file"] for r in published if "other_judge" in r["flags"]}
    assert flagged == {
        "therapy/exp/dialogues/mistral-instruct_0_261.json",  # by its scores
        "therapy/exp/dialogues/mistral-instruct_0_501.json",  # the copy says so
    }
    asked = [r for r in published_records(FOLDER, other_judge=True) if "other_judge" in r["flags"]]
    counts = Counter(reward for r in asked for reward in r["rewards"])
    assert counts == {1.0: 207, 0.0: 300, None: 48}


@with_data
def test_the_published_files_come_back_to_the_byte(
    tmp_path: Path, published: list[dict[str, Any]]
) -> None:
    originals = find_published(FOLDER / "raw")
    assert len(originals) == 6
    log = tmp_path / "log.jsonl.gz"
    assert write_log(log, map(parse_dialogue, published)) == 562
    records = [t.record() for t in read_log(log)]
    whole = [r for r in records if "conversation" in r["source"]["record"]]
    assert len(whole) == 2 * 55 + 32 + 16 + 19 + 1
    write_published(whole, tmp_path)
    for path in originals:
        again = tmp_path / path.relative_to(FOLDER / "raw")
        assert again.read_bytes() == path.read_bytes()


@with_data
def test_the_copy_comes_back_object_by_object() -> None:
    with gzip.open(FOLDER / "dev.jsonl.gz") as lines:
        original = {d["id"]: d for d in map(json.loads, lines)}
    restored = published_dialogues(dialogue_records(FOLDER / "dev.jsonl.gz"))
    dialogues = {d["id"]: d for each in restored.values() for d in each}
    assert dialogues == original and len(original) == 352
    for record in dialogue_records(FOLDER / "dev.jsonl.gz"):
        assert record["behaviour"] == original[record["dialogue"]]["source_model"]


@with_data
def test_the_stored_scores_follow_from_the_records(published: list[dict[str, Any]]) -> None:
    compared: Counter[str] = Counter()
    for record in published:
        ((dialogue,),) = published_dialogues([record]).values()
        scores, speaker = dialogue.get("aggregate") or dialogue, record["source"]["speaker"]
        counted = record["reward_parts"]["prompt_to_line_published"]
        stored = scores.get(f"{speaker}_prompt_consistency_score")
        if stored is not None:
            assert prompt_score([bool(x) for x in counted if x is not None]) == stored
            compared["prompt"] += 1
        stored = scores.get(f"{speaker}_index_consistency_score")
        if stored is not None:
            assert index_score(_index_answers(dialogue), int(speaker[1]) - 1) == stored
            compared["index"] += 1
    assert compared == {"prompt": 420 + 63 + 78, "index": 420 + 63 + 78}


def _index_answers(dialogue: dict[str, Any]) -> list[tuple[int, str]]:
    """Return the line-to-line answers; of the copy the lists that were in them."""
    if "conversation" in dialogue:
        return list(judged_lines(dialogue, "eval_index_consistency"))
    return [
        (turn["index"], str(turn.get("conflicts_raw") or turn["conflicts"] or "none"))
        for turn in dialogue["turns"]
        if "line_status" in turn
    ]


@with_data
def test_rewards_read_from_answers_are_the_copys_labels(published: list[dict[str, Any]]) -> None:
    """The labels came about independently."""
    copied = {(r["dialogue"], r["persona"]): r for r in dialogue_records(FOLDER / "dev.jsonl.gz")}
    outcomes: Counter[Any] = Counter()
    for record in published:
        other = copied[record["dialogue"], record["persona"]]
        for field in ("messages", "rewards", "domain", "behaviour", "judge", "flags"):
            assert record[field] == other[field]
        part = "line_to_line"
        pairs = zip(record["reward_parts"][part], other["reward_parts"][part], strict=True)
        outcomes.update(one == two for one, two in pairs)
    assert outcomes == {True: 7145, False: 25}  # second thoughts, see test_published_verdicts


@with_data
def test_the_published_dialogues_split_by_persona(published: list[dict[str, Any]]) -> None:
    for domain, personas in (("chatting", 100), ("education", 13), ("therapy", 5)):
        log = [parse_dialogue(r) for r in published if r["domain"] == domain]
        sides = split_by_persona(log, 0.2)
        refuse_leaks(*sides)
        assert sum(len({t.persona for t in side}) for side in sides) == personas
        assert 0.15 < len(sides[1]) / len(log) < 0.25


@with_data
def test_a_model_learns_from_the_stored_verdicts(published: list[dict[str, Any]]) -> None:
    log = [parse_dialogue(r) for r in published if r["domain"] == "education"]
    log = sorted(log, key=lambda t: sum(len(m["content"]) for m in t.messages))[:6]
    assert {0.0, 1.0} <= {reward for t in log for reward in t.rewards}
    model = tiny_model("llama", max_position_embeddings=8192)
    agent = PPGAgent(
        LMPolicy(model, tiny_tokenizer(), seed=0), None, "kstep:3", learning_rate=3e-3, seed=0
    )
    agent.learn_offline(log, validation=log_of_others(published, log), epochs=4)
    losses = [row["train/policy_loss"] for row in agent.history]
    assert len(losses) == 4 and all(b < a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    for row in agent.history:
        assert all(math.isfinite(value) for value in row.values())
        assert row["offline/dropped_turns"] == 0.0 and row["train/skipped_steps"] == 0.0


def log_of_others(published: list[dict[str, Any]], log: list[LoggedDialogue]) -> Any:
    """Return two short lessons of other pupils."""
    pupils = {t.persona for t in log}
    others = [parse_dialogue(r) for r in published if r["domain"] == "education"]
    others = [t for t in others if t.persona not in pupils]
    return sorted(others, key=lambda t: sum(len(m["content"]) for m in t.messages))[:2]
