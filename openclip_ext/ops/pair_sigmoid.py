"""The logistic loss of every pair, formed tile by tile. Letters as in `ops/pairs.py`."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from openclip_ext.ops.gather import sum_over_ranks
from openclip_ext.ops.pairs import PairBatch


def sigmoid_pair_loss(pairs: PairBatch, logit_bias: Tensor) -> Tensor:
    """`1/G sum_ij softplus(-y_ij (s_ij + b))`, y_ij = 1 for an image and its own text, else -1.

    With `softplus(-t) = softplus(t) - t` it is the sum over all pairs of one function, less that of the G own pairs'
    `s_ii + b`, so no pair has to be told from the others. The gradient on each rank covers its own images with all
    texts and its own texts with all images, times W. A collective call when there is more than one rank.

    Args:
        pairs: the global batch.
        logit_bias: b, ().
    """
    bias = logit_bias.to(pairs.image.dtype)
    return _SigmoidPairLoss.apply(pairs.image, pairs.text, pairs.logit_scale, bias, pairs)


class _SigmoidPairLoss(torch.autograd.Function):
    """Computes the gradient with the value, so that no score of a pair is kept for the backward pass."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, bias, pairs):
        one_process = len(pairs.sizes) == 1
        of_image, of_text = -pairs.text.detach(), -pairs.image.detach()  # those of own pairs
        total, of_bias = -(pairs.positive + bias).sum(), image.new_tensor(-float(len(image)))
        for place, texts, scores, _ in pairs.in_batch[0]:
            logits = scores + bias
            total += softplus(logits).sum()
            weights = logits.sigmoid_()
            of_bias += weights.sum()
            of_image.addmm_(weights, texts)
            if one_process:
                of_text[place].addmm_(weights.T, image)
        if not one_process:
            for _, images, scores, _ in pairs.in_batch[1]:
                of_text.addmm_((scores + bias).sigmoid_(), images)
        of_scale = torch.linalg.vecdot(pairs.image, of_image).sum()
        world_size, count = len(pairs.sizes), len(pairs.all_ids)
        share = world_size / count
        scale = share * logit_scale
        ctx.save_for_backward(of_image.mul_(scale), of_text.mul_(scale), share * of_scale, share * of_bias)
        return sum_over_ranks(total, world_size) / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value):
        return *(grad_value * gradient for gradient in ctx.saved_tensors), None
