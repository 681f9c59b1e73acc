"""Global contrastive loss with a running normaliser per anchor."""

import dataclasses

import torch
from torch import Tensor, nn

from openclip_ext.ops.pairs import PairBatch, gather_pairs, log_mean_ratio, pair_loss
from openclip_ext.options import option
from openclip_ext.registry import LossSpec
from openclip_ext.state.rate_table import RateTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    gamma: float = option(
        0.9, "weight of the current batch in the running normaliser", allowed="in (0, 1]", check=lambda g: 0 < g <= 1
    )


class SogCLRLoss(nn.Module):
    """Target: `mean_i log mean_{j != i} r_ij` over all N pairs, both directions averaged.

    `U_i <- (1 - gamma) U_i + gamma mean_{j in batch} r_ij`, then the gradient `mean_j r_ij / U_i grad q_ij` with the
    weight held constant. The value returned is the mean of `log U_i`.

    Source: Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning", ICML 2022, for image-text
    pairs with one normaliser per sample and direction.
    """

    def __init__(self, options: Options, *, num_samples: int, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.gamma = options.gamma
        self.rates = RateTable(num_samples)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        sample_ids: Tensor,
        output_dict: bool = True,
    ) -> dict[str, Tensor] | Tensor:
        """Features (B, D) of unit norm, logit scale (), ids (B,). Returns `contrastive_loss`, the global mean."""
        pairs = gather_pairs(image_features, text_features, logit_scale, sample_ids, self.rank, self.world_size)
        log_rate = self._blended_rate(pairs)
        loss = pair_loss(pairs, value=log_rate, log_weight=-log_rate)
        return {"contrastive_loss": loss} if output_dict else loss

    @torch.no_grad()
    def warm_start(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, sample_ids: Tensor
    ) -> None:
        """Write the batch's own normalisers before training, as at a first visit. Arguments as of `forward`."""
        self._blended_rate(
            gather_pairs(image_features, text_features, logit_scale, sample_ids, self.rank, self.world_size)
        )
        self.rates.commit()

    def commit(self) -> None:
        self.rates.commit()

    def _blended_rate(self, pairs: PairBatch) -> Tensor:
        """log of the normalisers after this visit, (2, B), which it stages."""
        log_rate = self.rates.blend(pairs.ids, log_mean_ratio(pairs), self.gamma)
        self.rates.stage(pairs.all_ids, pairs.gathered(log_rate))
        return log_rate


SPEC = LossSpec(
    name="sogclr",
    summary="running normaliser per anchor, decoupled",
    paper="Yuan et al., ICML 2022",
    options=Options,
    needs=frozenset({"sample_ids"}),
    build=SogCLRLoss,
)
