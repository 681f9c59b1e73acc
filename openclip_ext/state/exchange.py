"""Rows of tables in parts: each rank gets those of its samples from the ranks that keep them.

    B   samples of this rank        G   samples of all ranks        W   ranks

Ids of all samples are known to every rank, since the batch was gathered. So nobody asks: each rank sends the rows that
it keeps to those whose samples they are, in one `all_to_all`. Writing takes no exchange at all: what a step writes, it
makes of the gathered batch, of which each rank writes the rows that it keeps.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from openclip_ext.ops.gather import gather_rows, gather_sizes
from openclip_ext.state.table import SampleTable


class Gathered(Protocol):
    """Samples whose ids every rank knows, such as a `PairBatch`."""

    @property
    def ids(self) -> Tensor:
        """(B,), of this rank."""

    @property
    def all_ids(self) -> Tensor:
        """(G,), of all ranks in their order."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many are each rank's."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """`Gathered` and nothing else."""

    ids: Tensor
    all_ids: Tensor
    sizes: tuple[int, ...]


def gather_ids(ids: Tensor, table: SampleTable) -> Samples:
    """Ids (B,) as all ranks over which the table is spread know them. A collective call if it is."""
    sizes = gather_sizes(len(ids), table.placement.parts, ids.device)
    return Samples(ids, gather_rows(ids, sizes), sizes)


@torch.no_grad()
def read_rows(tables: Sequence[SampleTable], samples: Gathered) -> list[Tensor]:
    """Rows of both directions of own samples, (2, B, ...), of each table.

    A collective call where tables are in parts. The host waits for the device then, to learn how many rows go where.

    Args:
        tables: of one size, and spread over the same ranks.
        samples: whose ids are all below N.
    """
    if tables[0].placement.parts == 1:
        return [table.read(samples.ids) for table in tables]
    keeper = samples.ids // tables[0].block
    sent, received = _shares(tables[0], samples, keeper)
    others = samples.all_ids // tables[0].block != tables[0].placement.rank
    asked = samples.all_ids[others.argsort(stable=True)[: sum(sent)]]  # of each rank in turn, in its order
    answers = [_as_bytes(table.read(asked)) for table in tables]
    widths = [answer.shape[1] for answer in answers]
    by_keeper = answers[0].new_empty(len(keeper), sum(widths))
    dist.all_to_all_single(by_keeper, torch.cat(answers, dim=1), received, sent)
    rows = torch.empty_like(by_keeper)
    rows[keeper.argsort(stable=True)] = by_keeper
    return [_from_bytes(part, table) for part, table in zip(rows.split(widths, dim=1), tables, strict=True)]


def _shares(table: SampleTable, samples: Gathered, keeper: Tensor) -> tuple[list[int], list[int]]:
    """How many rows this rank sends to each, and how many it gets."""
    parts, rank = table.placement.parts, table.placement.rank
    device = keeper.device
    received = torch.searchsorted(keeper.sort().values, torch.arange(parts + 1, device=device)).diff()
    kept_here = torch.nn.functional.pad((samples.all_ids // table.block == rank).cumsum(0), (1, 0))
    ends = torch.tensor((0, *samples.sizes)).cumsum(0).to(device, non_blocking=True)
    sent, received = torch.stack([kept_here[ends].diff(), received]).tolist()
    return sent, received


def _as_bytes(rows: Tensor) -> Tensor:
    """(2, B, ...) as (B, bytes of both directions)."""
    return rows.transpose(0, 1).flatten(1).contiguous().view(torch.uint8)


def _from_bytes(rows: Tensor, table: SampleTable) -> Tensor:
    """Inverse of `_as_bytes`, for rows of the table."""
    values = rows.contiguous().view(table.values.dtype).view(len(rows), 2, *table.values.shape[2:])
    return values.transpose(0, 1).contiguous()
