"""Many runs, several at a time, each on one core."""

import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from tqdm import tqdm

from openclip_ext.processes import worker_pool

from .store import Store


class Row(Protocol):
    """Runs that make one line of a table."""

    def wanted(self, store: Store) -> list:
        """Runs that are to be done next; none: all are done."""
        ...

    def left(self, store: Store) -> int:
        """About how many runs are to be done."""
        ...

    @property
    def cost(self) -> float:
        """Of one run, in seconds or any other unit."""
        ...


def finish(
    rows: Sequence[Row], store: Store, work: Callable[[Any], dict], jobs: int, report: Callable[[], object],
    title: Callable[[Any], str] = str,
) -> None:  # fmt: skip
    """Do all runs of `rows` that the store has not, `jobs` at a time, row by row.

    Args:
        rows: as they are to be done.
        store: to which each finished run is added.
        work: does one run in a process of its own, and returns what it found.
        jobs: processes, each on one core.
        report: called whenever a row is done.
        title: of a run, for the progress bar.
    """
    left, done = sum(row.cost * row.left(store) for row in rows), 0
    with (
        tqdm(total=left / 1e6, unit="M", smoothing=0.1, bar_format=_BAR) as bar,
        worker_pool(jobs, begin=functools.partial(torch.set_num_threads, 1)) as pool,
    ):
        running: dict[Any, concurrent.futures.Future] = {}
        while True:
            wanted = (run for row in rows for run in row.wanted(store) if run not in running)
            for run in itertools.islice(wanted, jobs - len(running)):
                running[run] = pool.submit(work, run)
            if not running:
                return
            concurrent.futures.wait(running.values(), return_when=concurrent.futures.FIRST_COMPLETED)
            for run in [run for run, future in running.items() if future.done()]:
                store.add(run, running.pop(run).result())
                bar.set_postfix_str(title(run))
            still = sum(row.cost * row.left(store) for row in rows)
            bar.total, bar.n = max(bar.total, still / 1e6), max(bar.total, still / 1e6) - still / 1e6
            bar.refresh()
            if (finished := sum(not row.wanted(store) for row in rows)) > done:
                done = finished
                report()


_BAR = "{percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} to go{postfix}"
