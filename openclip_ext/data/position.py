"""How far an epoch of the data has been read, by every data worker of every rank."""

import dataclasses
from typing import Any

from openclip_ext.data.passes import Place


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


class Position:
    """How far an epoch has been read.

    Attributes:
        layout: of those who read it.
        batches: that each rank has been given.
        places: by rank and worker; a rank follows its own.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout, self.batches = layout, 0
        self.places = [[Place() for _ in range(layout.workers)] for _ in range(layout.world_size)]

    @property
    def samples(self) -> int:
        """That all ranks have been given in this epoch."""
        return self.batches * self.layout.global_batch

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
        }

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> "Position":
        position = Position(Layout(**state["layout"]))
        position.batches = state["batches"]
        position.places = [
            [Place(number, drawn, list(sizes)) for number, drawn, sizes in of_rank] for of_rank in state["places"]
        ]
        return position
