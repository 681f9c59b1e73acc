"""The sigmoid loss of SigLIP."""

from torch import Tensor

from openclip_ext.losses.base import Loss
from openclip_ext.ops.pair_sigmoid import sigmoid_pair_loss
from openclip_ext.registry import LossSpec


class SigmoidLoss(Loss):
    """`-1/G sum_ij log sigmoid(y_ij (logit_scale <v_i, t_j> + logit_bias))`, y_ij = 1 for i = j, else -1.

    It is `open_clip.loss.SigLipLoss`, over the global batch.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.
    """

    def compute(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, logit_bias: Tensor, **extra: Tensor
    ) -> dict[str, Tensor]:
        """`contrastive_loss`."""
        pairs = self.context.gather_pairs(image_features, text_features, logit_scale)
        return {"contrastive_loss": sigmoid_pair_loss(pairs, logit_bias)}


SPEC = LossSpec(
    name="siglip",
    summary="as OpenCLIP's SigLipLoss: a logistic loss on every pair, no normaliser",
    paper="Zhai et al., ICCV 2023",
    needs=frozenset({"logit_bias"}),
    build=SigmoidLoss,
)
