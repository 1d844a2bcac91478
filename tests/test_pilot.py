"""A pilot: its findings, where they are kept, and how they reach report and command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from agents import cli
from agents.diagnostics import CreditDiagnosis, caution
from agents.methods import UNTRAINED
from agents.pilot import Pilot, PilotConfig, pilot_record, read_pilots, run_pilot
from agents.report import GRADIENTS, pilot_findings, pilot_rows, write_report
from agents.statistics import Estimate
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
    assert [file.name for file in (run / "pilots").iterdir()] == [
        "chatting-noise-0.1-3-turns-nano.json"
    ]


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
    assert "Which act moves which reward" in page and "what full keeps" in page
    assert "cannot tell; the pilot has 3" in page
    rows = pilot_rows([pilot_record(pilot)])
    assert {len(row) for row in rows} == {len(GRADIENTS)}
    (finding,) = pilot_findings([pilot_record(pilot)])
    assert finding.startswith("chatting, noise 0.1, 3 turns, pilot of 12 dialogues with nano. For")
    assert "one update of the very model that spoke" in finding
    assert "The pilot in chatting has max_turns 3 (comparison: 8)." in page
    assert files["gradients.csv"].read_text().startswith("world,model,dialogues,credit,")
    assert "| signal to noise |" in files["table.md"].read_text()


def test_pilots_of_another_model_stand_beside_and_a_damaged_one_is_named(
    run: Path, pilot: Pilot, tmp_path: Path
) -> None:
    shutil.copytree(run / "pilots", tmp_path / "pilots")
    record = pilot_record(pilot)
    record["config"]["agent"] = "runs/half/agent"
    (tmp_path / "pilots" / "other.json").write_text(json.dumps(record))
    found = read_pilots(tmp_path)
    assert [each["config"]["agent"] for each in found] == ["nano", "runs/half/agent"]
    assert {row[1] for row in pilot_rows(found)} == {"nano", "runs/half/agent"}
    (tmp_path / "pilots" / "other.json").write_text("{")
    with pytest.raises(ValueError, match=r"other\.json is damaged .*; remove it"):
        read_pilots(tmp_path)


def test_where_all_credits_point_the_same_way_that_is_said() -> None:
    def with_cosines(*cosines: float) -> list[CreditDiagnosis]:
        found, none = Estimate(1.0, 0.5, 1.5), Estimate(0.0, -1.0, 1.0)
        return [
            CreditDiagnosis(
                **{
                    **{field.name: found for field in fields(CreditDiagnosis)},
                    "credit": "kstep:2",
                    "cosine": Estimate(cosine, cosine - 0.1, 1.0),
                    "signal": none if np.isnan(cosine) else found,
                }
            )
            for cosine in cosines
        ]

    assert caution(with_cosines(0.98, 1.0, np.nan)).startswith(
        "All credits point the same way here (cosine to full at least 0.98)"
    )
    assert caution(with_cosines(-0.6, 1.0)) == "" == caution(with_cosines(np.nan))


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
