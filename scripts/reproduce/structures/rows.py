"""Rows of the table: a base loss, alone or with terms, whose weights are chosen on the validation split."""

import dataclasses
import itertools

from runs.store import Store

from .train import Run

#: The paper's terms, and weights from which the choice starts.
TERMS = {"feature_separation": 0.5, "brownian_bridge": 0.25, "geometric_consistency": 0.1}
TITLES = {"feature_separation": "Sep", "brownian_bridge": "Br", "geometric_consistency": "GC"}  # as the paper has them
CHOOSING = 1000  # the seed of runs that choose


@dataclasses.dataclass(frozen=True)
class Row:
    """A title, candidates among which the validation split chooses, and seeds of the runs that are scored.

    Candidates differ in the terms' weights; those of the base loss, which has none, in the learning rate.
    """

    title: str
    candidates: tuple[Run, ...]
    seeds: int

    def wanted(self, store: Store[Run]) -> list[Run]:
        choosing = [run for run in self.candidates if store.get(run) is None]
        return choosing or [run for run in self.scored(store) if store.get(run) is None]

    def left(self, store: Store[Run]) -> int:
        wanted = self.wanted(store)
        return len(wanted) + (self.seeds if wanted and wanted[0].split == "val" else 0)

    @property
    def cost(self) -> float:
        """Second views cost half of the first ones."""
        run = self.candidates[0]
        return 2000 * run.epochs * (1.5 if run.terms else 1.0)

    def chosen(self, store: Store[Run]) -> Run:
        """The best candidate; all must be done."""
        return max(self.candidates, key=lambda run: store.require(run)["recall"])

    def scored(self, store: Store[Run]) -> list[Run]:
        """The runs on the test split."""
        chosen = self.chosen(store)
        return [dataclasses.replace(chosen, split="test", seed=seed) for seed in range(self.seeds)]


def rows(base: Run, factors: tuple[float, ...], seeds: int) -> list[Row]:
    """The base loss, with each term, and with all of them; as many candidates each.

    Args:
        base: whose terms, split and seed are not looked at.
        factors: by which the base loss's learning rate, a term's weight, or the weights of all terms are multiplied.
        seeds: of the runs that are scored.
    """
    base = dataclasses.replace(base, terms=(), split="val", seed=CHOOSING)
    found = [Row(base.loss, tuple(dataclasses.replace(base, lr=base.lr * factor) for factor in factors), seeds)]
    for names in ([name] for name in TERMS):
        found.append(_with_terms(base, names, factors, seeds))
    found.append(_with_terms(base, list(TERMS), factors, seeds))
    return found


def _with_terms(base: Run, names: list[str], factors: tuple[float, ...], seeds: int) -> Row:
    candidates = [
        dataclasses.replace(base, terms=tuple((name, TERMS[name] * factor) for name in names)) for factor in factors
    ]
    title = " + ".join([base.loss, *(TITLES[name] for name in names)] if len(names) == 1 else [base.loss, "all"])
    return Row(title, tuple(candidates), seeds)


def finished_rows(store: Store[Run]) -> list[Row]:
    """Rows made of all runs that are done, of which at least one is scored, by source and kind."""
    found = []
    choosing = [run for run in store.runs() if run.split == "val"]
    for _, own in itertools.groupby(sorted(choosing, key=_kind), key=_kind):
        candidates = tuple(own)
        names = [name for name, _ in candidates[0].terms]
        title = (
            candidates[0].loss
            if not names
            else f"{candidates[0].loss} + " + (TITLES[names[0]] if len(names) == 1 else "all")
        )
        row = Row(title, candidates, max((run.seed for run in store.runs() if run.split == "test"), default=0) + 1)
        if any(store.get(run) is not None for run in row.scored(store)):
            found.append(row)
    return found


def _kind(run: Run) -> str:
    names = [name for name, _ in run.terms]
    order = 0 if not names else 9 if len(names) > 1 else 1 + list(TERMS).index(names[0])
    return f"{run.source} {run.epochs} {run.batch_size} {run.loss} {order} {names}"
