"""Distillation from a teacher's similarities, as OpenCLIP has it."""

from torch import Tensor

from openclip_ext.losses.base import Loss
from openclip_ext.losses.context import LossContext
from openclip_ext.ops.gather import with_global_value
from openclip_ext.ops.precision import promoted
from openclip_ext.options import NoOptions
from openclip_ext.registry import LossSpec
from openclip_ext.upstream import distill_loss


class DistillTerm(Loss):
    """Cross entropy of the model's softmax over the batch against the teacher's, both directions averaged.

    Source: the distillation part of `open_clip.loss.DistillClipLoss`.
    """

    def __init__(self, options: NoOptions, context: LossContext) -> None:
        context.require_gather("loss term distill, which is OpenCLIP's own,")
        super().__init__(options, context)
        self.loss = distill_loss(
            local_loss=True, gather_with_grad=True, rank=context.rank, world_size=context.world_size
        )

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """Features (B, D) and scale () of the model, and of the teacher. Returns `distill_loss`, the global mean."""
        student = promoted(image_features, text_features, logit_scale)
        teacher = promoted(dist_image_features, dist_text_features, dist_logit_scale)
        value = self.loss(*student, *teacher, output_dict=True)["distill_loss"]
        value = with_global_value(value, self.context.world_size)
        return {"distill_loss": value}


SPEC = LossSpec(
    name="distill",
    summary="distillation from the similarities of --distill-model; added by that flag",
    paper="open_clip.loss.DistillClipLoss",
    needs=frozenset({"teacher_features"}),
    build=DistillTerm,
)
