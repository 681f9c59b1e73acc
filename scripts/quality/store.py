"""Runs that are done, one JSON line each, and those that are to be done."""

import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable

from tqdm import tqdm

from .loop import Run, score
from .tasks import Files, Setting


class Store:
    """What runs have found, in a file to which a line is added by each. A line that was cut off does not count.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.found: dict[str, dict] = {}
        if not os.path.exists(path):
            return
        with open(path) as file:
            for line in file:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.found[_key(record["run"])] = record["found"]

    def get(self, run: Run) -> dict | None:
        """What the run has found; None: it is not done."""
        return self.found.get(_key(dataclasses.asdict(run)))

    def require(self, run: "Run") -> dict:
        """The record of a run that is finished."""
        record = self.get(run)
        assert record is not None
        return record

    def runs(self) -> list[Run]:
        """All that are done."""
        records = [json.loads(key) for key in self.found]
        return [Run(**record | {"setting": Setting(**record["setting"])}) for record in records]

    def add(self, run: Run, found: dict) -> None:
        record = {"run": dataclasses.asdict(run), "found": found}
        self.found[_key(record["run"])] = found
        with open(self.path, "a+b") as file:
            if file.tell() and not _ends_line(file):
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")


def _key(run: dict) -> str:
    return json.dumps(run, sort_keys=True)


def _ends_line(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one batch size: runs that choose its learning rate, and runs that are scored.

    Attributes:
        base: what all its runs share; `lr`, `seed` and `split` of it are not looked at.
        rates: learning rates to choose from, in ascending order, the same for all rows of a table.
        seeds: of the runs that are scored. The learning rate is chosen with one that is none of them.
    """

    base: Run
    rates: tuple[float, ...]
    seeds: int

    def wanted(self, store: Store) -> list[Run]:
        """Runs that are to be done next: those that choose the learning rate, then those that are scored; none: done.

        The choice begins in the middle of the rates and climbs: while the best one so far has a neighbour that has not
        been tried, that is next.
        """
        known = self.validation(store)
        best = max(known, key=known.__getitem__, default=self.rates[len(self.rates) // 2])
        at = self.rates.index(best)
        near = [lr for lr in self.rates[max(at - 1, 0) : at + 2] if lr not in known]
        runs = [self._choosing(lr) for lr in near] or [
            dataclasses.replace(self.base, lr=best, seed=seed, split="test") for seed in range(self.seeds)
        ]
        return [run for run in runs if store.get(run) is None]

    def validation(self, store: Store) -> dict[float, float]:
        """Scores on the validation split by learning rate, of those that were tried."""
        found = {lr: store.get(self._choosing(lr)) for lr in self.rates}
        return {lr: record["score"] for lr, record in found.items() if record is not None}

    def scored(self, store: Store) -> list[Run]:
        """Runs on the test split at the learning rate that is best on the validation split, as far as they are done."""
        known = self.validation(store)
        best = max(known, key=known.__getitem__)
        runs = [dataclasses.replace(self.base, lr=best, seed=seed, split="test") for seed in range(self.seeds)]
        return [run for run in runs if store.get(run) is not None]

    def left(self, store: Store) -> int:
        """About how many runs are to be done; where the choice is open, two more than are known to be."""
        wanted = self.wanted(store)
        return len(wanted) + (2 + self.seeds if wanted and wanted[0].split == "val" else 0)

    def _choosing(self, lr: float) -> Run:
        return dataclasses.replace(self.base, lr=lr, seed=1000, split="val")

    @property
    def cost(self) -> float:
        """Of one run, in an arbitrary unit: a step costs about as much as encoding 150 pairs."""
        pairs = self.base.setting.pairs * self.base.setting.epochs
        return pairs * (1 + 150 / self.base.batch_size)


def finished_rows(store: Store) -> list[Row]:
    """Rows made of all runs that are done, of which at least one is scored."""
    rows = []
    for base, own in itertools.groupby(sorted(store.runs(), key=repr), key=_base):
        runs = list(own)
        row = Row(base=base, rates=tuple(sorted({run.lr for run in runs})), seeds=max(run.seed for run in runs) + 1)
        if row.validation(store) and row.scored(store):
            rows.append(row)
    return rows


def _base(run: Run) -> Run:
    return dataclasses.replace(run, lr=0.0, seed=0, split="")


def finish(rows: list[Row], store: Store, files: Files, jobs: int, report: Callable[[], None]) -> None:
    """Do all runs of `rows` that the store has not, `jobs` at a time, row by row.

    Args:
        rows: as they are to be done.
        store: to which each finished run is added.
        files: of a task that is read from files.
        jobs: processes, each on one core.
        report: called whenever a row is done.
    """
    left, done = sum(row.cost * row.left(store) for row in rows), 0
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=left / 1e6, unit="M", smoothing=0.1, bar_format=_BAR) as bar,
        concurrent.futures.ProcessPoolExecutor(jobs, context, initializer=_end_with_parent) as pool,
    ):
        running: dict[Run, concurrent.futures.Future] = {}
        while True:
            wanted = (run for row in rows for run in row.wanted(store) if run not in running)
            for run in itertools.islice(wanted, jobs - len(running)):
                running[run] = pool.submit(score, run, files)
            if not running:
                return
            concurrent.futures.wait(running.values(), return_when=concurrent.futures.FIRST_COMPLETED)
            for run in [run for run, future in running.items() if future.done()]:
                store.add(run, running.pop(run).result())
                bar.set_postfix_str(f"{run.method} at {run.batch_size}, {run.scale} scale")
            still = sum(row.cost * row.left(store) for row in rows)
            bar.total, bar.n = max(bar.total, still / 1e6), max(bar.total, still / 1e6) - still / 1e6
            bar.refresh()
            if (finished := sum(not row.wanted(store) for row in rows)) > done:
                done = finished
                report()


def _end_with_parent() -> None:
    """In a process of the pool, which would wait for work forever if what started it was killed."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_BAR = "{percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} to go{postfix}"
