"""Sums over pairs whose weights are given as matrices, for losses that choose among candidates.

Letters as in `ops/pairs.py`. Where a matrix of all own anchors would be large, some rows of it are added at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openclip_ext.ops.gather import exchange_columns
from openclip_ext.ops.pair_sums import PairSums
from openclip_ext.ops.pairs import Columns, PairBatch


def add_all(sums: PairSums, pairs: PairBatch, weights: Sequence[Tensor]) -> None:
    """Add all own anchors with the batch's columns; weights are (B, G) per direction.

    A collective call over several ranks.
    """
    as_columns = [exchange_columns(weight, pairs.sizes, pairs.rank) for weight in weights]
    # An own image meets all texts twice: as an anchor of direction 0 and as a column of direction 1.
    image_weights = weights[0] + as_columns[1]
    text_weights = image_weights.T if len(pairs.sizes) == 1 else weights[1] + as_columns[0]
    mixed = image_weights @ pairs.all_text
    sums.scale += torch.linalg.vecdot(pairs.image, mixed).sum()
    sums.features[0] += mixed
    sums.features[1].addmm_(text_weights, pairs.all_image)
    sums.positive += weights[0].sum(1) + weights[1].sum(1)


def add_rows(sums: PairSums, pairs: PairBatch, direction: int, first: int, tile: int, weights: Tensor) -> None:
    """Add the anchors `first` to `first + tile` of each rank with the batch's columns.

    A collective call over several ranks, for which all must take as many steps, those with fewer anchors too.

    Args:
        sums: to which they are added.
        pairs: the global batch.
        direction: of the anchors.
        first: the first anchor's place on its rank.
        tile: how many there are, where a rank has as many.
        weights: (b, G), of own anchors.
    """
    anchors = pairs.in_batch[1 - direction].columns
    add_columns(sums, pairs.in_batch[direction], direction, slice(first, first + tile), weights)
    row_sizes = tuple(max(0, min(tile, size - first)) for size in pairs.sizes)
    as_columns = exchange_columns(weights, pairs.sizes, pairs.rank, row_sizes)
    rows = [part[first : first + tile] for part in anchors.split(pairs.sizes)]
    sums.features[1 - direction].addmm_(as_columns, torch.cat(rows) if len(rows) > 1 else rows[0])


def add_columns(sums: PairSums, columns: Columns, direction: int, rows: slice, weights: Tensor) -> None:
    """Add the own anchors `rows`, as anchors alone, with `columns`; weights are (b, C)."""
    mixed = weights @ columns.columns
    sums.features[direction][rows] += mixed
    sums.positive[rows] += weights.sum(1)
    sums.scale += torch.linalg.vecdot(columns.anchors[rows], mixed).sum()
