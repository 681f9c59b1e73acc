"""Gathers over ranks, without gradient, for batches whose sizes may differ between ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_sizes(num_rows: int, world_size: int, device: torch.device) -> tuple[int, ...]:
    """The number of rows on each rank, in rank order. A collective call when `world_size > 1`."""
    if world_size == 1:
        return (num_rows,)
    sizes = torch.empty(world_size, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([num_rows], device=device))
    return tuple(sizes.tolist())


@torch.no_grad()
def gather_rows(rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Rows of all ranks stacked in rank order, detached.

    Args:
        rows: this rank's rows, shape (B, ...).
        sizes: rows on each rank, from `gather_sizes`; ranks with fewer are padded on the way.

    Returns:
        Shape (sum(sizes), ...).
    """
    if len(sizes) == 1:
        return rows.detach()
    longest = max(sizes)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    stacked = rows.new_empty(len(sizes) * longest, *rows.shape[1:])
    dist.all_gather_into_tensor(stacked, padded)
    if min(sizes) == longest:
        return stacked
    return torch.cat([part[:size] for part, size in zip(stacked.split(longest), sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes, rank):
        ctx.sizes, ctx.start = sizes, sum(sizes[:rank])
        ctx.stop = ctx.start + sizes[rank]
        return gather_rows(rows, sizes)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.stop], None, None


def gather_rows_with_grad(rows: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    """As `gather_rows`, and differentiable: a row's gradient is the sum of what all ranks make of it.

    The backward pass is a collective call too.
    """
    return rows if len(sizes) == 1 else _GatherRows.apply(rows, sizes, rank)


@torch.no_grad()
def exchange_columns(
    rows: Tensor, sizes: tuple[int, ...], rank: int, row_sizes: tuple[int, ...] | None = None
) -> Tensor:
    """This rank's columns of the matrix whose rows are spread over ranks, transposed.

    Args:
        rows: this rank's rows, (b, G).
        sizes: columns of each rank.
        rank: of this process.
        row_sizes: rows on each rank; None: as `sizes`.

    Returns:
        (B, sum(row_sizes)): row j is the column of this rank's pair j.
    """
    if len(sizes) == 1:
        return rows.T
    row_sizes = row_sizes or sizes
    blocks = torch.cat([part.flatten() for part in rows.split(sizes, dim=1)])
    own = sizes[rank]
    received = blocks.new_empty(own * sum(row_sizes))
    shares, sent = [own * size for size in row_sizes], [len(rows) * size for size in sizes]
    dist.all_to_all_single(received, blocks, shares, sent)
    return torch.cat([part.view(-1, own) for part in received.split(shares)]).T


@torch.no_grad()
def sum_over_ranks(value: Tensor, world_size: int) -> Tensor:
    """The sum of a tensor of one shape over ranks, detached. A collective call when `world_size > 1`."""
    if world_size == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor, world_size: int) -> Tensor:
    """The mean of a scalar over ranks, detached."""
    return sum_over_ranks(value, world_size) / world_size


def with_global_value(value: Tensor, world_size: int) -> Tensor:
    """A scalar with the value of its mean over ranks and its own gradient."""
    return value + (mean_over_ranks(value, world_size) - value.detach())


def global_mean(total: Tensor, count: Tensor | float, world_size: int) -> Tensor:
    """The mean over all ranks of what `total` is the sum of on this one.

    Its gradient covers this rank's share, times W: averaged over ranks it is that of one process.

    Args:
        total: (), with gradient.
        count: how many values were summed up on this rank.
        world_size: W.
    """
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return with_global_value(total / mean_over_ranks(count, world_size), world_size)
