"""Processes that work for this one: forked where the system can, ended when this one ends."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext


def worker_context(modules: Sequence[str] = ()) -> BaseContext:
    """What starts processes by forking one that has imported `modules` once; anew where nothing forks, on Windows.

    All contexts share the process that is forked: modules that are named after it has started are imported by each.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    if modules:
        context.set_forkserver_preload(list(modules))
    return context


def worker_pool(
    processes: int, modules: Sequence[str] = (), begin: Callable[[], object] | None = None
) -> ProcessPoolExecutor:
    """Processes that are handed functions with their arguments, and end with this one even if it is killed.

    Args:
        processes: how many, at most.
        modules: as in `worker_context`.
        begin: called first in each.
    """
    return ProcessPoolExecutor(processes, worker_context(modules), _begin, (begin,))


def _begin(begin: Callable[[], object] | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)
