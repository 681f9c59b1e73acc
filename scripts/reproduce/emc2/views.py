"""Images in two augmentations each that are made once and kept."""

import functools
import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from openclip_ext.errors import UserError

SIZE = 16  # pixels, in one channel for digits and in three for a folder
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@functools.cache
def stored_views(folder: str, count: int) -> Tensor:
    """Two views of each image, (2, count, pixels), of mean 0 and deviation 1; always the same.

    Args:
        folder: of images, in folders inside it too; empty: scikit-learn's handwritten digits.
        count: the first so many, in the order of their names.

    Raises:
        UserError: no such folder, or fewer images than `count`.
    """
    images = _from_folder(folder, count) if folder else _digits(count)
    turn = v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2))
    crop = v2.Compose(
        [v2.RandomResizedCrop(SIZE, (0.4, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)]
    )
    augment = crop if folder else turn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        views = torch.stack([torch.stack([augment(image) for image in images]) for _ in range(2)])
    views = views.flatten(2)
    return (views - views.mean()) / views.std()


def _digits(count: int) -> Tensor:
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    if count > len(images):
        raise UserError(f"--count {count}: there are {len(images)} digits")
    return v2.functional.resize(images[:count], [SIZE, SIZE], antialias=True)


def _from_folder(folder: str, count: int) -> Tensor:
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in ENDINGS)[:count]
    if len(paths) < count:
        kind = "holds" if os.path.isdir(folder) else "no such folder:"
        raise UserError(f"--images {folder}: {kind} {len(paths)} images, and --count {count} are needed")
    side = 2 * SIZE  # before it is cropped
    pictures = [Image.open(path).convert("RGB").resize((side, side)) for path in paths]
    return torch.stack([v2.functional.to_dtype(v2.functional.to_image(picture), scale=True) for picture in pictures])
