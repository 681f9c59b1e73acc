"""The global contrastive loss, estimated from one batch."""

import dataclasses

from torch import Tensor
from torch.nn.functional import softplus

from openclip_ext.losses.base import PairLoss
from openclip_ext.losses.context import LossContext
from openclip_ext.losses.recent import RecentOptions, recent_needs
from openclip_ext.options import option
from openclip_ext.registry import LossSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RecentOptions):
    negatives: int = option(
        0, "K, negatives in the target loss; 0: all others of the training set", allowed=">= 0", check=lambda k: k >= 0
    )


class BatchCorrectedLoss(PairLoss):
    """`mean_i log(1 + K mean_{j != i} r_ij)`, r_ij = exp(s_ij - s_ii), both directions averaged.

    With K = N - 1 the batch stands for the whole training set of N pairs, so an anchor is pushed as hard as in the
    loss over all of it. With K = G - 1 this is OpenCLIP's `ClipLoss`. There is no memory: the estimate inside the log
    is the batch's own.
    """

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__(options, context)
        self.log_negatives = context.log_negatives(options.negatives)

    def terms(self, log_mean: Tensor, log_count: Tensor) -> tuple[Tensor, Tensor]:
        """`log(1 + K mean r)`, weighted by `K / (1 + K mean r)`."""
        log_rate = softplus(self.log_negatives + log_mean)
        return log_rate, self.log_negatives - log_rate


SPEC = LossSpec(
    name="batch_corrected",
    summary="same-batch estimate of the loss over the whole training set; no memory",
    paper="the limit gamma = 1 of gamma_decomp",
    options=Options,
    needs=lambda options: recent_needs(options) | (frozenset() if options.negatives else {"num_samples"}),
    build=BatchCorrectedLoss,
)
