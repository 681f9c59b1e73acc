"""Labelled images in one folder per class, and a frozen image tower's features of them."""

import dataclasses
import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from openclip_ext.errors import UserError


@dataclasses.dataclass(frozen=True)
class ProbeData:
    """Batches of (images, class indices) to fit probes on, and to measure them with."""

    train: Iterable[tuple[Tensor, Tensor]]
    val: Iterable[tuple[Tensor, Tensor]]


def probe_data(train: str, val: str, transform, *, batch_size: int, workers: int) -> ProbeData:
    """The folders of `--probe-train` and `--probe-val`; classes are matched by their folders' names.

    Raises:
        UserError: no such folder, no image in it or in a class of it, fewer than two classes, or a class of `val` that
            `train` lacks.
    """
    fitted, measured = _dataset(train, "--probe-train", transform), _dataset(val, "--probe-val", transform)
    if len(fitted.classes) < 2:
        raise UserError(f"--probe-train {train}: holds one class folder; a probe needs two or more")
    unknown = [name for name in measured.classes if name not in fitted.class_to_idx]
    if unknown:
        raise UserError(f"--probe-val {val}: its class folder {unknown[0]} is not in --probe-train {train}")
    measured.target_transform = [fitted.class_to_idx[name] for name in measured.classes].__getitem__
    loaders = (DataLoader(data, batch_size=batch_size, num_workers=workers) for data in (fitted, measured))
    return ProbeData(*loaders)


def _dataset(folder: str, flag: str, transform):
    from torchvision.datasets import ImageFolder

    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder")
    try:
        return ImageFolder(folder, transform=transform)
    except FileNotFoundError as error:
        raise UserError(f"{flag} {folder}: needs a folder of images per class ({error})") from error


@torch.no_grad()
def encoded(
    model, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, autocast, dtype=None, progress=True
) -> tuple[Tensor, Tensor]:
    """Image features (M, D), float32 and not normalised, and labels (M,), on the CPU.

    Args:
        model: has `encode_image`; in evaluation mode.
        batches: (images, class indices).
        device: where the model is.
        autocast: a function that returns the context to run the model in.
        dtype: of images; None: as loaded.
        progress: show a progress bar.
    """
    features, labels = [], []
    for images, indices in tqdm(batches, desc="probe", unit="batch", disable=not progress, leave=False):
        with autocast():
            features.append(model.encode_image(images.to(device=device, dtype=dtype)).float().cpu())
        labels.append(indices)
    return torch.cat(features), torch.cat(labels)
