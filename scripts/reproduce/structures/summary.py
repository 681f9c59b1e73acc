"""What finished rows say: means and intervals, as JSON, Markdown and a picture."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure
from runs.intervals import draw_bars, format_compared, paired_differences
from runs.store import Store

from openclip_ext.evaluation.metrics.structure import TITLES
from openclip_ext.files import atomic

from .rows import Row, finished_rows
from .train import RECALLS, Run

SCORES = {"zero_shot": "zero-shot top-1", "linear_probe": "linear probe", "recall": "mean recall"}
#: What the terms are there to shape.
MEASURES = ("modality_gap", "alignment", "uniformity_image", "uniformity_text", "consistency_error_across",
            "consistency_error_within")  # fmt: skip


def summarise(store: Store[Run]) -> list[dict]:
    """One record per row that has been scored.

    `scores`: by name, one value per seed, of `zero_shot`, `linear_probe`, `recall` and each recall, in percent, and of
    what `openclip-ext structure` measures. `difference`: mean and 95 % interval of the differences to the base loss,
    seed by seed.
    """
    records: list[dict] = []
    bases: dict[tuple, dict] = {}
    for row in finished_rows(store):
        record = _record(row, store)
        place = (str(record["source"]), record["epochs"], record["batch_size"], record["loss"])
        if not record["terms"]:
            bases[place] = record
        base = bases.get(place)
        record["difference"] = {} if base in (None, record) else paired_differences(record["scores"], base["scores"])
        records.append(record)
    return records


def _record(row: Row, store: Store[Run]) -> dict:
    found = {run.seed: store.get(run) for run in row.scored(store)}
    done = {seed: record for seed, record in found.items() if record is not None}
    names = (*SCORES, *RECALLS)
    scores = {name: {seed: record[name] for seed, record in done.items()} for name in names}
    scores |= {
        name: {seed: record["structure"][name] for seed, record in done.items() if name in record["structure"]}
        for name in TITLES
    }
    return {
        **dataclasses.asdict(row.chosen(store)), "title": row.title, "split": "test", "seed": None,
        "validation": [[dict(run.terms) or run.lr, store.require(run)["recall"]] for run in row.candidates],
        "scores": {name: values for name, values in scores.items() if values},
        "seconds": float(np.median([record["seconds"] for record in done.values()])),
    }  # fmt: skip


def markdown(records: list[dict]) -> str:
    """A line per row: scores in percent and what they differ by from the base loss, then what structure is measured."""
    heads = [*SCORES.values(), *(TITLES[name] for name in MEASURES)]
    lines = ["| data | loss | chosen | " + " | ".join(heads) + " |", "| --- | --- | --- |" + " ---: |" * len(heads)]
    for record in records:
        chosen = ", ".join(f"{weight:.3g}" for _, weight in record["terms"]) or f"lr {record['lr']:.3g}"
        cells = [_cell(record, name, 1) for name in SCORES] + [_cell(record, name, 4) for name in MEASURES]
        lines.append("| " + " | ".join([data_name(record), record["title"], chosen, *cells]) + " |")
    return "\n".join(lines)


def data_name(record: dict) -> str:
    path = record["source"]["pairs"].rstrip("/")
    return path.rsplit("/", 1)[-1] if path else "digits"


def _cell(record: dict, name: str, digits: int) -> str:
    values = list(record["scores"][name].values())
    if name not in SCORES:
        return f"{np.mean(values):.{digits}f}"
    return format_compared(values, record["difference"].get(name), digits)


def draw(records: list[dict], path: str) -> None:
    """Write a PNG of one source: a small chart per score and measure, a bar per row, intervals over seeds."""
    names = {**SCORES, **{name: TITLES[name] for name in MEASURES}}
    figure = Figure(figsize=(12, 9), layout="constrained")
    charts = figure.subplots(3, 3).flat
    for axes, (name, title) in zip(charts, names.items(), strict=True):
        rows = [list(record["scores"][name].values()) for record in records]
        draw_bars(axes, title, [record["title"] for record in records], rows, fontsize="x-small", rotation=20)
    seeds = len(records[0]["scores"]["recall"])
    figure.suptitle(f"{data_name(records[0])}: mean and 95 % interval over {seeds} seeds; weights chosen on validation")
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
