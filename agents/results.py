"""Run folders of comparisons -> evidence: what every method earned, and what separates them.

    found = read_comparison("runs/compare")
    for row in found.rows:
        print(row.domain, row.method, row.budget, row.metrics["reward"], row.over_full)

A row is one method under one budget in one world (a domain and its noise), over all seeds. Nothing
is dropped silently: cells that failed, stopped or never began, and all that should not be
mixed, are in `warnings`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .compare import PLAN, Cell, planned_cells
from .methods import UNTRAINED
from .runs import ERROR, MANIFEST, RESULT
from .statistics import (
    CrossedMean,
    Estimate,
    crossed_mean,
    holm,
    interquartile_mean,
    probability_of_improvement,
)

World = tuple[str, float]
"""A domain and its noise."""
Key = tuple[str, float, int, str]
"""Domain, noise, budget and method: what makes a row."""

_CELL = ("domain", "method", "budget", "seed", "noise")
_NONE = Estimate(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class CellRecord:
    """One cell as its run folder has it.

    Attributes:
        result: as run_cell returned it; None if it failed or is not complete.
        error: why it failed, a traceback; "" if it did not.
    """

    cell: Cell
    folder: Path
    settings: Mapping[str, Any]
    made_with: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: str

    @property
    def state(self) -> str:
        """Return "complete", "failed", "damaged", "unfinished" or "not begun"."""
        if self.result is not None:
            return "complete"
        if self.error:
            return "failed"
        if self.made_with:
            return "damaged" if (self.folder / RESULT).exists() else "unfinished"
        return "damaged" if self.folder.exists() else "not begun"


@dataclass(frozen=True)
class Row:
    """One method under one budget in one world, over its seeds.

    Attributes:
        seeds: of the complete cells.
        metrics: mean and interval of every metric, over seeds and held-out personas.
        iqm: interquartile mean of the reward.
        over_untrained, over_full: paired difference of the reward to the untrained model and to
            full planning under the same budget; None where there is nothing to pair with.
        to_best: the same to the method that earned most under this budget (on the seeds and
            personas that all of them have); None for itself.
        beats_full: how likely a run of it beats one of full planning on the same persona.
        num_personas: who has a reward with every seed; means are over these.
        p_full, p_best: p-values of the two differences after Holm's correction for all methods of
            this world and budget.
        missing: cells that failed, are damaged or unfinished, or were planned and not begun.
    """

    domain: str
    noise: float
    method: str
    budget: int
    seeds: tuple[int, ...]
    metrics: Mapping[str, CrossedMean]
    iqm: Estimate
    over_untrained: CrossedMean | None = None
    over_full: CrossedMean | None = None
    to_best: CrossedMean | None = None
    beats_full: Estimate = _NONE
    p_full: float = float("nan")
    p_best: float = float("nan")
    missing: int = 0
    num_personas: int = 0

    @property
    def reward(self) -> CrossedMean:
        """Mean reward per turn."""
        return self.metrics["reward"]


@dataclass(frozen=True)
class Comparison:
    """All cells of a comparison and what follows from them."""

    records: Sequence[CellRecord]
    rows: Sequence[Row] = field(init=False)
    warnings: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", _rows(self.records))
        object.__setattr__(self, "warnings", _warnings(self.records, self.rows))

    @property
    def worlds(self) -> list[World]:
        """Domains with their noise, in the order of the folders."""
        return list(dict.fromkeys((r.cell.domain, r.cell.noise) for r in self.records))

    @property
    def failed(self) -> list[CellRecord]:
        """Cells that failed."""
        return [record for record in self.records if record.state == "failed"]

    def of(self, world: World, budget: int | None = None) -> list[Row]:
        """Return the rows of a world, under one budget with the untrained model, or under all."""
        return [
            row
            for row in self.rows
            if (row.domain, row.noise) == world and (budget is None or row.budget in (0, budget))
        ]

    def budgets(self, world: World) -> list[int]:
        """Return the budgets of a world, smallest first."""
        return sorted({row.budget for row in self.of(world) if row.budget})


def world_name(world: World, among: Sequence[World] = ()) -> str:
    """Return the domain, with its noise where `among` holds the domain with several."""
    domain, noise = world
    alone = len({other for name, other in among if name == domain}) < 2
    return domain if alone else f"{domain}, noise {noise:g}"


def read_comparison(*runs: str | Path) -> Comparison:
    """Read one or several run folders of `ppg compare` (or `ppg demo`) as one comparison.

    Raises:
        FileNotFoundError: there are no cells in a folder.
        ValueError: the cells were not made under the same conditions, or one is there twice.
    """
    if not runs:
        raise ValueError("Name the run folder of a comparison, such as runs/compare.")
    records = [record for run in runs for record in _read_cells(Path(run))]
    _refuse_mixtures(records)
    return Comparison(_in_order(records))


def _read_cells(run: Path) -> list[CellRecord]:
    found = []
    planned = {cell.folder(run): cell for cell in planned_cells(run)}
    for file in sorted(run.rglob(MANIFEST)):
        manifest = _json(file)
        if manifest is None and file.parent in planned:
            continue  # counted as damaged below
        if manifest is None:
            raise ValueError(f"{file} is damaged; remove its folder.")
        settings = manifest.get("settings", {})
        if not all(name in settings for name in _CELL):
            continue  # a run of `ppg train`, say
        error = file.with_name(ERROR)
        found.append(
            CellRecord(
                cell=Cell(**{name: settings[name] for name in _CELL}),
                folder=file.parent,
                settings={k: v for k, v in settings.items() if k not in _CELL},
                made_with={k: v for k, v in manifest.items() if k not in ("settings", "data")},
                result=_result(file.with_name(RESULT)),
                error=_text(error).strip() if error.exists() else "",
            )
        )
    if not found:
        one = " It holds a training run, whose curves are in metrics.jsonl."
        raise FileNotFoundError(
            f"There is no comparison in {run}; make one with ppg compare."
            f"{one if (run / MANIFEST).exists() else ''}"
        )
    begun = {record.cell for record in found}
    return found + [
        CellRecord(cell, folder, found[0].settings, {}, None, "")
        for folder, cell in planned.items()
        if cell not in begun
    ]


def _json(file: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is none or it is half written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _result(file: Path) -> dict[str, Any] | None:
    """Return a cell's result; None if there is none or it lacks what a report is made of."""
    found = _json(file) or {}
    parts = (found.get("by_persona"), found.get("metrics"), found.get("reward_T"))
    whole = isinstance(parts[0], dict) and isinstance(parts[0].get("reward"), dict)
    return found if whole and isinstance(parts[1], dict) and isinstance(parts[2], list) else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _refuse_mixtures(records: Sequence[CellRecord]) -> None:
    first = records[0]
    for record in records[1:]:
        for name in sorted(first.settings.keys() | record.settings.keys()):
            there, here = first.settings.get(name), record.settings.get(name)
            if there != here:
                raise ValueError(
                    f"{record.folder} was made with {name}={here!r}, {first.folder} with "
                    f"{there!r}: that is no fair comparison. Report them apart."
                )
    seen: dict[Cell, Path] = {}
    for record in records:
        if record.cell in seen:
            raise ValueError(
                f"{record.cell} is in {seen[record.cell]} and in {record.folder}; name one of them."
            )
        seen[record.cell] = record.folder


def _in_order(records: Iterable[CellRecord]) -> list[CellRecord]:
    """Return the cells world by world: untrained first, then by budget, seeds last."""
    return sorted(
        records, key=lambda r: (r.cell.domain, r.cell.noise, r.cell.budget, _rank(r), r.cell.seed)
    )


def _rank(record: CellRecord) -> tuple[int, str]:
    """Return where a method stands in a table: baselines, then by how far it looks ahead."""
    order = ("untrained", "ppo", "trajectory", "greedy", "kstep", "segment", "discounted", "full")
    head = record.cell.method.partition(":")[0]
    return (order.index(head) if head in order else len(order), record.cell.method)


def values(records: Iterable[CellRecord], metric: str) -> dict[int, dict[str, float]]:
    """Return {seed: {persona: mean}} of the complete cells, without personas that have none."""
    return {
        record.cell.seed: {
            persona: mean
            for persona, mean in record.result["by_persona"][metric].items()
            if mean is not None and not math.isnan(mean)
        }
        for record in records
        if record.result is not None and metric in record.result["by_persona"]
    }


def _rows(records: Sequence[CellRecord]) -> list[Row]:
    groups: dict[Key, list[CellRecord]] = {}
    for record in records:
        cell = record.cell
        groups.setdefault((cell.domain, cell.noise, cell.budget, cell.method), []).append(record)
    rewards = {key: values(group, "reward") for key, group in groups.items()}
    plain = {key: _row(key, group) for key, group in groups.items()}
    rows = []
    for key, row in plain.items():
        world_budget = key[:3]
        rivals = [k for k in groups if k[:3] == world_budget and len(plain[k].seeds)]
        best = _best({k: rewards[k] for k in rivals})
        full, untrained = (*world_budget, "full"), (*key[:2], 0, UNTRAINED)
        others: dict[str, Any] = {}
        if row.seeds:
            others["over_untrained"] = _difference(key, untrained, rewards)
            others["over_full"] = _difference(key, full, rewards)
            others["to_best"] = None if best is None else _difference(key, best, rewards)
            if others["over_full"] is not None:
                first_SP, second_SP = _together(rewards[key], rewards[full], paired=False)
                others["beats_full"] = probability_of_improvement(first_SP, second_SP)
        rows.append(replace(row, **others))
    return _corrected(rows)


def _best(rewards: Mapping[Key, dict[int, dict[str, float]]]) -> Key | None:
    """Return who earned most on the seeds and personas that all have, else on their own."""
    if not rewards:
        return None
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in rewards.values())))
    people = sorted(set.intersection(*(_people(by_seed) for by_seed in rewards.values())))

    def mean(by_seed: dict[int, dict[str, float]]) -> float:
        shared = _table(by_seed, seeds, people) if seeds and people else _matrix(by_seed)
        return float(shared.mean())

    return max(rewards, key=lambda key: mean(rewards[key]))


def _row(key: Key, group: Sequence[CellRecord]) -> Row:
    domain, noise, budget, method = key
    complete = [record for record in group if record.result is not None]
    names = complete[0].result["by_persona"] if complete and complete[0].result else {}
    metrics = {name: crossed_mean(_matrix(values(complete, name))) for name in names}
    return Row(
        domain,
        noise,
        method,
        budget,
        seeds=tuple(record.cell.seed for record in complete),
        metrics=metrics,
        iqm=interquartile_mean(_matrix(values(complete, "reward"))) if complete else _NONE,
        missing=len(group) - len(complete),
        num_personas=len(_people(values(complete, "reward"))),
    )


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with p-values that mind how many methods are compared."""
    found = list(rows)
    for which, name in (("over_full", "p_full"), ("to_best", "p_best")):
        families: dict[tuple[str, float, int], list[int]] = {}
        for i, row in enumerate(rows):
            if getattr(row, which) is not None:
                families.setdefault((row.domain, row.noise, row.budget), []).append(i)
        for members in families.values():
            adjusted = holm([getattr(rows[i], which).p_value for i in members])
            for i, p_value in zip(members, adjusted, strict=True):
                changed: dict[str, Any] = {name: p_value}
                found[i] = replace(found[i], **changed)
    return found


def _difference(
    first: Key, second: Key, rewards: Mapping[Key, dict[int, dict[str, float]]]
) -> CrossedMean | None:
    if first == second or not rewards.get(second):
        return None
    first_SP, second_SP = _together(rewards[first], rewards[second], paired=True)
    return crossed_mean(first_SP - second_SP) if first_SP.size else None


def _together(
    first: Mapping[int, Mapping[str, float]],
    second: Mapping[int, Mapping[str, float]],
    paired: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return both as seeds x the personas they share; `paired`: also only the seeds they share."""
    people = sorted(_people(first) & _people(second))
    seeds = [sorted(first), sorted(second)]
    if paired:
        seeds = [sorted(first.keys() & second.keys())] * 2
    return _table(first, seeds[0], people), _table(second, seeds[1], people)


def _matrix(found: Mapping[int, Mapping[str, float]]) -> np.ndarray:
    return _table(found, sorted(found), sorted(_people(found)))


def _people(found: Mapping[int, Mapping[str, float]]) -> set[str]:
    """Return the personas that every seed has."""
    return set.intersection(*(set(by_persona) for by_persona in found.values())) if found else set()


def _table(
    found: Mapping[int, Mapping[str, float]], seeds: Sequence[int], people: Sequence[str]
) -> np.ndarray:
    rows = [[found[seed][person] for person in people] for seed in seeds]
    return np.array(rows, dtype=np.float64).reshape(len(seeds), len(people))


def _warnings(records: Sequence[CellRecord], rows: Sequence[Row]) -> list[str]:
    found = []
    for state, remedy in (
        ("failed", "their errors are below; the same command tries them again"),
        ("damaged", "the same command does them again"),
        ("unfinished", "the same command goes on with them"),
        ("not begun", f"the same command begins them ({PLAN} lists them)"),
    ):
        number = sum(record.state == state for record in records)
        if number:
            found.append(f"{number} of {len(records)} cells {state}: {remedy}.")
    if any(len(row.seeds) == 1 for row in rows):
        found.append(
            "Some methods have one training seed: no interval, since the luck of training is not "
            "known. Compare with more seeds."
        )
    if any(len(row.seeds) == 2 for row in rows):
        found.append("Two training seeds give rough intervals: they hold .88, not .95. Use more.")
    groups: dict[tuple[str, float, int], set[tuple[int, ...]]] = {}
    for row in rows:
        if row.seeds:
            groups.setdefault((row.domain, row.noise, row.budget), set()).add(row.seeds)
    if any(len(seeds) > 1 for seeds in groups.values()):
        found.append("Methods differ in their seeds; differences are over the seeds both have.")
    for row in rows:
        most = max(r.num_personas for r in rows if (r.domain, r.noise) == (row.domain, row.noise))
        if row.seeds and row.num_personas < most:
            found.append(
                f"{row.domain} {row.method} {row.budget}: only {row.num_personas} of {most} "
                "personas have a reward with every seed; its means are over these, and do not "
                "compare with those over all. Differences are over the personas both have."
            )
    made_with = {
        "git commits": [made.get("git_commit") for r in records if (made := r.made_with)],
        "versions": [made.get("versions") for r in records if (made := r.made_with)],
    }
    for name, each in made_with.items():
        kinds = list(dict.fromkeys(json.dumps(one, sort_keys=True) for one in each))
        if len(kinds) > 1:
            found.append(f"The cells were made with different {name}: {' and '.join(kinds)}.")
    return found
