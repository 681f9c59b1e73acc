"""Zero-shot classification as tasks of `openclip-ext eval`. Imports no torch: the flags are part of `--help`."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openclip_ext.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from openclip_ext.evaluation.datasets.labelled import LabelledSet
    from openclip_ext.evaluation.loading import LoadedModel
    from openclip_ext.evaluation.ranks import Ranks

TITLE = "zero-shot classification"
CIFAR = (10, 100)
#: By flag: what it is, and whether a part of the classes is all there is of it.
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
            f"--{name.replace('_', '-')}", metavar="FOLDER", help=f"{title}: a folder per class, named by wnid or index"
        )
    add_classes_argument(group, "present for ImageNet-A, -R and -O; the others must have all")
    for num_classes in CIFAR:
        group.add_argument(
            f"--cifar{num_classes}", metavar="FOLDER",
            help=f"CIFAR-{num_classes}'s test images in torchvision's files",
        )  # fmt: skip
    add_labelled_arguments(group)
    group.add_argument(
        "--clip-benchmark", action="append", default=[], metavar="NAME=FOLDER",
        help="a classification set that clip_benchmark knows, and where it is or is to be kept; repeatable; needs "
        "openclip-ext[eval]",
    )  # fmt: skip


def add_classes_argument(group, default: str) -> None:
    """`--classes`, of ImageNet's folders; `default` in words."""
    group.add_argument(
        "--classes",
        choices=["present", "all"],
        help="what an image may be taken for where a folder has a part of ImageNet's classes: those in the folder, or "
        f"all 1,000 (default: {default})",
    )


def add_labelled_arguments(group) -> None:
    """`--zero-shot`, and how its classes are said in words."""
    group.add_argument(
        "--zero-shot", action="append", default=[], metavar="DATA",
        help="any other set: a folder per class, or shards of a picture and a cls file per sample; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--class-names", metavar="FILE",
        help="a name per line for the classes of --zero-shot (default: its classnames.txt, or its folders' names)",
    )  # fmt: skip
    group.add_argument(
        "--templates", metavar="FILE",
        help="a template per line for --zero-shot, with {} for the class; or openai or simple, OpenCLIP's 80 or 7 "
        "(default: its zeroshot_classification_templates.txt, or openai)",
    )  # fmt: skip


def require_words_have_a_set(zero_shot: Sequence[str], class_names: str | None, templates: str | None) -> None:
    """Raises UserError: `--class-names` or `--templates` without the one set that it is for."""
    for flag, value in (("--class-names", class_names), ("--templates", templates)):
        if value and not zero_shot:
            raise UserError(f"{flag} {value}: is for --zero-shot; add one, or drop the flag")
    if class_names and len(zero_shot) > 1:
        raise UserError(
            f"--class-names {class_names}: is for one --zero-shot; put a classnames.txt into each folder instead"
        )


def set_name(path: str) -> str:
    """What a set of `--zero-shot` is called: as its folder."""
    return Path(path if os.path.isdir(path) else os.path.dirname(path)).resolve().name


def tasks(args: argparse.Namespace) -> list["ZeroShotTask"]:
    """What the flags ask for. Raises UserError: a path that does not fit."""
    require_words_have_a_set(args.zero_shot, args.class_names, args.templates)
    from openclip_ext.evaluation.datasets.imagenet import imagenet_folder
    from openclip_ext.evaluation.datasets.labelled_sets import cifar, clip_benchmark_set, labelled_set

    sets = []
    for dest, (_, partial) in IMAGENET_SETS.items():
        name, path = dest.replace("_", "-"), getattr(args, dest)
        if path:
            classes = args.classes or ("present" if partial else None)
            sets.append((name, path, imagenet_folder(path, f"--{name}", classes)))
    for num_classes in CIFAR:
        name = f"cifar{num_classes}"
        if path := getattr(args, name):
            sets.append((name, path, cifar(path, f"--{name}", num_classes)))
    for given in args.clip_benchmark:
        name, _, path = given.partition("=")
        if not path:
            raise UserError(f"--clip-benchmark {given}: give the set and its folder, such as pets=data/pets")
        sets.append((name, path, clip_benchmark_set(name, path, "--clip-benchmark")))
    for path in args.zero_shot:
        sets.append((set_name(path), path, labelled_set(path, "--zero-shot", args.class_names, args.templates)))
    classifiers: dict[Any, _Classifier] = {}
    found = []
    for name, path, labelled in sets:
        words = tuple(labelled.class_names), tuple(labelled.templates)
        classifier = classifiers.setdefault(words, _Classifier(*words))
        found.append(ZeroShotTask(name, path, labelled, classifier, args.batch_size, args.workers))
    return found


class _Classifier:
    """The classifier of class names and templates: made once for all sets of a model that have the same."""

    def __init__(self, class_names: Sequence[str], templates: Sequence[str | Callable[[str], str]]) -> None:
        self.class_names, self.templates = class_names, templates
        self._made_for: tuple | None = None
        self._columns: Tensor | None = None

    def of(self, model: "LoadedModel", ranks: "Ranks") -> "Tensor":
        """(D, C); see `zero_shot_classifier`. Raises UserError: it is not finite."""
        from openclip_ext.evaluation.metrics.zero_shot import zero_shot_classifier

        identity = model.sha256, model.name, model.precision, model.device
        if self._made_for != identity:
            words = self.class_names, self.templates
            self._columns = zero_shot_classifier(model, *words, ranks=ranks, progress=ranks.first)
            self._made_for = identity
        assert self._columns is not None
        if not self._columns.isfinite().all():
            raise UserError(f"{model.source}: its features are not finite; take a checkpoint from before it diverged")
        return self._columns


@dataclasses.dataclass(frozen=True)
class ZeroShotTask:
    """Zero-shot classification of a labelled set.

    Attributes:
        name, dataset: see `Task`.
        labelled: its pictures, class names and templates.
        classifier: of those names and templates.
        batch_size, workers: of loading.
    """

    name: str
    dataset: str
    labelled: "LabelledSet"
    classifier: _Classifier
    batch_size: int
    workers: int

    def run(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, Any]:
        """Beside samples and scores (`zero_shot_scores`): `num_classes`, `num_templates`, and a `note` if any."""
        from openclip_ext.evaluation.datasets.labelled import LabelledBatches
        from openclip_ext.evaluation.metrics.zero_shot import zero_shot_counts, zero_shot_scores

        labelled = self.labelled
        loading: dict[str, Any] = {"batch_size": self.batch_size, "workers": self.workers, "ranks": ranks}
        batches = LabelledBatches(labelled.pictures, model.transform, **loading)
        classifier = self.classifier.of(model, ranks)
        parts = ranks.on_first(zero_shot_counts(model, classifier, batches, desc=self.name, progress=ranks.first))
        if not ranks.first:
            return {}
        counts = sum(parts[1:], parts[0])
        num_samples = counts[:, 0].sum().item()
        result = {
            "num_samples": num_samples,
            "data": {"images": num_samples, "checksum": labelled.checksum()},
            "num_classes": len(labelled.class_names),
            "num_templates": len(labelled.templates),
            "scores": zero_shot_scores(counts),
        }
        return result | ({"note": labelled.note} if labelled.note else {})
