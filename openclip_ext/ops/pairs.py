"""Sums over all pairs of the global batch, in both directions, and the gradient of weighted pair sums.

This is the only place that sees scores of pairs; a loss asks for sums over its anchors' negatives and hands back one
weight per anchor.

    B   pairs on this rank          D   width of the embeddings
    G   pairs of all ranks          W   ranks
    s_ij = logit_scale * <x_i, y_j>         score of anchor i with column j
    q_ij = s_ij - s_ii                      shifted score, r_ij = exp(q_ij) its ratio

Direction 0 has images as anchors and texts as columns, direction 1 the reverse. Column j is a negative of anchor i
when their sample ids differ: a sample that comes twice in a batch is not its own negative.
"""

import dataclasses

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openclip_ext.ops.gather import gather_rows, gather_sizes
from openclip_ext.ops.precision import promoted


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """The features of this rank, with gradient, and those of all ranks, without."""

    image: Tensor  # (B, D)
    text: Tensor  # (B, D)
    logit_scale: Tensor  # ()
    all_image: Tensor  # (G, D)
    all_text: Tensor  # (G, D)
    ids: Tensor  # (B,) int64
    all_ids: Tensor  # (G,) int64
    sizes: tuple[int, ...]  # rows on each rank
    rank: int

    @property
    def own_rows(self) -> slice:
        """Where this rank's pairs sit among the gathered ones."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

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
    return PairBatch(image, text, logit_scale.to(image.dtype), all_image, all_text, ids, all_ids, sizes, rank)


@torch.no_grad()
def log_mean_ratio(pairs: PairBatch) -> Tensor:
    """`log mean_j r_ij` over the negatives j of each anchor of this rank, shape (2, B), detached.

    -inf for an anchor without any negative.
    """
    same = pairs.ids[:, None] == pairs.all_ids
    log_count = _log_count(same, pairs.image.dtype)
    log_means = []
    for anchors, columns, _, all_columns in pairs.directions():
        positive = (anchors * columns).sum(1, keepdim=True)
        shifted = pairs.logit_scale * (anchors @ all_columns.T - positive)
        log_means.append(shifted.masked_fill(same, -torch.inf).logsumexp(1) - log_count)
    return torch.stack(log_means)


def pair_loss(pairs: PairBatch, *, value: Tensor, log_weight: Tensor) -> Tensor:
    """A scalar with a given value and the gradient of a weighted sum over pairs.

        value:     mean over both directions and all G anchors of `value_i`
        gradient:  mean over both directions and all G anchors of  sum_j w_ij grad q_ij,
                   w_ij = exp(q_ij + log_weight_i) / (negatives of i), held constant

    The gradient on each rank covers its own anchors against all columns and all other anchors against its own
    columns, times W, so that averaging it over ranks gives the gradient of one process on the concatenated batch.
    No tensor of width D is communicated. A collective call when there is more than one rank.

    Args:
        pairs: the global batch.
        value: (2, B), the value of each own anchor.
        log_weight: (2, B), the log weight of each own anchor. Both are detached.
    """
    same = pairs.ids[:, None] == pairs.all_ids
    log_share = log_weight - _log_count(same, pairs.image.dtype)
    scalars = torch.cat([value.masked_fill(same.all(1), 0.0), log_share]).detach()
    all_value, all_log_share = gather_rows(scalars.T.contiguous(), pairs.sizes).T.chunk(2)
    return _PairLoss.apply(pairs.image, pairs.text, pairs.logit_scale, all_value.mean(), all_log_share, pairs)


def _log_count(same: Tensor, dtype: torch.dtype) -> Tensor:
    """log of the number of negatives of each row, 0 for a row without any."""
    return (~same).sum(1).clamp_min(1).to(dtype).log()


class _PairLoss(torch.autograd.Function):
    """Computes the gradient with the value, so that no score of a pair is kept for the backward pass."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, value, all_log_share, pairs):
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*_gradients(pairs, all_log_share))
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value):
        return *(grad_value * gradient for gradient in ctx.saved_tensors), None, None, None


def _gradients(pairs: PairBatch, all_log_share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to this rank's image features, text features, and the logit scale."""
    gradient = [torch.zeros_like(pairs.image), torch.zeros_like(pairs.text)]
    scale_gradient = torch.zeros_like(pairs.logit_scale)
    same = pairs.all_ids[:, None] == pairs.all_ids[pairs.own_rows]  # (G, B)
    for direction, (anchors, columns, all_anchors, all_columns) in enumerate(pairs.directions()):
        log_share = all_log_share[direction]
        # Own anchors against all columns.
        positive = (anchors * columns).sum(1, keepdim=True)
        difference = anchors @ all_columns.T - positive
        weight = _weights(pairs.logit_scale * difference, log_share[pairs.own_rows], same.T)
        row_sum = weight.sum(1, keepdim=True)
        gradient[direction] += weight @ all_columns - row_sum * columns
        gradient[1 - direction] -= row_sum * anchors
        scale_gradient += (weight * difference).sum()
        # All anchors against own columns: with one rank these are the same pairs.
        if len(pairs.sizes) > 1:
            all_positive = (all_anchors * all_columns).sum(1, keepdim=True)
            shifted = pairs.logit_scale * (all_anchors @ columns.T - all_positive)
            weight = _weights(shifted, log_share, same).T
        else:
            weight = weight.T
        gradient[1 - direction] += weight @ all_anchors
    world_size, global_batch = len(pairs.sizes), len(pairs.all_ids)
    factor = world_size / (2 * global_batch)
    return factor * pairs.logit_scale * gradient[0], factor * pairs.logit_scale * gradient[1], factor * scale_gradient


def _weights(shifted: Tensor, log_share: Tensor, same: Tensor) -> Tensor:
    # Masked after the exponential: a row without negatives has an infinite weight.
    return (shifted + log_share[:, None]).exp().masked_fill(same, 0.0)
