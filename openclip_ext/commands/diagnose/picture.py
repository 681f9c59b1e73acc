"""The picture of `openclip-ext diagnose`: signal and bias over the batch size, a line per loss."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from openclip_ext.report.palette import row_style


def draw_diagnosis(report: dict[str, Any], path: str) -> None:
    """Write a PNG: left the signal, with each loss's equivalent batch at the report's `batch_size`, right the bias."""
    figure = Figure(figsize=(11.5, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, loss in enumerate(report["losses"]):
        _draw_line(left, loss, "signal", index)
        _draw_line(right, loss, "bias", index)
        if loss["name"] != "clip":
            _mark_equivalent(left, loss, report["batch_size"], index)
    sizes = [row["batch_size"] for row in report["losses"][0]["batches"]]
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sizes)
        axes.set_xlabel("pairs per step")
        axes.grid(alpha=0.25)
    left.set(title="signal: cosine of one step's gradient with that of all pairs", ylim=(0, 1.02))
    right.set(title="bias: error of the mean gradient, relative to its length")
    right.set_ylim(bottom=0)
    left.plot([], [], marker="D", markerfacecolor="none", color="0.3", linestyle="none",
              label=f"worth this batch of clip's at {report['batch_size']:,}")  # fmt: skip
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{report['model']}, {report['checkpoint']['source']}, {report['num_pairs']:,} pairs")
    figure.savefig(path, dpi=130)


def _draw_line(axes: Axes, loss: dict, name: str, index: int) -> None:
    rows = loss["batches"]
    sizes, values = [row["batch_size"] for row in rows], [row[name]["value"] for row in rows]
    low, high = ([row[name]["interval"][end] for row in rows] for end in range(2))
    axes.fill_between(sizes, low, high, alpha=0.12, color=row_style(index)["color"])
    # Every other one is dashed, so that of two that are the same both are seen.
    style = row_style(index) | {"linestyle": ("-", "--")[index % 2]}
    axes.plot(sizes, values, marker=".", linewidth=2, label=loss["name"], **style)


def _mark_equivalent(axes: Axes, loss: dict, size: int, index: int) -> None:
    """From the loss's signal to where `clip` has it; beyond the batch sizes measured, to their edge."""
    row = next(row for row in loss["batches"] if row["batch_size"] == size)
    signal, equivalent = row["signal"]["value"], row["equivalent_batch"]["value"]
    color = row_style(index)["color"]
    axes.plot([size, equivalent], [signal, signal], color=color, linewidth=0.8, linestyle=":")
    axes.plot([equivalent], [signal], marker="D", markerfacecolor="none", color=color)
