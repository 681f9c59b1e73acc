"""The tables of `openclip-ext report` in Markdown, padded so that they read well in a terminal too."""

import re
import textwrap
from collections.abc import Sequence

from tabulate import tabulate

WIDTH = 100  # of tables and of the lines between them
LABEL_WIDTH = 40  # of the first column of a table of rows, and of settings: what is longer goes on below

#: Metrics that are shares of something, shown in percent.
_SHARE = re.compile(r"R@\d+$|top\d+$|acc\d*$|recall|accuracy")


def tables(report: dict) -> str:
    """Scores, differences to the first group, what is not compared, and the settings in which the groups differ."""
    groups, metrics = report["groups"], report["metrics"]
    parts = (
        [_scores(groups, metrics)]
        if metrics
        else ["No run has been evaluated; train with --val-data, or use openclip-ext eval.\n"]
    )
    if metrics and len(groups) > 1:
        parts.append(_differences(groups, metrics))
    if report["remarks"]:
        lines = (textwrap.fill(f"* {text}", WIDTH, subsequent_indent="  ") for text in report["remarks"])
        parts.append("\n".join(lines) + "\n")
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
        label = wrapped(group["label"], LABEL_WIDTH)
        rows.append([label, str(len(group["runs"])), _epochs(group["runs"]), *cells])
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
        rows.append([wrapped(group["label"], LABEL_WIDTH), _of(group, first), *cells])
    text = (
        f"Difference to {first['label']}: mean ± half the 95 % interval; of seeds in pairs, or else of means; of "
        "one run and one run without an interval. * marks intervals without zero."
    )
    return textwrap.fill(text, WIDTH) + "\n\n" + markdown_table(["", "of", *(title(name) for name in metrics)], rows)


def _of(group: dict, first: dict) -> str:
    """What the differences between two groups are of."""
    kinds = {difference["paired"] for difference in group["differences"].values()}
    if kinds and len(group["runs"]) == len(first["runs"]) == 1:
        return "runs"
    return {True: "seeds", False: "means"}[kinds == {True}] if kinds else "–"


def _settings(groups: list[dict]) -> str:
    names = list(dict.fromkeys(name for group in groups for name in group["settings"]))
    head = ["", *(wrapped(group["label"], LABEL_WIDTH).replace("\n", "") for group in groups)]
    rows = [[name, *(wrapped(group["settings"].get(name) or "–", LABEL_WIDTH) for group in groups)] for name in names]
    if len(names) < len(groups):  # whichever way is narrower
        head, *rows = map(list, zip(head, *rows, strict=True))
        rows = [[wrapped(label, LABEL_WIDTH), *cells] for label, *cells in rows]
    return "What the runs differ in.\n\n" + markdown_table(head, rows)


def verdict(report: dict) -> str:
    """One sentence: which differences to the first group are larger than their intervals, and which are not."""
    first, *others = report["groups"]
    cells = [
        (group["label"], metric, cell)
        for group in others
        for metric in report["metrics"]
        if (cell := group["differences"].get(metric)) and cell["interval"] is not None
    ]
    if not cells:
        return "There is no interval around any difference: that takes two rows, and two seeds of each."
    larger = [
        f"{label} in {metric} ({_cell(metric, cell, 'interval', sign='+').removesuffix(' *')})"
        for label, metric, cell in cells
        if abs(cell["mean"]) > cell["interval"]
    ]
    if not larger and len(cells) == 1:
        return f"The difference to {first['label']} is not larger than its 95 % interval."
    if not larger:
        return f"None of the {len(cells)} differences to {first['label']} is larger than its 95 % interval."
    rest = len(cells) - len(larger)
    are = "is larger than its 95 % interval" if len(larger) == 1 else "are larger than their 95 % intervals"
    others_are = "the other is not" if rest == 1 else f"the other {rest} are not" if rest else "there are no others"
    return f"Of {len(cells)} differences to {first['label']}, {_joined(larger)} {are}; {others_are}."


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


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


def wrapped(text: str, width: int, lines: int | None = None) -> str:
    """In lines of at most `width`, broken at spaces and commas, after slashes and before plus signs where that goes."""
    pieces = [
        part[start : start + width]
        for part in re.split(r"(?<=[/, ])|(?=\+)", text.replace("\n", " "))
        for start in range(0, len(part), width)
    ]
    found = [""]
    for piece in pieces:
        if len(found[-1]) + len(piece.rstrip()) > width:
            found.append("")
        found[-1] += piece
    if lines and len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: width - 1] + "…"]
    return "\n".join(line.rstrip() for line in found)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the first column to the left and all others to the right; several where one would be too wide.

    Each of them has the first column. A cell of several lines goes on in the rows below it.
    """
    table = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    parts, columns = [], [0]
    for column in range(1, len(head)):
        if len(columns) > 1 and _width(table, [*columns, column]) > WIDTH:
            parts.append(_table(table, columns))
            columns = [0]
        columns.append(column)
    return "\n".join([*parts, _table(table, columns)])


def _table(table: Sequence[Sequence[str]], columns: Sequence[int]) -> str:
    head, *rows = ([row[column] for column in columns] for row in table)
    align = ["left", *["right"] * (len(columns) - 1)]
    return tabulate(rows, head, tablefmt="pipe", colalign=align, disable_numparse=True) + "\n"


def _width(table: Sequence[Sequence[str]], columns: Sequence[int]) -> int:
    return max(map(len, _table(table, columns).splitlines()))
