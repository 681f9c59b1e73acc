"""Runs that are done, one JSON line each."""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Run = TypeVar("Run")


class Store(Generic[Run]):
    """What runs have found, in a file to which a line is added by each. A line that was cut off does not count.

    Args:
        path: of the file, which need not exist.
        read: makes a run, a dataclass, of its fields as JSON has them.
    """

    def __init__(self, path: str, read: Callable[[dict], Run]) -> None:
        self.path, self._read = path, read
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
        return self.found.get(_key(_fields(run)))

    def require(self, run: Run) -> dict:
        """The record of a run that is finished."""
        record = self.get(run)
        assert record is not None
        return record

    def runs(self) -> list[Run]:
        """All that are done."""
        return [self._read(json.loads(key)) for key in self.found]

    def add(self, run: Run, found: dict) -> None:
        record = {"run": _fields(run), "found": found}
        self.found[_key(record["run"])] = found
        with open(self.path, "a+b") as file:
            if file.tell() and not _ends_line(file):
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")


def _fields(run: Any) -> dict:
    return dataclasses.asdict(run)


def _key(run: dict) -> str:
    return json.dumps(run, sort_keys=True)


def _ends_line(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
