"""From a picture and its captions to a row of tensors, and from rows to a batch."""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from openclip_ext.data.captions import CaptionFormat, one_view, two_views


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFormat:
    """What a row holds.

    Attributes:
        image_transform: picture to tensor.
        tokenizer: captions to (B, L) ids.
        image_aug_transform: picture to tensor, for a second view; None: none wanted.
        text_aug: whether a second view of the caption is wanted.
        row_seeds: whether training rows hold their seed, for draws that others make.
        captions: where a sample's captions are; None: rows hold images alone, and a sample needs no caption.
    """

    image_transform: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    image_aug_transform: Callable[[Any], torch.Tensor] | None = None
    text_aug: bool = False
    row_seeds: bool = False
    captions: CaptionFormat | None = CaptionFormat()

    def training_row(self, image: Image.Image, captions: list[str], seed: int) -> dict:
        """A row whose random draws are a function of `seed`. The first view is the same with or without a second."""
        _seed_all(seed)
        row: dict[str, Any] = {"image": self.image_transform(image)}
        if self.row_seeds:
            row["row_seeds"] = seed
        if self.image_aug_transform is not None:
            row["image_aug"] = self.image_aug_transform(image)
        if self.captions is None:
            return row
        rng = random.Random(seed)
        if self.text_aug:
            row["text"], row["text_aug"] = two_views(captions, rng)
        else:
            row["text"] = one_view(captions, rng)
        return row

    def evaluation_row(self, image: Image.Image, captions: list[str]) -> dict:
        """A row of one view and the first caption."""
        return {"image": self.image_transform(image), "text": captions[0]}

    def batch(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Rows as one batch: images stacked, captions tokenised, ids as int64."""
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name.startswith("text"):
                batch[name] = self.tokenizer(values)
            else:
                batch[name] = torch.stack(values) if name.startswith("image") else torch.tensor(values)
        return batch


def row_seed(seed: int, epoch: int, sample_id: int) -> int:
    """The seed of a sample's row in an epoch of a run, on whichever worker and rank it is made."""
    return hash((seed, epoch, sample_id))


def _seed_all(seed: int) -> None:
    """The generators that image transforms draw from. Not `torch.manual_seed`, which would reset CUDA's too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Random draws inside change nothing for those outside."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
