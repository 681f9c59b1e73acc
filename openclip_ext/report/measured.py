"""What a score was measured on, and how: only what is the same stands in one column, and so in one difference."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from openclip_ext.errors import counted
from openclip_ext.report.run_files import Row, RunFiles, metrics

Flags = tuple[str, ...]

#: What validation during training is called where data have to be told apart, the flags that name those data, and those
#: that say how it is measured on them, by how the names of its metrics start.
VALIDATION: dict[str, tuple[str, Flags, Flags]] = {
    "image_to_text_": ("val-data", ("val_data",), ()),
    "text_to_image_": ("val-data", ("val_data",), ()),
    "clip_val_loss": ("val-loss", ("val_data",), ("batch_size",)),  # among the pairs of a batch
    "val_generative_loss": ("val-data", ("val_data",), ()),
    "imagenet-zeroshot": ("imagenet-val", ("imagenet_val",), ("classes",)),
    "imagenetv2-zeroshot": ("imagenet-v2", ("imagenet_v2",), ("classes",)),
    "knn-": ("probe-val", ("probe_val", "probe_train"), ()),
    "linear-probe-": ("probe-val", ("probe_val", "probe_train"), ()),
}
_OTHERS = ("zero-shot", ("zero_shot",), ("templates", "class_names"))
_TASKS = frozenset(task for task, *_ in (*VALIDATION.values(), _OTHERS))
_OF_PAIRS = ("val-data", "val-loss")
_DEFAULTS = {"batch_size": "unknown", "classes": "all"}  # of flags that say how; of others "by default"


@dataclasses.dataclass(frozen=True)
class Data:
    """What a score depends on besides the model, as far as it was recorded; None: it was not.

    Attributes:
        path: as it was given.
        images, texts: how many.
        classes: among how many an image's is chosen.
        how: what else was chosen, such as templates, in words.
        checksum: of their content.
    """

    path: str | None = None
    images: int | None = None
    texts: int | None = None
    classes: int | None = None
    how: tuple[str, ...] = ()
    checksum: str | None = None

    def same(self, other: "Data") -> bool:
        """By how it was measured, and by content where both have a checksum, else by path and numbers."""
        if (self.classes, self.how) != (other.classes, other.how):
            return False
        if self.checksum and other.checksum:
            return (self.checksum, self.images, self.texts) == (other.checksum, other.images, other.texts)
        return (self.path, self.images) == (other.path, other.images)


_COUNTED = {"num_templates": "template", "candidates": "candidate"}  # the latter are ranked again


def of_result(result: dict[str, Any]) -> Data:
    """Of a task's result in a report of `openclip-ext eval`."""
    content = result.get("data") or {}
    path = result.get("dataset")
    return Data(
        path=None if path is None else os.path.normpath(str(path)),
        images=content.get("images", result.get("num_samples")),
        texts=content.get("texts", result.get("num_texts")),
        classes=result.get("num_classes"),
        how=tuple(counted(result[name], word) for name, word in _COUNTED.items() if result.get(name) is not None),
        checksum=content.get("checksum"),
    )


def of_validation(run: RunFiles, row: Row, metric: str) -> Data:
    """Of a metric in a row of validation: by the values of its flags, and the number of pairs where it is of pairs."""
    task, flags, chosen = _validation(metric)
    given = run.params.flags_at(row.get("epoch", 0))
    values = [str(given[flag]) for flag in flags if given.get(flag) is not None]
    how = [(flag, given.get(flag) or _DEFAULTS.get(flag, "by default")) for flag in chosen]
    number = int(row["num_samples"]) if task in _OF_PAIRS and "num_samples" in row else None
    return Data(
        path=", ".join(map(os.path.normpath, values)) or None,
        images=number,
        texts=number,
        how=tuple(f"{flag.replace('_', '-')} {value}" for flag, value in how),
    )


def _validation(metric: str) -> tuple[str, Flags, Flags]:
    name = metric.rpartition("/")[2].removeprefix("ema-")
    return next((value for start, value in VALIDATION.items() if name.startswith(start)), _OTHERS)


Columns = dict[
    str, list[tuple[str, list[Data]]]
]  # by task, where data differ: (name of a column's data, what they are)


def columns(runs: Sequence[RunFiles]) -> Columns:
    """The tasks that were not measured on the same data everywhere, with a short name for each of their data."""
    found: dict[str, list[Data]] = {}
    for run in runs:
        for task, data in _measured(run):
            found.setdefault(task, []).append(data)
    split = {task: _classes(found[task]) for task in found}
    return {
        task: list(zip(_names([same[0] for same in classes]), classes, strict=True))
        for task, classes in split.items()
        if len(classes) > 1
    }


def _measured(run: RunFiles) -> Iterator[tuple[str, Data]]:
    for report in run.evaluations_of_the_end:
        for task, result in report["tasks"].items():
            yield task, of_result(result)
    for row in run.validation:
        for metric in metrics(row):
            yield _validation(metric)[0], of_validation(run, row, metric)


def _classes(found: Sequence[Data]) -> list[list[Data]]:
    """Those that are the same, together. What has no checksum may be several of those that have: then it is itself."""
    classes: list[list[Data]] = []
    for data in sorted(dict.fromkeys(found), key=lambda data: data.checksum is None):  # stable: in order of the runs
        fitting = [same for same in classes if data.same(same[0])]
        if len(fitting) == 1:
            fitting[0].append(data)
        else:
            classes.append([data])
    return sorted(classes, key=lambda same: min(found.index(data) for data in same))


def _names(different: Sequence[Data]) -> list[str]:
    """What tells them apart, as short as it can be: of paths, else how it was measured, else numbers or checksums."""
    parts: list[Callable[[Data], str]] = [
        dict(zip(different, _path_parts([data.path or "unknown" for data in different]), strict=True)).__getitem__,
        lambda data: ", ".join(word for word in data.how if not all(word in other.how for other in different)),
        *(lambda data, kind=kind: _number(data, kind) for kind in ("images", "texts", "classes")),
        lambda data: (data.checksum or "no checksum")[:11],
    ]
    names = [""] * len(different)
    for part in parts:
        words = [part(data) for data in different]
        if len(set(names)) < len(names) and len(set(words)) > 1:
            names = [", ".join(filter(None, pair)) for pair in zip(names, words, strict=True)]
    return [name if names.count(name) == 1 else f"{name} {index}".strip() for index, name in enumerate(names, start=1)]


def _number(data: Data, kind: str) -> str:
    value = getattr(data, kind)
    return "" if value is None else f"{value:,} {kind}"


def _path_parts(paths: Sequence[str]) -> list[str]:
    """The last folder in which all differ; where there is none, what is left between their common start and end."""
    split = [path.replace(", ", "/").split("/") for path in paths]
    unique = set(paths)
    for back in range(1, min(map(len, split)) + 1):
        parts = [words[-back] for words in split]
        if len(set(parts)) == len(unique):
            return parts
    start = len(os.path.commonprefix(split))
    end = len(os.path.commonprefix([words[start:][::-1] for words in split]))
    rest = ["/".join(words[start : len(words) - end]) for words in split]
    return rest if all(rest) else list(paths)


def told_apart(run: RunFiles, apart: Columns) -> RunFiles:
    """The run with names of data in the names of its tasks and metrics, where `columns` has found several."""
    if not apart:
        return run
    evaluations = [
        report | {"tasks": {_name(task, of_result(result), apart): result for task, result in report["tasks"].items()}}
        for report in run.evaluations
    ]
    validation = [
        {name: value for name, value in row.items() if name not in metrics(row)}
        | {_name_of_metric(run, row, name, apart): value for name, value in metrics(row).items()}
        for row in run.validation
    ]
    return dataclasses.replace(run, evaluations=evaluations, validation=validation)


def _name(task: str, data: Data, apart: Columns) -> str:
    return next((f"{task} ({name})" for name, same in apart.get(task, ()) if data in same), task)


def _name_of_metric(run: RunFiles, row: Row, metric: str, apart: Columns) -> str:
    task, *_ = _validation(metric)
    return f"{_name(task, of_validation(run, row, metric), apart)}/{metric}" if task in apart else metric


def unqualified(metric: str) -> str:
    """The metric's name without that of its data."""
    task, _, score = metric.rpartition("/")
    task, _, data = task.partition(" (")
    return score if not task or (data and task in _TASKS) else f"{task}/{score}"


def remarks(apart: Columns) -> list[str]:
    """For each task with several data a line that says so."""
    return [
        f"{task}: not measured alike, so columns of their own and no difference between them: "
        + "; ".join(f"({name}) {_described(same[0])}" for name, same in classes)
        for task, classes in apart.items()
    ]


def _described(data: Data) -> str:
    numbers = (_number(data, kind) for kind in ("images", "texts", "classes"))
    return ", ".join(filter(None, (data.path or "path unknown", *numbers, *data.how)))


def chances(runs: Sequence[RunFiles]) -> dict[str, float]:
    """By metric, the score of random guesses, where it is known. Runs as `told_apart` returns them."""
    found: dict[str, float | None] = {}
    for run in runs:
        for report in run.evaluations_of_the_end:
            for task, result in report["tasks"].items():
                found |= {f"{task}/{score}": _chance(score, of_result(result)) for score in result["scores"]}
        for row in run.validation:
            found |= {name: _chance(name, of_validation(run, row, name)) for name in metrics(row)}
    return {name: chance for name, chance in found.items() if chance is not None}


def _chance(metric: str, data: Data) -> float | None:
    """Of top-k among classes, and of recall@k where a query has one partner among the candidates."""
    score = metric.rpartition("/")[2].removeprefix("ema-")
    for start, candidates in (
        ("top", data.classes),
        ("text_to_image_R@", data.images),
        ("image_to_text_R@", data.texts if data.texts == data.images else None),
    ):
        number = score.removeprefix(start)
        if number != score and number.isdecimal() and candidates:
            return min(1.0, int(number) / candidates)
    return None
