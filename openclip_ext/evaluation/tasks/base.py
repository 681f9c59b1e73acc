"""What a task is, running several, and their results as a table. Imports no torch."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from tabulate import tabulate

if TYPE_CHECKING:
    from openclip_ext.evaluation.loading import LoadedModel
    from openclip_ext.evaluation.ranks import Ranks


class Task(Protocol):
    """What can be measured of a model. Making one checks all that can be checked without a model.

    Attributes:
        name: its key in the report; of a command line's tasks no two have the same.
        dataset: the path that was given.
    """

    name: str
    dataset: str

    def run(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, Any]:
        """What the report says of it: `num_samples`, `scores` (name to number), and anything else worth knowing.

        Ranks share the work; those other than the first return nothing.

        Raises:
            UserError: data that cannot be used.
        """


def run_tasks(model: "LoadedModel", tasks: Iterable[Task], ranks: "Ranks") -> dict[str, dict[str, Any]]:
    """By task: `dataset`, what its `run` returns, and `seconds`; nothing on ranks other than the first."""
    results = {}
    for task in tasks:
        start = time.perf_counter()
        if result := task.run(model, ranks):
            results[task.name] = {"dataset": task.dataset, **result, "seconds": round(time.perf_counter() - start, 3)}
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results for people: tasks with the same scores below each other, and their notes."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, result in results.items():
        kinds.setdefault(tuple(result["scores"]), []).append(name)
    return "\n\n".join(_part(scores, {name: results[name] for name in names}) for scores, names in kinds.items())


def _part(scores: tuple[str, ...], results: dict[str, dict[str, Any]]) -> str:
    head = ["", "samples", *scores, "seconds"]
    rows = [
        [name, str(result["num_samples"]), *(f"{result['scores'][score]:.4f}" for score in scores),
         f"{result['seconds']:.1f}"]
        for name, result in results.items()
    ]  # fmt: skip
    alignment = ["left", *("right" for _ in head[1:])]
    notes = [f"{name}: {result['note']}" for name, result in results.items() if result.get("note")]
    return "\n".join([tabulate(rows, head, tablefmt="plain", colalign=alignment, disable_numparse=True), *notes])
