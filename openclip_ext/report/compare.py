"""`openclip-ext report`: runs beside each other, as tables, as JSON, and as a picture."""

import argparse
import dataclasses
import datetime
import fnmatch
import json
import math
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.files import make_out_folder
from openclip_ext.report import measured
from openclip_ext.report.intervals import half_width, half_width_of_difference
from openclip_ext.report.params import shown
from openclip_ext.report.run_files import Row, RunFiles, is_run, read_run
from openclip_ext.report.tables import tables

#: What is shown where `--metric` says nothing else: patterns of names, in this order.
HEADLINES = ("*top1", "*R@1", "*acc1", "clip_val_loss")
CURVE_POINTS = 500  # of a training curve in the report; a longer one is averaged within windows

#: Runs that differ only in these are one row.
_NOT_A_SETTING = frozenset({"seed", *upstream.flags_with(upstream.Role.BOOKKEEPING)})


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        label: what tells it from the others, short.
        settings: parameters in which the groups that have them differ.
        runs: at least one.
    """

    label: str
    settings: dict[str, str]
    runs: list[RunFiles]

    def values(self, metric: str) -> list[float]:
        """The metric at the end of each run that has it."""
        return [run.scores[metric] for run in self.runs if metric in run.scores]

    def by_seed(self, metric: str) -> dict[int, float] | None:
        """The metric by seed; None where a seed is unknown or occurs twice."""
        seeds = [run.params.flags.get("seed") for run in self.runs]
        if None in seeds or len(set(seeds)) < len(seeds):
            return None
        return {run.params.flags["seed"]: run.scores[metric] for run in self.runs if metric in run.scores}


def run_report(args: argparse.Namespace) -> dict:
    """Compare the runs, print the tables, write `report.md`, `report.json` and `report.png` into `--out`.

    Returns:
        What `report.json` holds; see `compare`.

    Raises:
        UserError: a folder that is no run or holds nothing to report, or a metric that no run has.
    """
    runs = [read_run(path) for path in _folders(args.runs)]
    for run in runs:
        for name in run.earlier:
            same = name == run.last_checkpoint
            why = "that file was written anew since" if same else f"{run.last_checkpoint} came later"
            print(f"{run.name}: what openclip-ext eval found of {name} is left out: {why}")
    report = compare(group(runs), args.metric)
    out = Path(args.out)
    make_out_folder(out)
    write_report(report, out)
    return report


def write_report(report: dict, out: Path) -> None:
    """Write a report as Markdown, JSON and PNG into a folder, and print its tables."""
    from openclip_ext.report.picture import draw_report

    draw_report(report, str(out / "report.png"))
    (out / "report.md").write_text(f"# Runs compared\n\n{tables(report)}\n![curves and scores](report.png)\n")
    (out / "report.json").write_text(json.dumps(_without_nan(report), indent=1))
    print(tables(report))
    print(f"{out}: report.md, report.json, report.png")


def _folders(paths: Sequence[str]) -> list[str]:
    """Folders of runs; a folder that is none stands for the runs in it.

    Raises:
        UserError: a folder is named twice.
    """
    folders: list[str] = []
    for path in paths:
        inside = sorted((str(folder) for folder in Path(path).glob("*/") if is_run(folder)), key=_natural)
        folders += [path] if is_run(Path(path)) or not inside else inside
    resolved = [os.path.realpath(folder) for folder in folders]
    for folder, real in zip(folders, resolved, strict=True):
        if resolved.count(real) > 1:
            raise UserError(f"{folder}: is named twice; name each run once")
    return folders


def _natural(name: str) -> list:
    """A key that sorts `run-10` after `run-9`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def group(runs: Sequence[RunFiles]) -> list[Group]:
    """Runs in groups that differ in more than the seed, in the order of their first runs.

    A run without known flags is a group of its own.

    Raises:
        UserError: a run has neither training rows nor scores.
    """
    for run in runs:
        if not run.training and not run.scores:
            raise UserError(f"{run.folder}: has reported neither a step nor an evaluation yet; leave it out")
    members: dict[object, list[RunFiles]] = {}
    for run in runs:
        key = frozenset(_settings(run).items()) if run.params.flags else run.folder
        members.setdefault(key, []).append(run)
    settings = [_settings(runs[0]) for runs in members.values()]
    names = sorted({name for row in settings for name in row})
    differing = [name for name in names if len({row[name] for row in settings if name in row}) > 1]
    labels = _labels(list(members.values()))
    return [
        Group(label, {name: row[name] for name in differing if name in row}, runs)
        for label, row, runs in zip(labels, settings, members.values(), strict=True)
    ]


def _settings(run: RunFiles) -> dict[str, str]:
    """Values in words; of a setting that was changed on the way all of them, and when."""
    versions, flags = run.params.versions, run.params.flags
    settings = {**versions, **{name: shown(value) for name, value in flags.items()}, **run.params.changes()}
    return {name: value for name, value in settings.items() if name not in _NOT_A_SETTING}


def _changes(runs: Sequence[RunFiles]) -> list[str]:
    """A line per run that was resumed with other settings."""
    stories = [
        (run.name, [f"{name} {story}" for name, story in run.params.changes().items() if name not in _NOT_A_SETTING])
        for run in runs
    ]
    return [f"{name}: was resumed with other settings: {'; '.join(parts)}" for name, parts in stories if parts]


def _labels(groups: list[list[RunFiles]]) -> list[str]:
    """What the names of a group's runs have in common, such as `clip` of `clip-0` and `clip-1`, made unique."""
    labels = []
    for runs in groups:
        common = os.path.commonprefix([run.name for run in runs])
        if len(runs) > 1:
            common = re.sub(r"([-_ .]?(seed|s))?[-_ .=]*$", "", common)
        labels.append(common or runs[0].name)
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: index + 1].count(label)})"
        for index, label in enumerate(labels)
    ]


def compare(groups: Sequence[Group], patterns: Sequence[str] | None = None) -> dict:
    """Everything the report says, ready for JSON.

    Args:
        groups: the first is what the others are compared with.
        patterns: of names of metrics to show, as the shell's; None: `HEADLINES`.

    Returns:
        `created`, `versions`; `metrics`: names of those shown in tables and picture; `chance`: by metric the score of
        random guesses, where it is known; `remarks`: lines about what was changed on the way and
        what is not compared; and `groups`, each with

        * `label`, `settings` (parameters in which the groups differ, with this group's values),
        * `runs`: `name, folder, seed, epochs` (completed ones at the last evaluation, None without any), `scores`
          (all metrics at the end), `training` (columns such as `step`, `loss`, `lr`, at most 500 points, means over
          windows where the run has more) and `validation` (columns `epoch` and metrics),
        * `scores`: by metric `mean, std, interval, n` over the group's runs: sample standard deviation, and half the
          width of the mean's 95 % confidence interval; both None from a single run,
        * `differences`: by metric `mean, interval, paired, n, values`: what the group has more than the first one;
          `paired` means over the `n` seeds that both have, whose differences are `values`, else it is the difference
          of the means with Welch's interval. Empty for the first group.
        * `targets`: by column of `training`, the objective whose value it is: only what has the same can be compared.

    Raises:
        UserError: a pattern fits no metric of any run.
    """
    apart = measured.columns([run for group in groups for run in group.runs])
    groups = [
        dataclasses.replace(group, runs=[measured.told_apart(run, apart) for run in group.runs]) for group in groups
    ]
    runs = [run for group in groups for run in group.runs]
    names = {name: None for run in runs for name in run.scores}  # a set that keeps order
    return {
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "versions": {"openclip-ext": version("openclip-ext")},
        "metrics": shown_metrics(list(names), patterns),
        "chance": measured.chances(runs),
        "remarks": _changes(runs) + measured.remarks(apart),
        "groups": [
            {
                "label": group.label,
                "settings": group.settings,
                "targets": _targets(group.runs[0]),
                "runs": [_run(run) for run in group.runs],
                "scores": {name: _summary(values) for name in names if (values := group.values(name))},
                "differences": {} if group is groups[0] else _differences(group, groups[0], list(names)),
            }
            for group in groups
        ],
    }


def shown_metrics(names: list[str], patterns: Sequence[str] | None) -> list[str]:
    """The names that the patterns fit, in their order; of `HEADLINES` where there are none, or else the first four.

    A name that says which of several data it is of is also found by the name without.

    Raises:
        UserError: a pattern fits nothing.
    """
    shown: list[str] = []
    for pattern in patterns or HEADLINES:
        found = [name for name in names if fnmatch.filter([name, measured.unqualified(name)], pattern)]
        if patterns and not found:
            raise UserError(f"--metric {pattern}: there is no such metric; there are: {', '.join(names) or 'none'}")
        shown += [name for name in found if name not in shown]
    return shown or names[:4]


def _targets(run: RunFiles) -> dict[str, str]:
    """By loss in `training`, what is minimised; empty where that is not known."""
    flags = run.params.flags
    if not flags:
        return {}
    size = math.prod(int(flags.get(name) or 1) for name in ("batch_size", "accum_freq", "world_size"))
    base = _base_loss(run)
    targets = {f"{term.partition('=')[0]}_loss": f"{term}, batch {size}" for term in flags.get("loss_term") or ()}
    targets["contrastive_loss"] = f"{base}, batch {size}"
    return targets | {"loss": f"{' + '.join([base, *(flags.get('loss_term') or ())])}, batch {size}"}


def _base_loss(run: RunFiles) -> str:
    """The loss without terms, and its options; of what was changed on the way all values, and when."""
    flags, changes = run.params.flags, run.params.changes()
    loss = changes.get("loss") or flags.get("loss") or ("siglip" if flags.get("siglip") else "clip")
    # Each of the flags of recent pairs can be given as `--loss-arg` too, and means the same.
    said = {
        name: changes.get(name) or ("" if flags.get(name) is None else shown(flags[name]))
        for name in ("loss_arg", "recent_batches", "recent_check", "recent_limit")
    }
    options = [value if name == "loss_arg" else f"{name}={value}" for name, value in said.items() if value]
    return " ".join(filter(None, (loss, ", ".join(options))))


def _run(run: RunFiles) -> dict:
    return {
        "name": run.name,
        "folder": str(run.folder),
        "seed": run.params.flags.get("seed"),
        "epochs": run.validation[-1]["epoch"] if run.validation else None,
        "scores": run.scores,
        "training": _columns(run.training, CURVE_POINTS),
        "validation": _columns(run.validation, len(run.validation)),
    }


def _columns(rows: list[Row], points: int) -> dict[str, list[float]]:
    """Columns of rows, each value the mean over a window where there are more rows than points; NaN where missing."""
    names = {name: None for row in rows for name in row}
    windows = np.array_split(np.arange(len(rows)), min(points, len(rows))) if rows else []
    columns = {name: np.array([row.get(name, np.nan) for row in rows], dtype=float) for name in names}
    return {name: [float(values[window].mean()) for window in windows] for name, values in columns.items()}


def _summary(values: list[float]) -> dict:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "interval": half_width(values), "n": len(values)}


def _differences(group: Group, first: Group, names: list[str]) -> dict[str, dict]:
    differences = {name: _difference(group, first, name) for name in names}
    return {name: difference for name, difference in differences.items() if difference}


def _difference(group: Group, first: Group, metric: str) -> dict | None:
    """What the group has more of the metric than the first; None where one of them has not been measured."""
    own, base = group.by_seed(metric) or {}, first.by_seed(metric) or {}
    shared = sorted(own.keys() & base.keys())
    if shared and (len(shared) > 1 or len(own) == len(base) == 1):
        values = [own[seed] - base[seed] for seed in shared]
        mean = float(np.mean(values))
        return {"mean": mean, "interval": half_width(values), "paired": True, "n": len(values), "values": values}
    values, others = group.values(metric), first.values(metric)
    if not values or not others:
        return None
    mean = float(np.mean(values) - np.mean(others))
    interval = half_width_of_difference(values, others)
    return {"mean": mean, "interval": interval, "paired": False, "n": len(values), "values": []}


def _without_nan(value):
    """The same with None for what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
