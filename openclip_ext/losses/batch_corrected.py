"""The global contrastive loss, estimated from one batch."""

import dataclasses
import math

from torch import Tensor, nn
from torch.nn.functional import softplus

from openclip_ext.ops.pairs import gather_pairs, log_mean_ratio, pair_loss
from openclip_ext.options import option
from openclip_ext.registry import LossSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    negatives: int = option(
        0, "K, negatives in the target loss; 0: all others of the training set", allowed=">= 0", check=lambda k: k >= 0
    )


class BatchCorrectedLoss(nn.Module):
    """`mean_i log(1 + K mean_{j != i} r_ij)`, r_ij = exp(s_ij - s_ii), both directions averaged.

    With K = N - 1 the batch stands for the whole training set of N pairs, so an anchor is pushed as hard as in the
    loss over all of it. With K = G - 1 this is OpenCLIP's `ClipLoss`. There is no memory: the estimate inside the log
    is the batch's own.
    """

    def __init__(self, options: Options, *, num_samples: int, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.log_negatives = math.log(options.negatives or num_samples - 1)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        output_dict: bool = True,
    ) -> dict[str, Tensor] | Tensor:
        """Features (B, D) of unit norm, logit scale (). Returns `contrastive_loss`, the global mean."""
        pairs = gather_pairs(image_features, text_features, logit_scale, None, self.rank, self.world_size)
        log_rate = softplus(self.log_negatives + log_mean_ratio(pairs))  # log(1 + K mean r)
        loss = pair_loss(pairs, value=log_rate, log_weight=self.log_negatives - log_rate)
        return {"contrastive_loss": loss} if output_dict else loss


SPEC = LossSpec(
    name="batch_corrected",
    summary="same-batch estimate of the loss over the whole training set; no memory",
    paper="the limit gamma = 1 of gamma_decomp",
    options=Options,
    build=BatchCorrectedLoss,
)
