"""Means and 95 % intervals over seeds, as tables and bar charts show them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from openclip_ext.report.intervals import half_width
from openclip_ext.report.palette import row_style

#: A mean, and half the width of its interval where there is one.
Difference = tuple[float, float | None]


def paired_differences(own: Mapping[str, Mapping], base: Mapping[str, Mapping]) -> dict[str, Difference]:
    """By name of a score: mean and half width of `own - base`, over the seeds that both have. Others are left out."""
    found = {name: paired_difference(values, base.get(name, {})) for name, values in own.items()}
    return {name: difference for name, difference in found.items() if difference is not None}


def paired_difference(own: Mapping, base: Mapping) -> Difference | None:
    """Mean and half width of `own - base`, over the seeds that both have; None: there is none."""
    common = [value - base[seed] for seed, value in own.items() if seed in base]
    return (float(np.mean(common)), half_width(common)) if common else None


def format_interval(mean: float, width: float | None, digits: int = 1, sign: str = "") -> str:
    """`81.9 ± 0.2`; with the sign "+", `+0.4 ± 0.2`. The mean alone where there is no width."""
    return f"{mean:{sign}.{digits}f}" + ("" if width is None else f" ± {width:.{digits}f}")


def format_values(values: Sequence[float], digits: int = 1) -> str:
    """Mean and half width of the values, as `format_interval` has it; empty without values."""
    return format_interval(float(np.mean(values)), half_width(values), digits) if values else ""


def format_compared(values: Sequence[float], difference: Difference | None, digits: int = 1) -> str:
    """`81.9 ± 0.2 (+0.4 ± 0.2)`: values, and in brackets one of `paired_differences`, where there is one."""
    text = format_values(values, digits)
    if difference is None:
        return text
    mean, width = difference
    return f"{text} ({format_interval(mean, width, digits, '+')})"


def draw_bars(axes: Axes, title: str, names: Sequence[str], rows: Sequence[Sequence[float]], **ticks: Any) -> None:
    """A bar per row, which is the mean of its values, with its interval; `ticks` style the names below the bars."""
    means, widths = [float(np.mean(values)) for values in rows], [half_width(values) or 0.0 for values in rows]
    colors = [row_style(index)["color"] for index in range(len(rows))]
    axes.bar(range(len(rows)), means, yerr=widths, color=colors, capsize=3, width=0.65)
    axes.set_title(title, fontsize="medium")
    axes.set_xticks(range(len(rows)), names, **ticks)
    axes.grid(axis="y", alpha=0.25)
