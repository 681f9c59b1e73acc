"""Image-text retrieval as tasks of `openclip-ext eval`. Imports no torch: the flags are part of `--help`."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openclip_ext.evaluation.flags import add_caption_arguments, caption_format, csv_columns

if TYPE_CHECKING:
    from torch import Tensor

    from openclip_ext.evaluation.datasets.captioned import CaptionedFiles, CaptionedShards
    from openclip_ext.evaluation.feature_cache import FeatureCache
    from openclip_ext.evaluation.loading import LoadedModel
    from openclip_ext.evaluation.ranks import Ranks

TITLE = "retrieval"
FLAG = "--retrieval"


def add_arguments(group) -> None:
    group.add_argument(
        FLAG, action="append", default=[], metavar="SHARDS_OR_CSV",
        help="images with one or more captions each, all of which count: a folder or pattern of shards, or a CSV "
        "with a row per caption; repeatable",
    )  # fmt: skip
    add_caption_arguments(group)


def tasks(args: argparse.Namespace) -> list["RetrievalTask"]:
    """What the flags ask for. Raises UserError: a path or column that does not fit."""
    caption_format(args)  # is wrong or right whatever there is to read
    return [_task(path, args) for path in args.retrieval]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """Recall both ways over all images and captions of a set.

    Attributes:
        name, dataset: see `Task`.
        pairs: a dataset of `openclip_ext.evaluation.datasets.captioned`.
        reading: what its samples depend on beside its files.
        cache: of features.
        batch_size, workers: of loading.
    """

    name: str
    dataset: str
    pairs: Any
    reading: dict[str, Any]
    cache: "FeatureCache"
    batch_size: int
    workers: int

    def run(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, Any]:
        """Scores are recalls; `ranks` has the mean and median ranks, `cached` is whether features were on disk."""
        from openclip_ext.evaluation.datasets.captioned import pair_features
        from openclip_ext.evaluation.datasets.content import checksum_of_pairs
        from openclip_ext.evaluation.feature_cache import files_identity, model_identity, require_finite
        from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics

        def compute():
            loading: dict[str, Any] = {"batch_size": self.batch_size, "workers": self.workers, "ranks": ranks}
            loading["desc"] = self.name
            return require_finite(pair_features(model, self.pairs, **loading), model)

        files = files_identity(self.pairs.files)
        identity = None
        if files is not None:
            identity = {"of": "pairs", "files": files, "reading": self.reading, **model_identity(model)}
        features, cached = self.cache.get(identity, compute, ranks)
        if not ranks.first:
            return {}
        checksum = checksum_of_pairs(*(features[name] for name in ("image_id", "text_id", "image_of_text")))
        metrics = retrieval_metrics(*(features[name].to(model.device) for name in ("image", "text", "image_of_text")))
        return {
            "num_samples": len(features["image"]),
            "num_texts": len(features["text"]),
            "data": {"images": len(features["image"]), "texts": len(features["text"]), "checksum": checksum},
            "cached": cached,
            "scores": {name: value for name, value in metrics.items() if "_R@" in name},
            "ranks": {name: value for name, value in metrics.items() if "_R@" not in name},
        } | self._copies(features["image_id"])

    def _copies(self, image_ids: "Tensor") -> dict[str, str]:
        """A note, if the same image is there as several."""
        copies = len(image_ids) - len(image_ids.unique())
        if not copies:
            return {}
        return {
            "note": f"{copies:,} of {len(image_ids):,} images are copies of others, and the captions of one count as "
            "wrong for the next; have each image once with all its captions: openclip-ext shards pack groups them by "
            "image, for --caption-key, and so does a CSV with one path per image"
        }


def _task(path: str, args: argparse.Namespace) -> RetrievalTask:
    from openclip_ext.evaluation.datasets.captioned import captioned_csv, captioned_shards
    from openclip_ext.evaluation.feature_cache import open_cache

    captions = caption_format(args)
    reading = dataclasses.asdict(captions)
    if columns := csv_columns(args, path):
        pairs: CaptionedFiles | CaptionedShards = captioned_csv(path, FLAG, *columns, captions)
        reading["csv"] = columns
    else:
        pairs = captioned_shards(path, FLAG, captions)
        reading["noted"] = pairs.noted
    return RetrievalTask(
        name=f"retrieval-{Path(path).stem}",
        dataset=path,
        pairs=pairs,
        reading=reading,
        cache=open_cache(args.feature_cache, args.no_feature_cache),
        batch_size=args.batch_size,
        workers=args.workers,
    )
