"""Labelled images in one folder per class to fit probes on, and a frozen image tower's features of them."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from openclip_ext.errors import UserError
from openclip_ext.evaluation.datasets.labelled import LabelledBatches, LabelledFiles, class_folders
from openclip_ext.evaluation.ranks import ALONE, Ranks


@dataclasses.dataclass(frozen=True)
class ProbeSets:
    """Pictures with positions in `classes`.

    Attributes:
        classes: names of the folders of `train`.
        train: to fit probes on.
        val: to measure them with.
        select: to choose a penalty on; None: a part of `train` is.
    """

    classes: list[str]
    train: LabelledFiles
    val: LabelledFiles
    select: LabelledFiles | None = None


@dataclasses.dataclass(frozen=True)
class ProbeData:
    """Batches of (images, class indices) to fit probes on, and to measure them with."""

    train: Iterable[tuple[Tensor, Tensor]]
    val: Iterable[tuple[Tensor, Tensor]]


def probe_sets(train: str, val: str, select: str | None = None) -> ProbeSets:
    """The folders of `--probe-train`, `--probe-val` and `--probe-select`; classes are matched by their folders' names.

    Raises:
        UserError: no such folder, no image in it or in a class of it, fewer than two classes, or a class of `val` or
            `select` that `train` lacks.
    """
    classes, samples = class_folders(train, "--probe-train")
    if len(classes) < 2:
        raise UserError(f"--probe-train {train}: holds one class folder; a probe needs two or more")
    position_of = {name: position for position, name in enumerate(classes)}

    def matched(folder: str, flag: str) -> LabelledFiles:
        names, samples = class_folders(folder, flag)
        if unknown := [name for name in names if name not in position_of]:
            raise UserError(f"{flag} {folder}: its class folder {unknown[0]} is not in --probe-train {train}")
        return LabelledFiles([(path, position_of[names[label]]) for path, label in samples])

    return ProbeSets(
        classes,
        LabelledFiles(samples),
        matched(val, "--probe-val"),
        matched(select, "--probe-select") if select else None,
    )


def probe_data(train: str, val: str, transform, *, batch_size: int, workers: int, ranks: Ranks = ALONE) -> ProbeData:
    """Batches of the folders of `--probe-train` and `--probe-val`, of which each of several ranks has a part.

    Raises:
        UserError: see `probe_sets`.
    """
    sets = probe_sets(train, val)
    loading = {"batch_size": batch_size, "workers": workers, "ranks": ranks}
    return ProbeData(*(LabelledBatches(data, transform, **loading) for data in (sets.train, sets.val)))


def encoded(model, batches: Iterable[tuple[Tensor, Tensor]], **how) -> tuple[Tensor, Tensor]:
    """Image features (M, D), float32 and not normalised, and labels (M,), on the CPU; see `encoded_batches`."""
    return in_turn([list(encoded_batches(model, batches, **how))])


def in_turn(parts: list[list[tuple[Tensor, Tensor]]]) -> tuple[Tensor, ...]:
    """Features and labels of batches that ranks took in turn; nothing of no rank."""
    batches = [batch for turn in itertools.zip_longest(*parts) for batch in turn if batch is not None]
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


@torch.no_grad()
def encoded_batches(
    model,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    autocast,
    dtype=None,
    desc: str = "probe",
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """By batch: image features (B, D), float32 and not normalised, and labels (B,), on the CPU.

    Args:
        model: has `encode_image`; in evaluation mode.
        batches: (images, class indices).
        device: where the model is.
        autocast: a function that returns the context to run the model in.
        dtype: of images; None: as loaded.
        desc: what the progress bar is called.
        progress: show it.
    """
    total = getattr(batches, "num_batches", None)
    for images, labels in tqdm(batches, desc=desc, unit="batch", total=total, disable=not progress, leave=False):
        with autocast():
            features = model.encode_image(images.to(device=device, dtype=dtype)).float().cpu()
        yield features[labels >= 0], labels[labels >= 0]  # without what makes up for a batch that there is not
