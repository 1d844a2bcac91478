"""The demo's report: table, what it says of the gaps, plots and dialogues, from made-up runs."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.compare import Cell, CompareConfig, cell_settings
from agents.demo import (
    COLUMNS,
    before_after,
    findings,
    markdown_table,
    save_demo,
    table_rows,
)
from agents.methods import UNTRAINED
from agents.runs import RunFolder
from agents.statistics import Estimate

DOMAINS = ("chatting", "therapy")
METHODS = ("greedy", "full")
LEVELS = {UNTRAINED: 0.4, "greedy": 0.6, "full": 0.8}


def result_of(cell: Cell, level: float, spread: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng(len(cell.method))
    rewards = {f"p{i}": level + spread * float(rng.normal()) for i in range(40)}
    metrics = {
        "reward": Estimate(level, level - 0.02, level + 0.02),
        "drift": Estimate(-0.03, -0.04, -0.02),
        "prompt_to_line": Estimate(0.7, 0.6, 0.8),
        "line_to_line": Estimate(0.9, 0.85, 0.95),
        "warmth": Estimate(0.5, 0.4, 0.6),
        "degenerate_rate": Estimate(0.125, 0.1, 0.15),
    }
    return {
        "domain": cell.domain,
        "method": cell.method,
        "metrics": {name: asdict(value) for name, value in metrics.items()},
        "reward_T": [level, level - 0.1],
        "by_persona": {"reward": rewards},
        "num_timesteps": 0 if cell.method == UNTRAINED else 128,
        "train_seconds": 12.4,
        "tokens_per_second": None if cell.method == UNTRAINED else 1234.5,
    }


def results_of(spread: float = 0.0, **levels: float) -> dict[Cell, dict[str, Any]]:
    levels = {**LEVELS, **levels}
    methods = [(UNTRAINED, 0), *((method, 192) for method in METHODS)]
    cells = [Cell(domain, *method) for domain in DOMAINS for method in methods]
    return {cell: result_of(cell, levels[cell.method], spread) for cell in cells}


@pytest.fixture
def config(tmp_path: Path) -> CompareConfig:
    """A run folder in which every cell has learned for three updates and spoken two dialogues."""
    c = CompareConfig(run=str(tmp_path), domains=DOMAINS, methods=METHODS, budgets=(192,), seeds=1)
    for cell, result in results_of().items():
        folder = RunFolder(cell.folder(c.run), cell_settings(cell, c))
        folder.finish(result)
        for update in range(0 if cell.method == UNTRAINED else 3):
            row = {"time/total_timesteps": 64 * (update + 1), "rollout/turn_rew_mean": 0.2 * update}
            folder.log(row)
        dialogues = [
            [
                {"role": "system", "content": "You are Ada."},
                {"role": "user", "content": f"Hello {number}."},
                {"role": "assistant", "content": f"{cell.method}\nsays *this* in {cell.domain}."},
                {"role": "user", "content": "Oh."},
            ]
            for number in range(2)
        ]
        folder.write_transcripts(
            {"messages": messages, "rewards": [reward]}
            for messages, reward in zip(dialogues, [0.25, 0.75], strict=True)
        )
    return c


def test_the_table_has_a_row_for_every_cell_and_a_value_in_every_column() -> None:
    results = results_of()
    rows = table_rows(results)
    assert [row[:2] for row in rows] == [(cell.domain, cell.method) for cell in results]
    trained = dict(zip(COLUMNS, rows[1][2:], strict=True))
    assert trained == {
        "reward/turn": "0.600 [0.580, 0.620]",
        "prompt_to_line": "0.700 [0.600, 0.800]",
        "line_to_line": "0.900 [0.850, 0.950]",
        "domain part": "warmth 0.500 [0.400, 0.600]",
        "degenerate": "0.125",
        "drift/turn": "-0.030 [-0.040, -0.020]",
        "seconds": "12",
        "tokens/s": "1,234",
    }
    assert rows[0][-1] == ""  # the untrained model has no training speed


def test_a_judge_with_other_parts_leaves_cells_empty_and_no_error() -> None:
    results = results_of()
    for result in results.values():
        for name in ("prompt_to_line", "line_to_line", "warmth", "degenerate_rate"):
            del result["metrics"][name]
    row = dict(zip(COLUMNS, table_rows(results)[0][2:], strict=True))
    assert [row[name] for name in COLUMNS[1:5]] == ["", "", "", ""]


def test_the_markdown_table_is_rectangular() -> None:
    lines = markdown_table(results_of()).splitlines()
    assert len(lines) == 2 + 6
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 3}
    assert set(lines[1]) <= set("|- ")


def test_a_clear_gap_is_called_separated() -> None:
    sentences = findings(results_of())
    assert len(sentences) == 2
    assert sentences[1].startswith("therapy: full leads, +0.400 [+0.400, +0.400] over untrained")
    assert "+0.200 [+0.200, +0.200] over greedy (separated)" in sentences[1]


def test_a_gap_within_the_noise_is_not_called_separated() -> None:
    for sentence in findings(results_of(spread=0.3, greedy=0.79)):
        assert "(not separated)" in sentence


def test_findings_do_without_an_untrained_model_or_a_second_method() -> None:
    results = {cell: result for cell, result in results_of().items() if cell.method == "full"}
    assert findings(results) == ["chatting: full leads", "therapy: full leads"]
    untrained = {cell: r for cell, r in results_of().items() if cell.method == UNTRAINED}
    assert findings(untrained) == []


def test_dialogues_are_shown_before_and_after_training_with_the_best_method(
    config: CompareConfig,
) -> None:
    text = before_after(results_of(), config)
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == [
        f"## {domain}, dialogue {number}, {method}"
        for domain in DOMAINS
        for number in (1, 2)
        for method in (UNTRAINED, "full")
    ]
    assert "- persona: You are Ada." in text and "- partner: Hello 1." in text
    assert "- **agent** (0.75): full says *this* in therapy." in text


def test_fewer_dialogues_than_asked_for_are_no_error(config: CompareConfig) -> None:
    assert before_after(results_of(), config, dialogues=9) == before_after(results_of(), config)


def test_the_report_is_four_files_that_can_be_looked_at(config: CompareConfig) -> None:
    paths = save_demo(results_of(), config)
    names = ["table.md", "drift.png", "learning_curves.png", "transcripts.md"]
    assert [path.name for path in paths] == names
    table = paths[0].read_text(encoding="utf-8")
    assert markdown_table(results_of()) in table
    assert "192 dialogues x 8 turns a method" in table and "- therapy: full leads" in table
    for picture in paths[1:3]:
        content = picture.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width > 800 and height > 400 and len(content) > 10_000


def test_results_read_from_disk_give_the_same_report(config: CompareConfig) -> None:
    results = results_of()
    read = {cell: json.loads(json.dumps(result)) for cell, result in results.items()}
    assert table_rows(read) == table_rows(results) and findings(read) == findings(results)
