"""The picture of `bench_loss.py`."""

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from openclip_ext.files import atomic
from openclip_ext.report.palette import row_style

from .loss_steps import STOCK

#: Key of a row, what its numbers are multiplied by for a tick, their unit, and a title.
PANELS = (("seconds", 1e3, "ms", "time of forward and backward"), ("bytes", 1e-6, "MB", "extra memory at the peak"))
MARKERS = "osD^v<>PX*h"  # lines of equal height lie on each other


def draw(rows: list[dict], path: str) -> None:
    """Write a PNG: time and memory over the batch, a line per loss and width.

    Numbers are multiples of ClipLoss's, whose own are below each batch size, where it was measured.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    kinds = list(dict.fromkeys((row["loss"], row["width"]) for row in rows if row["loss"] != STOCK))
    widths = {width for _, width in kinds}
    stock = {(row["batch"], row["width"]): row for row in rows if row["loss"] == STOCK}
    batches = sorted({row["batch"] for row in rows})
    for axes, (key, factor, unit, title) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for index, (loss, width) in enumerate(kinds):
            own = [row for row in rows if (row["loss"], row["width"]) == (loss, width)]
            # Time is compared with ClipLoss's in the same process, as far as it was measured there.
            points = sorted((row["batch"], row[key] / _unit(row, key, stock, factor)) for row in own)
            name = f"{loss}, width {width}" if len(widths) > 1 else loss
            axes.plot(*zip(*points, strict=True), marker=MARKERS[index % len(MARKERS)], label=name, **row_style(index))
        if stock:
            axes.axhline(1, color="black", linewidth=2.5, label=STOCK)
        named = {batch: row[key] for (batch, _), row in stock.items()} if len(widths) == 1 else {}
        labels = [f"{factor * named[batch]:,.0f} {unit}" if named else "" for batch in batches]
        axes.set(title=f"{title}, {'times ClipLoss’s' if stock else unit}", xscale="log", yscale="log")
        axes.set(xlabel="G, pairs of the batch" + ("; below: ClipLoss" if named else ""))
        axes.set_xticks(batches, [f"{batch:,}\n{label}" for batch, label in zip(batches, labels, strict=True)])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if stock else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def _unit(row: dict, key: str, stock: dict, factor: float) -> float:
    """What a row's number is divided by."""
    beside = stock.get((row["batch"], row["width"]))
    if beside is None:
        return 1 / factor
    return row.get(f"stock_{key}") or beside[key] or 1
