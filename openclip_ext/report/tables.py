"""The tables of `openclip-ext report` in Markdown, padded so that they read well in a terminal too."""

import re
from collections.abc import Sequence

#: Metrics that are shares of something, shown in percent.
_SHARE = re.compile(r"R@\d+$|top\d+$|acc\d*$|recall|accuracy")


def tables(report: dict) -> str:
    """Scores, differences to the first group, and the settings in which the groups differ."""
    groups, metrics = report["groups"], report["metrics"]
    parts = (
        [_scores(groups, metrics)]
        if metrics
        else ["No run has been evaluated; train with --val-data, or use openclip-ext eval.\n"]
    )
    if metrics and len(groups) > 1:
        parts.append(_differences(groups, metrics))
    if report["remarks"]:
        parts.append("\n".join(f"* {remark}" for remark in report["remarks"]) + "\n")
    if any(group["settings"] for group in groups):
        parts.append(_settings(groups))
    return "\n".join(parts)


def percent(metric: str) -> bool:
    """Whether the metric is shown times 100."""
    return bool(_SHARE.search(metric))


def title(metric: str) -> str:
    """The metric's name with its unit."""
    return f"{metric}, %" if percent(metric) else metric


def _scores(groups: list[dict], metrics: list[str]) -> str:
    rows = []
    for group in groups:
        cells = [_cell(metric, group["scores"].get(metric), "std") for metric in metrics]
        rows.append([group["label"], str(len(group["runs"])), _epochs(group["runs"]), *cells])
    text = "Scores at the end: mean ± standard deviation over runs that differ in their seed.\n\n"
    text += markdown_table(["", "runs", "epoch", *(title(metric) for metric in metrics)], rows)
    if len({run["epochs"] for group in groups for run in group["runs"]}) > 1:
        text += "\nThe runs were not all evaluated after the same number of epochs.\n"
    return text


def _epochs(runs: list[dict]) -> str:
    epochs = sorted({run["epochs"] for run in runs if run["epochs"] is not None})
    return "–" if not epochs else "–".join(f"{epoch:g}" for epoch in dict.fromkeys((epochs[0], epochs[-1])))


def _differences(groups: list[dict], metrics: list[str]) -> str:
    first, *others = groups
    rows = []
    for group in others:
        cells = [_cell(metric, group["differences"].get(metric), "interval", sign="+") for metric in metrics]
        kinds = {difference["paired"] for difference in group["differences"].values()}
        rows.append([group["label"], "seeds" if kinds == {True} else "means", *cells])
    return (
        f"Difference to {first['label']}: mean ± half the 95 % interval; of seeds in pairs, or else of means. * marks "
        "intervals without zero.\n\n" + markdown_table(["", "of", *(title(metric) for metric in metrics)], rows)
    )


def _settings(groups: list[dict]) -> str:
    names = list(dict.fromkeys(name for group in groups for name in group["settings"]))
    head = ["", *(group["label"] for group in groups)]
    rows = [[name, *(group["settings"].get(name, "–") for group in groups)] for name in names]
    if len(names) < len(groups):  # whichever way is narrower
        head, *rows = zip(head, *rows, strict=True)
    return "What the runs differ in.\n\n" + markdown_table(head, rows)


def cell(metric: str, value: float, sign: str = "") -> str:
    """The value as tables show it, without its unit."""
    return f"{100 * value:{sign}.1f}" if percent(metric) else f"{value:{sign}.3f}"


def _cell(metric: str, summary: dict | None, spread: str, sign: str = "") -> str:
    if summary is None:
        return "–"
    text = cell(metric, summary["mean"], sign)
    if summary[spread] is None:
        return text
    mark = " *" if spread == "interval" and abs(summary["mean"]) > summary["interval"] else ""
    return f"{text} ± {cell(metric, summary[spread])}{mark}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned in its text too, the first to the left and all others to the right."""
    clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [head, *rows]]
    widths = [max(3, *(len(row[column]) for row in clean)) for column in range(len(head))]
    lines = ["| " + " | ".join(_pad(row, widths)) + " |" for row in clean]
    lines.insert(
        1, "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    )
    return "\n".join(lines) + "\n"


def _pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The first column to the left, all others to the right."""
    first, *others = row
    return [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
