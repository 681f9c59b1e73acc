"""Probes on frozen image features as tasks of `openclip-ext eval`. Imports no torch: the flags are part of `--help`."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openclip_ext.errors import UserError

if TYPE_CHECKING:
    from openclip_ext.evaluation.datasets.probe_sets import ProbeSets
    from openclip_ext.evaluation.feature_cache import FeatureCache
    from openclip_ext.evaluation.loading import LoadedModel
    from openclip_ext.evaluation.ranks import Ranks

TITLE = "probes"
KINDS = ("knn", "linear", "few-shot")
SHOTS = (1, 2, 4, 8, 16)


def add_arguments(group) -> None:
    for name, use in (
        ("train", "to fit probes on"),
        ("val", "to measure them with"),
        ("select", "to choose the penalty of linear probes on (default: a part of --probe-train)"),
    ):
        group.add_argument(f"--probe-{name}", metavar="FOLDER", help=f"images in a folder per class, {use}")
    group.add_argument(
        "--probes", nargs="+", choices=KINDS, default=["knn", "linear"],
        help="nearest neighbours, logistic regression, and that on a few images per class (default: knn linear)",
    )  # fmt: skip
    group.add_argument(
        "--shots", nargs="+", type=int, default=list(SHOTS), metavar="K",
        help="images per class of few-shot probes (default: 1 2 4 8 16)",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, default=5, help="draws of few-shot images (default: %(default)s)")


def tasks(args: argparse.Namespace) -> list["ProbeTask"]:
    """What the flags ask for. Raises UserError: a folder that does not fit, or one without the other."""
    if bool(args.probe_train) != bool(args.probe_val):
        raise UserError("--probe-train, --probe-val: give both or neither")
    if args.probe_select and not args.probe_train:
        raise UserError(f"--probe-select {args.probe_select}: is for --probe-train and --probe-val; give them too")
    if min(args.shots) < 1:
        raise UserError(f"--shots {min(args.shots)}: must be at least 1")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: must be at least 1")
    if not args.probe_train:
        return []
    from openclip_ext.evaluation.datasets.probe_sets import probe_sets
    from openclip_ext.evaluation.feature_cache import open_cache

    features = ProbeFeatures(
        probe_sets(args.probe_train, args.probe_val, args.probe_select),
        cache=open_cache(args.feature_cache, args.no_feature_cache),
        batch_size=args.batch_size,
        workers=args.workers,
    )
    made = {
        "knn": KnnTask(features, args.probe_val),
        "linear": LinearProbeTask(features, args.probe_val),
        "few-shot": FewShotTask(features, args.probe_val, sorted(set(args.shots)), args.seeds),
    }
    return [made[kind] for kind in KINDS if kind in args.probes]


class ProbeFeatures:
    """Features of the sets of a probe: those of the last model are kept, since several probes use them."""

    def __init__(self, sets: "ProbeSets", *, cache: "FeatureCache", batch_size: int, workers: int) -> None:
        self.sets, self.cache = sets, cache
        self._loading: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
        self._identity: dict | None = None
        self._features: dict[str, tuple[Any, Any]] = {}
        self.cached = False

    def of(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, tuple[Any, Any]]:
        """(features, labels) of `train`, `val` and, if there is one, `select`; features are the first rank's only."""
        from openclip_ext.evaluation.feature_cache import model_identity

        identity = model_identity(model)
        if identity != self._identity:
            sets = {name: getattr(self.sets, name) for name in ("train", "val", "select")}
            found = {
                name: self._of_set(name, data, model, identity, ranks)
                for name, data in sets.items()
                if data is not None
            }
            self._features = {name: (features, labels) for name, (features, labels, _) in found.items()}
            self.cached = all(cached for _, _, cached in found.values())
            self._identity = identity
        return self._features

    def _of_set(self, name: str, data, model: "LoadedModel", identity: dict, ranks: "Ranks") -> tuple[Any, Any, bool]:
        import torch

        from openclip_ext.evaluation.datasets.labelled import LabelledBatches
        from openclip_ext.evaluation.datasets.probe_sets import probe_features
        from openclip_ext.evaluation.feature_cache import files_identity, require_finite

        def compute():
            batches = LabelledBatches(data, model.transform, ranks=ranks, **self._loading)
            found = probe_features(model, batches, ranks=ranks, desc=f"probe-{name}", progress=ranks.first)
            return {} if found is None else require_finite({"image": found[0]}, model)

        files = files_identity(path for path, _ in data.samples)
        tensors, cached = self.cache.get({"of": "images", "files": files, **identity}, compute, ranks)
        return tensors.get("image"), torch.tensor([label for _, label in data.samples]), cached


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """What probes have in common.

    Attributes:
        features: of all sets, shared by the probes.
        dataset: see `Task`.
    """

    features: ProbeFeatures
    dataset: str

    def _data(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, tuple[Any, Any]]:
        """(features, labels) of the sets, on the model's device; none but on the first rank."""
        found = self.features.of(model, ranks)
        if not ranks.first:
            return {}
        return {
            name: (features.to(model.device), labels.to(model.device)) for name, (features, labels) in found.items()
        }

    def _report(self, scores: dict[str, float], **more) -> dict[str, Any]:
        sets = self.features.sets
        return {
            "num_samples": len(sets.val),
            "data": {"images": len(sets.val), "checksum": sets.checksum()},
            "num_train": len(sets.train),
            "num_classes": len(sets.classes),
            "cached": self.features.cached,
            **more,
            "scores": scores,
        }


class KnnTask(ProbeTask):
    """`knn_hits`."""

    name = "knn"

    def run(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, Any]:
        from openclip_ext.evaluation.metrics.probes import NEIGHBOURS, class_scores, knn_hits

        data = self._data(model, ranks)
        if not data:
            return {}
        hits = knn_hits(*data["train"], *data["val"])
        return self._report(class_scores(hits, data["val"][1]), neighbours=NEIGHBOURS)


class LinearProbeTask(ProbeTask):
    """`linear_probe`; `C` is the one chosen."""

    name = "linear-probe"

    def run(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, Any]:
        from openclip_ext.evaluation.metrics.probes import class_scores, linear_probe

        data = self._data(model, ranks)
        if not data:
            return {}
        features, labels = data["val"]
        classes, strength = linear_probe(*data["train"], features, data.get("select"), progress=True)
        return self._report(class_scores(classes == labels, labels), C=strength)


@dataclasses.dataclass(frozen=True)
class FewShotTask(ProbeTask):
    """`few_shot_accuracies`: scores are means over seeds; `half_width` is half their 95 % intervals' width.

    Attributes:
        shots: images per class.
        seeds: draws.
    """

    shots: Sequence[int]
    seeds: int
    name = "few-shot"

    def run(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, Any]:
        from openclip_ext.evaluation.metrics.probes import few_shot_accuracies
        from openclip_ext.report.intervals import half_width

        data = self._data(model, ranks)
        if not data:
            return {}
        accuracies = few_shot_accuracies(
            *data["train"], *data["val"], data.get("select"), shots=self.shots, seeds=self.seeds
        )
        named = {f"{k}-shot": values for k, values in accuracies.items()}
        half_widths = {name: half_width(values) for name, values in named.items()}
        return self._report(
            {name: sum(values) / len(values) for name, values in named.items()},
            **({"note": note} if (note := self._note(half_widths, data["train"][1])) else {}),
            half_width=half_widths,
            by_seed=named,
        )

    def _note(self, half_widths: dict[str, float | None], labels) -> str:
        """The intervals, and which class has fewer images than were asked for."""
        notes = []
        if self.seeds > 1:
            intervals = (f"{name} ± {width:.4f}" for name, width in half_widths.items())
            notes.append(f"{', '.join(intervals)} (95 % interval of the mean of {self.seeds} draws)")
        counts = labels.bincount()
        if counts.min() < self.shots[-1]:
            smallest = self.features.sets.classes[counts.argmin()]
            notes.append(f"class {smallest} has {counts.min()} images, which is all it gives where more are asked for")
        return "; ".join(notes)
