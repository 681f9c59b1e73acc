"""Real gloo ranks for tests: processes that start once and run many functions."""

import multiprocessing.connection
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch

# Bound before any group exists: its functions keep the group that was the default one when they were imported.
import torch.distributed.nn

from openclip_ext.processes import worker_context


class RankPool:
    """Processes that run a function together as ranks of one gloo group.

    They start on first use and import torch once; every `run` makes a fresh process group. Use as a context manager,
    or call `close`.

    Example:
        >>> with RankPool() as ranks:  # doctest: +SKIP
        ...     ranks.run(my_module.my_function, 2, "argument")
    """

    def __init__(self) -> None:
        self._context: Any = worker_context()
        self._workers: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
        """`function(rank, num_ranks, *args)` on `num_ranks` processes; their results in rank order.

        Args:
            function: importable by name, since it is pickled by reference.
            num_ranks: the world size that the function sees.
            *args: pickled.

        Raises:
            RuntimeError: the function raised on a rank, with that rank's traceback, or a process died.
        """
        while len(self._workers) < num_ranks:
            self._workers.append(self._start())
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            for rank, (_, connection) in enumerate(self._workers[:num_ranks]):
                connection.send((function, rank, num_ranks, store, args))
            return self._answers(num_ranks)

    def _answers(self, num_ranks: int) -> list[Any]:
        """Results in rank order. After a failure the other ranks, which may wait for that one forever, get a moment."""
        waiting: dict[Any, int] = {connection: rank for rank, (_, connection) in enumerate(self._workers[:num_ranks])}
        results: dict[int, Any] = {}
        failures: dict[int, Any] = {}
        while ready := multiprocessing.connection.wait(list(waiting), timeout=2.0 if failures else None):
            connection: Any
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    succeeded, answer = connection.recv()
                except EOFError:
                    succeeded, answer = False, "the process died"
                (results if succeeded else failures)[rank] = answer
            if not waiting:
                break
        if failures:
            self.close()
            raise RuntimeError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(num_ranks)]

    def _start(self):
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        return process, here

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.terminate()
            process.join()
        self._workers = []

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _serve(connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, rank, num_ranks, store, args = connection.recv()
        except EOFError:
            return
        try:
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
            try:
                answer = True, function(rank, num_ranks, *args)
            finally:
                torch.distributed.destroy_process_group()
        except Exception:
            answer = False, traceback.format_exc()
        connection.send(answer)
