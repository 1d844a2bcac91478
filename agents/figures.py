"""Drawings of a comparison and of diagnostics; the only file that knows matplotlib.

Every function returns a matplotlib Figure with one panel a world (a domain and its noise):
`savefig` writes it as PNG, PDF or SVG. Its label is its title, which pages and papers set
themselves. Methods keep their colour and marker through all figures of
a comparison; both tell them apart, and the colours are Okabe and Ito's, for colour-blind readers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .credit import parse_credit
from .methods import UNTRAINED
from .results import CellRecord, Comparison, World, world_name
from .runs import read_metrics

_COLOURS = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2"),
    *("#999999", "#8C6D1F", "#4B0082"),
)
_MARKERS = "os^DvPX*<>"


Drawing = Figure
"""For files that hand figures on."""


def drift_figure(found: Comparison) -> Figure:
    """Return mean reward against the turn of the dialogue, under the largest budget: the drift."""

    def draw(axis: Axes, world: World, styles: Mapping[str, Any]) -> None:
        for method, records in _largest(found, world):
            reward_ST = [r.result["reward_T"] for r in records if r.result]
            turns = np.arange(1, max(map(len, reward_ST)) + 1)
            _line(axis, turns, _rows(reward_ST, len(turns)), label=method, **styles[method])
        axis.set(xlabel="turn of the dialogue")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _figure(found, draw, "mean reward", "Reward per turn on held-out personas")


def learning_figure(found: Comparison) -> Figure:
    """Return mean reward in training against dialogues learned from, under the largest budget."""

    def draw(axis: Axes, world: World, styles: Mapping[str, Any]) -> None:
        for method, records in _largest(found, world):
            if method == UNTRAINED:
                levels = [r.result["metrics"]["reward"]["mean"] for r in records if r.result]
                axis.axhline(np.mean(levels), color=_COLOURS[0], linestyle=":", label=method)
                continue
            rewards = []
            for record in records:
                rows = read_metrics(record.folder)
                name = "rollout/turn_rew_mean"
                rewards.append([row[name] for row in rows if name in row])
            if not any(rewards):
                continue
            longest = max(map(len, rewards))
            episodes = records[0].cell.budget / longest
            dialogues = episodes * np.arange(1, longest + 1)
            every = max(1, longest // 6)
            reward_SN = _rows(rewards, longest)
            _line(axis, dialogues, reward_SN, label=method, markevery=every, **styles[method])
        axis.set(xlabel="dialogues learned from")

    return _figure(found, draw, "mean reward in training", "Learning curves")


def data_size_figure(found: Comparison) -> Figure:
    """Return the held-out reward with its 95 % interval against the dialogues learned from."""

    def draw(axis: Axes, world: World, styles: Mapping[str, Any]) -> None:
        budgets = found.budgets(world)
        methods = _methods(found)
        for row in found.of(world):
            if row.method == UNTRAINED and row.seeds:
                axis.axhline(row.reward.mean, color=_COLOURS[0], linestyle=":", label=row.method)
        for number, method in enumerate(m for m in methods if m != UNTRAINED):
            rows = [row for row in found.of(world) if row.method == method and row.seeds]
            if not rows:
                continue
            # Beside each other, so that intervals can be read.
            place = [row.budget * 1.04 ** (number - len(methods) / 2) for row in rows]
            means = np.array([row.reward.mean for row in rows])
            below = np.nan_to_num([row.reward.mean - row.reward.low for row in rows])
            above = np.nan_to_num([row.reward.high - row.reward.mean for row in rows])
            style = {**styles[method], "capsize": 2, "elinewidth": 1}
            axis.errorbar(place, means, [below, above], label=method, **style)
        axis.set(xscale="log", xlabel="dialogues learned from")
        axis.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axis.minorticks_off()

    return _figure(found, draw, "mean reward per turn", "Reward against data, held-out personas")


def variance_figure(pilots: Sequence[Mapping[str, Any]]) -> Figure:
    """Return variance and direction of each credit's gradient against its window, see pilot.py."""
    figure = Figure(figsize=(4.2 * len(pilots), 6.4), layout="constrained")
    panels = figure.subplots(2, len(pilots), squeeze=False, sharex="col", sharey="row")
    for column, pilot in enumerate(pilots):
        found = [each for each in pilot["diagnoses"] if each["credit"] != "trajectory"]
        window = [each["window"] for each in found]
        above, below = panels[0][column], panels[1][column]
        _band(above, window, [each["variance"] for each in found], _COLOURS[6], "measured")
        bound = [each["bound"] for each in found]
        above.plot(window, bound, color=_COLOURS[4], linestyle="--", label="bound")
        above.set(yscale="log", title=_pilot_title(pilot))
        _band(below, window, [each["cosine"] for each in found], _COLOURS[3], "cosine to full")
        below.set(ylim=(-1.05, 1.05), xlabel="rewards a turn answers for")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    panels[0][0].set_ylabel("variance of the gradient")
    panels[1][0].set_ylabel("cosine to the full gradient")
    panels[0][0].legend(frameon=False)
    return _titled(figure, "Variance and direction against lookahead")


def dependence_figure(pilots: Sequence[Mapping[str, Any]], credits: Sequence[str]) -> Figure:
    """Return how the act at turn t moves the reward at turn u, above the matrix of a credit.

    Args:
        pilots: one column each.
        credits: which credit's matrix stands below each pilot's map.
    """
    maps = [np.array(pilot["dependence"]["strength_TT"]) for pilot in pilots]
    highest = max(float(np.nanmax(np.abs(value_TT))) for value_TT in maps)
    figure = Figure(figsize=(3.4 * len(maps) + 1, 6.6), layout="constrained")
    above, below = figure.subplots(2, len(maps), squeeze=False)
    columns = zip(above, below, maps, pilots, credits, strict=True)
    for upper, lower, strength_TT, pilot, credit in columns:
        effects = upper.imshow(strength_TT, cmap="PuOr", vmin=-highest, vmax=highest)
        upper.set_title(_pilot_title(pilot))
        weight_TT = parse_credit(credit).weights(len(strength_TT))
        weights = lower.imshow(weight_TT, cmap="cividis", vmin=0.0, vmax=1.0)
        lower.set_title(f"what {credit} keeps")
        for axis in (upper, lower):
            turns = np.arange(len(strength_TT))
            axis.set(xlabel="reward of turn", ylabel="act of turn")
            axis.set_xticks(turns, [str(t + 1) for t in turns])
            axis.set_yticks(turns, [str(t + 1) for t in turns])
    figure.colorbar(effects, ax=above, label="effect on the reward")
    figure.colorbar(weights, ax=below, label="weight of the reward")
    return _titled(figure, "Which act moves which reward")


def _titled(figure: Figure, title: str) -> Figure:
    """Name a figure for the page that shows it; the title is not drawn."""
    figure.set_label(title)
    return figure


def _pilot_title(pilot: Mapping[str, Any]) -> str:
    """Return domain and noise, and the model where it is not the bundled one."""
    config = pilot["config"]
    agent = "" if config["agent"] == "nano" else f"\n{'/'.join(Path(config['agent']).parts[-2:])}"
    return f"{config['domain']}, noise {config['noise']:g}{agent}"


def _band(
    axis: Axes, x: Sequence[float], found: Sequence[Mapping[str, float]], colour: str, label: str
) -> None:
    """Draw estimates with their intervals."""
    mean, low, high = (np.array([each[k] for each in found]) for k in ("mean", "low", "high"))
    axis.plot(x, mean, color=colour, marker="o", markersize=4, label=label)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def svg(drawing: Drawing) -> str:
    """Return the figure as SVG on a clear ground."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        drawing.savefig(text, format="svg", transparent=True)
    return text.getvalue()


def _methods(found: Comparison) -> list[str]:
    return list(dict.fromkeys(row.method for row in found.rows))


def _largest(found: Comparison, world: World) -> Iterable[tuple[str, list[CellRecord]]]:
    """Yield (method, its complete cells) of a world under its largest budget."""
    budget = max(found.budgets(world), default=0)
    for method in _methods(found):
        records = [
            record
            for record in found.records
            if (record.cell.domain, record.cell.noise) == world
            and record.cell.method == method
            and record.cell.budget in (0, budget)
            and record.result is not None
        ]
        if records:
            yield method, records


def _rows(values: Sequence[Sequence[float]], width: int) -> np.ndarray:
    """Return the seeds' series as one array, NaN after the end of a shorter one."""
    padded = [[*series, *[float("nan")] * (width - len(series))] for series in values]
    return np.array(padded, dtype=np.float64)


def _line(axis: Axes, x: np.ndarray, y_SX: np.ndarray, **style: Any) -> None:
    """Draw the mean over seeds, shaded from the lowest to the highest seed."""
    axis.plot(x, np.nanmean(y_SX, axis=0), **style)
    if len(y_SX) > 1:
        low, high = np.nanmin(y_SX, axis=0), np.nanmax(y_SX, axis=0)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _figure(
    found: Comparison,
    draw: Callable[[Axes, World, Mapping[str, Any]], None],
    ylabel: str,
    title: str,
) -> Figure:
    """Return a figure with one panel a world; the legend names what all panels show."""
    worlds = found.worlds
    columns = min(3, len(worlds))
    lines = -(-len(worlds) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines + 0.9), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    styles = {method: _style(number) for number, method in enumerate(_methods(found))}
    legend: dict[str, Any] = {}
    for axis, world in zip(panels, worlds, strict=False):
        draw(axis, world, styles)
        axis.set_title(world_name(world, found.worlds))
        axis.grid(alpha=0.3)
        legend |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    for axis in panels[len(worlds) :]:
        axis.set_visible(False)
    for axis in panels[::columns]:
        axis.set_ylabel(ylabel)
    shown = {method: legend[method] for method in styles if method in legend}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False)
    return _titled(figure, title)


def _style(number: int) -> dict[str, Any]:
    style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
    return {**style, "markersize": 4, "linestyle": ":" if number == 0 else "-"}
