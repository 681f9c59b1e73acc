"""The picture of `openclip-ext interpolate`: scores over alpha, and two tasks against each other."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openclip_ext.report.tables import percent, title


def draw_interpolation(rows: list[dict], metrics: list[str], heading: str, path: str) -> None:
    """Write a PNG.

    Args:
        rows: `alpha` and `scores` (by `task/score`), by alpha.
        metrics: names of the scores to draw; of the first of two tasks each, one is drawn against the other.
        heading: above everything.
        path: of the PNG.
    """
    pair = _pair(metrics)
    figure = Figure(figsize=(11 if pair else 6, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if pair else 1, squeeze=False)[0]
    _draw_lines(axes[0], rows, metrics)
    if pair:
        _draw_pair(axes[1], rows, *pair)
    figure.suptitle(heading, fontsize="medium")
    figure.savefig(path, dpi=130)


def _pair(metrics: list[str]) -> list[str]:
    """The first metric of each task, if there are exactly two tasks."""
    firsts: dict[str, str] = {}
    for name in metrics:
        firsts.setdefault(name.rpartition("/")[0], name)
    return list(firsts.values()) if len(firsts) == 2 else []


def _values(rows: list[dict], name: str) -> list[float]:
    return [(100 if percent(name) else 1) * row["scores"][name] for row in rows]


def _draw_lines(axes: Axes, rows: list[dict], metrics: list[str]) -> None:
    alphas = [row["alpha"] for row in rows]
    for index, name in enumerate(metrics):
        style: dict[str, Any] = {
            "color": matplotlib.colormaps["tab10"](index % 10),
            "linestyle": ("-", "--", ":")[index // 10 % 3],
        }
        axes.plot(alphas, _values(rows, name), marker=".", label=title(name), **style)
    axes.set(title="on the line from A to B", xlabel="alpha (0: A, 1: B)", ylabel="score")
    axes.legend(fontsize="small", frameon=False)
    axes.grid(alpha=0.25)


def _draw_pair(axes: Axes, rows: list[dict], first: str, second: str) -> None:
    x, y = _values(rows, first), _values(rows, second)
    axes.plot(x, y, color="0.6", linewidth=1, zorder=1)
    points = axes.scatter(x, y, c=[row["alpha"] for row in rows], cmap="viridis", vmin=0, vmax=1, s=36, zorder=2)
    for row, place in zip(rows, zip(x, y, strict=True), strict=True):
        if row["alpha"] in (0, 1):
            axes.annotate("AB"[int(row["alpha"])], place, xytext=(6, 6), textcoords="offset points", fontweight="bold")
    axes.set(title="two tasks against each other", xlabel=title(first), ylabel=title(second))
    axes.margins(0.12)
    axes.grid(alpha=0.25)
    axes.figure.colorbar(points, ax=axes, label="alpha")
