"""Tasks of `openclip-ext eval`: their flags, and running them. Imports no torch: the flags are part of `--help`.

A task family is a module with `TITLE`, `add_arguments(group)` and `tasks(args) -> list[Task]`.
"""

import argparse
import os
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from openclip_ext.errors import UserError
from openclip_ext.evaluation.tasks import probes, retrieval, zero_shot

if TYPE_CHECKING:
    from openclip_ext.evaluation.loading import LoadedModel

FAMILIES = (zero_shot, retrieval, probes)


class Task(Protocol):
    """What can be measured of a model. Making one checks all that can be checked without a model.

    Attributes:
        name: its key in the report; of a command line's tasks no two have the same.
        dataset: the path that was given.
    """

    name: str
    dataset: str

    def run(self, model: "LoadedModel") -> dict[str, Any]:
        """What the report says of it: `num_samples`, `scores` (name to number), and anything else worth knowing.

        Raises:
            UserError: data that cannot be used.
        """


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all families, and those of how data is loaded."""
    for family in FAMILIES:
        family.add_arguments(parser.add_argument_group(family.TITLE))
    group = parser.add_argument_group("loading")
    group.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    cores = min(4, os.cpu_count() or 1)
    group.add_argument("--workers", type=int, default=cores, help="processes that load data (default: %(default)s)")
    group.add_argument(
        "--feature-cache", metavar="FOLDER",
        help="where features for retrieval and probes are kept (default: openclip-ext/features in ~/.cache)",
    )  # fmt: skip
    group.add_argument("--no-feature-cache", action="store_true", help="neither keep them nor take kept ones")


def tasks_from(args: argparse.Namespace, *, required: bool = True) -> list[Task]:
    """What the flags of `add_task_arguments` ask for, in the order of the families.

    Raises:
        UserError: nothing is asked for and something is `required`, two tasks would have one name, or a path does
            not fit.
    """
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    tasks = [task for family in FAMILIES for task in family.tasks(args)]
    if required and not tasks:
        raise UserError("nothing to evaluate: name data with --imagenet-val, --zero-shot, or another; see --help")
    names = [task.name for task in tasks]
    if twice := [task for task in tasks if names.count(task.name) > 1]:
        raise UserError(f"{twice[0].dataset} and {twice[1].dataset}: both would be called {twice[0].name}; rename one")
    return tasks


def run_tasks(model: "LoadedModel", tasks: Iterable[Task]) -> dict[str, dict[str, Any]]:
    """By task: `dataset`, what its `run` returns, and `seconds`."""
    results = {}
    for task in tasks:
        start = time.perf_counter()
        result = task.run(model)
        results[task.name] = {"dataset": task.dataset, **result, "seconds": round(time.perf_counter() - start, 3)}
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results for people: tasks with the same scores below each other."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, result in results.items():
        kinds.setdefault(tuple(result["scores"]), []).append(name)
    return "\n\n".join(_grid(scores, {name: results[name] for name in names}) for scores, names in kinds.items())


def _grid(scores: Sequence[str], results: dict[str, dict[str, Any]]) -> str:
    head = ["", "samples", *scores, "seconds"]
    rows = [
        [name, str(result["num_samples"]), *(f"{result['scores'][score]:.4f}" for score in scores),
         f"{result['seconds']:.1f}"]
        for name, result in results.items()
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = zip(row[1:], widths[1:], strict=True)
        lines.append("  ".join([f"{row[0]:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in cells)]))
    notes = [f"{name}: {result['note']}" for name, result in results.items() if result.get("note")]
    return "\n".join(lines + notes)
