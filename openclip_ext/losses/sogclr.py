"""Global contrastive loss with a running normaliser per anchor."""

import dataclasses

from torch import Tensor

from openclip_ext.losses.rates import RateLoss, RateOptions
from openclip_ext.losses.recent import recent_needs
from openclip_ext.options import option
from openclip_ext.registry import LossSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RateOptions):
    gamma: float = option(
        0.9, "weight of the current batch in the running normaliser", allowed="in (0, 1]", check=lambda g: 0 < g <= 1
    )


class SogCLRLoss(RateLoss):
    """Target: `mean_i log mean_{j != i} r_ij` over all N pairs, both directions averaged.

    `U_i <- (1 - gamma) U_i + gamma mean_{j in batch} r_ij`, then the gradient `mean_j r_ij / U_i grad q_ij` with the
    weight held constant. The value returned is the mean of `log U_i`.

    Source: Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning", ICML 2022, for image-text
    pairs with one normaliser per sample and direction.
    """

    @property
    def batch_weight(self) -> float:
        return self.options.gamma

    def log_weight(self, log_rate: Tensor) -> Tensor:
        """One over U."""
        return -log_rate


SPEC = LossSpec(
    name="sogclr",
    summary="running normaliser per anchor, decoupled",
    paper="Yuan et al., ICML 2022",
    options=Options,
    needs=lambda options: recent_needs(options) | {"sample_ids", "num_samples"},
    build=SogCLRLoss,
)
