"""InfoNCE, the loss of CLIP."""

from torch import Tensor
from torch.nn.functional import softplus

from openclip_ext.losses.base import PairLoss
from openclip_ext.losses.recent import RecentOptions, recent_needs
from openclip_ext.registry import LossSpec


class ClipLoss(PairLoss):
    """`mean_i log(1 + sum_{j != i} exp(s_ij - s_ii))`, both directions averaged: InfoNCE, written over negatives.

    Without sample ids every pair is a sample of its own: then it is `open_clip.ClipLoss`, the mean of the two cross
    entropies of `logit_scale * image @ text.T` over the global batch.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
    """

    least_pairs = 1  # as OpenCLIP's, which is 0 then

    def terms(self, log_mean: Tensor, log_count: Tensor) -> tuple[Tensor, Tensor]:
        """`log(1 + n mean r)`, weighted by `n / (1 + n mean r)`, n negatives."""
        value = softplus(log_mean + log_count)
        return value, log_count - value


SPEC = LossSpec(
    name="clip",
    summary="as OpenCLIP's ClipLoss: softmax over the batch, positive in the denominator",
    paper="Radford et al., ICML 2021",
    options=RecentOptions,
    needs=recent_needs,
    build=ClipLoss,
)
