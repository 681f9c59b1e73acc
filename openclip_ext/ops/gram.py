"""Sums over all pairs of rows of the global batch, without a matrix of pairs where that is cheaper.

    G   rows on all ranks       D   width
    x, y    (B, D), this rank's rows

Both sums are of fourth degree in the rows, so they are functions of products of shape (D, D), which add up over ranks.
They are written in a = x + y and d = x - y: in x and y themselves they would be small differences of large numbers.
"""

import torch.distributed as dist
from torch import Tensor


def sum_of_squared_gaps(x: Tensor, y: Tensor, world_size: int = 1) -> Tensor:
    """`sum_jk (<x_j, x_k> - <y_j, y_k>)^2`, which is `1/2 (<A^T A, D^T D> + tr((A^T D)^2))`, A = X + Y, D = X - Y.

    A collective call when `world_size > 1`: the value is the global one, the gradient that of this rank's rows times W,
    so that averaged over ranks it is that of one process.
    """
    a, d = x + y, x - y
    if _few(x, world_size):
        half = a @ d.T
        return (half + half.T).square().sum() / 4
    cross = _gram(a, d, world_size)
    return ((_gram(a, a, world_size) * _gram(d, d, world_size)).sum() + (cross * cross.T).sum()) / 2


def sum_of_squared_cross_gaps(x: Tensor, y: Tensor, world_size: int = 1) -> Tensor:
    """`sum_jk (<x_j, y_k> - <x_k, y_j>)^2 + (<x_j, x_k> - <y_j, y_k>)^2`.

    The first difference is antisymmetric in (j, k), the second symmetric, so no product of the two survives the sum,
    and both together are `sum_jk <x_j + y_j, x_k - y_k>^2 = <A^T A, D^T D>`. Otherwise as `sum_of_squared_gaps`.
    """
    a, d = x + y, x - y
    if _few(x, world_size):
        return (a @ d.T).square().sum()
    return (_gram(a, a, world_size) * _gram(d, d, world_size)).sum()


def _few(x: Tensor, world_size: int) -> bool:
    """Whether the (G, G) form takes fewer operations. Over ranks the (D, D) form also communicates less."""
    return world_size == 1 and len(x) < 2 * x.shape[1]


def _gram(x: Tensor, y: Tensor, world_size: int) -> Tensor:
    """`X^T Y` over all ranks, (D, D), with the gradient of this rank's rows times W."""
    own = x.T @ y
    if world_size == 1:
        return own
    total = own.detach().clone()
    dist.all_reduce(total)
    return total + world_size * (own - own.detach())
