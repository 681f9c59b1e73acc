"""The decoupled contrastive loss: InfoNCE without the positive in its denominator."""

from torch import Tensor

from openclip_ext.losses.base import PairLoss
from openclip_ext.losses.recent import RecentOptions, recent_needs
from openclip_ext.registry import LossSpec


class DCLLoss(PairLoss):
    """`mean_i log sum_{j != i} exp(s_ij - s_ii)` over the G pairs of the global batch, both directions averaged.

    Removing the positive removes the factor `1 - p(positive)` that shrinks gradients at small batch. The normaliser is
    still the batch's own, so the bias of order 1/G remains: the baseline that every memory has to beat.

    Source: Yeh et al., "Decoupled Contrastive Learning", ECCV 2022.
    """

    def terms(self, log_mean: Tensor, log_count: Tensor) -> tuple[Tensor, Tensor]:
        """`log sum_j r_ij`, weighted by one over the mean ratio."""
        return log_mean + log_count, -log_mean


SPEC = LossSpec(
    name="dcl",
    summary="decoupled: the positive is out of the denominator; no memory",
    paper="Yeh et al., ECCV 2022",
    options=RecentOptions,
    needs=recent_needs,
    build=DCLLoss,
)
