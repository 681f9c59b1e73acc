"""What finished runs say: squared norms of exact gradients, as JSON, Markdown and a picture."""

import dataclasses

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from runs.intervals import format_values
from runs.methods import place
from runs.store import Store

from openclip_ext.files import atomic
from openclip_ext.report.intervals import half_width

from .train import Run

BASE = "clip"  # SimCLR's loss
LAST = 0.25  # of the iterations, over which squared norms are averaged


def summarise(store: Store[Run]) -> list[dict]:
    """One record per method, of the longest runs of the same kind.

    `iterations`, and at each `squared_norm` and `loss`, (seeds, iterations); `last`: the squared norm averaged over the
    last quarter, by seed; `ratio`: that over the same seed's of `clip`, whose mean and 95 % interval are taken in logs.
    """
    runs = store.runs()
    if not runs:
        return []
    kinds = sorted({_kind(run) for run in runs}, key=lambda kind: kind.epochs)
    runs = sorted((run for run in runs if _kind(run) == kinds[-1]), key=lambda run: run.seed)
    methods = sorted({run.method for run in runs}, key=place)
    records = []
    for method in methods:
        own = [run for run in runs if run.method == method]
        found = [store.require(run) for run in own]
        norms = np.array([record["squared_norm"] for record in found])
        records.append({
            **{key: value for key, value in dataclasses.asdict(own[0]).items() if key != "seed"},
            "seeds": [run.seed for run in own], "iterations": found[0]["iterations"], "squared_norm": norms.tolist(),
            "loss": [record["loss"] for record in found], "seconds": float(np.median([r["seconds"] for r in found])),
            "last": norms[:, -max(1, round(LAST * norms.shape[1])) :].mean(1).tolist(),
        })  # fmt: skip
    base = next((record for record in records if record["method"] == BASE), None)
    for record in records:
        record["ratio"] = _ratios(record, base) if base else []
    return records


def _kind(run: Run) -> "Run":
    return dataclasses.replace(run, method="", seed=0)


def _ratios(record: dict, base: dict) -> list[float]:
    of_base = dict(zip(base["seeds"], base["last"], strict=True))
    return [
        value / of_base[seed] for seed, value in zip(record["seeds"], record["last"], strict=True) if seed in of_base
    ]


def markdown(records: list[dict]) -> str:
    """A line per method."""
    lines = [
        "| method | squared norm | times `clip`'s | loss over all images at the end | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        at_end = [losses[-1] for losses in record["loss"]]
        cells = [
            f"`{record['method']}`",
            format_values(record["last"], 2),
            _ratio(record["ratio"]),
            format_values(at_end, 3),
            f"{record['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(values: list[float]) -> str:
    if not values:
        return ""
    logs = np.log(values)
    width = half_width(logs.tolist())
    middle = f"{np.exp(logs.mean()):.2f}"
    return (
        middle if width is None else f"{middle} ({np.exp(logs.mean() - width):.2f}–{np.exp(logs.mean() + width):.2f})"
    )


def draw(records: list[dict], path: str) -> None:
    """Write a PNG: squared norm and loss over iterations, a line per method with the range of its seeds."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_curves(left, records, "squared_norm")
    _draw_curves(right, records, "loss")
    left.set(yscale="log", xlabel="iterations", ylabel="squared norm of the gradient of the loss over all images")
    right.set(xlabel="iterations", ylabel="loss over all images")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
    first = records[0]
    where = "images of a folder" if first["folder"] else "handwritten digits"
    seeds = f"mean and range of {len(first['seeds'])} seeds"
    figure.suptitle(f"{first['images']} {where}, batch {first['batch_size']}; {seeds}")
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _draw_curves(axes: Axes, records: list[dict], name: str) -> None:
    """Colors by loss and kernel; dashed where states are encoded again."""
    kinds = list(dict.fromkeys(_color_of(record["method"]) for record in records))
    for record in records:
        color = matplotlib.colormaps["tab10"](kinds.index(_color_of(record["method"])) % 10)
        curves = np.array(record[name])
        axes.plot(record["iterations"], curves.mean(0), color=color, label=record["method"],
                  linestyle="--" if "bank=index" in record["method"] else "-")  # fmt: skip
        axes.fill_between(record["iterations"], curves.min(0), curves.max(0), color=color, alpha=0.08, linewidth=0)
    axes.grid(alpha=0.25, which="both")


def _color_of(method: str) -> str:
    return method.replace("+bank=index", "")
