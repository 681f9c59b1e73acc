"""What finished runs say: means and intervals, as JSON, Markdown and a picture."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from runs.intervals import draw_bars, format_compared, format_values, paired_differences
from runs.store import Store

from openclip_ext.files import atomic
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
            record["difference"] = paired_differences(record["scores"], bases[setting]["scores"])
        records.append(record)
    return records


def _setting(run: Run) -> tuple[tuple[str, object], ...]:
    """What runs share that are compared."""
    return tuple(item for item in dataclasses.asdict(run).items() if item[0] not in ("row", "seed"))


def markdown(records: list[dict]) -> str:
    """A line per row: scores in percent, and differences to the base loss in brackets; last, what words alone score."""
    lines = []
    for record in records:
        cells = (
            format_compared(list(record["scores"][name].values()), record.get("difference", {}).get(name))
            for name in SCORES
        )
        lines.append([record["row"], str(record["seeds"]), *cells])
    if records:
        blind = records[0]["words_alone"]
        lines.append(["words alone", "", *(format_values(list(blind.get(name, {}).values())) for name in SCORES)])
    return markdown_table(["", "seeds", *SCORES], lines)


def draw(records: list[dict], path: str) -> None:
    """Write a PNG: a chart per score, a bar per row with its interval over seeds, a line at what words alone score."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    charts = list(figure.subplots(2, 3).flat)
    charts.pop().axis("off")
    for axes, (name, title) in zip(charts, SCORES.items(), strict=True):
        rows = [list(record["scores"][name].values()) for record in records]
        draw_bars(axes, title, [record["row"] for record in records], rows)
        axes.set_ylim(0, 100)
        if blind := records[0]["words_alone"].get(name):
            axes.axhline(float(np.mean(list(blind.values()))), color="0.4", linestyle="--", label="words alone")
            axes.legend(fontsize="x-small")
    figure.suptitle(f"fusion model on generated scenes, %: mean and 95 % interval over {records[0]['seeds']} seeds")
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
