"""An OpenCLIP model inside another module. Imports torch, so it is imported by what needs it."""

from typing import Any

from torch import Tensor, nn


class Wrapper(nn.Module):
    """An OpenCLIP model `model` inside another module, which still encodes images and texts as it does."""

    model: Any  # OpenCLIP says of no model what it has

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, *args, **options) -> Tensor:
        """The model's."""
        return self.model.encode_image(*args, **options)

    def encode_text(self, *args, **options) -> Tensor:
        """The model's."""
        return self.model.encode_text(*args, **options)
