"""Sums over all pairs of the global batch, in both directions, and the gradient of weighted pair sums.

This is the only place that sees scores of pairs; a loss asks for sums over its anchors' negatives and hands back one
weight per anchor.

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
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openclip_ext.ops.gather import exchange_columns, gather_rows, gather_sizes
from openclip_ext.ops.precision import promoted


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

    @property
    def own_rows(self) -> slice:
        """Where this rank's pairs sit among the gathered ones."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    @cached_property
    def same(self) -> Tensor:
        """Whether an own anchor and a column are one sample, (B, G): those are no negatives."""
        return self.ids[:, None] == self.all_ids

    @property
    def joined(self) -> StoredPairs:
        """The stored pairs, where there are some."""
        assert self.stored is not None
        return self.stored

    @cached_property
    def same_stored(self) -> Tensor:
        """Whether an own pair and a stored one are one sample, (B, S)."""
        return self.ids[:, None] == self.joined.ids

    @cached_property
    def count(self) -> Tensor:
        """The number of negatives of each own anchor, (B,)."""
        count = (~self.same).sum(1)
        return count if self.stored is None else count + (~self.same_stored).sum(1)

    @cached_property
    def log_count(self) -> Tensor:
        """log of the number of negatives of each own anchor, (B,); 0 for one without any."""
        return self.count.clamp_min(1).to(self.image.dtype).log()

    @cached_property
    @torch.no_grad()
    def scores(self) -> tuple[Tensor, Tensor]:
        """s_ij of own anchors and all columns, (B, G) per direction."""
        of_images = self.logit_scale * self.image @ self.all_text.T
        if len(self.sizes) == 1:  # a copy costs a tenth of a product
            return of_images, of_images.T.contiguous()
        return of_images, self.logit_scale * self.text @ self.all_image.T

    @cached_property
    @torch.no_grad()
    def stored_scores(self) -> tuple[Tensor, Tensor]:
        """Scores of own images with stored texts, and of own texts with stored images, (B, S) each."""
        return self.logit_scale * self.image @ self.joined.text.T, self.logit_scale * self.text @ self.joined.image.T

    @cached_property
    @torch.no_grad()
    def positive(self) -> Tensor:
        """s_ii of own pairs, (B,)."""
        return self.logit_scale * (self.image * self.text).sum(1)

    @cached_property
    @torch.no_grad()
    def stored_standing(self) -> tuple[Tensor, Tensor]:
        """`log mean_j r_aj` of each stored anchor a, and log of the number of its negatives j, (2, S) each.

        Its negatives are those that it had when it was stored, as they were, and those it has among the batch's columns
        now. So no weight made of it is above what it would be in the batch alone, however far features have moved. A
        collective call over several ranks.
        """
        stored, ranks = self.joined, (1,) * len(self.sizes)
        # An anchor of direction 0 is a stored image, whose columns are the batch's texts.
        own = torch.stack([_stored_log_sum(self, 1 - direction, dim=0) for direction in range(2)])
        log_sums = torch.cat([gather_rows(own[None], ranks), stored.log_sum.to(own.dtype)[None]])
        log_sum = log_sums.logsumexp(0)
        count = stored.count + gather_rows((~self.same_stored).sum(0)[None], ranks).sum(0)
        log_count = count.clamp_min(1).to(own.dtype).log().expand_as(log_sum)
        return log_sum - stored.positive - log_count, log_count

    def gathered(self, values: Tensor) -> Tensor:
        """Values of own anchors (n, B) as those of all, (n, G), detached. A collective call over several ranks."""
        return gather_rows(values.T.contiguous(), self.sizes).T

    def directions(self):
        """(anchors, columns, all anchors, all columns), images as anchors first."""
        yield self.image, self.text, self.all_image, self.all_text
        yield self.text, self.image, self.all_text, self.all_image


def gather_pairs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    sample_ids: Tensor | None,
    rank: int,
    world_size: int,
    stored: StoredPairs | None = None,
) -> PairBatch:
    """Gather the global batch. A collective call when `world_size > 1`.

    Features of half precision are promoted to float32 first. Without `sample_ids` every row counts as a sample of
    its own.

    Raises:
        ValueError: image and text features differ in shape, or the global batch holds fewer than two pairs.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise ValueError(
            f"image_features {tuple(image_features.shape)} and text_features {tuple(text_features.shape)} "
            "must both be (batch, width)"
        )
    image, text = promoted(image_features, text_features)
    sizes = gather_sizes(len(image), world_size, image.device)
    if sum(sizes) < 2:
        raise ValueError("a contrastive loss needs at least two pairs in the global batch; raise --batch-size")
    all_image, all_text = gather_rows(torch.cat([image, text], dim=1), sizes).chunk(2, dim=1)
    if sample_ids is None:
        all_ids = torch.arange(sum(sizes), device=image.device)
        start = sum(sizes[:rank])
        ids = all_ids[start : start + sizes[rank]]
    else:
        ids = sample_ids.to(image.device)
        all_ids = gather_rows(ids, sizes)
    logit_scale = logit_scale.to(image.dtype)
    return PairBatch(image, text, logit_scale, all_image, all_text, ids, all_ids, sizes, rank, stored)


@torch.no_grad()
def log_mean_ratio(pairs: PairBatch) -> Tensor:
    """`log mean_j r_ij` over the negatives j of each anchor of this rank, shape (2, B), detached.

    -inf for an anchor without any negative.
    """
    log_sum = torch.stack([scores.masked_fill(pairs.same, -torch.inf).logsumexp(1) for scores in pairs.scores])
    if pairs.stored is not None:
        log_sum = torch.logaddexp(log_sum, torch.stack([_stored_log_sum(pairs, d, dim=1) for d in range(2)]))
    return log_sum - pairs.positive - pairs.log_count


def _stored_log_sum(pairs: PairBatch, direction: int, dim: int) -> Tensor:
    """log of the sum of exp(score) over stored partners (dim 1, (B,)) or own ones (dim 0, (S,))."""
    return pairs.stored_scores[direction].masked_fill(pairs.same_stored, -torch.inf).logsumexp(dim)


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
    anchors, and as anchors `sum_j w_ij grad s_ij` over the batch's columns j, the logit scale held constant.

    Args:
        pairs: the global batch.
        value: (2, B), the value of each own anchor.
        log_weight: (2, B), the log weight of each own anchor.
        stored_log_weight: (2, S), the log weight of each stored anchor, whose standing `stored_standing` tells. All
            are detached.
    """
    factor = log_weight - pairs.log_count - pairs.positive
    scalars = torch.cat([value.masked_fill(pairs.same.all(1), 0.0), factor]).detach()
    all_value, all_factor = pairs.gathered(scalars).chunk(2)

    def weights():
        own = [_weights(pairs.same, scores, log[:, None]) for scores, log in zip(pairs.scores, factor, strict=True)]
        if len(pairs.sizes) == 1:
            return own, [weight.T for weight in own]
        # The score of any anchor with an own column is that of this column, as an anchor of the other direction.
        return own, [_weights(pairs.same, pairs.scores[1 - d], all_factor[d]) for d in range(2)]

    def stored_weights():
        if stored_log_weight is None:
            return None
        stored_factor = stored_log_weight - pairs.stored_standing[1] - pairs.joined.positive
        scores, same = pairs.stored_scores, pairs.same_stored
        on_stored = [_weights(same, scores[d], factor[d][:, None]) for d in range(2)]
        by_stored = [_weights(same, scores[1 - d], stored_factor[d]) for d in range(2)]
        return on_stored, by_stored

    return _PairLoss.apply(pairs.image, pairs.text, pairs.logit_scale, all_value.mean(), weights, stored_weights, pairs)


def weighted_pair_loss(pairs: PairBatch, *, value: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """As `pair_loss`, with the weights w_ij of own anchors and all columns given, (B, G) per direction, detached."""
    all_value = pairs.gathered(value.masked_fill(pairs.same.all(1), 0.0))

    def both():
        return weights, [exchange_columns(weight, pairs.sizes, pairs.rank) for weight in weights]

    return _PairLoss.apply(pairs.image, pairs.text, pairs.logit_scale, all_value.mean(), both, lambda: None, pairs)


def _weights(same: Tensor, scores: Tensor, log_factor: Tensor) -> Tensor:
    """`exp(s_ij + log factor)`, 0 where both are one sample."""
    # Masked after the exponential: a row without negatives has an infinite weight.
    return (scores + log_factor).exp_().masked_fill_(same, 0.0)


class _PairLoss(torch.autograd.Function):
    """Computes the gradient with the value, so that no score of a pair is kept for the backward pass.

    `weights()` gives, per direction, those of own anchors and all columns (B, G), and those of own columns and all
    anchors (B, G). `stored_weights()` gives the same of stored columns and anchors, (B, S) per direction; or None.
    """

    @staticmethod
    def forward(ctx, image, text, logit_scale, value, weights, stored_weights, pairs):
        if any(ctx.needs_input_grad):
            as_anchors, as_columns = weights()
            ctx.save_for_backward(*_gradients(pairs, as_anchors, as_columns, stored_weights()))
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value):
        return *(grad_value * gradient for gradient in ctx.saved_tensors), None, None, None, None


def _gradients(pairs: PairBatch, as_anchors, as_columns, stored_weights) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to this rank's image features, text features, and the logit scale."""
    positive = as_anchors[0].sum(1) + as_anchors[1].sum(1)
    # An own image meets all texts twice: as an anchor of direction 0 and as a column of direction 1.
    image_weights = as_anchors[0] + as_columns[1]
    text_weights = image_weights.T if len(pairs.sizes) == 1 else as_anchors[1] + as_columns[0]
    image_gradient = image_weights @ pairs.all_text
    text_gradient = text_weights @ pairs.all_image
    scale_gradient = (pairs.image * image_gradient).sum()
    if stored_weights is not None:
        on_stored, by_stored = stored_weights
        positive = positive + on_stored[0].sum(1) + on_stored[1].sum(1)
        image_gradient += (on_stored[0] + by_stored[1]) @ pairs.joined.text
        text_gradient += (on_stored[1] + by_stored[0]) @ pairs.joined.image
        gaps = zip(on_stored, pairs.stored_scores, strict=True)
        scale_gradient = scale_gradient + sum((weights * scores).sum() for weights, scores in gaps) / pairs.logit_scale
    image_gradient -= positive[:, None] * pairs.text
    text_gradient -= positive[:, None] * pairs.image
    scale_gradient = scale_gradient - (positive * (pairs.image * pairs.text).sum(1)).sum()
    factor = len(pairs.sizes) / (2 * len(pairs.all_ids))
    return (
        factor * pairs.logit_scale * image_gradient,
        factor * pairs.logit_scale * text_gradient,
        factor * scale_gradient,
    )
