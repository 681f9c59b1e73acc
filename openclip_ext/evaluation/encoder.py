"""A model with all it takes to encode pictures and texts."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model and how to run it.

    Attributes:
        model: an OpenCLIP model, in evaluation mode.
        tokenizer: the model's: texts to (B, L) ids.
        transform: the model's, for evaluation: picture to (3, H, W).
        device: where the model is.
        autocast: returns the context to run the model in.
        dtype: of images; None: as loaded.
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    transform: Callable[[Any], Tensor]
    device: torch.device
    autocast: Callable[[], AbstractContextManager]
    dtype: torch.dtype | None

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """(B, D) features of (B, 3, H, W) images, of unit norm unless `normalize` is False, on `device`."""
        with self.autocast():
            images = images.to(device=self.device, dtype=self.dtype, non_blocking=True)
            return self.model.encode_image(images, normalize=normalize)

    @torch.no_grad()
    def encode_texts(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """(B, D) features of (B, L) token ids, of unit norm unless `normalize` is False, on `device`."""
        with self.autocast():
            return self.model.encode_text(tokens.to(self.device, non_blocking=True), normalize=normalize)
