"""The pairs of the global batch and of recent steps, and their scores tile by tile.

    B   pairs on this rank          D   width of the embeddings
    G   pairs of all ranks          W   ranks
    S   stored pairs, of recent steps
    s_ij = logit_scale * <x_i, y_j>         score of anchor i with column j
    q_ij = s_ij - s_ii                      shifted score, r_ij = exp(q_ij) its ratio

Direction 0 has images as anchors and texts as columns, direction 1 the reverse. Column j is a negative of anchor i
when their sample ids differ: a sample that comes twice in a batch is not its own negative.

Stored pairs are the pairs of one more rank that takes no gradient: their columns are negatives of the batch's anchors,
and their anchors have the batch's columns as negatives. Every rank holds all of them.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from openclip_ext.ops.gather import gather_rows, gather_sizes
from openclip_ext.ops.precision import promoted

#: Scores that are formed at once, about: 4 MiB of the CPU's memory in float32, where more would leave its caches, and
#: 256 MiB of a GPU's, whose products are slow if small.
SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}


def fitting_tile(rows: int, device: torch.device) -> int:
    """How many columns of `rows` anchors make a tile, at least 32."""
    return max(32, SCORES_AT_ONCE.get(device.type, 2**26) // max(1, rows))


class Columns:
    """Columns that this rank's anchors of one direction meet.

    Iterating gives, per tile of T columns, where it lies, its scores (B, T) and whether anchor and column are one
    sample (B, T). Scores of a single tile are kept, those of several formed anew each time.

    Args:
        anchors: (B, D).
        columns: (C, D).
        ids: (B,) sample ids of the anchors.
        column_ids: (C,).
        logit_scale: ().
        tile: T; None: by `fitting_tile`.
        left_out: (B,) ids of samples that count as the anchor's own too, one per anchor.
    """

    def __init__(
        self, anchors: Tensor, columns: Tensor, ids: Tensor, column_ids: Tensor, logit_scale: Tensor,
        tile: int | None, left_out: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.columns, self._column_ids, self._left_out = columns, column_ids, left_out
        self.anchors, self._ids, self._logit_scale = anchors.detach(), ids, logit_scale.detach()
        self._tile = tile or fitting_tile(len(anchors), anchors.device)
        self._kept: tuple[slice, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.columns)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        if self.fit:
            yield self.whole
            return
        for start in range(0, len(self), self._tile):
            place = slice(start, min(start + self._tile, len(self)))
            yield place, *self._form(slice(None), place)

    @property
    def fit(self) -> bool:
        """Whether all columns are one tile."""
        return len(self) <= self._tile

    @property
    def whole(self) -> tuple[slice, Tensor, Tensor]:
        """All columns as one tile, which is kept."""
        if self._kept is None:
            self._kept = slice(0, len(self)), *self._form(slice(None), slice(None))
        return self._kept

    def of_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scores of the anchors `rows` with all columns, and whether both are one sample, (b, C) each."""
        if not self.fit:
            return self._form(rows, slice(None))
        _, scores, same = self.whole
        return scores[rows], same[rows]

    def of_block(self, rows: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        """The same of any anchors `rows` (b,) with the columns `place` alone."""
        if not self.fit:
            return self._form(rows, place)
        _, scores, same = self.whole
        return scores[rows, place], same[rows, place]

    def _form(self, rows: slice | Tensor, place: slice) -> tuple[Tensor, Tensor]:
        scores = self.anchors[rows] @ (self._logit_scale * self.columns[place]).T
        return scores, self._same(rows, place)

    def _same(self, rows: slice | Tensor, place: slice) -> Tensor:
        column_ids = self._column_ids[place]
        same = self._ids[rows, None] == column_ids
        if self._left_out is not None:
            same |= self._left_out[rows, None] == column_ids
        return same


@dataclasses.dataclass(frozen=True)
class StoredPairs:
    """Pairs of recent steps as they were then, the same on all ranks, without gradient."""

    image: Tensor  # (S, D)
    text: Tensor  # (S, D)
    ids: Tensor  # (S,) int64
    log_sum: Tensor  # (2, S), log sum_j exp(s_ij) over the negatives that the anchor had then
    count: Tensor  # (S,), how many those were
    positive: Tensor  # (S,), s_ii as it was


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """The features of this rank, with gradient, and those of all ranks and of recent steps, without."""

    image: Tensor  # (B, D)
    text: Tensor  # (B, D)
    logit_scale: Tensor  # ()
    all_image: Tensor  # (G, D)
    all_text: Tensor  # (G, D)
    ids: Tensor  # (B,) int64
    all_ids: Tensor  # (G,) int64
    sizes: tuple[int, ...]  # rows on each rank
    rank: int
    stored: StoredPairs | None = None
    tile: int | None = None  # columns whose scores are formed at once; None: by `fitting_tile`

    @property
    def own_rows(self) -> slice:
        """Where this rank's pairs sit among the gathered ones."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    @property
    def joined(self) -> StoredPairs:
        """The stored pairs, where there are some."""
        assert self.stored is not None
        return self.stored

    @cached_property
    def in_batch(self) -> tuple[Columns, Columns]:
        """Own anchors of each direction and the columns of the batch."""
        common = self.ids, self.all_ids, self.logit_scale, self.tile
        return Columns(self.image, self.all_text, *common), Columns(self.text, self.all_image, *common)

    @cached_property
    def in_stored(self) -> tuple[Columns, Columns]:
        """Own anchors of each direction and stored columns."""
        common = self.ids, self.joined.ids, self.logit_scale, self.tile
        return Columns(self.image, self.joined.text, *common), Columns(self.text, self.joined.image, *common)

    def scores_of(self, direction: int, rows: slice) -> tuple[Tensor, Tensor]:
        """s_ij of the own anchors `rows` and the batch's columns, and whether both are one sample, (b, G) each."""
        if self._turned(direction):
            _, scores, same = self.in_batch[0].whole
            return scores[:, rows].T.contiguous(), same[:, rows].T
        return self.in_batch[direction].of_rows(rows)

    def scores_of_block(self, direction: int, rows: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        """The same of any own anchors `rows` (b,) with the columns `place` alone."""
        if self._turned(direction):
            _, scores, same = self.in_batch[0].whole
            return scores[place, rows].T, same[place, rows].T
        return self.in_batch[direction].of_block(rows, place)

    def _turned(self, direction: int) -> bool:
        """Whether the other direction's scores are at hand: a copy costs a tenth of a product."""
        return direction == 1 and len(self.sizes) == 1 and self.in_batch[0].fit

    @cached_property
    def batch_count(self) -> Tensor:
        """The number of negatives of each own anchor in the batch, (B,)."""
        return len(self.all_ids) - occurrences(self.ids, self.all_ids)

    @cached_property
    def count(self) -> Tensor:
        """The number of negatives of each own anchor, (B,)."""
        if self.stored is None:
            return self.batch_count
        return self.batch_count + len(self.stored.ids) - occurrences(self.ids, self.stored.ids)

    @cached_property
    def log_count(self) -> Tensor:
        """log of the number of negatives of each own anchor, (B,); 0 for one without any."""
        return self.count.clamp_min(1).to(self.image.dtype).log()

    @cached_property
    @torch.no_grad()
    def positive(self) -> Tensor:
        """s_ii of own pairs, (B,)."""
        return self.logit_scale * torch.linalg.vecdot(self.image, self.text)

    def gathered(self, values: Tensor) -> Tensor:
        """Values of own anchors (n, B) as those of all, (n, G), detached. A collective call over several ranks."""
        return gather_rows(values.T.contiguous(), self.sizes).T


def occurrences(ids: Tensor, among: Tensor) -> Tensor:
    """How often each of `ids` (B,) is found in `among`, (B,)."""
    in_order = among.sort().values
    return torch.searchsorted(in_order, ids, right=True) - torch.searchsorted(in_order, ids)


def gather_pairs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    sample_ids: Tensor | None,
    rank: int,
    world_size: int,
    stored: StoredPairs | None = None,
    tile: int | None = None,
) -> PairBatch:
    """Gather the global batch. A collective call when `world_size > 1`.

    Features of half precision are promoted to float32 first. Without `sample_ids` every row counts as a sample of
    its own.

    Raises:
        ValueError: image and text features differ in shape.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise ValueError(
            f"image_features {tuple(image_features.shape)} and text_features {tuple(text_features.shape)} "
            "must both be (batch, width)"
        )
    image, text = promoted(image_features, text_features)
    sizes = gather_sizes(len(image), world_size, image.device)
    if world_size == 1:
        all_image, all_text = image.detach(), text.detach()
    else:
        all_image, all_text = gather_rows(torch.cat([image, text], dim=1), sizes).chunk(2, dim=1)
    if sample_ids is None:
        all_ids = torch.arange(sum(sizes), device=image.device)
        start = sum(sizes[:rank])
        ids = all_ids[start : start + sizes[rank]]
    else:
        ids = sample_ids.to(image.device)
        all_ids = gather_rows(ids, sizes)
    logit_scale = logit_scale.to(image.dtype)
    return PairBatch(image, text, logit_scale, all_image, all_text, ids, all_ids, sizes, rank, stored, tile)
