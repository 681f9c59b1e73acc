"""A model with all it takes to encode pictures and texts, one batch or many."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model and how to run it.

    Attributes:
        model: an OpenCLIP model, or one that encodes as it does, in evaluation mode.
        tokenizer: the model's: texts to (B, L) ids.
        device: where the model is.
        autocast: returns the context to run the model in.
        dtype: of images; None: as loaded.
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    autocast: Callable[[], AbstractContextManager]
    dtype: torch.dtype | None

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """(B, D) features of (B, 3, H, W) images, of unit norm unless `normalize` is False, on `device`."""
        with self.autocast():
            return self.model.encode_image(self._placed(images), normalize=normalize)

    @torch.no_grad()
    def encode_texts(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """(B, D) features of (B, L) token ids, of unit norm unless `normalize` is False, on `device`."""
        with self.autocast():
            return self.model.encode_text(tokens.to(self.device, non_blocking=True), normalize=normalize)

    @torch.no_grad()
    def labelled(
        self, batches: Iterable[tuple[Tensor, Tensor]], *, normalize: bool, desc: str, progress: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """By batch of (images, class indices): image features (B, D) on `device`, and the indices as they came."""
        for images, labels in tqdm(batches, desc=desc, unit="batch", disable=not progress, leave=False):
            yield self.encode_images(images, normalize=normalize), labels

    @torch.no_grad()
    def paired(self, batches: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """By batch with `image` and `text`: the batch, and what the model returns for it, on `device`.

        That is `image_features` and `text_features` (B, D), `logit_scale`, and what else a model has to say.
        """
        for batch in batches:
            with self.autocast():
                out = self.model(self._placed(batch["image"]), batch["text"].to(self.device, non_blocking=True))
            yield batch, out

    def _placed(self, images: Tensor) -> Tensor:
        return images.to(device=self.device, dtype=self.dtype, non_blocking=True)
