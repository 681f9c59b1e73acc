"""What several ranks have measured, brought together."""

import dataclasses
import datetime
import itertools
import os
from typing import Any

import torch.distributed as dist
from torch import nn


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that share an evaluation. All of them call each method, with values on the CPU.

    Attributes:
        rank: of this process.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def on_first(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on the first rank; nothing on the others."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.first else None
        dist.gather_object(value, values)
        return values or []

    def in_turn(self, own: list[Any]) -> list[Any]:
        """Batches of all ranks, of which each had every so many, in the order of one's; nothing but on the first."""
        turns = itertools.zip_longest(*self.on_first(own))
        return [batch for turn in turns for batch in turn if batch is not None]

    def on_all(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give all ranks the first one's buffers, such as batch statistics, of which each keeps its own in training."""
        if self.world_size > 1:
            for buffer in model.buffers():
                value = buffer.contiguous()
                dist.broadcast(value, 0)
                buffer.copy_(value)


ALONE = Ranks()


def join_ranks(device_type: str) -> tuple[Ranks, str]:
    """The processes that `accelerate launch` or `torchrun` has started, and this one's device of a type."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, device_type
    from accelerate import PartialState  # which one process does without

    # The first one fits probes while the others wait.
    state = PartialState(cpu=device_type == "cpu", timeout=datetime.timedelta(hours=6))
    return Ranks(state.process_index, state.num_processes), str(state.device)


def leave_ranks(ranks: Ranks) -> None:
    """Inverse of `join_ranks`, for the end of a command. A collective call."""
    if ranks.world_size > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
