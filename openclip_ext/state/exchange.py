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


class Reading:
    """Rows of both directions of own samples, on their way from the ranks that keep them.

    Making one is a collective call where tables are in parts, and the host waits for the device then, to learn how many
    rows go where; the rows themselves come while this rank goes on.

    Args:
        tables: of one size, and spread over the same ranks.
        samples: whose ids are all below N.
    """

    @torch.no_grad()
    def __init__(self, tables: Sequence[SampleTable], samples: Gathered) -> None:
        self._tables, self._work, self._sent = tables, None, None
        if tables[0].placement.parts == 1:
            self._rows = [table.read(samples.ids) for table in tables]
            return
        self._keeper = samples.ids // tables[0].block
        sent, received = _shares(tables[0], samples, self._keeper)
        others = samples.all_ids // tables[0].block != tables[0].placement.rank
        asked = samples.all_ids[others.argsort(stable=True)[: sum(sent)]]  # of each rank in turn, in its order
        answers = [_as_bytes(table.read(asked)) for table in tables]
        self._widths = [answer.shape[1] for answer in answers]
        self._sent = torch.cat(answers, dim=1)
        self._received = self._sent.new_empty(len(self._keeper), sum(self._widths))
        self._work = dist.all_to_all_single(self._received, self._sent, received, sent, async_op=True)

    @torch.no_grad()
    def rows(self) -> list[Tensor]:
        """Of each table, (2, B, ...), as they were when this was made."""
        if self._work is None:
            return self._rows
        self._work.wait()
        rows = torch.empty_like(self._received)
        rows[self._keeper.argsort(stable=True)] = self._received
        parts = zip(rows.split(self._widths, dim=1), self._tables, strict=True)
        return [_from_bytes(part, table) for part, table in parts]


class Reader:
    """Reads tables, once per step ahead of time where it is told what comes."""

    def __init__(self, tables: Sequence[SampleTable]) -> None:
        self._tables = tables
        self._coming: Reading | None = None

    def expect(self, ids: Tensor) -> None:
        """Let the rows of own samples (B,) come, for the next `read`, which is to be of these and before any write.

        A collective call where the tables are in parts; otherwise nothing happens.

        Raises:
            IndexError: an id outside of the tables.
        """
        table = self._tables[0]
        if table.placement.parts > 1:
            samples = gather_ids(ids, table)
            table.check(samples.all_ids)
            self._coming = Reading(self._tables, samples)

    def read(self, samples: Gathered) -> list[Tensor]:
        """Rows of both directions of own samples, (2, B, ...), of each table. Collective unless they were expected."""
        coming, self._coming = self._coming, None
        return (coming or Reading(self._tables, samples)).rows()


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
