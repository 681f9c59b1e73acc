"""What rows cost beside each other: all are trained at once, in turns."""

import dataclasses
import itertools
import time
from collections.abc import Mapping

import torch
from runs.store import Store
from tqdm import tqdm

from .loop import Run, begin, steps
from .store import finished_rows
from .tasks import Files

PARTS = 40  # of each training


def time_rows(task: str, store: Store, files: Files = ()) -> None:
    """Measure the seconds of every row of a task that is scored, with its first seed, and add them to the store."""
    firsts = [row.scored(store)[0] for row in finished_rows(store) if row.base.task == task]
    for run, seconds in take_turns({run: store.require(run)["steps"] for run in firsts}, files).items():
        store.add(timed(run), {"seconds": seconds})


def timed(run: Run) -> Run:
    """By what the store knows the seconds of a row that `run` belongs to."""
    return dataclasses.replace(run, seed=0, split="time")


def take_turns(runs: Mapping[Run, int], files: Files = ()) -> dict[Run, float]:
    """CPU seconds that training takes on one core, by run.

    Each takes a part of its steps, then the next one does, and so on: whatever slows the machine down for a while slows
    down all, and the seconds compare.

    Args:
        runs: and how many steps each has.
        files: of their task.
    """
    torch.set_num_threads(1)
    training = {run: steps(run, *begin(run, files)) for run in runs}
    seconds = dict.fromkeys(runs, 0.0)
    for _, run in tqdm(itertools.product(range(PARTS), runs), total=PARTS * len(runs), unit="part"):
        started = time.process_time()
        for _ in itertools.islice(training[run], -(-runs[run] // PARTS)):
            pass
        seconds[run] += time.process_time() - started
    return seconds
