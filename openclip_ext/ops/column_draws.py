"""Draws of a column by the softmax of an anchor's scores, which are formed tile by tile. Letters as in `ops/pairs.py`.

    K   blocks of neighbouring columns
    w   columns of a block

A draw inverts the distribution function: it is the first column, in their order, up to which the weights add up to a
given share of all. What a block weighs in all is kept from the pass over the tiles that sums them up, so that only the
scores of the one block that a draw falls into must be formed again.
"""

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from openclip_ext.ops.pairs import Columns, PairBatch


@dataclasses.dataclass(frozen=True)
class BlockSums:
    """Sums over the negatives among the columns that own anchors of one direction meet.

    Attributes:
        log_sum: (B, K), `log sum_j exp(s_ij)` over a block's columns.
        log_square: (B,), `log sum_j exp(2 s_ij)` over all of them.
        width: w; the last block may have fewer columns.
        columns: how many there are.
    """

    log_sum: Tensor
    log_square: Tensor
    width: int
    columns: int

    @property
    def places(self) -> Tensor:
        """Where each block begins and ends, (K, 2)."""
        begin = torch.arange(0, self.columns, self.width, device=self.log_sum.device)
        return torch.stack([begin, (begin + self.width).clamp_max(self.columns)], dim=1)

    def add(self, scores: Tensor, first: int, anchors: slice, dim: int) -> None:
        """Add scores of `anchors` with columns from `first` on, which lie along `dim`; -inf: no negative."""
        stop = first + scores.shape[dim]
        largest = scores.amax(dim, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
        ratios = (scores - largest).exp_()
        blocks = slice(first // self.width, -(-stop // self.width))
        borders = [max(first, block * self.width) - first for block in range(blocks.start, blocks.stop)]
        sizes = [end - start for start, end in itertools.pairwise([*borders, stop - first])]
        sums = torch.stack([part.sum(dim) for part in ratios.split(sizes, dim)], dim=1)
        largest = largest.squeeze(dim)
        _gain(self.log_sum[anchors, blocks], largest[:, None] + sums.log_())
        _gain(self.log_square[anchors], 2 * largest + ratios.square_().sum(dim).log_())


def _gain(total: Tensor, more: Tensor) -> None:
    total.copy_(torch.logaddexp(total, more))


def block_sums(pairs: PairBatch) -> tuple[BlockSums, BlockSums]:
    """Of the batch's columns, per direction. Its tiles are formed once for both in one process."""
    both = _empty(pairs.in_batch[0]), _empty(pairs.in_batch[1])
    if len(pairs.sizes) > 1:
        for sums, columns in zip(both, pairs.in_batch, strict=True):
            _add_anchors(sums, columns)
        return both
    for place, _, scores, same in pairs.in_batch[0]:
        scores = scores.masked_fill(same, -torch.inf)
        both[0].add(scores, place.start, slice(None), 1)
        both[1].add(scores, 0, place, 0)
    return both


def sums_of(columns: Columns) -> BlockSums:
    """Of any columns."""
    sums = _empty(columns)
    _add_anchors(sums, columns)
    return sums


def _empty(columns: Columns) -> BlockSums:
    width = max(64, math.ceil(len(columns) / 128))  # few enough blocks to keep, narrow enough ones to form again
    shape = len(columns.anchors), math.ceil(len(columns) / width)
    log_sum = columns.anchors.new_full(shape, -torch.inf)
    return BlockSums(log_sum, log_sum.new_full(shape[:1], -torch.inf), width, len(columns))


def _add_anchors(sums: BlockSums, columns: Columns) -> None:
    for place, _, scores, same in columns:
        sums.add(scores.masked_fill(same, -torch.inf), place.start, slice(None), 1)


def first_reaching(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where cumulated weights reach a target.

    Args:
        weights: (B, C), none negative.
        target: (B,), above 0; one above the sum of the weights counts as that.

    Returns:
        The first column up to which they do, (B,), and the weight of those before it, (B,). Without any weight some
        column.
    """
    cumulated = weights.cumsum(1, dtype=torch.float64)
    target = torch.minimum(target.to(cumulated.dtype), cumulated[:, -1])
    place = torch.searchsorted(cumulated, target[:, None]).clamp_max_(weights.shape[1] - 1)
    before = cumulated.gather(1, place) - weights.gather(1, place)
    return place.squeeze(1), before.squeeze(1)
