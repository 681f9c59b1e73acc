"""The picture of `bench_loss.py`."""

from matplotlib.figure import Figure

from openclip_ext.files import atomic
from openclip_ext.report.palette import row_style


def draw(rows: list[dict], path: str) -> None:
    """Write a PNG: time and memory over the batch, a line per loss and width; the first is drawn in black."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    kinds = list(dict.fromkeys((row["loss"], row["width"]) for row in rows))
    several = len({width for _, width in kinds}) > 1
    panels = (("seconds", 1e3, "time of forward and backward, ms"), ("bytes", 1e-6, "extra memory at the peak, MB"))
    for axes, (key, factor, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for index, (loss, width) in enumerate(kinds):
            own = sorted(
                (row for row in rows if (row["loss"], row["width"]) == (loss, width)), key=lambda r: r["batch"]
            )
            style = {"color": "black", "linewidth": 2.5} if index == 0 else row_style(index - 1)
            name = f"{loss}, width {width}" if several else loss
            values = [max(factor * row[key], 0.1) for row in own]
            axes.plot([row["batch"] for row in own], values, marker="o", markersize=4, label=name, **style)
        batches = sorted({row["batch"] for row in rows})
        axes.set(title=label, xlabel="G, pairs of the batch", xscale="log", yscale="log")
        axes.set_xticks(batches, [f"{batch:,}" for batch in batches], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small", frameon=False)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
