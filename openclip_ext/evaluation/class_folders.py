"""Labelled images in one folder per class, and a frozen image tower's features of them."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from openclip_ext.errors import UserError
from openclip_ext.evaluation.labelled import LabelledBatches, LabelledFiles, class_folders
from openclip_ext.evaluation.ranks import ALONE, Ranks


@dataclasses.dataclass(frozen=True)
class ProbeData:
    """Batches of (images, class indices) to fit probes on, and to measure them with."""

    train: Iterable[tuple[Tensor, Tensor]]
    val: Iterable[tuple[Tensor, Tensor]]


def probe_data(train: str, val: str, transform, *, batch_size: int, workers: int, ranks: Ranks = ALONE) -> ProbeData:
    """The folders of `--probe-train` and `--probe-val`; classes are matched by their folders' names.

    Of several ranks each has a part.

    Raises:
        UserError: no such folder, no image in it or in a class of it, fewer than two classes, or a class of `val` that
            `train` lacks.
    """
    names, fitted = class_folders(train, "--probe-train")
    other_names, measured = class_folders(val, "--probe-val")
    if len(names) < 2:
        raise UserError(f"--probe-train {train}: holds one class folder; a probe needs two or more")
    unknown = [name for name in other_names if name not in names]
    if unknown:
        raise UserError(f"--probe-val {val}: its class folder {unknown[0]} is not in --probe-train {train}")
    index_of = [names.index(name) for name in other_names]
    measured = [(path, index_of[label]) for path, label in measured]
    options = {"batch_size": batch_size, "workers": workers, "ranks": ranks}
    return ProbeData(*(LabelledBatches(LabelledFiles(data), transform, **options) for data in (fitted, measured)))


def encoded(model, batches: Iterable[tuple[Tensor, Tensor]], **how) -> tuple[Tensor, Tensor]:
    """Image features (M, D), float32 and not normalised, and labels (M,), on the CPU; see `encoded_batches`."""
    return in_turn([list(encoded_batches(model, batches, **how))])


def in_turn(parts: list[list[tuple[Tensor, Tensor]]]) -> tuple[Tensor, ...]:
    """Features and labels of batches that ranks took in turn; nothing of no rank."""
    batches = [batch for turn in itertools.zip_longest(*parts) for batch in turn if batch is not None]
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


@torch.no_grad()
def encoded_batches(
    model, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, autocast, dtype=None, progress=True
) -> Iterator[tuple[Tensor, Tensor]]:
    """By batch: image features (B, D), float32 and not normalised, and labels (B,), on the CPU.

    Args:
        model: has `encode_image`; in evaluation mode.
        batches: (images, class indices).
        device: where the model is.
        autocast: a function that returns the context to run the model in.
        dtype: of images; None: as loaded.
        progress: show a progress bar.
    """
    for images, labels in tqdm(batches, desc="probe", unit="batch", disable=not progress, leave=False):
        with autocast():
            features = model.encode_image(images.to(device=device, dtype=dtype)).float().cpu()
        yield features[labels >= 0], labels[labels >= 0]  # without what makes up for a batch that there is not
