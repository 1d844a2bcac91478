"""The report of a comparison: tables, findings, figures and the page, from made-up run folders."""

from __future__ import annotations

import csv
import struct
from pathlib import Path

import numpy as np
import pytest

from agents.compare import Cell
from agents.figures import data_size_figure, drift_figure, learning_figure, svg
from agents.methods import UNTRAINED
from agents.report import (
    DIFFERENCES,
    EARNED,
    csv_table,
    dialogues,
    difference_rows,
    earned_rows,
    facts,
    findings,
    leading_credit,
    markdown,
    transcript_warnings,
    write_report,
)
from agents.results import Comparison, read_comparison
from tests.made_up_runs import write_comparison

LEVELS = {UNTRAINED: 0.3, "greedy": 0.5, "kstep:3": 0.6, "full": 0.6}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    write_comparison(folder, LEVELS)
    return folder


@pytest.fixture(scope="module")
def found(run: Path) -> Comparison:
    return read_comparison(run)


def test_both_tables_are_rectangular_and_hold_every_row(found: Comparison) -> None:
    earned, differences = earned_rows(found), difference_rows(found)
    assert {len(row) for row in earned} == {len(EARNED)}
    assert {len(row) for row in differences} == {len(DIFFERENCES)}
    assert [row[:3] for row in earned[:4]] == [
        ("chatting", UNTRAINED, ""),
        ("chatting", "greedy", "64"),
        ("chatting", "kstep:3", "64"),
        ("chatting", "full", "64"),
    ]
    assert len(earned) == len(found.rows) == 14
    assert [row[1] for row in differences] == ["greedy", "kstep:3", "full"] * 4
    shown = dict(zip(EARNED, earned[1], strict=True))
    assert shown["reward/turn"] == str(found.rows[1].reward)
    assert shown["drift/turn"].startswith("-0.030") and shown["degenerate"].startswith("0.125")


def test_a_finding_tells_who_leads_who_is_level_and_who_is_behind(found: Comparison) -> None:
    sentences = findings(found)
    assert len(sentences) == 2 * 2  # domains x budgets
    for sentence in sentences:
        level = "full" if "kstep:3 earned most" in sentence else "kstep:3"
        assert f"not separated from it: {level}" in sentence
        assert sentence.endswith("; behind: greedy.") and "over untrained" in sentence
    assert sentences[3].startswith("therapy, 128 dialogues: ")


def test_with_one_seed_nothing_is_said_to_be_behind(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, seeds=1, domains=["therapy"], budgets=[64])
    found = read_comparison(tmp_path)
    (sentence,) = findings(found)
    assert sentence.endswith("one seed cannot tell whether the others are behind.")
    text = markdown(found)
    assert "[" not in "".join(earned_rows(found)[1]) and "nan" not in text
    assert "one training seed: no interval" in text


def test_a_failed_cell_is_in_every_form_of_the_report(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    folder = Cell("therapy", "greedy", 64, 1).folder(tmp_path)
    (folder / "result.json").unlink()
    (folder / "error.txt").write_text("Traceback ...\nMemoryError: <script>too large</script>\n")
    files = {path.name: path for path in write_report([tmp_path])}
    table = files["table.md"].read_text(encoding="utf-8")
    assert "failed: therapy greedy 64 seed 1: MemoryError: <script>too large</script>" in table
    assert "2 (1 missing)" in table
    page = files["report.html"].read_text(encoding="utf-8")
    assert "MemoryError" in page and "<script>too large" not in page


def test_cells_with_the_same_error_are_told_together_with_its_whole_message(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    error = (
        "Traceback (most recent call last):\n  File 'x', line 1, in f\n    g()\n"
        "RuntimeError: first line\nsecond line\n"
    )
    for seed in (0, 2):
        folder = Cell("therapy", "greedy", 64, seed).folder(tmp_path)
        (folder / "result.json").unlink()
        (folder / "error.txt").write_text(error)
    table = markdown(read_comparison(tmp_path))
    both = "therapy greedy 64 seed 0, therapy greedy 64 seed 2"
    assert f"failed: {both}: RuntimeError: first line second line" in table
    assert "Methods differ in their seeds" in table


def test_a_method_that_stands_alone_is_not_said_to_lack_seeds(tmp_path: Path) -> None:
    write_comparison(tmp_path, {UNTRAINED: 0.3, "greedy": 0.5}, domains=["therapy"], budgets=[64])
    (sentence,) = findings(read_comparison(tmp_path))
    assert sentence.endswith("over untrained; it has nothing to be compared with.")


def test_cells_without_whole_dialogues_are_counted_and_the_rest_is_written(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    folders = [Cell("therapy", "greedy", 64, seed).folder(tmp_path) for seed in range(3)]
    (folders[0] / "transcripts.jsonl").write_text("")
    (folders[1] / "transcripts.jsonl").write_text('{"messages": [], "rewards": [1.0]}\n')
    (folders[2] / "transcripts.jsonl").unlink()
    found = read_comparison(tmp_path)
    (warning,) = transcript_warnings(found)
    assert warning.startswith("3 of 12 cells have no dialogues to show")
    methods = {dialogue.method for dialogue in dialogues(found)}
    assert methods == set(LEVELS) - {"greedy"}
    assert warning.split(",")[0] in write_report([tmp_path])[0].read_text(encoding="utf-8")


def test_figures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    write_comparison(tmp_path, LEVELS, domains=["therapy"], budgets=[64])
    stale, own = tmp_path / "out" / "variance.pdf", tmp_path / "out" / "mine.pdf"
    stale.parent.mkdir()
    for file in (stale, own):
        file.touch()
    write_report([tmp_path], tmp_path / "out")
    assert not stale.exists() and own.exists()


def test_the_csv_holds_the_numbers_unrounded(found: Comparison) -> None:
    rows = list(csv.DictReader(csv_table(found).splitlines()))
    row = found.rows[1]
    (reward,) = [
        r
        for r in rows
        if (r["domain"], r["method"], r["budget"], r["quantity"])
        == (row.domain, row.method, str(row.budget), "reward")
    ]
    numbers = [float(reward[name]) for name in ("mean", "low", "high")]
    assert numbers == [row.reward.mean, row.reward.low, row.reward.high]
    assert "nan" not in csv_table(found)


def test_dialogues_know_what_each_line_is_credited_with(found: Comparison) -> None:
    shown = [d for d in dialogues(found) if (d.domain, d.budget, d.seed) == ("therapy", 64, 0)]
    kstep = next(d for d in shown if d.method == "kstep:3")
    assert (kstep.persona, kstep.group, kstep.system) == ("p00", "7", "You are p00.")
    assert [line.speaker for line in kstep.lines] == ["partner", "agent", "partner", "agent"]
    first, unscorable = kstep.lines[1], kstep.lines[3]
    assert (first.reward, first.reason, first.parts) == (0.6, "it fits", {"prompt_to_line": 1.0})
    assert first.credited == pytest.approx(0.6) and first.advantage == pytest.approx(0.0)
    assert (unscorable.reward, unscorable.credited, unscorable.advantage) == (None, None, None)
    untrained = [d for d in dialogues(found) if d.method == UNTRAINED]
    assert untrained and all(line.credited is None for line in untrained[0].lines)


def test_the_facts_name_the_conditions(found: Comparison) -> None:
    named = dict(facts(found))
    assert {"model", "episodes", "max_turns", "weights", "git commit", "versions"} <= set(named)
    assert "torch" in named["versions"]


def test_figures_have_a_title_for_the_page_that_is_not_drawn(found: Comparison) -> None:
    for figure in (drift_figure(found), learning_figure(found), data_size_figure(found)):
        assert figure.get_label() and not figure.get_suptitle()


def test_the_leading_credit_is_the_best_bundled_one_of_the_domain(found: Comparison) -> None:
    rows = [row for row in found.of(("chatting", 0.1), 128) if row.method != "untrained"]
    best = max(rows, key=lambda row: row.reward.mean)
    assert leading_credit(found, "chatting") == best.method
    rows.remove(best)
    without = Comparison([r for r in found.records if r.cell.method != best.method])
    second = max(rows, key=lambda row: row.reward.mean)
    assert leading_credit(without, "chatting") == second.method
    assert leading_credit(found, "education") == "full"


def test_the_drift_figure_shows_the_mean_over_seeds_and_their_range(found: Comparison) -> None:
    figure = drift_figure(found)
    assert [axis.get_title() for axis in figure.axes] == ["chatting", "therapy"]
    for axis in figure.axes:
        lines = {str(line.get_label()): line for line in axis.get_lines()}
        assert list(lines) == list(LEVELS)
        # The larger budget gains .01, seeds 0, 1, 2 differ by .002.
        assert list(lines["full"].get_ydata()) == pytest.approx([0.612, 0.512])
        low, high = (np.asarray(axis.collections[3].get_datalim(axis.transData))[i] for i in (0, 1))
        assert (low[1], high[1]) == pytest.approx((0.51, 0.614))


def test_the_learning_figure_shows_the_logged_rewards(found: Comparison) -> None:
    for axis in learning_figure(found).axes:
        untrained, *curves = axis.get_lines()
        assert list(untrained.get_ydata()) == pytest.approx([0.3, 0.3], abs=0.02)
        for curve in curves:
            assert list(curve.get_xdata()) == pytest.approx([128 / 3, 256 / 3, 128])
            assert list(curve.get_ydata()) == pytest.approx([0.0, 0.2, 0.4])


def test_the_data_size_figure_has_a_point_for_every_budget(found: Comparison) -> None:
    for axis in data_size_figure(found).axes:
        assert [label.get_text() for label in axis.get_xticklabels()] == ["64", "128"]
        assert len(axis.containers) == 3


def test_the_report_is_a_page_tables_and_figures_that_can_be_printed(run: Path) -> None:
    files = {path.name: path for path in write_report([run])}
    figures = [
        f"{n}.{k}" for n in ("drift", "learning_curves", "data_size") for k in ("pdf", "png")
    ]
    assert list(files) == ["report.html", "table.md", "table.csv", *figures]
    assert all(path.parent == run / "report" for path in files.values())
    for name in figures:
        content = files[name].read_bytes()
        if name.endswith("pdf"):
            assert content.startswith(b"%PDF")
        else:
            width, height = struct.unpack(">II", content[16:24])
            assert width > 800 and height > 400 and len(content) > 10_000
    page = files["report.html"].read_text(encoding="utf-8")
    assert "How far ahead" in page and page.count("<svg") >= 3


def test_a_report_can_be_written_elsewhere_and_again(run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        files = write_report([run], tmp_path / "out")
        assert all(path.parent == tmp_path / "out" and path.exists() for path in files)


def test_a_drawing_for_the_page_has_no_ground_of_its_own(found: Comparison) -> None:
    drawn = svg(drift_figure(found))
    assert drawn.startswith("<?xml") and "</svg>" in drawn
    assert 'style="fill: #ffffff"' not in drawn.partition("axes_1")[0]
