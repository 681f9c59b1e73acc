"""Sums over all pairs, in both directions, and the gradient of weighted pair sums. Letters as in `ops/pairs.py`.

A loss asks for sums over its anchors' negatives and hands back one weight per anchor. Scores are formed tile by tile,
once for the sums and, unless there is only one tile, once more for the gradient, so that memory grows with the batch
and not with its square. In one process a tile serves both directions: anchors of one are columns of the other.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openclip_ext.ops.gather import gather_rows, sum_over_ranks
from openclip_ext.ops.pairs import Columns, PairBatch, StoredPairs, occurrences


@torch.no_grad()
def log_mean_ratio(pairs: PairBatch, log_sum: Tensor | None = None) -> Tensor:
    """`log mean_j r_ij` over the negatives j of each anchor of this rank, shape (2, B), detached.

    -inf for an anchor without any negative.

    Args:
        pairs: the global batch.
        log_sum: (2, B), `log sum_j exp(s_ij)` over the negatives in the batch, where that is known.
    """
    if log_sum is None and len(pairs.sizes) == 1:
        of_texts = torch.empty_like(pairs.positive)
        log_sum = torch.stack([_log_sums(pairs.in_batch[0], of_texts), of_texts])
    elif log_sum is None:
        log_sum = torch.stack([_log_sums(columns) for columns in pairs.in_batch])
    if pairs.stored is not None:
        log_sum = torch.logaddexp(log_sum, torch.stack([_log_sums(columns) for columns in pairs.in_stored]))
    return log_sum - pairs.positive - pairs.log_count


@torch.no_grad()
def stored_standing(pairs: PairBatch) -> tuple[Tensor, Tensor]:
    """`log mean_j r_aj` of each stored anchor a, and log of the number of its negatives j, (2, S) each.

    Its negatives are those that it had when it was stored, as they were, and those it has among the batch's columns
    now. So no weight made of it is above what it would be in the batch alone, however far features have moved. A
    collective call over several ranks.
    """
    stored, ranks = pairs.joined, (1,) * len(pairs.sizes)
    # An anchor of direction 0 is a stored image, whose columns are the batch's texts.
    own = torch.empty_like(stored.log_sum, dtype=pairs.image.dtype)
    for sums, columns in zip(own, reversed(pairs.in_stored), strict=True):
        _log_sums(columns, sums)
    log_sums = torch.cat([gather_rows(own[None], ranks), stored.log_sum.to(own.dtype)[None]])
    log_sum = log_sums.logsumexp(0)
    own_count = len(pairs.ids) - occurrences(stored.ids, pairs.ids)
    count = stored.count + gather_rows(own_count[None], ranks).sum(0)
    log_count = count.clamp_min(1).to(own.dtype).log().expand_as(log_sum)
    return log_sum - stored.positive - log_count, log_count


@torch.no_grad()
def counting_negatives(pairs: PairBatch, stored: StoredPairs) -> Tensor:
    """How many negatives that count a batch holds of each own anchor, both directions, (2, B).

        G (sum_j r_ij)^2 / (C_i sum_j r_ij^2)     j: the C_i negatives of anchor i in the batch and among stored pairs

    The fraction is the share of negatives that carry the softmax over them, by its effective sample size (Kish): 1
    where all have the same score, 1 / C_i where one outweighs all others.
    """
    count, found = (pairs.batch_count + pairs.count_of(stored)).clamp_min(1), []
    for columns in zip(pairs.in_batch, pairs.columns_of(stored), strict=True):
        first = pairs.image.new_full(pairs.positive.shape, -torch.inf)
        second = first.clone()
        for _, _, scores, same in itertools.chain(*columns):
            scores = scores.masked_fill(same, -torch.inf)
            first = torch.logaddexp(first, scores.logsumexp(1))
            second = torch.logaddexp(second, (2 * scores).logsumexp(1))
        found.append((2 * first - second).exp().nan_to_num(0.0) / count)
    return len(pairs.all_ids) * torch.stack(found)


def _log_sums(columns: Columns, of_columns: Tensor | None = None) -> Tensor:
    """log of the sum of exp(score) over the columns of each anchor, (B,).

    Into `of_columns` (C,), where it is given, goes that over the anchors of each column.
    """
    # In float64, since what is added tile by tile adds up what logarithms of float32 leave out.
    total = columns.anchors.new_full(columns.anchors.shape[:1], -torch.inf, dtype=torch.float64)
    for place, _, scores, same in columns:
        scores = scores.masked_fill(same, -torch.inf)
        # What stays is made before the first tile: between large blocks of memory it would keep them apart, and the
        # C library's heap would grow by one with each tile.
        torch.logaddexp(total, scores.logsumexp(1).to(total.dtype), out=total)
        if of_columns is not None:
            torch.logsumexp(scores, 0, out=of_columns[place])
    return total.to(columns.anchors.dtype)


def pair_loss(
    pairs: PairBatch, *, value: Tensor, log_weight: Tensor, stored_log_weight: Tensor | None = None
) -> Tensor:
    """A scalar with a given value and the gradient of a sum over pairs, weighted by their ratios.

        value:     mean over both directions and all G anchors of `value_i`
        gradient:  mean over both directions and all G anchors of  sum_j w_ij grad q_ij,
                   w_ij = exp(q_ij + log_weight_i) / (negatives of i), held constant

    The gradient on each rank covers its own anchors against all columns and all other anchors against its own
    columns, times W, so that averaging it over ranks gives the gradient of one process on the concatenated batch.
    No tensor of width D is communicated. A collective call when there is more than one rank.

    Stored pairs add to the gradient, and nothing to the number that sums are divided by: as columns of the batch's
    anchors, and as anchors `sum_j w_ij grad s_ij` over the batch's columns j, the logit scale held constant, where they
    give back what the first take (`PairSums.add_stored`).

    Args:
        pairs: the global batch.
        value: (2, B), the value of each own anchor.
        log_weight: (2, B), the log weight of each own anchor.
        stored_log_weight: (2, S), the log weight of each stored anchor, whose standing `stored_standing` tells, less
            the log of the number of its negatives. All are detached.
    """
    factor = log_weight - pairs.log_count - pairs.positive
    if stored_log_weight is None:
        return score_weighted_loss(pairs, value=value, factor=factor)
    stored_factor = stored_log_weight - pairs.joined.positive
    return score_weighted_loss(
        pairs, value=value, factor=factor, in_stored=pairs.in_stored, stored_factor=stored_factor
    )


def score_weighted_loss(
    pairs: PairBatch, *, value: Tensor, factor: Tensor, in_stored: Sequence[Columns] = (),
    stored_factor: Tensor | None = None, held: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:  # fmt: skip
    """As `pair_loss`, with the weights `w_ij = exp(s_ij + factor_i)`.

    Args:
        pairs: the global batch.
        value: (2, B), the value of each own anchor.
        factor: (2, B), of own anchors.
        in_stored: own anchors of each direction and stored columns, if there are stored pairs.
        stored_factor: (2, S), of stored anchors; None: they take no part, only stored columns do. All are detached.
        held: per direction one more column for each own anchor, (B, D), and its weight, (B,); no gradient reaches it.
    """
    scalars = torch.cat([_counted(pairs, value), factor]).detach()
    all_value, all_factor = pairs.gathered(scalars).chunk(2)

    def add_up() -> PairSums:
        sums = PairSums(pairs)
        if len(pairs.sizes) == 1:
            sums.add_both_directions(pairs.in_batch[0], factor)
        else:
            for direction, columns in enumerate(pairs.in_batch):
                sums.add(direction, columns, factor[direction], all_factor[1 - direction])
        sums.scale = torch.linalg.vecdot(pairs.image, sums.features[0]).sum()
        if in_stored:
            sums.add_stored(pairs, in_stored, factor, stored_factor)
        return sums.with_held(pairs, held)

    return _PairLoss.apply(pairs.image, pairs.text, pairs.logit_scale, all_value.mean(), add_up, pairs)


def centre(pairs: PairBatch, direction: int) -> Tensor:
    """The mean of the batch's columns of a direction but an anchor's own, (B, D), to which stored columns are moved.

    All anchors are pulled to their positives and pushed from their negatives. In the batch alone these are the same
    features, so that the noise of their mean cancels. Against a mean of other features it stays, and outweighs what
    stored pairs bring where features lie in a narrow cone, as those of trained towers do. In expectation nothing
    changes, but for a mean that has moved since they were stored, which is put right too.
    """
    own, all_columns = ((pairs.text, pairs.all_text), (pairs.image, pairs.all_image))[direction]
    return (all_columns.sum(0) - own.detach()) / max(1, len(all_columns) - 1)


def loss_with_sums(
    pairs: PairBatch, *, value: Tensor, sums: "PairSums", held: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """As `score_weighted_loss`, with what the gradient is made of given, but for `held`."""
    all_value = pairs.gathered(_counted(pairs, value))
    return _PairLoss.apply(
        pairs.image, pairs.text, pairs.logit_scale, all_value.mean(), lambda: sums.with_held(pairs, held), pairs
    )


def _counted(pairs: PairBatch, value: Tensor) -> Tensor:
    """Values of anchors, 0 for those that have no negative in the batch."""
    return value.masked_fill(pairs.batch_count == 0, 0.0)


class _PairLoss(torch.autograd.Function):
    """Computes the gradient with the value, so that no score of a pair is kept for the backward pass."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, value, add_up, pairs):
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*add_up().gradients(pairs))
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value):
        return *(grad_value * gradient for gradient in ctx.saved_tensors), None, None, None


class PairSums:
    """What the gradient is made of, added up tile by tile.

    Attributes:
        features: per direction, `sum_j w_ij y_j` over all that own anchors meet, as anchors and as columns, (B, D).
        positive: the weight of the own pairs' positives, both directions together, (B,).
        scale: `sum_ij w_ij <x_i, y_j>`, ().
    """

    def __init__(self, pairs: PairBatch) -> None:
        self.features = [torch.zeros_like(pairs.image), torch.zeros_like(pairs.text)]
        self.positive = torch.zeros_like(pairs.image[:, 0])
        self.scale = torch.zeros_like(pairs.logit_scale)

    def add_both_directions(self, columns: Columns, factor: Tensor) -> None:
        """All pairs of one process, as columns of the first direction; `factor` is (2, B)."""
        for place, tile, scores, same in columns:
            weights, as_columns = _weights(scores, same, factor[0][:, None]), _weights(scores, same, factor[1][place])
            self.positive += weights.sum(1)
            self.positive[place] += as_columns.sum(0)
            weights += as_columns
            self.features[0].addmm_(weights, tile)
            self.features[1][place].addmm_(weights.T, columns.anchors)

    def add(self, direction: int, columns: Columns, factor: Tensor, column_factor: Tensor) -> None:
        """Own anchors (B,) with columns of all ranks (C,), each of which is an anchor of the other direction too."""
        for place, tile, scores, same in columns:
            weights = _weights(scores, same, factor[:, None])
            self.positive += weights.sum(1)
            weights += _weights(scores, same, column_factor[place])
            self.features[direction].addmm_(weights, tile)

    def add_stored(
        self, pairs: PairBatch, in_stored: Sequence[Columns], factor: Tensor, stored_factor: Tensor | None
    ) -> None:
        """Own anchors with stored columns and, if `stored_factor` is given, stored anchors with own columns.

        In a batch alone the columns of a direction are pushed, all together, with the weights with which they are
        pulled as the positives of their anchors. Stored columns take a part of that push, and stored anchors give it
        back: one number per direction multiplies their weights, so that they give what was taken. With K steps that do
        not move it is (K + 2) / (K + 1) in expectation, since their negatives are those of one step more. Without it
        features are pushed less, or more, than they are pulled, from where they all are, and that feeds on itself: the
        faster they move, the more what is stored lags behind.

        Then both push with stored features moved to the mean that `centre` says. A collective call over several ranks.
        """
        met = [
            self._meet(pairs, direction, columns, factor, stored_factor) for direction, columns in enumerate(in_stored)
        ]
        if stored_factor is None:
            return
        totals = sum_over_ranks(torch.stack([weight.sum(1) for weight, _ in met]), len(pairs.sizes))
        for direction, (sums, (weight, push), columns) in enumerate(zip(self.features, met, in_stored, strict=True)):
            taken, given = totals[1 - direction, 0], totals[direction, 1]
            share = torch.where(given > 0, taken / given, 0.0)
            moved = centre(pairs, direction) - columns.columns.mean(0)
            sums += push.mul_(share).addcmul_((weight[0] + share * weight[1])[:, None], moved)

    def _meet(
        self, pairs: PairBatch, direction: int, columns: Columns, factor: Tensor, stored_factor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add own anchors with stored columns. What these, as anchors, push own columns with is left to be added.

        Returns:
            The weight of each own feature, as an anchor and as a column of stored anchors, (2, B), and the sum of the
            stored anchors with their weights, (B, D).
        """
        weight, push = columns.anchors.new_zeros(2, len(columns.anchors)), torch.zeros_like(columns.anchors)
        for place, tile, scores, same in columns:
            weights = _weights(scores, same, factor[direction][:, None])
            self.scale += (weights * scores).sum() / pairs.logit_scale
            self.features[direction].addmm_(weights, tile)
            weight[0] += weights.sum(1)
            if stored_factor is not None:
                weights = _weights(scores, same, stored_factor[1 - direction][place])
                weight[1] += weights.sum(1)
                push.addmm_(weights, tile)
        self.positive += weight[0]
        return weight, push

    def with_held(self, pairs: PairBatch, held: Sequence[tuple[Tensor, Tensor]]) -> "PairSums":
        """Add one column for each own anchor, as of `score_weighted_loss`; returns itself."""
        for anchors, sums, (columns, weights) in zip((pairs.image, pairs.text), self.features, held, strict=False):
            self.positive += weights
            # Some rows at a time: columns may be of half precision.
            parts = zip(anchors.split(1024), sums.split(1024), columns.split(1024), weights.split(1024), strict=True)
            for x, total, column, weight in parts:
                column = column.to(x.dtype)
                total.addcmul_(weight[:, None], column)
                self.scale += torch.dot(weight, torch.linalg.vecdot(x, column))
        return self

    def gradients(self, pairs: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """With respect to this rank's image features, text features, and the logit scale."""
        factor = len(pairs.sizes) / (2 * len(pairs.all_ids))
        scale = self.scale - (self.positive * torch.linalg.vecdot(pairs.image, pairs.text)).sum()
        of_features = zip(self.features, (pairs.text, pairs.image), strict=True)
        image, text = (sums.addcmul_(self.positive[:, None], partners, value=-1) for sums, partners in of_features)
        return image.mul_(factor * pairs.logit_scale), text.mul_(factor * pairs.logit_scale), factor * scale


def _weights(scores: Tensor, same: Tensor, log_factor: Tensor) -> Tensor:
    """`exp(s_ij + log factor)`, 0 where both are one sample."""
    # Masked after the exponential: a row without negatives has an infinite weight.
    return (scores + log_factor).exp_().masked_fill_(same, 0.0)
