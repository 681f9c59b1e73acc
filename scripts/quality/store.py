"""Runs that are done, one JSON line each, and those that are to be done."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from .loop import Run, score
from .tasks import Setting

Files = tuple[str, str] | None


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
        rates: learning rates, the same for all rows of a table.
        seeds: of the runs that are scored. The learning rate is chosen with one that is none of them.
    """

    base: Run
    rates: tuple[float, ...]
    seeds: int

    def choosing(self) -> list[Run]:
        seed = 1000
        return [dataclasses.replace(self.base, lr=lr, seed=seed, split="val") for lr in self.rates]

    def scored(self, store: Store) -> list[Run]:
        """Runs on the test split at the learning rate that is best on the validation split; none while that is open."""
        found = [record for run in self.choosing() if (record := store.get(run)) is not None]
        if len(found) < len(self.rates):
            return []
        best = max(range(len(found)), key=lambda index: found[index]["score"])
        base = dataclasses.replace(self.base, lr=self.rates[best], split="test")
        return [dataclasses.replace(base, seed=seed) for seed in range(self.seeds)]

    @property
    def cost(self) -> float:
        """Of one run, in an arbitrary unit: a step costs about as much as encoding 150 pairs."""
        pairs = self.base.setting.pairs * self.base.setting.epochs
        return pairs * (1 + 150 / self.base.batch_size)


def finished_rows(store: Store) -> list[Row]:
    """Rows made of all runs that are done, of which at least one is scored."""
    runs, rows = store.runs(), []
    bases = {dataclasses.replace(run, lr=0.0, seed=0, split="") for run in runs}
    for base in bases:
        own = [run for run in runs if dataclasses.replace(run, lr=0.0, seed=0, split="") == base]
        row = Row(base=base, rates=tuple(sorted(run.lr for run in own if run.split == "val")), seeds=len(own))
        seeds = [store.get(run) is not None for run in row.scored(store)]
        if seeds and seeds[0]:
            rows.append(dataclasses.replace(row, seeds=seeds.index(False)))
    return rows


def finish(rows: list[Row], store: Store, files: Files, jobs: int, report: Callable[[], None]) -> None:
    """Do all runs of `rows` that the store has not, `jobs` at a time, row by row.

    Args:
        rows: as they are to be done.
        store: to which each finished run is added.
        files: of a task that is read from files.
        jobs: processes, each on one core.
        report: called whenever a row is done.
    """
    pending = deque((row, run) for row in rows for run in row.choosing() if not store.get(run))
    for row in reversed(rows):  # their learning rate was chosen before
        pending.extendleft((row, run) for run in reversed(row.scored(store)) if not store.get(run))
    total = sum(row.cost * (len(row.rates) + row.seeds) for row in rows)
    left = sum(row.cost * _left(row, store) for row in rows)
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=total / 1e6, initial=(total - left) / 1e6, unit="M", smoothing=0.1, bar_format=_BAR) as bar,
        concurrent.futures.ProcessPoolExecutor(jobs, context, initializer=_end_with_parent) as pool,
    ):
        running: dict[concurrent.futures.Future, tuple[Row, Run]] = {}
        while pending or running:
            while pending and len(running) < jobs:
                row, run = pending.popleft()
                running[pool.submit(score, run, files)] = row, run
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                row, run = running.pop(future)
                store.add(run, future.result())
                bar.update(row.cost / 1e6)
                bar.set_postfix_str(f"{run.method} at {run.batch_size}, {run.scale} scale")
                if run.split == "val":
                    pending.extendleft((row, new) for new in reversed(row.scored(store)) if not store.get(new))
                elif all(store.get(other) for other in row.scored(store)):
                    report()


def _end_with_parent() -> None:
    """In a process of the pool, which would wait for work forever if what started it was killed."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_BAR = "{percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} to go{postfix}"


def _left(row: Row, store: Store) -> int:
    """How many runs of a row are not done."""
    scored = row.scored(store)
    choosing = sum(store.get(run) is None for run in row.choosing())
    return choosing + (sum(store.get(run) is None for run in scored) if scored else row.seeds)
