"""Published judge answers, read twice. Tests with answers of others need a folder with the data set

(environment variable CONSISTENT_LLMS, else ../shared/data/consistent_llms) and are skipped without.
"""

import gzip
import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from ppg_env.published_verdicts import (
    consistent_llms,
    consistent_llms_conflicts,
    index_score,
    judged_lines,
    main,
    markdown,
    prompt_score,
    strict,
    strict_conflicts,
    table,
    total,
)

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("CONSISTENT_LLMS") or ROOT.parent / "shared/data/consistent_llms")
SAMPLE = json.loads((Path(__file__).parent / "published_sample.json").read_text(encoding="utf-8"))
OUTCOME = {True: "consistent", False: "contradicts", None: "unscorable"}
with_data = pytest.mark.skipif(
    not (FOLDER / "raw").is_dir(), reason="needs the Consistent-LLMs data set (CONSISTENT_LLMS)"
)

# ---- one answer ----------------------------------------------------------------------------------


def test_yes_means_contradiction():
    assert strict("She never had a dog. YES") is False
    assert strict("She does have a dog. NO") is True
    assert not consistent_llms("She never had a dog. YES")
    assert consistent_llms("She does have a dog. NO")


@pytest.mark.parametrize(
    "ending",
    [
        *(
            "NO",
            "NO.",
            "**NO**",
            "(NO)",
            "(NO).",
            "[NO]",
            "Answer: NO",
            "\n\nNO\n",
            "; NO.",
            '"NO"',
        ),
        *(
            "- NO",
            "NO NO",
            "Answer: no",
            "**Verdict:** no",
            "no",
            "\nno.",
            "No.",
            "Is it wrong? No",
        ),
        "NO\n\nThe dog is hers.",
        "NO\nSo the answer is NO.",
        "NO\n```",
        "Answer YES or NO: NO",
        "Aligned: YES\nContradicted: NO",
        "YES would be too harsh, so NO",
    ],
)
def test_a_verdict_at_the_end_is_read(ending):
    answer = f"There is no reason why a nurse should not say so. {ending}"
    assert strict(answer) is True
    swapped = re.sub(r"\b(yes|no)\b", _swap, ending, flags=re.IGNORECASE)
    assert strict(f"A nurse would not say so.\n{swapped}") is False


def test_a_line_of_its_own_needs_no_full_stop_before_it():
    assert strict("A nurse may say so\n\nno") is True
    assert strict("A nurse would not say so\n- yes") is False


def _swap(found):
    other = {"yes": "no", "no": "yes"}[found[0].lower()]
    return other.upper() if found[0].isupper() else other


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "",
            "   ",
            "\n\n",
            "It fits the background.",
            "Which line?",
            "!!!",
            "______",
        ),
        "There was no line.",  # a word of the explanation
        "There was no",
        "I see no line, yes or no",
        "I cannot answer YES or NO.",
        "I cannot say YES/NO",
        "Answer with YES or NO",
        "It is not YES",
        "Is it NO?",
        "YES or is it NO?",
        *("YES. NO.", "YES NO", "YES\n\nNO", "**YES**\n\n**NO**", "NO (YES)", "YES/NO.", "NO-YES"),
        "YES\nThe two sides:\nNO\nThat is all.",
        "YES, a nurse may well say so.",  # what it means is anybody's guess
        "So YES (it fits)",
        "NO, it fits.",
        "YESTERDAY",
        "NOT",
        "CONSISTENT",
    ],
)
def test_an_answer_without_a_clear_verdict_is_unscorable(answer):
    assert strict(answer) is None


def test_the_published_score_counts_whatever_holds_no_yes():
    for answer in ("", "There is no line to judge.", "yes", "%%%%", "It contradicts everything."):
        assert consistent_llms(answer)
        assert strict(answer) is not True
    assert not consistent_llms("It fits YESTERDAY's line. NO")
    assert not consistent_llms("I cannot answer YES or NO.")


@pytest.mark.parametrize(
    ("answer", "conflicts"),
    [
        ("They fit. []", []),
        ("They fit. [ ]", []),
        ("They clash. [3]", [3]),
        ("They clash: [5, 3, 3].", [3, 5]),
        ("They clash.\n\n[1,5]\n\nThe first is about a dog.", [1, 5]),
        ("They clash. **[1]**", [1]),
        ("[2 is the other's line]\n\n[3]", [3]),
        ("[3, 5] are near, but the clash is with 1. [1]", [1]),
        ("[]\nConflicts: []", []),
        ("They clash. [2, 3]", [3]),  # 2 is the other's line
        ("They clash. [3, 99]", [3]),
        ("They clash. [2, 4]", None),  # lists none of the speaker's lines
        ("They clash. [99]", None),
        ("They clash. [7]", None),  # the judged line itself
        ("[1]\n[3]", None),
        ("They clash with [1] and [3]", None),
        ("They clash with [1] [3]", None),
        ("They clash with [1] []", None),
        ("See [1, 3] for the same thought.", None),
        ("They fit ([5, 3]). No clash.", None),
        *((text, None) for text in ("", "They fit.", "[None]", "[one]", "[1, None]", "[-1]")),
        *(
            (text, None)
            for text in ("[1.0]", "[1, 3", "1, 3]", "[1,]", "[,]", "[1 3]", "[²]", "[٣]")
        ),
        (f"[{'9' * 5000}]", None),
    ],
)
def test_conflicts_are_read_from_a_list_at_the_end(answer, conflicts):
    assert strict_conflicts(answer, [1, 3, 5]) == conflicts


@pytest.mark.parametrize(
    ("answer", "counted"),
    [
        ("They fit.", []),
        ("They clash. [1, 2, 3, 3, 99]", [1, 3, 3, 99]),
        ("They fit ([5, 6]). No clash.", [5]),
        ("[1] is near, but the clash is with [3]", [1]),
        ("[2 is the other's line]\n\n[3]", []),
        ("[None]", []),
        ("[1, None]", []),
        ("[²]", []),
        (f"[{'9' * 5000}]", []),
    ],
)
def test_the_published_score_takes_the_first_list_and_any_line_of_the_speaker(answer, counted):
    assert consistent_llms_conflicts(answer, speaker=1) == counted


def test_published_scores_are_shares():
    assert prompt_score([]) == 0
    assert prompt_score([True, True, False, True]) == 0.75
    answers = [(2, "[0]"), (3, "no list"), (4, "[]"), (5, "[1, 3]"), (7, "[2]")]
    assert index_score(answers, speaker=0) == 1 - 1 / 3
    assert index_score(answers, speaker=1) == 1 - 2 / 6
    assert index_score([], speaker=0) == 0


@pytest.mark.parametrize(
    "noise", ["NO!", "\n", "[", "[ ", "[1, ", "YES or ", " ", "- no\n", "]", "(NO"]
)
def test_long_babble_is_read_in_no_time(noise):
    """With a regular expression that tries again from every place, this would take minutes."""
    answer = noise * (300_000 // len(noise)) + "x"
    assert strict(answer) is None or "\n" in noise
    assert strict_conflicts(answer, [1]) is None
    assert consistent_llms_conflicts(answer, 1) == []


# ---- files ---------------------------------------------------------------------------------------


def dialogue(answers, **more):
    return {"eval_prompt_consistency": [[i, answer] for i, answer in enumerate(answers)], **more}


def write(folder, name, *dialogues):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dialogues), encoding="utf-8")


def write_copy(folder, name, words, aggregate=None):
    turns = [
        {"speaker": ("P1", "P2")[i % 2]} | ({"prompt_verdict": word} if word else {})
        for i, word in enumerate(words)
    ]
    record = {"source_file": name, "turns": turns, "aggregate": aggregate}
    with gzip.open(folder / "dev.jsonl.gz", "at", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@pytest.fixture
def folder(tmp_path):
    """Two files with answers and one of which there are only words."""
    answers = ["It fits. NO", "It clashes. YES", "Which line?", "It fits. NO", "YES, it fits."]
    write(tmp_path, "raw/chatting/exp/dialogues/fair.json", dialogue(answers))
    scores = {"P1_prompt_consistency_score": 1.0, "P2_prompt_consistency_score": 0}
    mixed = dialogue(["It fits. YES", "It fits. NO"], **scores)
    write(tmp_path, "raw/therapy/exp/mixed.json", mixed)
    write(tmp_path, "raw/therapy/exp/unjudged.json", {"conversation": []})

    name, scores = "education/exp/dialogues/words.json", {"P2_prompt_consistency_score": 2 / 3}
    write_copy(tmp_path, name, [None, "YES", None, "NO", None, "NONE"], scores)
    write_copy(tmp_path, name, [None, "BOTH"])
    write_copy(tmp_path, "chatting/exp/dialogues/fair.json", ["YES"])
    return tmp_path


def test_a_row_counts_the_judged_lines_of_one_file(folder):
    fair, words, mixed = table(folder)
    assert (fair.file, fair.read, fair.judged) == ("chatting/dialogues/fair", "answers", 5)
    assert (fair.published, fair.consistent, fair.contradicts, fair.unscorable) == (3, 2, 1, 2)
    assert fair.difference == pytest.approx(20)

    assert (words.file, words.read, words.judged) == ("education/dialogues/words", "words", 4)
    assert (words.published, words.consistent, words.contradicts, words.unscorable) == (2, 1, 1, 2)
    assert (mixed.file, mixed.judged) == ("therapy/mixed", 2)


def test_files_whose_scores_count_the_other_way_are_told_and_not_summed(folder):
    rows = table(folder)
    assert [row.inverted for row in rows] == [False, False, True]
    assert total(rows).judged == 9


def test_the_command_prints_markdown_or_json(folder, capsys):
    main([str(folder)])
    printed = capsys.readouterr().out
    assert "| chatting/dialogues/fair | 5 | 60.0 % | 40.0 % | 20.0 % | 40.0 % | 20.0 |" in printed
    assert (
        "| education/dialogues/words † | 4 | 50.0 % | 25.0 % | 25.0 % | 50.0 % | 25.0 |" in printed
    )
    assert "| therapy/mixed ‡ | 2 |" in printed
    assert "| total | 9 | 55.6 % | 33.3 % | 22.2 % | 44.4 % | 22.2 |" in printed
    assert "† read from the verdict words" in printed

    main([str(folder), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in shown][-1] == "total"
    assert shown[0]["unscorable"] == 2
    assert shown[0]["difference"] == pytest.approx(20)


def test_a_folder_of_nothing_but_the_other_way_round_has_an_empty_total(tmp_path, capsys):
    write(tmp_path, "therapy/exp/x.json", dialogue(["YES"], P1_prompt_consistency_score=1.0))
    main([str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)[-1]["judged"] == 0
    main([str(tmp_path)])
    assert "| total | 0 | 0.0 % |" in capsys.readouterr().out


def test_a_folder_with_nothing_judged_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="no judged dialogues"):
        table(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no judged dialogues" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"eval_prompt_consistency": [[0]]}]', "7", "[" * 99999]
)
def test_a_file_of_another_kind_is_named(tmp_path, text):
    write(tmp_path, "therapy/exp/x.json")
    (tmp_path / "therapy/exp/x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json is no dialogue file"):
        table(tmp_path)


def test_a_copy_that_is_cut_off_is_named(tmp_path):
    whole = gzip.compress(b"{}" * 1000)
    (tmp_path / "dev.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"dev\.jsonl\.gz is no dialogue file"):
        table(tmp_path)


def test_a_copy_of_another_kind_is_named(tmp_path):
    with gzip.open(tmp_path / "dev.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"dev\.jsonl\.gz is no dialogue file.*source_file"):
        table(tmp_path)


# ---- the published answers -----------------------------------------------------------------------


def published_dialogues():
    """Yield (file, position, dialogue)."""
    for path in sorted((FOLDER / "raw").glob("*/exp/**/*.json")):
        name = path.relative_to(FOLDER / "raw").with_suffix("").as_posix()
        for position, record in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            yield name, position, record


def kind(answer):
    """Return what is odd about an answer at first sight; only for drawing the sample."""
    words = re.findall(r"\b(yes|no)\b", answer, re.IGNORECASE)
    if not words:
        return "none"
    if len({word.lower() for word in words}) == 2:
        return "both"
    if not all(word.isupper() for word in words):
        return "lower"
    if len(words) > 1:
        return "repeated"
    return "clear" if re.search(r"\b(YES|NO)\.?\s*$", answer) else "odd"


def draw_sample(seed=20251104, size=200, most=30):
    """Return (file, position, line, answer): up to 30 of each odd kind, then clear ones."""
    rng, pools = random.Random(seed), defaultdict(list)
    for name, position, record in published_dialogues():
        for line, answer in judged_lines(record, "eval_prompt_consistency"):
            pools[name, kind(answer)].append((name, position, line, answer))
    sample = []
    for (_, of_kind), pool in sorted(pools.items()):
        if of_kind != "clear":
            sample += rng.sample(pool, min(most, len(pool)))
    names, left = sorted(name for name, of_kind in pools if of_kind == "clear"), size - len(sample)
    for n, name in enumerate(names):
        sample += rng.sample(pools[name, "clear"], left // len(names) + (n < left % len(names)))
    return sample


def test_the_sample_holds_hashes_and_labels_of_200_answers():
    assert SAMPLE["columns"] == ["sha256", "file", "record", "line", "kind", "label", "why"]
    assert len({entry[0] for entry in SAMPLE["answers"]}) == 200
    assert all(re.fullmatch(r"[0-9a-f]{64}", entry[0]) for entry in SAMPLE["answers"])
    labels = Counter(tuple(entry[5:]) for entry in SAMPLE["answers"])
    assert labels == {
        ("consistent", ""): 75,
        ("contradicts", ""): 55,
        ("unscorable", "no_verdict"): 47,
        ("unscorable", "at_odds"): 17,
        ("unscorable", "nothing_to_judge"): 6,
    }


@with_data
def test_strict_reads_the_sample_as_a_careful_reader_does_or_errs_in_known_ways():
    """Never wrong about a clear answer.

    It gives none where the verdict opens a remark ("YES (a little)"), which happens in one file
    only, and takes a verdict at its word where the explanation says that there was nothing to
    judge, or says the opposite.
    """
    drawn = draw_sample()
    hashes = [hashlib.sha256(answer.encode()).hexdigest() for *_, answer in drawn]
    assert hashes == [entry[0] for entry in SAMPLE["answers"]]

    of_another_judge, of_the_judge = Counter(), Counter()
    for (name, *_, answer), entry in zip(drawn, SAMPLE["answers"], strict=True):
        other = name == "therapy/exp/dialogues/mistral-instruct_0_261"
        outcome = (entry[5], entry[6], OUTCOME[strict(answer)])
        (of_another_judge if other else of_the_judge)[outcome] += 1
    assert of_the_judge == {
        ("consistent", "", "consistent"): 57,
        ("contradicts", "", "contradicts"): 39,
        ("unscorable", "no_verdict", "unscorable"): 47,
        ("unscorable", "nothing_to_judge", "contradicts"): 5,
        ("unscorable", "nothing_to_judge", "consistent"): 1,
    }
    assert of_another_judge == {
        ("consistent", "", "consistent"): 14,
        ("contradicts", "", "contradicts"): 7,
        ("unscorable", "at_odds", "unscorable"): 8,
        ("consistent", "", "unscorable"): 4,
        ("contradicts", "", "unscorable"): 9,
        ("unscorable", "at_odds", "contradicts"): 8,
        ("unscorable", "at_odds", "consistent"): 1,
    }


@with_data
def test_the_published_prompt_scores_are_reproduced():
    compared = Counter()
    for name, _, record in published_dialogues():
        judged = list(judged_lines(record, "eval_prompt_consistency"))
        for speaker in (0, 1):
            stored = record.get(f"P{speaker + 1}_prompt_consistency_score")
            if stored is None:
                continue
            own = [answer for line, answer in judged if line % 2 == speaker]
            counted = [consistent_llms(answer) for answer in own]
            if name.endswith("mistral-instruct_0_261"):  # an older script, the other way round
                counted = ["NO" not in answer for answer in own]
            assert prompt_score(counted) == stored
            compared[name] += 1
    assert sum(compared.values()) == 100 + 10 + 32 + 2 * 16 + 19


@with_data
def test_the_published_line_to_line_scores_are_reproduced():
    compared = 0
    for _, _, record in published_dialogues():
        answers = list(judged_lines(record, "eval_index_consistency"))
        for speaker in (0, 1):
            stored = record.get(f"P{speaker + 1}_index_consistency_score")
            if stored is not None:
                assert index_score(answers, speaker) == stored
                compared += 1
    assert compared == 100 + 10 + 32 + 16 + 19


@with_data
def test_strict_conflicts_are_those_of_the_converted_copy_but_for_second_thoughts():
    """The copy's labels came about independently, from the first list of each answer."""
    with gzip.open(FOLDER / "dev.jsonl.gz", "rt", encoding="utf-8") as lines:
        copy = {d["id"]: d for d in map(json.loads, lines)}
    manifest = json.loads((FOLDER / "raw/manifest.json").read_text(encoding="utf-8"))
    outcomes = Counter()
    for name, position, record in published_dialogues():
        turns = copy[manifest[f"{name}.json"]["ids"][position]]["turns"]
        for line, answer in judged_lines(record, "eval_index_consistency"):
            conflicts = strict_conflicts(answer, range(line % 2, line, 2))
            labelled = turns[line]["conflicts"]
            if conflicts is None:
                outcomes["unscorable here", labelled is None] += 1
            else:
                same = labelled is not None and conflicts == sorted(set(labelled))
                outcomes["the same", same] += 1
    assert outcomes == {
        ("the same", True): 1123,
        ("the same", False): 5,  # the answer ends with another list than it begins with
        ("unscorable here", True): 69,
        ("unscorable here", False): 21,  # the list stands in the middle of the explanation
    }


@with_data
def test_the_table_of_the_published_files():
    rows = {row.file: row for row in table(FOLDER)}
    assert len(rows) == 24
    assert [name for name, row in rows.items() if row.inverted] == [
        "therapy/dialogues/mistral-instruct_0_261",
        "therapy/dialogues/mistral-instruct_0_501",
    ]
    assert sum(row.judged for row in rows.values()) == 7070
    degenerate = [row for name, row in rows.items() if "llama3-8b-kto" in name]
    assert [round(row.difference) for row in degenerate] == [30, 34, 36, 37]
    assert "| total | 6515 |" in markdown(list(rows.values()))


@with_data
def test_the_rows_by_words_are_those_by_answers(tmp_path):
    """Where both are at hand, except for the file in which remarks follow the verdict."""
    (tmp_path / "dev.jsonl.gz").symlink_to(FOLDER / "dev.jsonl.gz")
    by_words = {row.file: row for row in table(tmp_path)}
    for row in table(FOLDER / "raw"):
        other = by_words[row.file]
        assert (row.judged, row.published) == (other.judged, other.published)
        if not row.inverted:
            assert (row.consistent, row.unscorable) == (other.consistent, other.unscorable)
