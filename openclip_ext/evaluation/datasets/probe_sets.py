"""Labelled images in one folder per class to fit probes on, and a frozen image tower's features of them."""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from openclip_ext.errors import UserError
from openclip_ext.evaluation.datasets.class_folders import class_folders
from openclip_ext.evaluation.datasets.labelled import LabelledBatches, LabelledFiles
from openclip_ext.evaluation.encoder import Encoder
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

    def checksum(self) -> str:
        """Of all sets: scores depend on each."""
        sets = (self.train, self.val, *([self.select] if self.select else []))
        return hashlib.sha256(" ".join(data.checksum() for data in sets).encode()).hexdigest()


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
    loading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "ranks": ranks}
    return ProbeData(*(LabelledBatches(data, transform, **loading) for data in (sets.train, sets.val)))


def probe_features(
    encoder: Encoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    ranks: Ranks = ALONE,
    desc: str = "probe",
    progress: bool = True,
) -> tuple[Tensor, Tensor] | None:
    """Image features (M, D), float32 and not normalised, and labels (M,), on the CPU; None but on the first rank.

    Args:
        encoder: the model.
        batches: (images, class indices), this rank's; images of class -1, which make up for missing ones, are left out.
        ranks: those that share the batches in turn. The features come in the order of one rank's batches.
        desc: what the progress bar is called.
        progress: show it.
    """
    own = [
        (features.float().cpu()[labels >= 0], labels[labels >= 0])
        for features, labels in encoder.labelled(batches, normalize=False, desc=desc, progress=progress)
    ]
    in_order = ranks.in_turn(own)
    if not in_order:
        return None
    features, labels = zip(*in_order, strict=True)
    return torch.cat(features), torch.cat(labels)
