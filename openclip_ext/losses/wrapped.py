"""An adapter for losses that are already written for OpenCLIP."""

from torch import Tensor, nn

from openclip_ext.losses.base import Loss
from openclip_ext.losses.context import LossContext
from openclip_ext.ops.gather import with_global_value
from openclip_ext.ops.precision import promoted


class WrappedLoss(Loss):
    """Calls a loss of OpenCLIP and reports its mean over ranks as the value, its gradient untouched.

    Half-precision features are promoted to float32 first.
    """

    def __init__(self, loss: nn.Module, context: LossContext) -> None:
        super().__init__(context=context)
        self.loss = loss

    def compute(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **extra: Tensor
    ) -> dict[str, Tensor]:
        """What the loss returns."""
        outputs = self.loss(*promoted(image_features, text_features, logit_scale), **extra, output_dict=True)
        return {name: with_global_value(value, self.context.world_size) for name, value in outputs.items()}
