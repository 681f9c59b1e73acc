"""What finished rows say: means, intervals, and paired differences; as JSON, Markdown and a picture."""

import dataclasses
import statistics
from itertools import groupby

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from runs.intervals import Difference, format_interval, paired_difference
from runs.store import Store

from openclip_ext.files import atomic
from openclip_ext.report.intervals import half_width

from .methods import Method
from .store import Row, finished_rows
from .turns import timed


def summarise(store: Store) -> list[dict]:
    """One record per row that has been scored, by task, logit scale, batch size, and method.

    `score` and `half_width`: mean and 95 % interval over seeds. `against_best` and `against_without`: mean and interval
    of the differences, seed by seed, to the stateless baseline with the highest score at the same task, logit scale and
    batch size, and to the same method without recent pairs; None where there is none such. `seconds`: CPU time,
    taken in turns with other rows where that was done, else the median over seeds.
    """
    rows = sorted(finished_rows(store), key=_place)
    scores = {_place(row): {run.seed: store.require(run)["score"] for run in row.scored(store)} for row in rows}
    return [_record(row, store, scores) for row in rows]


def _place(row: Row) -> tuple:
    base = row.base
    return base.task, dataclasses.astuple(base.setting), base.scale, base.batch_size, base.method


def _record(row: Row, store: Store, scores: dict[tuple, dict[int, float]]) -> dict:
    *place, method = _place(row)
    own = scores[_place(row)]
    values = list(own.values())
    baselines = {name: others for (*at, name), others in scores.items() if at == place and Method(name).stateless}
    best = max(baselines, key=lambda name: statistics.mean(baselines[name].values()), default=None)
    without = Method(method).without_recent
    found = [store.require(run) for run in row.scored(store)]
    in_turns = [record for record in [store.get(timed(row.scored(store)[0]))] if record]
    recents = [record["recent"] for record in found if "recent" in record]
    return {
        **dataclasses.asdict(row.base),
        "lr": row.scored(store)[0].lr,
        "validation": row.validation(store),
        "scores": values,
        "score": statistics.mean(values),
        "half_width": half_width(values),
        "best_baseline": best,
        "against_best": paired_difference(own, baselines[best]) if best not in (None, method) else None,
        "against_without": paired_difference(own, scores.get((*place, without), {})) if without else None,
        "pairs": found[0]["pairs"],
        "steps": found[0]["steps"],
        "seconds": statistics.median(record["seconds"] for record in in_turns or found),
        "recent": statistics.mean(recents) if recents else None,
        "logit_scale": statistics.mean(record["logit_scale"] for record in found),
    }


def markdown(records: list[dict]) -> str:
    """A table per task, logit scale and batch size."""
    lines = []
    for (task, scale), of_task in groupby(records, key=lambda record: (record["task"], record["scale"])):
        lines += ["", f"**{task}, {scale} logit scale**", "", _HEAD, _RULE]
        lines += [_line(record) for record in of_task]
    return "\n".join(lines[1:])


_HEAD = (
    "| batch | method | score | to the best stateless | to the same without | lr | recent steps | steps | pairs seen "
    "| seconds |"
)
_RULE = "|" + " ---: | --- |" + " ---: |" * 8


def _line(record: dict) -> str:
    rates = sorted(record["validation"])
    edge = " (edge)" if record["lr"] in (rates[0], rates[-1]) and len(rates) > 1 else ""
    cells = [
        record["batch_size"],
        f"`{record['method']}`",
        format_interval(record["score"], record["half_width"]),
        "best" if record["best_baseline"] == record["method"] else _signed(record["against_best"]),
        _signed(record["against_without"]),
        f"{record['lr']:g}{edge}",
        "" if record["recent"] is None else f"{record['recent']:.1f}",
        f"{record['steps']:,}",
        f"{record['pairs']:,}",
        f"{record['seconds']:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _signed(difference: Difference | None) -> str:
    return "" if difference is None else format_interval(difference[0], difference[1], sign="+")


def draw(records: list[dict], path: str) -> None:
    """Write a PNG of one task: score over batch size, a line per method, a panel per kind of logit scale."""
    scales = sorted({record["scale"] for record in records})
    figure = Figure(figsize=(1.5 + 5.5 * len(scales), 5), layout="constrained")
    panels = figure.subplots(1, len(scales), squeeze=False, sharey=True)[0]
    methods = list(dict.fromkeys(record["method"] for record in records))
    bases = {method: Method(method).without_recent or method for method in methods}
    plain = list(dict.fromkeys(bases.values()))
    for axes, scale in zip(panels, scales, strict=True):
        for index, method in enumerate(methods):
            rows = [record for record in records if (record["scale"], record["method"]) == (scale, method)]
            base = bases[method]
            style = {
                "color": matplotlib.colormaps["tab10"](plain.index(base) % 10),
                "linestyle": "--" if base == method else "-",
                "marker": "osD^v"[[other for other in methods if bases[other] == base].index(method) % 5],
            }
            _draw_method(axes, rows, method, 1.02 ** (index - len(methods) / 2), style)
        sizes = sorted({record["batch_size"] for record in records})
        axes.set(title=f"{scale} logit scale", xlabel="batch size (pairs encoded at once)", xscale="log")
        axes.set_xticks(sizes, map(str, sizes), minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("score on the test split, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small", frameon=False)
    figure.suptitle(f"{records[0]['task']}: mean and 95 % interval over {len(records[0]['scores'])} seeds")
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def _draw_method(axes: Axes, rows: list[dict], method: str, shift: float, style: dict) -> None:
    """A line with intervals; `shift` is a factor that keeps the intervals of methods apart."""
    rows = sorted(rows, key=lambda record: record["batch_size"])
    axes.errorbar(
        [shift * record["batch_size"] for record in rows], [record["score"] for record in rows],
        yerr=[record["half_width"] or 0 for record in rows], label=method, capsize=2, markersize=4, **style,
    )  # fmt: skip
