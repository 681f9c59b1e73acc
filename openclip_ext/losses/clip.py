"""OpenCLIP's own loss, as it is; with the pairs of recent steps, the same over more columns."""

from torch import Tensor
from torch.nn.functional import softplus

from openclip_ext.losses.base import Loss, PairLoss
from openclip_ext.losses.context import LossContext
from openclip_ext.losses.recent import RecentOptions, recent_needs
from openclip_ext.losses.wrapped import WrappedLoss
from openclip_ext.registry import LossSpec
from openclip_ext.upstream import clip_loss


class ClipPairLoss(PairLoss):
    """`mean_i log(1 + sum_{j != i} exp(s_ij - s_ii))`, both directions averaged: InfoNCE, written over negatives.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
    """

    def terms(self, log_mean: Tensor, log_count: Tensor) -> tuple[Tensor, Tensor]:
        """`log(1 + n mean r)`, weighted by `n / (1 + n mean r)`, n negatives."""
        value = softplus(log_mean + log_count)
        return value, log_count - value


def build(options: RecentOptions, context: LossContext) -> Loss:
    """`open_clip.ClipLoss`, gathered with gradient, so that N ranks equal one; with recent pairs `ClipPairLoss`.

    Value: mean of the two cross entropies of `logit_scale * image @ text.T` over the global batch.
    """
    if options.recent_batches:
        return ClipPairLoss(options, context)
    world = {"rank": context.rank, "world_size": context.world_size}
    return WrappedLoss(clip_loss(local_loss=True, gather_with_grad=True, **world), context)


SPEC = LossSpec(
    name="clip",
    summary="OpenCLIP's ClipLoss: softmax over the batch, positive in the denominator",
    paper="Radford et al., ICML 2021",
    options=RecentOptions,
    needs=recent_needs,
    build=build,
)
