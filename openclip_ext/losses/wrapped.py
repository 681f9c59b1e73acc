"""An adapter for losses that are already written for OpenCLIP."""

from torch import Tensor, nn

from openclip_ext.ops.gather import with_global_value
from openclip_ext.ops.precision import promoted


class WrappedLoss(nn.Module):
    """Calls a loss of OpenCLIP and reports its mean over ranks as the value, its gradient untouched.

    Half-precision features are promoted to float32 first.
    """

    def __init__(self, loss: nn.Module, world_size: int) -> None:
        super().__init__()
        self.loss = loss
        self.world_size = world_size

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, output_dict: bool = True, **extra
    ) -> dict[str, Tensor] | Tensor:
        outputs = self.loss(*promoted(image_features, text_features, logit_scale), **extra, output_dict=True)
        outputs = {name: with_global_value(value, self.world_size) for name, value in outputs.items()}
        return outputs if output_dict else sum(outputs.values())
