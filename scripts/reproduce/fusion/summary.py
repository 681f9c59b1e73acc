"""What finished runs say: means and intervals, as JSON, Markdown and a picture."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from runs.store import Store

from openclip_ext.files import atomic
from openclip_ext.report.intervals import half_width
from openclip_ext.report.palette import row_style
from openclip_ext.report.tables import markdown_table

from .train import ROWS, Run

#: Scores, and what the pictures' charts are called.
SCORES = {
    "retrieval": "retrieval: text to image, recall@1",
    "retrieval-reranked": "the same, re-ranked by matching",
    "vqa": "questions (vqa)",
    "nlvr2": "statements on two pictures (nlvr2)",
    "ve": "entailment (ve)",
}


def summarise(store: Store[Run]) -> list[dict]:
    """A record per row and setting, in the order of `ROWS`.

    `scores` and `words_alone`: by name and seed, in percent. `difference`: by name the mean and 95 % interval of
    differences to the base loss alone, seed by seed.
    """
    records: list[dict[str, Any]] = []
    bases: dict[tuple, dict[str, Any]] = {}
    runs = sorted(store.runs(), key=lambda run: (_setting(run), list(ROWS).index(run.row), run.seed))
    for (setting, row), own in itertools.groupby(runs, key=lambda run: (_setting(run), run.row)):
        found = {run.seed: store.require(run) for run in own}
        record: dict[str, Any] = dict(setting) | {"row": row, "seeds": len(found)}
        for kind in ("scores", "words_alone"):
            names = next(iter(found.values()))[kind]
            record[kind] = {name: {seed: 100 * one[kind][name] for seed, one in found.items()} for name in names}
        record["seconds"] = float(np.median([one["seconds"] for one in found.values()]))
        if row == "base":
            bases[setting] = record
        elif setting in bases:
            record["difference"] = _differences(record["scores"], bases[setting]["scores"])
        records.append(record)
    return records


def _setting(run: Run) -> tuple[tuple[str, object], ...]:
    """What runs share that are compared."""
    return tuple(item for item in dataclasses.asdict(run).items() if item[0] not in ("row", "seed"))


def _differences(own: dict, base: dict) -> dict[str, tuple[float, float | None]]:
    found = {}
    for name, values in own.items():
        both = [values[seed] - base[name][seed] for seed in values if seed in base[name]]
        if both:
            found[name] = float(np.mean(both)), half_width(both)
    return found


def markdown(records: list[dict]) -> str:
    """A line per row: scores in percent, and differences to the base loss in brackets; last, what words alone score."""
    lines = []
    for record in records:
        cells = [_shown(list(record["scores"][name].values())) for name in SCORES]
        for place, name in enumerate(SCORES):
            if name in record.get("difference", {}):
                mean, width = record["difference"][name]
                cells[place] += f" ({_with_width(mean, width, '+')})"
        lines.append([record["row"], str(record["seeds"]), *cells])
    if records:
        blind = records[0]["words_alone"]
        lines.append(["words alone", "", *(_shown(list(blind.get(name, {}).values())) for name in SCORES)])
    return markdown_table(["", "seeds", *SCORES], lines)


def _shown(values: list[float]) -> str:
    return _with_width(float(np.mean(values)), half_width(values)) if values else ""


def _with_width(mean: float, width: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.1f}" + ("" if width is None else f" ± {width:.1f}")


def draw(records: list[dict], path: str) -> None:
    """Write a PNG: a chart per score, a bar per row with its interval over seeds, a line at what words alone score."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    charts = list(figure.subplots(2, 3).flat)
    charts.pop().axis("off")
    for axes, (name, title) in zip(charts, SCORES.items(), strict=True):
        values = [list(record["scores"][name].values()) for record in records]
        means, widths = [float(np.mean(own)) for own in values], [half_width(own) or 0.0 for own in values]
        colors = [row_style(index)["color"] for index in range(len(records))]
        axes.bar(range(len(means)), means, yerr=widths, color=colors, capsize=3, width=0.65)
        if blind := records[0]["words_alone"].get(name):
            axes.axhline(float(np.mean(list(blind.values()))), color="0.4", linestyle="--", label="words alone")
            axes.legend(fontsize="x-small")
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(len(means)), [record["row"] for record in records])
        axes.set_ylim(0, 100)
        axes.grid(axis="y", alpha=0.25)
    figure.suptitle(f"fusion model on generated scenes, %: mean and 95 % interval over {records[0]['seeds']} seeds")
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
