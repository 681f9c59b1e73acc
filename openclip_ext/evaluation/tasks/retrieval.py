"""Image-text retrieval as tasks of `openclip-ext eval`. Imports no torch: the flags are part of `--help`."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openclip_ext.errors import UserError

if TYPE_CHECKING:
    from openclip_ext.evaluation.feature_cache import FeatureCache
    from openclip_ext.evaluation.loading import LoadedModel

TITLE = "retrieval"
FLAG = "--retrieval"


def add_arguments(group) -> None:
    group.add_argument(
        FLAG, action="append", default=[], metavar="SHARDS_OR_CSV",
        help="images with one or more captions each: a folder or pattern of shards, or a CSV with a row "
        "per caption; repeatable",
    )  # fmt: skip
    group.add_argument("--caption-separator", metavar="TEXT", help="splits a caption into several, all of which count")
    group.add_argument(
        "--caption-key", metavar="KEY",
        help="where a sample's JSON holds its captions; default: where sizes.json says, else its text",
    )  # fmt: skip
    group.add_argument("--csv-img-key", default="filepath", help="column of image paths (default: %(default)s)")
    group.add_argument("--csv-caption-key", default="title", help="column of captions (default: %(default)s)")
    group.add_argument("--csv-separator", metavar="CHARACTER", help="between columns; default: recognised")


def tasks(args: argparse.Namespace) -> list["RetrievalTask"]:
    """What the flags ask for. Raises UserError: a path or column that does not fit."""
    if args.caption_separator == "":
        raise UserError("--caption-separator: must not be empty")
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

    def run(self, model: "LoadedModel") -> dict[str, Any]:
        """Scores are recalls; `ranks` has the mean and median ranks, `cached` is whether features were on disk."""
        from openclip_ext.evaluation.datasets.captioned import pair_features
        from openclip_ext.evaluation.feature_cache import files_identity, model_identity, require_finite
        from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics

        def compute():
            loading = {"batch_size": self.batch_size, "workers": self.workers, "desc": self.name}
            return require_finite(pair_features(model, self.pairs, **loading), model)

        files = files_identity(self.pairs.files)
        identity = files and {"of": "pairs", "files": files, "reading": self.reading, **model_identity(model)}
        features, cached = self.cache.get(identity, compute)
        metrics = retrieval_metrics(*(features[name].to(model.device) for name in ("image", "text", "image_of_text")))
        return {
            "num_samples": len(features["image"]),
            "num_texts": len(features["text"]),
            "cached": cached,
            "scores": {name: value for name, value in metrics.items() if "_R@" in name},
            "ranks": {name: value for name, value in metrics.items() if "_R@" not in name},
        }


def _task(path: str, args: argparse.Namespace) -> RetrievalTask:
    from openclip_ext.data.captions import CaptionFormat
    from openclip_ext.evaluation.datasets.captioned import captioned_csv, captioned_shards
    from openclip_ext.evaluation.feature_cache import open_cache

    captions = CaptionFormat(separator=args.caption_separator, key=args.caption_key)
    reading = dataclasses.asdict(captions)
    if path.endswith((".csv", ".tsv")):
        if args.caption_key is not None:
            raise UserError(f"--caption-key {args.caption_key}: is for shards; a CSV takes --csv-caption-key")
        columns = {name: getattr(args, f"csv_{name}") for name in ("img_key", "caption_key", "separator")}
        pairs = captioned_csv(path, FLAG, *columns.values(), captions)
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
