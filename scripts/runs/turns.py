"""Times of functions that take turns."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds_of(function: Callable[[], object], cuda: bool) -> float:
    """CPU seconds of a call; on a GPU those that pass."""
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    function()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def medians(functions: Mapping[str, Callable[[], object]], repeats: int, cuda: bool) -> dict[str, float]:
    """Median seconds of each function, called in turns."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            taken[name].append(seconds_of(function, cuda))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
