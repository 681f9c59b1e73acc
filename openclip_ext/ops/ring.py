"""Rows of all ranks that pass by one rank after the other, where gathered they would all be held at once."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor


def pass_around(rows: Tensor, sizes: tuple[int, ...], rank: int) -> Iterator[tuple[int, Tensor]]:
    """Each rank's rows in turn: the own ones, then those of the rank before this one, and so on around the ring.

    While the caller works on some rows, they are on their way to the next rank and others arrive from the one before:
    two ranks' rows are held at a time. Every rank must take all of them.

    Args:
        rows: this rank's, (B, D), detached.
        sizes: rows of each rank.
        rank: of this process.

    Yields:
        The rank whose rows they are, and the rows.
    """
    ranks = len(sizes)
    held = rows.contiguous()
    for step in range(ranks):
        source, arriving, transfers = (rank - step) % ranks, held, []
        if step < ranks - 1:
            arriving = held.new_empty(sizes[source - 1], *rows.shape[1:])
            operations = [
                dist.P2POp(dist.isend, held, (rank + 1) % ranks),
                dist.P2POp(dist.irecv, arriving, (rank - 1) % ranks),
            ]
            transfers = dist.batch_isend_irecv(operations)
        yield source, held
        for transfer in transfers:
            transfer.wait()
        held = arriving
