"""How far an epoch of the data has been read, by every data worker of every rank."""

import dataclasses
import math
from typing import Any

from openclip_ext.data.passes import Place
from openclip_ext.errors import counted


@dataclasses.dataclass(frozen=True)
class Layout:
    """Who reads how much of which data at once.

    Attributes:
        world_size: number of processes.
        workers: data workers of each, at least 1.
        batch_size: per rank.
        data: tells data, and orders of it, apart.
    """

    world_size: int
    workers: int
    batch_size: int
    data: str

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def __str__(self) -> str:
        return f"{counted(self.world_size, 'process')} x {counted(self.workers, 'worker')} x batch {self.batch_size}"

    def batches_per_worker(self, samples: int) -> int:
        """So that all workers of all ranks give as many full ones: rounded up."""
        return math.ceil(math.ceil(samples / self.global_batch) / self.workers)


class Position:
    """How far an epoch has been read.

    Attributes:
        layout: of those who read it.
        batches: that each rank has been given.
        places: by rank and worker; a rank follows its own.
        before: where others left the epoch, who began it; None: nobody did.
    """

    def __init__(self, layout: Layout, before: "Position | None" = None, number: int = 0) -> None:
        """Where a layout begins, with pass `number` over its share of the data."""
        self.layout, self.batches, self.before = layout, 0, before
        self.places = [[Place(number) for _ in range(layout.workers)] for _ in range(layout.world_size)]

    @property
    def samples(self) -> int:
        """That all ranks have been given in this epoch."""
        return self.batches * self.layout.global_batch + (self.before.samples if self.before else 0)

    @property
    def of_one_order(self) -> bool:
        """Whether all who read the epoch read the same data in the same order."""
        before = self.before
        return before is None or (before.layout.data == self.layout.data and before.of_one_order)

    @property
    def next_pass(self) -> int:
        """The number of a pass that no worker has begun yet."""
        return 1 + max(place.number for of_rank in self.places for place in of_rank)

    def advance(self, rank: int, batch: dict[str, Any]) -> None:
        """Count a batch that the rank was given, out of which what says where its worker is is taken."""
        self.batches += 1
        if place := batch.pop("place", None):
            worker, *moved = place
            self.places[rank][worker].advance(*moved)

    def state_dict(self) -> dict[str, Any]:
        """Plain values. Places of other ranks are those with which this one began."""
        return {
            "layout": dataclasses.asdict(self.layout),
            "batches": self.batches,
            "places": [[dataclasses.astuple(place) for place in of_rank] for of_rank in self.places],
            "before": self.before and self.before.state_dict(),
        }

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> "Position":
        before = state["before"] and Position.from_state_dict(state["before"])
        position = Position(Layout(**state["layout"]), before)
        position.batches = state["batches"]
        position.places = [
            [Place(number, drawn, list(sizes)) for number, drawn, sizes in of_rank] for of_rank in state["places"]
        ]
        return position
