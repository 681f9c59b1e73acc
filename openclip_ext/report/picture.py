"""The picture of `openclip-ext report`: training above, validation over epochs below it, last the scores at the end."""

import textwrap

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from openclip_ext.report.tables import percent, title

PANELS = 4  # per row; what is beyond is in the JSON
SMOOTHED = 100  # points of a drawn training curve: more would be noise
BANDS = 8  # groups with a band around their curve: more would hide each other
LABEL_WIDTH = 28
MARGIN = 0.6  # of the axis of scores, in ranges of the scores: an interval from two seeds is longer than that
CAPTION = "curves: mean and range over seeds; scores: dots are runs, bars 95 % intervals (cut at the frame)"


def draw_report(report: dict, path: str) -> None:
    """Write a PNG: one colour per group of runs; a curve is the mean over its runs, its band their range.

    Args:
        report: as `compare` makes it.
        path: of the PNG.
    """
    groups = report["groups"]
    curves = _with_curves(groups, report["metrics"])
    rows = [
        (_draw_training, _training_columns(groups)),
        (_draw_validation, curves),
        (_draw_scores, report["metrics"][:PANELS] if len(groups) > 1 or not curves else []),
    ]
    rows = [(draw, names) for draw, names in rows if names]
    width = max(len(names) for _, names in rows)
    heights = [1.2 + 0.3 * len(groups) if draw is _draw_scores else 3.2 for draw, _ in rows]
    figure = Figure(figsize=(max(2, width) * 3.7 + 2.6, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(rows), width, height_ratios=heights)
    for row, (draw, names) in enumerate(rows):
        for column, name in enumerate(names):
            draw(figure.add_subplot(grid[row, column]), groups, name, column == 0)
    handles = [Line2D([], [], **_style(index), linewidth=2) for index in range(len(groups))]
    labels = [_wrap(group["label"]) for group in groups]
    figure.legend(handles, labels, loc="outside right upper", fontsize="small", frameon=False)
    figure.supxlabel(CAPTION, fontsize="small")
    figure.savefig(path, dpi=120)


def _style(index: int) -> dict:
    """Ten colours, then the same ten dashed, and so on."""
    return {"color": matplotlib.colormaps["tab10"](index % 10), "linestyle": ("-", "--", ":")[index // 10 % 3]}


def _wrap(label: str) -> str:
    lines = textwrap.wrap(label.replace("+", " +"), LABEL_WIDTH, max_lines=3, placeholder="…") or [label]
    return "\n".join(lines)


def _training_columns(groups: list[dict]) -> list[str]:
    """The loss, its terms where a run has several, and the learning rate."""
    names = {name: None for group in groups for run in group["runs"] for name in run["training"]}
    terms = [name for name in names if name.endswith("_loss")]
    several = any(sum(name.endswith("_loss") for name in run["training"]) > 1 for g in groups for run in g["runs"])
    wanted = ["loss", *(terms[: PANELS - 2] if several else []), "lr"]
    return [name for name in wanted if name in names]


def _with_curves(groups: list[dict], metrics: list[str]) -> list[str]:
    """Metrics that some run has been evaluated on more than once."""
    runs = [run for group in groups for run in group["runs"]]
    return [name for name in metrics if any(len(run["validation"].get(name, ())) > 1 for run in runs)][:PANELS]


def _draw_training(axes: Axes, groups: list[dict], name: str, first: bool) -> None:
    titles = {"loss": "training loss", "lr": "learning rate"}
    _draw_curves(axes, groups, "training", "step", name, limit=SMOOTHED)
    axes.set(title=titles.get(name, f"training: {name}"), xlabel="optimizer step")
    if name == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_validation(axes: Axes, groups: list[dict], name: str, first: bool) -> None:
    _draw_curves(axes, groups, "validation", "epoch", name, factor=100 if percent(name) else 1, marker=".")
    axes.set(title=title(name), xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_curves(
    axes: Axes, groups: list[dict], part: str, x: str, name: str, *, factor: float = 1, limit: int = 0, marker: str = ""
) -> None:
    """`name` over `x`, both columns of `part` of each run; means over windows where there are more than `limit`."""
    for index, group in enumerate(groups):
        points: dict[float, list[float]] = {}
        for run in group["runs"]:
            columns = run[part]
            for position, value in zip(columns.get(x, ()), columns.get(name, ()), strict=False):
                if np.isfinite(value):
                    points.setdefault(position, []).append(factor * value)
        if not points:
            continue
        positions = np.array(sorted(points))
        curves = [np.array([reduce(points[p]) for p in positions]) for reduce in (np.mean, min, max)]
        positions, mean, low, high = (_smooth(values, limit) for values in (positions, *curves))
        axes.plot(positions, mean, linewidth=1.4, marker=marker, **_style(index))
        if len(group["runs"]) > 1 and len(groups) <= BANDS:
            axes.fill_between(positions, low, high, color=_style(index)["color"], alpha=0.15, linewidth=0)
    axes.grid(alpha=0.25)


def _smooth(values: np.ndarray, limit: int) -> np.ndarray:
    """Means over windows, where there are more values than `limit`."""
    if not limit or len(values) <= limit:
        return values
    return np.array([window.mean() for window in np.array_split(values, limit)])


def _draw_scores(axes: Axes, groups: list[dict], name: str, first: bool) -> None:
    factor = 100 if percent(name) else 1
    points = [
        [factor * value for run in group["runs"] if np.isfinite(value := run["scores"].get(name, np.nan))]
        for group in groups
    ]
    for index, (group, values) in enumerate(zip(groups, points, strict=True)):
        color = _style(index)["color"]
        axes.scatter(values, [index] * len(values), s=18, color=color, alpha=0.5, linewidths=0)
        cell = group["scores"].get(name)
        if cell and np.isfinite(cell["mean"]):
            error = None if cell["interval"] is None else factor * cell["interval"]
            axes.errorbar(factor * cell["mean"], index, xerr=error, fmt="|", color=color, markersize=11, capsize=3,
                          markeredgewidth=2)  # fmt: skip
    if everything := [value for values in points for value in values]:
        margin = MARGIN * (np.ptp(everything) or 0.1 * abs(everything[0]) or 1.0)
        axes.set_xlim(min(everything) - margin, max(everything) + margin)
    axes.set(title=title(name), xlabel="at the end")
    axes.set_yticks(range(len(groups)), [_wrap(group["label"]) if first else "" for group in groups], fontsize="small")
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25)
