"""OpenCLIP's own sigmoid loss, as it is."""

from openclip_ext.losses.context import LossContext
from openclip_ext.losses.wrapped import WrappedLoss
from openclip_ext.options import NoOptions
from openclip_ext.registry import LossSpec
from openclip_ext.upstream import siglip_loss


def build(options: NoOptions, context: LossContext) -> WrappedLoss:
    """`open_clip.loss.SigLipLoss`, averaged over ranks.

    Value: `-1/G sum_ij log sigmoid(y_ij (logit_scale <v_i, t_j> + logit_bias))`, y_ij = 1 for i = j, else -1.
    """
    return WrappedLoss(siglip_loss(rank=context.rank, world_size=context.world_size), context)


SPEC = LossSpec(
    name="siglip",
    summary="OpenCLIP's SigLipLoss: a logistic loss on every pair, no normaliser",
    paper="Zhai et al., ICCV 2023",
    needs=frozenset({"logit_bias"}),
    build=build,
)
