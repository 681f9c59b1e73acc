"""OpenCLIP's own loss, as it is."""

from openclip_ext.losses.base import LossContext
from openclip_ext.losses.wrapped import WrappedLoss
from openclip_ext.options import NoOptions
from openclip_ext.registry import LossSpec
from openclip_ext.upstream import clip_loss


def build(options: NoOptions, context: LossContext) -> WrappedLoss:
    """`open_clip.ClipLoss`, gathered with gradient, so that N ranks equal one.

    Value: mean of the two cross entropies of `logit_scale * image @ text.T` over the global batch.
    """
    world = {"rank": context.rank, "world_size": context.world_size}
    return WrappedLoss(clip_loss(local_loss=True, gather_with_grad=True, **world), context)


SPEC = LossSpec(
    name="clip",
    summary="OpenCLIP's ClipLoss: softmax over the batch, positive in the denominator",
    paper="Radford et al., ICML 2021",
    build=build,
)
