"""The captioning loss of CoCa models."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from openclip_ext.losses.base import Loss
from openclip_ext.ops.gather import global_mean
from openclip_ext.ops.precision import promoted
from openclip_ext.registry import LossSpec

PAD = 0  # of OpenCLIP's tokenizer


class CaptionTerm(Loss):
    """Mean cross entropy of the next caption token over all tokens of the global batch that are no padding.

    Source: Yu et al., "CoCa", TMLR 2022; `open_clip.loss.CoCaLoss` on one process.
    """

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        logits: Tensor,
        labels: Tensor,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """`logits` (B, L, V), `labels` (B, L). Returns `caption_loss`, the global mean."""
        (logits,) = promoted(logits)
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, reduction="sum")
        value = global_mean(total, (labels != PAD).sum(), self.context.world_size)
        return {"caption_loss": value}


SPEC = LossSpec(
    name="caption",
    summary="captioning loss of CoCa models; added for them, weighted by --coca-caption-loss-weight",
    paper="Yu et al., TMLR 2022",
    needs=frozenset({"caption_logits"}),
    build=CaptionTerm,
)
