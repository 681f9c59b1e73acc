"""Runs that are done, one JSON line each, and those that are to be done."""

import dataclasses
import itertools

from runs.store import Store

from .loop import Run
from .tasks import Setting


def open_store(path: str) -> Store[Run]:
    """The runs that are done, from a file which need not exist."""
    return Store(path, lambda record: Run(**record | {"setting": Setting(**record["setting"])}))


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
        seeds = max((run.seed for run in runs if run.split == "test"), default=-1) + 1
        row = Row(base=base, rates=tuple(sorted({run.lr for run in runs})), seeds=seeds)
        if row.validation(store) and row.scored(store):
            rows.append(row)
    return rows


def _base(run: Run) -> Run:
    return dataclasses.replace(run, lr=0.0, seed=0, split="")
