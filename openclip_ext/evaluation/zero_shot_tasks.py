"""Zero-shot classification as tasks of `openclip-ext eval`. Imports no torch: the flags are part of `--help`."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openclip_ext.evaluation.loading import LoadedModel

TITLE = "zero-shot classification"
#: Flag to: whether a part of the classes is what the set is.
IMAGENET_SETS = {
    "imagenet_val": ("ImageNet's validation images", False),
    "imagenet_v2": ("ImageNet-V2", False),
    "imagenet_sketch": ("ImageNet-Sketch", False),
    "imagenet_a": ("ImageNet-A", True),
    "imagenet_r": ("ImageNet-R", True),
    "imagenet_o": ("ImageNet-O", True),
}


def add_arguments(group) -> None:
    for name, (title, _) in IMAGENET_SETS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", metavar="FOLDER", help=f"{title}, in a folder per class named by wnid"
        )
    group.add_argument(
        "--classes",
        choices=["present", "all"],
        help="what an image may be taken for where a folder has a part of ImageNet's classes: those in the folder, or "
        "all 1,000 (default: present for ImageNet-A, -R and -O; the others must have all)",
    )


def tasks(args: argparse.Namespace) -> list["ZeroShotTask"]:
    """What the flags ask for. Raises UserError: a path that does not fit."""
    return [
        _imagenet_task(name, path, partial, args)
        for name, (_, partial) in IMAGENET_SETS.items()
        if (path := getattr(args, name))
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShotTask:
    """A labelled set with its class names and templates.

    Attributes:
        name, dataset: see `Task`.
        pictures: a dataset of (picture, class index).
        class_names: by class index.
        templates: format strings, or functions of a class name.
        note: what one has to know to compare its scores; may be empty.
        batch_size, workers: of loading.
    """

    name: str
    dataset: str
    pictures: Any
    class_names: Sequence[str]
    templates: Sequence[str | Callable[[str], str]]
    note: str = ""
    batch_size: int
    workers: int

    def run(self, model: "LoadedModel") -> dict[str, Any]:
        from openclip_ext.evaluation.labelled import LabelledBatches
        from openclip_ext.evaluation.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores

        batches = LabelledBatches(self.pictures, model.transform, batch_size=self.batch_size, workers=self.workers)
        classifier = zero_shot_classifier(model, self.class_names, self.templates)
        counts = zero_shot_counts(model, classifier, batches, num_batches=batches.num_batches, desc=self.name)
        return {
            "num_samples": counts[:, 0].sum().item(),
            "num_classes": len(self.class_names),
            "num_templates": len(self.templates),
            **({"note": self.note} if self.note else {}),
            "scores": zero_shot_scores(counts),
        }


def _imagenet_task(name: str, path: str, partial: bool, args: argparse.Namespace) -> ZeroShotTask:
    from openclip_ext import _host
    from openclip_ext.evaluation.imagenet import NUM_CLASSES, imagenet_folder

    classes = args.classes or ("present" if partial else None)
    found = imagenet_folder(path, f"--{name.replace('_', '-')}", classes)
    note = ""
    if found.num_present < NUM_CLASSES:
        chosen = "those" if classes == "present" else "all 1,000"
        note = f"images of {found.num_present} of ImageNet's classes, each to be taken for one of {chosen} ({classes})"
    return ZeroShotTask(
        name=name.replace("_", "-"),
        dataset=path,
        pictures=found.pictures,
        class_names=found.class_names,
        templates=_host.imagenet_names()[1],
        note=note,
        batch_size=args.batch_size,
        workers=args.workers,
    )
