"""The decoupled contrastive loss: InfoNCE without the positive in its denominator."""

import math

from torch import Tensor, nn

from openclip_ext.ops.pairs import gather_pairs, log_mean_ratio, pair_loss
from openclip_ext.registry import LossSpec


class DCLLoss(nn.Module):
    """`mean_i log sum_{j != i} exp(s_ij - s_ii)` over the G pairs of the global batch, both directions averaged.

    Removing the positive removes the factor `1 - p(positive)` that shrinks gradients at small batch. The normaliser is
    still the batch's own, so the bias of order 1/G remains: the baseline that every memory has to beat.

    Source: Yeh et al., "Decoupled Contrastive Learning", ECCV 2022.
    """

    def __init__(self, options, *, num_samples: int, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

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
        log_mean = log_mean_ratio(pairs)
        negatives = len(pairs.all_ids) - 1
        loss = pair_loss(pairs, value=log_mean + math.log(negatives), log_weight=-log_mean)
        return {"contrastive_loss": loss} if output_dict else loss


SPEC = LossSpec(
    name="dcl",
    summary="decoupled: the positive is out of the denominator; no memory",
    paper="Yeh et al., ECCV 2022",
    build=DCLLoss,
)
