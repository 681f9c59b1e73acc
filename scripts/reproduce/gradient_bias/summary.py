"""What finished runs say: how many of the initial values reach the optimum, as JSON, Markdown and a picture."""

import dataclasses
from itertools import groupby

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from runs.methods import place
from runs.store import Store

from openclip_ext.files import atomic

from .data import optimum
from .train import Run, is_decoupled

REACHED = 0.9  # metric: within a tenth of the optimum


def summarise(store: Store[Run]) -> list[dict]:
    """One record per run, by method, noise and batch size.

    `reached`: initial values whose metric is at least `REACHED`; `mean`: of the metric over initial values; `bias`: how
    far their mean shares are from the optimum, in which the noise of single runs is averaged out.
    """
    records = []
    for run in store.runs():
        found, best = store.require(run), optimum(is_decoupled(run.method))
        mean = torch.tensor(found["shares"]).mean(0)
        records.append({
            **dataclasses.asdict(run), "metric": found["metric"], "decoupled": is_decoupled(run.method),
            "reached": sum(value >= REACHED for value in found["metric"]),
            "mean": sum(found["metric"]) / run.starts, "bias": float((mean - best).norm() / best.norm()),
        })  # fmt: skip
    return sorted(records, key=lambda r: (*place(r["method"]), r["noise"], r["batch_size"], r["steps"]))


def markdown(records: list[dict]) -> str:
    """A line per method, a column per noise and batch size; only the longest runs of each."""
    cells = _cells(records)
    places = sorted({(noise, size) for _, noise, size in cells})
    lines = [
        "| method | " + " | ".join(f"noise {noise:g}, batch {size}" for noise, size in places) + " |",
        "| --- |" + " ---: |" * len(places),
    ]
    for method in dict.fromkeys(method for method, *_ in cells):
        found = [cells.get((method, *place)) for place in places]
        texts = ["" if r is None else f"{r['reached']} of {r['starts']}; {r['mean']:.2f}" for r in found]
        lines.append(f"| `{method}` | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _cells(records: list[dict]) -> dict[tuple, dict]:
    return {(r["method"], r["noise"], r["batch_size"]): r for r in records}


def draw(records: list[dict], path: str) -> None:
    """Write a PNG: the plane of batch size and noise, a panel per method."""
    cells = _cells(records)
    panels = {method: list(rows) for method, rows in groupby(cells.values(), key=lambda record: record["method"])}
    noises = sorted({noise for _, noise, _ in cells})
    sizes = sorted({size for *_, size in cells})
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + columns * (0.8 + 0.9 * len(sizes)), 1.4 + rows * (1.2 + 0.7 * len(noises))),
                    layout="constrained")  # fmt: skip
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for one, (method, of_method) in zip(axes, panels.items(), strict=False):
        _draw_plane(one, method, of_method, noises, sizes)
    for one in axes[len(panels) :]:
        one.set_axis_off()
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0.5, 1), "RdYlGn")
    bar = figure.colorbar(scale, ax=axes, extend="min", shrink=0.7)
    bar.set_label("mean metric; 1: the optimum of the loss over all pairs")
    figure.suptitle(f"Initial values, of {records[0]['starts']}, that reach the optimum (metric of at least {REACHED})")
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def _draw_plane(axes: Axes, method: str, records: list[dict], noises: list[float], sizes: list[int]) -> None:
    colors = matplotlib.colormaps["RdYlGn"]  # from 0.5 to 1
    for record in records:
        x, y = sizes.index(record["batch_size"]), noises.index(record["noise"])
        axes.add_patch(matplotlib.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colors(2 * record["mean"] - 1)))
        ink = "black" if 0.6 < record["mean"] < 0.95 else "white"
        axes.text(
            x, y, f"{record['reached']}\n{record['mean']:.2f}", ha="center", va="center", fontsize="small", color=ink
        )
    axes.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.5, len(noises) - 0.5), xlabel="batch size", ylabel="noise, logits")
    axes.set_xticks(range(len(sizes)), map(str, sizes))
    axes.set_yticks(range(len(noises)), [f"{noise:g}" for noise in noises])
    axes.set_title(method, fontsize="small")
