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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openclip_ext.ops.gather import gather_rows, gather_sizes
from openclip_ext.ops.precision import promoted
from openclip_ext.ops.ring import pass_around

#: Scores that are formed at once, about: 4 MiB of the CPU's memory in float32, where more would leave its caches, and
#: 256 MiB of a GPU's, whose products are slow if small.
SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}


NARROWEST = 32  # columns of a tile


def fitting_tile(rows: int, device: torch.device) -> int:
    """How many columns of `rows` anchors make a tile, at least `NARROWEST`."""
    return max(NARROWEST, SCORES_AT_ONCE.get(device.type, 2**26) // max(1, rows))


def least_bytes(own: int, ranks: int, width: int, *, tile: int | None = None, ring: bool = False) -> int:
    """What a loss over pairs takes at the least, in float32, beyond the features it is given.

    That is sums and gradients of own features, those of other ranks, and four numbers of each score of a tile.

    Args:
        own: B, on each rank.
        ranks: W.
        width: D.
        tile: columns; None: as few as `fitting_tile` chooses.
        ring: whether the features of two other ranks are held at a time, or those of all.
    """
    others = 0 if ranks == 1 else 2 if ring else 2 * ranks
    return 4 * own * (4 * width + others * width + 4 * min(own * ranks, tile or NARROWEST))


class Tile(NamedTuple):
    """Some columns, and their scores with the anchors that meet them."""

    place: slice  # where they lie among all columns
    columns: Tensor  # (T, D)
    scores: Tensor  # (B, T)
    same: Tensor  # (B, T), whether anchor and column are one sample


class Columns:
    """Columns that this rank's anchors of one direction meet.

    Iterating gives a `Tile` after the other. Scores of a single tile are kept, those of several formed anew each time.

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
        self._kept: Tile | None = None

    def __len__(self) -> int:
        return len(self.columns)

    def __iter__(self) -> Iterator[Tile]:
        return iter([self.whole]) if self.fit else self._tiles(self.columns, 0)

    def _tiles(self, columns: Tensor, first: int) -> Iterator[Tile]:
        """Tiles of `columns`, which are those from `first` on."""
        for start in range(0, len(columns), self._tile):
            part = columns[start : start + self._tile]
            place = slice(first + start, first + start + len(part))
            yield Tile(place, part, self._scores(slice(None), part), self._same(slice(None), place))

    @property
    def fit(self) -> bool:
        """Whether all columns are one tile."""
        return len(self) <= self._tile

    @property
    def whole(self) -> Tile:
        """All columns as one tile, which is kept."""
        if self._kept is None:
            scores, same = self._form(slice(None), slice(None))
            self._kept = Tile(slice(0, len(self)), self.columns, scores, same)
        return self._kept

    def of_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scores of the anchors `rows` with all columns, and whether both are one sample, (b, C) each."""
        if not self.fit:
            return self._form(rows, slice(None))
        return self.whole.scores[rows], self.whole.same[rows]

    def of_block(self, rows: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        """The same of any anchors `rows` (b,) with the columns `place` alone."""
        if not self.fit:
            return self._form(rows, place)
        return self.whole.scores[rows, place], self.whole.same[rows, place]

    def _form(self, rows: slice | Tensor, place: slice) -> tuple[Tensor, Tensor]:
        return self._scores(rows, self.columns[place]), self._same(rows, place)

    def _scores(self, rows: slice | Tensor, columns: Tensor) -> Tensor:
        return self.anchors[rows] @ (self._logit_scale * columns).T

    def _same(self, rows: slice | Tensor, place: slice) -> Tensor:
        column_ids = self._column_ids[place]
        same = self._ids[rows, None] == column_ids
        if self._left_out is not None:
            same |= self._left_out[rows, None] == column_ids
        return same


class PassingColumns(Columns):
    """Columns of all ranks that pass by: each rank holds its own, and hands on what it has from the rank before it.

    No rank holds those of more than two others at a time. Iterating is a collective call, and begins with the own ones.

    Args:
        sizes: columns of each rank.
        rank: of this process.
        Others as of `Columns`; `columns` are this rank's, `column_ids` those of all.
    """

    def __init__(self, *args: Any, sizes: tuple[int, ...], rank: int) -> None:
        super().__init__(*args)
        self._sizes, self._rank = sizes, rank

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def fit(self) -> bool:
        """Never: what has passed by is not kept."""
        return False

    def __iter__(self) -> Iterator[Tile]:
        for source, columns in pass_around(self.columns, self._sizes, self._rank):
            yield from self._tiles(columns, sum(self._sizes[:source]))


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
    ids: Tensor  # (B,) int64
    all_ids: Tensor  # (G,) int64
    sizes: tuple[int, ...]  # rows on each rank
    rank: int
    stored: StoredPairs | None = None
    tile: int | None = None  # columns whose scores are formed at once; None: by `fitting_tile`
    ring: bool = False  # columns of other ranks pass by, where they would be gathered

    @property
    def all_image(self) -> Tensor:
        """Images of all ranks, (G, D)."""
        return self._gathered_features[0]

    @property
    def all_text(self) -> Tensor:
        """Texts of all ranks, (G, D)."""
        return self._gathered_features[1]

    @cached_property
    def _gathered_features(self) -> tuple[Tensor, ...]:
        """Images and texts; a collective call where they are first asked for, if there are several ranks."""
        if len(self.sizes) == 1:
            return self.image.detach(), self.text.detach()
        return gather_rows(torch.cat([self.image, self.text], dim=1), self.sizes).chunk(2, dim=1)

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
        if self.ring and len(self.sizes) > 1:
            image, text = self.image.detach(), self.text.detach()
            ranks: dict[str, Any] = {"sizes": self.sizes, "rank": self.rank}
            return PassingColumns(image, text, *common, **ranks), PassingColumns(text, image, *common, **ranks)
        return Columns(self.image, self.all_text, *common), Columns(self.text, self.all_image, *common)

    @cached_property
    def in_stored(self) -> tuple[Columns, Columns]:
        """Own anchors of each direction and stored columns."""
        return self.columns_of(self.joined)

    def columns_of(self, stored: StoredPairs) -> tuple[Columns, Columns]:
        """Own anchors of each direction and columns of stored pairs, whether these join the batch or not."""
        common = self.ids, stored.ids, self.logit_scale, self.tile
        return Columns(self.image, stored.text, *common), Columns(self.text, stored.image, *common)

    def scores_of(self, direction: int, rows: slice) -> tuple[Tensor, Tensor]:
        """s_ij of the own anchors `rows` and the batch's columns, and whether both are one sample, (b, G) each."""
        if self._turned(direction):
            turned = self.in_batch[0].whole
            return turned.scores[:, rows].T.contiguous(), turned.same[:, rows].T
        return self.in_batch[direction].of_rows(rows)

    def scores_of_block(self, direction: int, rows: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        """The same of any own anchors `rows` (b,) with the columns `place` alone."""
        if self._turned(direction):
            turned = self.in_batch[0].whole
            return turned.scores[place, rows].T, turned.same[place, rows].T
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
        return self.batch_count if self.stored is None else self.batch_count + self.count_of(self.stored)

    def count_of(self, stored: StoredPairs) -> Tensor:
        """The number of negatives of each own anchor among stored pairs, (B,)."""
        return len(stored.ids) - occurrences(self.ids, stored.ids)

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
    ring: bool = False,
) -> PairBatch:
    """The global batch: sizes and ids of all ranks' pairs are gathered. A collective call when `world_size > 1`.

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
    if sample_ids is None:
        all_ids = torch.arange(sum(sizes), device=image.device)
        start = sum(sizes[:rank])
        ids = all_ids[start : start + sizes[rank]]
    else:
        ids = sample_ids.to(image.device)
        all_ids = gather_rows(ids, sizes)
    logit_scale = logit_scale.to(image.dtype)
    return PairBatch(image, text, logit_scale, ids, all_ids, sizes, rank, stored, tile, ring)
