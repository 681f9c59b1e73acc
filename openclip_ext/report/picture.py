"""The picture of `openclip-ext report`: differences to the first row, scores, and curves of what can be compared."""

import dataclasses
from typing import Any

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from openclip_ext.report.palette import row_style
from openclip_ext.report.tables import percent, title, wrapped

PANELS = 4  # metrics beside each other; what is beyond is in the JSON
CURVES_PER_ROW = 3
SMOOTHED = 100  # points of a drawn training curve: more would be noise
BANDS = 8  # rows with a band around their curve: more would hide each other
LABEL_WIDTH = 32
LABEL_LINES = 3
LONGEST = 1.0  # of an interval beyond the points, in ranges of the points: from two seeds it is far longer
CAPTION = (
    "Bars: 95 % intervals (arrows: they go on); differences are filled where theirs leaves out zero. "
    "Small dots: seeds. Curves: mean, and range over seeds."
)
OWN = "own objectives: heights do not compare"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A row of a panel: index of the group, values of its runs, their mean, and half its interval if there is one."""

    index: int
    values: list[float]
    mean: float
    interval: float | None


@dataclasses.dataclass(frozen=True)
class Curves:
    """A panel of curves.

    Attributes:
        heading: above it.
        part, x, y: which columns of a run.
        lines: by index of the group, positions and the mean, least and largest of its runs there.
    """

    heading: str
    part: str
    x: str
    y: str
    lines: dict[int, np.ndarray]


def draw_report(report: dict, path: str) -> None:
    """Write the picture as a PNG."""
    report_figure(report).savefig(path, dpi=120)


def report_figure(report: dict) -> Figure:
    """The picture of a report as `compare` makes it: one colour per group of runs.

    Above, differences to the first group, which decide; then scores; then curves, validation before training. A
    metric's panels stand in one column. There is no panel without points, and none whose lines are all the same.
    """
    groups, metrics = report["groups"], report["metrics"]
    curves = _validation_curves(groups, metrics) + _training_curves(groups)
    differing = [name for name in metrics if any(name in group["differences"] for group in groups)][:PANELS]
    scores = metrics[:PANELS] if len(groups) > 1 or not curves else []
    rows = [(names, draw) for names, draw in ((differing, _draw_differences), (scores, _draw_scores)) if names]
    count = -(-len(curves) // CURVES_PER_ROW)
    lines = max(_label(group).count("\n") for group in groups)
    heights = [1.1 + (0.33 + 0.1 * lines) * len(groups)] * len(rows) + [2.9] * count
    width = 2.4 + 3.1 * max([len(names) for names, _ in rows] + [min(CURVES_PER_ROW, len(curves))])
    figure = Figure(figsize=(max(9.0, width), sum(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for row, (names, draw) in enumerate(rows):
        for column, axes in enumerate(grid[row].subgridspec(1, len(names)).subplots(squeeze=False)[0]):
            draw(axes, report, names[column], labelled=column == 0)
    shares = np.array_split(np.arange(len(curves)), count) if count else []
    for row, share in enumerate(shares, start=len(rows)):
        for index, axes in zip(share, grid[row].subgridspec(1, len(share)).subplots(squeeze=False)[0], strict=True):
            _draw_curves(axes, curves[index], bands=len(groups) <= BANDS)
    handles = [Line2D([], [], **row_style(index), linewidth=2) for index in range(len(groups))]
    figure.legend(handles, [_label(group) for group in groups], title=CAPTION, loc="outside lower center",
                  ncols=min(4, len(groups)), fontsize="small", title_fontsize="small", frameon=False)  # fmt: skip
    return figure


def _factor(metric: str) -> int:
    return 100 if percent(metric) else 1


def _draw_differences(axes: Axes, report: dict, metric: str, *, labelled: bool) -> None:
    """What each group has more than the first, zero, and where chance would be."""
    first, factor = report["groups"][0], _factor(metric)
    estimates = []
    for index, group in enumerate(report["groups"]):
        cell = group["differences"].get(metric)
        if cell and np.isfinite(cell["mean"]):
            values = [factor * value for value in cell["values"]]
            estimates.append(Estimate(index, values, factor * cell["mean"], _times(factor, cell["interval"])))
    base, chance = first["scores"].get(metric), report["chance"].get(metric)
    known = chance is not None and base is not None
    _draw_estimates(axes, estimates, zero=0.0, chance=factor * (chance - base["mean"]) if known else None)
    axes.set_title(title(metric), fontweight="bold")
    axes.set_xlabel(f"difference to {_short(first['label'])}")
    _label_rows(axes, report["groups"], labelled, skip=1)


def _draw_scores(axes: Axes, report: dict, metric: str, *, labelled: bool) -> None:
    """Each group's mean, its runs, and where chance is."""
    factor, estimates = _factor(metric), []
    for index, group in enumerate(report["groups"]):
        cell = group["scores"].get(metric)
        values = [factor * run["scores"][metric] for run in group["runs"] if metric in run["scores"]]
        if cell and np.isfinite(cell["mean"]):
            estimates.append(Estimate(index, values, factor * cell["mean"], _times(factor, cell["interval"])))
    _draw_estimates(axes, estimates, chance=_times(factor, report["chance"].get(metric)))
    axes.set_title(title(metric))
    axes.set_xlabel("score at the end")
    _label_rows(axes, report["groups"], labelled)


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _draw_estimates(
    axes: Axes, estimates: list[Estimate], *, zero: float | None = None, chance: float | None = None
) -> None:
    """Points with their intervals, one line of the panel for each; an interval that leaves out `zero` is filled."""
    points = [zero] * (zero is not None) + [value for row in estimates for value in (row.mean, *row.values)]
    low, high = _limits(np.array(points), estimates)
    for row in estimates:
        color, half = row_style(row.index)["color"], row.interval or 0.0
        ends = row.mean - half, row.mean + half
        clear = zero is None or (row.interval is not None and not ends[0] <= zero <= ends[1])
        axes.plot(np.clip(ends, low, high), [row.index] * 2, color=color, linewidth=2.2, solid_capstyle="butt")
        axes.scatter(row.values, [row.index + 0.22] * len(row.values), s=9, color=color, alpha=0.55, linewidths=0)
        axes.plot(row.mean, row.index, marker="o", markersize=7, color=color, mfc=color if clear else "white", mew=1.8)
        inside = 0.012 * (high - low)
        for cut, edge, marker in ((ends[0] < low, low + inside, "<"), (ends[1] > high, high - inside, ">")):
            if cut:
                axes.plot(edge, row.index, marker=marker, color=color, markersize=6)
    if zero is not None:
        axes.axvline(zero, color="0.2", linewidth=1.1, zorder=0)
    if chance is not None:
        low, high = _draw_chance(axes, chance, low, high)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.grid(axis="x", alpha=0.25)


def _limits(points: np.ndarray, estimates: list[Estimate]) -> tuple[float, float]:
    """Around the points and their intervals, of which as much as `LONGEST` allows."""
    points = points[np.isfinite(points)]
    if not len(points):
        return -1.0, 1.0
    low, high = points.min(), points.max()
    span = (high - low) or 0.1 * abs(high) or 1.0
    halves = [(row.mean, row.interval) for row in estimates if row.interval is not None and np.isfinite(row.interval)]
    lowest = min([low, *(mean - half for mean, half in halves)])
    highest = max([high, *(mean + half for mean, half in halves)])
    return (
        float(max(lowest, low - LONGEST * span) - 0.08 * span), float(min(highest, high + LONGEST * span) + 0.08 * span)
    )  # fmt: skip


def _draw_chance(axes: Axes, chance: float, low: float, high: float) -> tuple[float, float]:
    """A dashed line, for which the limits give way a little; where it is far outside, a word at the edge."""
    reach = 0.35 * (high - low)
    style: dict[str, Any] = {
        "color": "0.45",
        "fontsize": "x-small",
        "va": "top",
        "transform": axes.get_xaxis_transform(),
    }
    if low - reach <= chance <= high + reach:
        low, high = min(low, chance - 0.1 * reach), max(high, chance + 0.1 * reach)
        axes.axvline(chance, color="0.45", linestyle="--", linewidth=1.1, zorder=0)
        left = chance > (low + high) / 2
        axes.text(chance, 0.99, "chance " if left else " chance", ha="right" if left else "left", **style)
    else:
        number = f"{chance:.3g}".replace("-", "−")
        below = chance < low
        words = f" ◂ chance {number}" if below else f"chance {number} ▸ "
        axes.text(low if below else high, 0.99, words, ha="left" if below else "right", **style)
    return low, high


def _label_rows(axes: Axes, groups: list[dict], labelled: bool, skip: int = 0) -> None:
    labels = [_label(group) if labelled else "" for group in groups[skip:]]
    axes.set_yticks(range(skip, len(groups)), labels, fontsize="small")
    axes.set_ylim(len(groups) - 0.4, skip - 0.9)


def _label(group: dict) -> str:
    return wrapped(group["label"], LABEL_WIDTH, lines=LABEL_LINES)


def _short(label: str) -> str:
    return label if len(label) <= LABEL_WIDTH else label[: LABEL_WIDTH - 1] + "…"


def _validation_curves(groups: list[dict], metrics: list[str]) -> list[Curves]:
    """Of each metric that some run has been evaluated on more than once."""
    everyone = range(len(groups))
    panels = [
        Curves(f"{title(name)} over epochs", "validation", "epoch", name,
               _lines(groups, everyone, "validation", "epoch", name, factor=_factor(name)))
        for name in metrics
    ]  # fmt: skip
    return _worth_drawing([panel for panel in panels if any(line.shape[1] > 1 for line in panel.lines.values())])


def _training_curves(groups: list[dict]) -> list[Curves]:
    """A panel per objective that several groups have, and one that says so for those that have their own; learning
    rates where they differ."""
    names = {name: None for group in groups for run in group["runs"] for name in run["training"]}
    losses = [name for name in names if name.endswith("_loss")] or ["loss"]
    panels = []
    for name in [*losses, "lr"]:
        having = [index for index, group in enumerate(groups) if any(name in run["training"] for run in group["runs"])]
        for heading, members in _by_target(groups, having, name) if name != "lr" else [("learning rate", having)]:
            panels.append(Curves(heading, "training", "step", name, _lines(groups, members, "training", "step", name)))
    return _worth_drawing(panels)


def _by_target(groups: list[dict], having: list[int], name: str) -> list[tuple[str, list[int]]]:
    """Groups whose column `name` is the same quantity, with a heading; those that are alone in theirs, together."""
    by_target: dict[object, list[int]] = {}
    for index in having:
        by_target.setdefault(groups[index]["targets"].get(name, index), []).append(index)
    quantity = name.replace("_", " ")
    several = {target: members for target, members in by_target.items() if len(members) > 1}
    alone = [index for members in by_target.values() if len(members) == 1 for index in members]
    panels = [
        (f"training: {quantity}" + (f"\nof {target}" if len(by_target) > 1 else ""), members)
        for target, members in several.items()
    ]
    if len(alone) == 1:
        target = groups[alone[0]]["targets"].get(name)
        panels.append((f"training: {quantity}" + (f"\nof {target}" if target and len(groups) > 1 else ""), alone))
    elif alone:
        panels.append((f"training: {quantity}\n{OWN}", alone))
    return panels


def _worth_drawing(panels: list[Curves]) -> list[Curves]:
    """Those with lines that are not all the same."""
    return [panel for panel in panels if panel.lines and (len(panel.lines) == 1 or not _all_the_same(panel))]


def _all_the_same(panel: Curves) -> bool:
    first, *others = panel.lines.values()
    return all(line.shape == first.shape and np.allclose(line, first, rtol=1e-6) for line in others)


def _lines(groups: list[dict], members, part: str, x: str, y: str, *, factor: float = 1) -> dict[int, np.ndarray]:
    """By group, (4, points): positions, and the mean, least and largest value of its runs there."""
    lines = {}
    for index in members:
        points: dict[float, list[float]] = {}
        for run in groups[index]["runs"]:
            for position, value in zip(run[part].get(x, ()), run[part].get(y, ()), strict=False):
                if np.isfinite(value):
                    points.setdefault(position, []).append(factor * value)
        if points:
            rows = [(position, np.mean(found), min(found), max(found)) for position, found in sorted(points.items())]
            lines[index] = np.array(rows).T
    return lines


def _draw_curves(axes: Axes, panel: Curves, *, bands: bool) -> None:
    training = panel.part == "training"
    for index, line in panel.lines.items():
        positions, mean, low, high = _smooth(line) if training else line
        axes.plot(positions, mean, linewidth=1.4, marker="" if training else ".", **row_style(index))
        if bands:
            axes.fill_between(positions, low, high, color=row_style(index)["color"], alpha=0.13, linewidth=0)
    axes.set_title("\n".join(wrapped(line, 48) for line in panel.heading.split("\n")), fontsize="medium")
    axes.set_xlabel("optimizer step" if training else "epoch")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    if panel.y == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.grid(alpha=0.25)


def _smooth(line: np.ndarray) -> np.ndarray:
    """Means over windows, where there are more points than are drawn."""
    if line.shape[1] <= SMOOTHED:
        return line
    return np.stack([window.mean(1) for window in np.array_split(line, SMOOTHED, axis=1)], axis=1)
