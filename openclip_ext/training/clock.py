"""When it is in a run: the optimizer step, the epoch, the place in the data, and random draws; all of it is kept."""

import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from openclip_ext.data.pipeline import TrainLoader
from openclip_ext.data.position import Position
from openclip_ext.data.streams import Start
from openclip_ext.evaluation.ranks import Ranks

Skipped = list[tuple[str, str, int]]


class Clock:
    """Time of a run, in optimizer steps; the one owner of it.

    No generator's state is kept: what is drawn in a step is a function of seed, step and rank, and what is drawn for a
    sample one of seed, epoch and the sample's id (`data.rows.row_seed`).

    Args:
        loader: of the training data, which begins where `epoch` does or goes on within it.
        accelerator: tells this rank from others.
        accum_freq: batches per optimizer step.
        epochs: of the run.
        seed: of random draws in a step.
        epoch: completed ones.

    Attributes:
        step: optimizer steps taken in the run, of whatever batch size each was. It never falls, so checkpoints and rows
            of the log are known by it.
        epoch: completed ones, with all that is done between epochs.
        index: where in the epoch it is, in steps of this batch size, up to `steps_per_epoch`.
        position: in the data.
        skipped: (kind, shard, count) of what this rank could not use in this epoch.
    """

    def __init__(
        self, loader: TrainLoader, accelerator: Accelerator, *, accum_freq: int, epochs: int, seed: int, epoch: int = 0
    ) -> None:
        self._loader, self._accelerator, self._seed = loader, accelerator, seed
        self.epochs, self.steps_per_epoch = epochs, loader.num_batches // accum_freq
        self.epoch = epoch
        self.index = self.steps_per_epoch - loader.batches_left(epoch) // accum_freq
        self.step = self.scheduled_step
        self.position: Position = loader.position(epoch)
        self.skipped: Skipped = []

    @property
    def scheduled_step(self) -> int:
        """Where schedules are: the step it would be had all of the run had this batch size."""
        return self.epoch * self.steps_per_epoch + self.index

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def epoch_is_over(self) -> bool:
        """Whether all its steps are taken; what is done between epochs may not be."""
        return self.index >= self.steps_per_epoch

    def begin_step(self) -> None:
        """Seed what draws at random in the step."""
        seed = hash((self._seed, self.step, self._accelerator.process_index))
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def read(self, batch: dict[str, Any]) -> None:
        """Follow a batch that this rank was given, out of which what is not data is taken."""
        self.skipped += batch.pop("skipped")
        self.position.advance(self._accelerator.process_index, batch)

    def end_step(self) -> None:
        self.step, self.index = self.step + 1, self.index + 1

    def end_epoch(self) -> None:
        """After all that is done between epochs, but for keeping a checkpoint."""
        self.epoch, self.index, self.skipped = self.epoch + 1, 0, []
        self.position = self._loader.position(self.epoch)

    def state_dict(self, **of_rank: Any) -> dict[str, Any]:
        """Plain values and tensors: all there is on the first rank, elsewhere what does not matter. A collective call.

        Args:
            of_rank: what else this rank is to find again.
        """
        position, rank = self.position.state_dict(), self._accelerator.process_index
        own = of_rank | {"skipped": self.skipped, "places": position["places"][rank]}
        ranks = Ranks(rank, self._accelerator.num_processes).on_first(own)
        position["places"] = [other.pop("places") for other in ranks]
        return {"epoch": self.epoch, "step": self.step, "position": position, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """Take over what epoch and position, which came with the loader, do not tell; what `of_rank` was.

        Ranks of another number take over nothing of their own, and the first one all that was skipped.
        """
        self.step = state["step"]
        ranks, rank = state["ranks"], self._accelerator.process_index
        if len(ranks) == self._accelerator.num_processes:
            self.skipped = [tuple(row) for row in ranks[rank]["skipped"]]
            return ranks[rank]
        self.skipped = [tuple(row) for other in ranks for row in other["skipped"] if rank == 0]
        return {}


def start_of(state: dict[str, Any] | None) -> Start | None:
    """Where the data of a run goes on that kept this state; None: where an epoch begins."""
    if state is None:
        return None
    position = Position.from_state_dict(state["position"])
    return Start(state["epoch"], position) if position.samples else None
