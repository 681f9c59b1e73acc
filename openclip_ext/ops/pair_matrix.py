"""Scores of all pairs as matrices, for losses that choose among candidates. Letters as in `ops/pairs.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openclip_ext.ops.gather import exchange_columns
from openclip_ext.ops.pair_sums import PairSums
from openclip_ext.ops.pairs import PairBatch


@torch.no_grad()
def scores_in_batch(pairs: PairBatch, direction: int) -> tuple[Tensor, Tensor]:
    """s_ij of own anchors and the batch's columns, and whether both are one sample, (B, G) each."""
    if len(pairs.sizes) == 1 and direction == 1:  # a copy costs a tenth of a product
        _, scores, same = pairs.in_batch[0].whole
        return scores.T.contiguous(), same
    _, scores, same = pairs.in_batch[direction].whole
    return scores, same


def scores_with_stored(pairs: PairBatch, direction: int) -> tuple[Tensor, Tensor]:
    """The same of own anchors and stored columns, (B, S) each."""
    _, scores, same = pairs.in_stored[direction].whole
    return scores, same


def weighted_pair_loss(pairs: PairBatch, *, value: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """As `pair_sums.pair_loss`, with the weights w_ij of own anchors and the batch's columns given.

    Args:
        pairs: the global batch.
        value: (2, B), the value of each own anchor.
        weights: (B, G) per direction. All are detached.
    """
    all_value = pairs.gathered(value.masked_fill(pairs.batch_count == 0, 0.0))
    return _WeightedPairLoss.apply(pairs.image, pairs.text, pairs.logit_scale, all_value.mean(), weights, pairs)


class _WeightedPairLoss(torch.autograd.Function):
    """Computes the gradient with the value."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, value, weights, pairs):
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*_gradients(pairs, weights))
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value):
        return *(grad_value * gradient for gradient in ctx.saved_tensors), None, None, None


def _gradients(pairs: PairBatch, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to this rank's image features, text features, and the logit scale."""
    as_columns = [exchange_columns(weight, pairs.sizes, pairs.rank) for weight in weights]
    # An own image meets all texts twice: as an anchor of direction 0 and as a column of direction 1.
    image_weights = weights[0] + as_columns[1]
    text_weights = image_weights.T if len(pairs.sizes) == 1 else weights[1] + as_columns[0]
    sums = PairSums(pairs)
    sums.features = [image_weights @ pairs.all_text, text_weights @ pairs.all_image]
    sums.positive = weights[0].sum(1) + weights[1].sum(1)
    sums.scale = torch.linalg.vecdot(pairs.image, sums.features[0]).sum()
    return sums.gradients(pairs)
