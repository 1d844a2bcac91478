"""A pilot: its findings, where they are kept, and how they reach report and command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agents import cli
from agents.methods import UNTRAINED
from agents.pilot import Pilot, PilotConfig, pilot_record, read_pilots, run_pilot
from agents.report import GRADIENTS, pilot_findings, pilot_rows, write_report
from tests.made_up_runs import write_comparison


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def pilot(run: Path) -> Pilot:
    few = PilotConfig(
        domain="chatting", episodes=12, group_size=4, max_turns=3, update_episodes=(8,)
    )
    return run_pilot(PilotConfig(**{**few.__dict__, "run": str(run)}))


def test_a_pilot_finds_what_every_credit_is_worth(pilot: Pilot) -> None:
    assert [each.credit for each in pilot.diagnoses] == ["greedy", "kstep:2", "full", "trajectory"]
    assert all(
        each.variance.mean > 0 and each.bound > each.variance.mean for each in pilot.diagnoses
    )
    assert pilot.dependence.strength_TT.shape == (3, 3)
    assert 0.0 < pilot.mean_reward < 1.0
    (suggestion,) = pilot.suggestions
    assert suggestion.credit is None  # three groups tell nothing
    assert "cannot tell; the pilot has 3 groups" in suggestion.verdict


def test_its_findings_are_kept_in_the_run_folder(run: Path, pilot: Pilot) -> None:
    (record,) = read_pilots(run)
    assert record == json.loads(json.dumps(pilot_record(pilot)))
    assert [file.name for file in (run / "pilots").iterdir()] == ["chatting-noise-0.1.json"]


def test_the_same_seed_gives_the_same_pilot(pilot: Pilot) -> None:
    again = run_pilot(pilot.config)
    assert again.suggestions == pilot.suggestions
    assert np.array_equal(again.dependence.strength_TT, pilot.dependence.strength_TT)


def test_they_are_part_of_the_comparisons_report(run: Path, pilot: Pilot) -> None:
    levels = {UNTRAINED: 0.3, "greedy": 0.5, "full": 0.6}
    write_comparison(run, levels, domains=["chatting"], budgets=[64])
    files = {path.name: path for path in write_report([run])}
    assert {"variance.pdf", "variance.png", "dependence.pdf", "dependence.png"} <= set(files)
    page = files["report.html"].read_text(encoding="utf-8")
    assert "Which act moves which reward" in page and "cannot tell; the pilot has 3" in page
    rows = pilot_rows([pilot_record(pilot)])
    assert {len(row) for row in rows} == {len(GRADIENTS)}
    assert pilot_findings([pilot_record(pilot)])[0].startswith("chatting, pilot of 12 dialogues.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodes": 8}, "two groups of at least 4 dialogues, got episodes=8"),
        ({"group_size": 3}, "got episodes=256 and group_size=3"),
        ({"episodes": 100}, "episodes=100 must be a multiple of group_size=8"),
    ],
)
def test_a_pilot_that_is_too_small_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PilotConfig(**settings)


def test_the_command_prints_the_table_and_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "ppg suggest-k --domain therapy --episodes 8 --group-size 4 --max-turns 2"
    monkeypatch.setattr("sys.argv", [*words.split(), "--update-episodes", "8,16"])
    cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "Gradients of nano in therapy" in shown and "greedy" in shown
    assert shown.count("cannot tell; the pilot has 2 groups") == 2
