"""A comparison as one page that one wants to show, as tables and as figures of the paper kind.

write_report(["runs/compare"])     # runs/compare/report/: report.html, table.md, table.csv,
                                   # findings.md, drift.pdf and .png, ...
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import page
from .credit import CREDIT_NAMES, Credit, advantages, partial_returns
from .figures import (
    Drawing,
    data_size_figure,
    dependence_figure,
    drift_figure,
    learning_figure,
    svg,
    variance_figure,
)
from .methods import UNTRAINED, parse_method
from .pilot import read_pilots
from .results import CellRecord, Comparison, Row, World, read_comparison, world_name
from .runs import TRANSCRIPTS, read_transcripts
from .statistics import Estimate
from .suggest import ONE_STEP

_FIGURES = ("drift", "learning_curves", "data_size", "variance", "dependence")
SIGNIFICANT = 0.05
"""Of p-values after Holm's correction."""

EARNED = (
    *("world", "method", "dialogues", "seeds", "reward/turn", "interquartile mean"),
    *("drift/turn", "prompt_to_line", "degenerate"),
)
DIFFERENCES = (
    *("world", "method", "dialogues", "over untrained", "over full", "p of that", "beats full"),
    *("behind the best", "p of that"),
)
GRADIENTS = (
    *("world", "model", "dialogues", "credit", "window", "norm", "variance", "signal to noise"),
    *("cosine to full", "bound"),
)


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """Write the report of one or several run folders of `ppg compare`; return the files.

    Args:
        runs: run folders that were made under the same conditions.
        out: folder; None = "report" in the first run folder.

    Raises:
        FileNotFoundError, ValueError: as `read_comparison`.
    """
    found = read_comparison(*runs)
    folder = Path(runs[0]) / "report" if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in itertools.product(_FIGURES, ("pdf", "png")):  # of an earlier report
        (folder / f"{name}.{kind}").unlink(missing_ok=True)
    pilots = [pilot for run in runs for pilot in read_pilots(run)]
    warnings = [*found.warnings, *pilot_warnings(pilots, found), *transcript_warnings(found)]
    drawings = {**figures(found), **pilot_figures(pilots, found)}
    files = [
        _write(folder / "table.md", markdown(found, pilots, warnings)),
        _write(folder / "table.csv", csv_table(found)),
        *([_write(folder / "gradients.csv", gradients_csv(pilots))] * bool(pilots)),
    ]
    for name, (_, drawing) in drawings.items():
        for kind in ("pdf", "png"):
            files.append(folder / f"{name}.{kind}")
            drawing.savefig(files[-1], dpi=150)
    title = "How far ahead should this agent plan?"
    content = page.Page(
        title=title,
        warnings=warnings,
        failures=failures(found),
        findings=[*findings(found), *pilot_findings(pilots)],
        tables=[
            page.Table("What every method earned", _EARNED_NOTE, EARNED, earned_rows(found)),
            page.Table("What separates them", _GAPS_NOTE, DIFFERENCES, difference_rows(found)),
            *([page.Table("Gradients", _PILOT_NOTE, GRADIENTS, pilot_rows(pilots))] * bool(pilots)),
        ],
        figures=[
            page.Figure(str(drawing.get_label()), caption, svg(drawing), caption)
            for caption, drawing in drawings.values()
        ],
        dialogues=dialogues(found),
        facts=facts(found),
    )
    return [page.write_page(content, folder / "report.html"), *files]


def figures(found: Comparison) -> dict[str, tuple[str, Drawing]]:
    """Return {file name: (caption, figure)}."""
    band = "Means over seeds, shaded from the lowest to the highest seed; largest budget."
    drawn = {
        "drift": (f"Held-out reward at each turn of the dialogue. {band}", drift_figure(found)),
        "learning_curves": (
            f"Reward of the dialogues learned from. {band}",
            learning_figure(found),
        ),
    }
    if max((len(found.budgets(world)) for world in found.worlds), default=0) > 1:
        caption = "Held-out reward with its 95 % interval over seeds and personas."
        drawn["data_size"] = (caption, data_size_figure(found))
    return drawn


def leading_credit(found: Comparison, domain: str) -> str:
    """Return the bundled credit that earned most in a domain under its largest budget, or "full".

    Of several noises the domain's first counts.
    """
    for world in found.worlds:
        for budget in reversed(found.budgets(world) if world[0] == domain else []):
            rows = [r for r in found.of(world, budget) if r.seeds and _is_bundled_credit(r.method)]
            if rows:
                return max(rows, key=lambda row: row.reward.mean).method
    return "full"


def _is_bundled_credit(method: str) -> bool:
    return method.partition(":")[0] in CREDIT_NAMES


def pilot_figures(
    pilots: Sequence[Mapping[str, Any]], found: Comparison
) -> dict[str, tuple[str, Drawing]]:
    """Return the figures of pilots, {} if there are none."""
    if not pilots:
        return {}
    variance = (
        "Above: variance of the gradient of one update with its 95 % interval, and the bound that "
        "no variance exceeds. Below: cosine between its expectation and the full gradient."
    )
    dependence = (
        "How strongly the act of a turn (row) moves the reward of a turn (column), measured within "
        "groups; left of the diagonal is noise alone. Below it what the domain's best credit keeps."
    )
    credits = [leading_credit(found, pilot["config"]["domain"]) for pilot in pilots]
    return {
        "variance": (variance, variance_figure(pilots)),
        "dependence": (dependence, dependence_figure(pilots, credits)),
    }


def pilot_findings(pilots: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which lookahead each pilot speaks for, and what that does not say."""
    sentences = []
    for pilot in pilots:
        world, model, number = _pilot_name(pilot)
        verdicts = " ".join(suggestion["verdict"] for suggestion in pilot["suggestions"])
        sentences.append(f"{world}, pilot of {number} dialogues with {model}. {verdicts}")
        sentences[-1] += f" {ONE_STEP}"
        if pilot.get("caution"):
            sentences[-1] += f" {pilot['caution']}"
    return sentences


def pilot_warnings(pilots: Sequence[Mapping[str, Any]], found: Comparison) -> list[str]:
    """Return which pilots were made under other conditions than the comparison."""
    warnings = []
    settings = found.records[0].settings
    for pilot in pilots:
        config, other = pilot["config"], []
        for name, there in (("agent", settings.get("model")), *settings.items()):
            if name in ("agent", "max_turns", "partner", "judge") and config.get(name) != there:
                other.append(f"{name} {config.get(name)} (comparison: {there})")
        if (config["domain"], config["noise"]) not in found.worlds:
            other.append(f"noise {config['noise']:g}")
        if other:
            warnings.append(f"The pilot in {config['domain']} has {', '.join(other)}.")
    return warnings


def _pilot_name(pilot: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return world, model and number of dialogues."""
    config = pilot["config"]
    return (
        f"{config['domain']}, noise {config['noise']:g}, {config['max_turns']} turns",
        str(config["agent"]),
        f"{config['episodes']:,}",
    )


def pilot_rows(pilots: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the cells of the table GRADIENTS."""
    return [
        (
            *_pilot_name(pilot),
            each["credit"],
            f"{each['window']:.1f}",
            f"{each['norm']:.3g}",
            f"{Estimate(**each['variance']):.3g}",
            f"{Estimate(**each['snr']):.2f}" if each["signal"]["low"] > 0 else "no signal found",
            _shown(Estimate(**each["cosine"]), ".2f"),
            f"{each['bound']:.3g}",
        )
        for pilot in pilots
        for each in pilot["diagnoses"]
    ]


_PILOT_NOTE = (
    "Gradient of one update on the pilot's dialogues; intervals from bootstrapped groups. "
    "Signal-to-noise: squared length of the expected gradient over the variance."
)
_EARNED_NOTE = (
    "Mean over training seeds and held-out personas with its 95 % interval for other seeds and "
    "other personas (two-way layout, Satterthwaite's t; with few seeds it can pass the range of "
    "the quantity), over personas that have a value with every seed; interquartile mean with a "
    "bootstrap interval over both. Drift: change of the reward per turn of the dialogue."
)
_GAPS_NOTE = (
    "Reward differences, paired by persona and seed; p-values are Holm's, for all methods of a "
    "world and budget, of the difference to their left. The best is chosen on the same data, which "
    "flatters it. Beats full: how likely one run of the method earns more than one of full "
    "planning on the same persona."
)


def earned_rows(found: Comparison) -> list[tuple[str, ...]]:
    """Return the cells of the table EARNED."""
    rows: list[tuple[str, ...]] = []
    for row in found.rows:
        metrics = row.metrics
        rows.append(
            (
                *_name(row, found),
                _seeds(row),
                _shown(metrics.get("reward")),
                _shown(row.iqm),
                _shown(metrics.get("drift"), "+.3f"),
                _shown(metrics.get("prompt_to_line")),
                _shown(metrics.get("degenerate_rate")),
            )
        )
    return rows


def difference_rows(found: Comparison) -> list[tuple[str, ...]]:
    """Return the cells of the table DIFFERENCES."""
    return [
        (
            *_name(row, found),
            _shown(row.over_untrained, "+.3f"),
            _shown(row.over_full, "+.3f"),
            _p(row.p_full),
            _shown(row.beats_full, ".2f"),
            _shown(row.to_best, "+.3f"),
            _p(row.p_best),
        )
        for row in found.rows
        if row.method != UNTRAINED and row.seeds
    ]


def findings(found: Comparison) -> list[str]:
    """Return, for every world and budget, who leads, who is level with it, and who is behind."""
    sentences = []
    for world in found.worlds:
        for budget in found.budgets(world):
            rows = [row for row in found.of(world, budget) if row.budget and row.seeds]
            if rows:
                sentences.append(_finding(rows, world_name(world, found.worlds)))
    return sentences


def _finding(rows: Sequence[Row], where: str) -> str:
    best = next((row for row in rows if row.to_best is None), rows[0])
    sentence = f"{where}, {best.budget:,} dialogues: {best.method} earned most ({best.reward})"
    if best.over_untrained is not None:
        sentence += f", {best.over_untrained:+.3f} over untrained"
    others = sorted((row for row in rows if row is not best), key=lambda row: -row.reward.mean)
    told = [row for row in others if not math.isnan(row.p_best)]
    if not others:
        return f"{sentence}; it has nothing to be compared with."
    if not told:
        return f"{sentence}; one seed cannot tell whether the others are behind."
    level = [row.method for row in told if row.p_best >= SIGNIFICANT]
    behind = [row.method for row in told if row.p_best < SIGNIFICANT]
    if level:
        sentence += f"; not separated from it: {', '.join(level)}"
    if behind:
        sentence += f"; behind: {', '.join(behind)}"
    return f"{sentence}."


def failures(found: Comparison) -> list[tuple[str, str]]:
    """Return (cells, error), cells with the same error together."""
    cells: dict[str, list[str]] = {}
    for record in found.failed:
        cells.setdefault(record.error, []).append(str(record.cell))
    return [(", ".join(names), error) for error, names in cells.items()]


def transcript_warnings(found: Comparison) -> list[str]:
    """Return how many complete cells have no dialogues to show."""
    complete = [record.folder for record in found.records if record.result is not None]
    without = [folder for folder in complete if not any(_spoken(folder))]
    if not without:
        return []
    return [
        f"{len(without)} of {len(complete)} cells have no dialogues to show, the first of them "
        f"{without[0]}: {TRANSCRIPTS} is missing or damaged there."
    ]


def markdown(
    found: Comparison, pilots: Sequence[Mapping[str, Any]] = (), warnings: Sequence[str] = ()
) -> str:
    """Return warnings, findings and all tables in Markdown."""
    said = (*(warnings or found.warnings), *findings(found), *pilot_findings(pilots))
    parts = [f"- {sentence}" for sentence in said]
    parts += [f"- failed: {cells}: {_brief(error)}" for cells, error in failures(found)]
    for header, rows, note in (
        (EARNED, earned_rows(found), _EARNED_NOTE),
        (DIFFERENCES, difference_rows(found), _GAPS_NOTE),
        *([(GRADIENTS, pilot_rows(pilots), _PILOT_NOTE)] * bool(pilots)),
    ):
        lines = [header, tuple("---" for _ in header), *rows]
        escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
        parts += ["", *("| " + " | ".join(line) + " |" for line in escaped), "", note]
    return "\n".join(parts) + "\n"


def _brief(error: str) -> str:
    """Return type and message of a traceback without its lines."""
    lines = error.splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith("  ")]
    said = lines[frames[-1] + 1 :] if frames else []
    return " ".join(said or lines[-1:])


def gradients_csv(pilots: Sequence[Mapping[str, Any]]) -> str:
    """Return the table GRADIENTS for other programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([GRADIENTS, *pilot_rows(pilots)])
    return text.getvalue()


def csv_table(found: Comparison) -> str:
    """Return one line a row and metric, numbers unrounded, for other programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("domain", "noise", "method", "budget", "seeds", "quantity", "mean", "low", "high", "p")
    writer.writerow(names)
    for row in found.rows:
        key = (row.domain, row.noise, row.method, row.budget, len(row.seeds))
        quantities: dict[str, tuple[Estimate | None, float]] = {
            **{name: (value, float("nan")) for name, value in row.metrics.items()},
            "interquartile_mean": (row.iqm, float("nan")),
            "over_untrained": (row.over_untrained, float("nan")),
            "over_full": (row.over_full, row.p_full),
            "to_best": (row.to_best, row.p_best),
            "beats_full": (row.beats_full, float("nan")),
        }
        for name, (value, p_value) in quantities.items():
            if value is not None and not math.isnan(value.mean):
                numbers = (value.mean, value.low, value.high, p_value)
                cells = ("" if math.isnan(number) else repr(float(number)) for number in numbers)
                writer.writerow((*key, name, *cells))
    return text.getvalue()


def facts(found: Comparison) -> list[tuple[str, str]]:
    """Return under which conditions the cells were made."""
    record = found.records[0]
    versions = record.made_with.get("versions") or {}
    return [
        ("cells", str(len(found.records))),
        *((name, _setting(value)) for name, value in record.settings.items() if name != "weights"),
        ("weights", str(record.settings.get("weights", ""))),
        ("git commit", str(record.made_with.get("git_commit"))),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("hardware", json.dumps(record.made_with.get("hardware"))),
    ]


def _setting(value: Any) -> str:
    return "each method's default" if value is None else str(value)


def dialogues(found: Comparison) -> Iterator[page.Dialogue]:
    """Yield the held-out dialogues of all complete cells with what each line is credited with."""
    for record in found.records:
        if record.result is not None:
            yield from _dialogues(record, world_name(_world(record), found.worlds))


def _dialogues(record: CellRecord, world: str) -> Iterator[page.Dialogue]:
    spoken = list(_spoken(record.folder))
    if not spoken:
        return
    turns = max(len(dialogue["rewards"]) for dialogue in spoken)
    shape = (len(spoken), turns)
    reward_BT, alive_BT = np.zeros(shape), np.zeros(shape, dtype=bool)
    for b, dialogue in enumerate(spoken):
        rewards = [float("nan") if r is None else r for r in dialogue["rewards"]]
        reward_BT[b, : len(rewards)], alive_BT[b, : len(rewards)] = rewards, True
    credited_BT, advantage_BT = _credited(record, reward_BT, alive_BT)
    cell = record.cell
    for b, dialogue in enumerate(spoken):
        system, lines = _lines(dialogue, credited_BT[b], advantage_BT[b])
        yield page.Dialogue(
            domain=world,
            method=cell.method,
            budget=cell.budget,
            seed=cell.seed,
            persona=str(dialogue.get("persona", "")),
            group=str(dialogue.get("group", "")),
            system=system,
            lines=lines,
        )


def _spoken(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the dialogues of a cell that are whole: a reward for each line of the agent."""
    try:
        for dialogue in read_transcripts(folder):
            own = [m for m in dialogue.get("messages", ()) if m.get("role") == "assistant"]
            if own and len(own) == len(dialogue.get("rewards", ())):
                yield dialogue
    except (FileNotFoundError, ValueError):
        return


def _credited(
    record: CellRecord, reward_BT: np.ndarray, alive_BT: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return each line's partial return and its distance from the mean at that turn; NaN = none."""
    credit = _credit(record.cell.method)
    nothing_BT = np.full(reward_BT.shape, np.nan)
    if credit is None or record.result is None:
        return nothing_BT, nothing_BT
    try:
        weight_TT = credit.weights(reward_BT.shape[1], record.result.get("boundaries"))
    except ValueError:
        return nothing_BT, nothing_BT
    scorable_BT = ~np.isnan(reward_BT)
    return_BT = partial_returns(reward_BT, weight_TT, alive_BT)
    advantage_BT = advantages(
        return_BT,
        baseline="batch_mean",
        group_B=np.arange(len(reward_BT)),
        alive_BT=alive_BT,
        scorable_BT=scorable_BT,
    )
    kept_BT = alive_BT & scorable_BT
    return np.where(kept_BT, return_BT, np.nan), np.where(kept_BT, advantage_BT, np.nan)


def _credit(method: str) -> Credit | None:
    """Return the method's credit; None if it has none or its class is not at hand."""
    try:
        return parse_method(method).credit
    except ValueError:
        return None


def _lines(
    dialogue: Mapping[str, Any], credited_T: np.ndarray, advantage_T: np.ndarray
) -> tuple[str, list[page.Line]]:
    """Return (system message, the other messages)."""
    system, lines, turn = "", [], 0
    reasons = dialogue.get("reasons") or []
    for message in dialogue["messages"]:
        if message["role"] == "system":
            system = message["content"]
        elif message["role"] == "user":
            lines.append(page.Line("partner", message["content"]))
        else:
            parts = dialogue.get("reward_parts", {})
            lines.append(
                page.Line(
                    "agent",
                    message["content"],
                    reward=dialogue["rewards"][turn],
                    reason=reasons[turn] if turn < len(reasons) else "",
                    parts={name: values[turn] for name, values in parts.items()},
                    credited=_or_none(credited_T[turn]),
                    advantage=_or_none(advantage_T[turn]),
                )
            )
            turn += 1
    return system, lines


def _world(record: CellRecord) -> World:
    return (record.cell.domain, record.cell.noise)


def _name(row: Row, found: Comparison) -> tuple[str, str, str]:
    dialogues = f"{row.budget:,}" if row.budget else ""
    return world_name((row.domain, row.noise), found.worlds), row.method, dialogues


def _seeds(row: Row) -> str:
    return f"{len(row.seeds)} ({row.missing} missing)" if row.missing else str(len(row.seeds))


def _shown(value: Estimate | None, spec: str = ".3f") -> str:
    return "" if value is None or math.isnan(value.mean) else format(value, spec)


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< .001" if value < 0.001 else f"{value:.3f}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
