"""Rows of a table that are one run each."""

import dataclasses
from typing import Any

from .store import Store


@dataclasses.dataclass(frozen=True)
class Single:
    """A row of a single run.

    Attributes:
        run: a dataclass.
        cost: see `runs.pool.Row`.
    """

    run: Any
    cost: float = 1.0

    def wanted(self, store: Store) -> list:
        return [] if store.get(self.run) is not None else [self.run]

    def left(self, store: Store) -> int:
        return len(self.wanted(store))
