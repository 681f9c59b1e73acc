"""What to train on, as flags name it."""

import dataclasses
import os
from typing import Any

from torchvision.transforms import AutoAugment, Compose

from openclip_ext.data.captions import CaptionFormat, require_caption_key
from openclip_ext.data.check import check_shards
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.table import Table, csv_table, synthetic_table
from openclip_ext.errors import UserError
from openclip_ext.fusion.config import QUESTIONS, TWO_IMAGES
from openclip_ext.fusion.objective import data_needs
from openclip_ext.losses import ObjectivePlan
from openclip_ext.training.config import RunConfig
from openclip_ext.training.fusion import Pictures


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What to train on.

    Attributes:
        source: shards or a table.
        num_samples: per epoch and over all ranks.
        size: N of the loss, the samples there are.
        num_ids: sample ids run from 0 to this; another than `size` only where `--sample-id-table` says so.
        sample_id: how samples are identified, None where the loss does not need it.
    """

    source: ShardListing | Table
    num_samples: int
    size: int
    num_ids: int
    sample_id: str | None


def training_data(config: RunConfig, plan: ObjectivePlan, table: Table | None = None) -> TrainingData | None:
    """What `--train-data` and its kin name, `table` if that has been read already; None where they name nothing.

    Raises:
        UserError: nothing matches, or the number of samples, or of ids where the loss needs them, cannot be known; or
            `--view-aug` is for views that nothing wants.
    """
    if config.view_aug != "standard" and not _wants_image_views(config, plan):
        raise UserError(
            f"--view-aug {config.view_aug}: is for second views of images; add --pairs views or a --loss-term that "
            "needs them, such as brownian_bridge=0.25, or drop the flag"
        )
    wanted = config.sample_id if "sample_ids" in plan.needs else None
    kind = dataset_type(config.train_data, config.dataset_type)
    if config.caption_key and kind != "webdataset":
        raise UserError(f"--caption-key {config.caption_key}: shards have JSON, {kind} data has not; drop the flag")
    if table is not None:
        return TrainingData(table, len(table), len(table), len(table), None)
    if kind == "synthetic":
        if not config.train_num_samples:
            raise UserError("--dataset-type synthetic: give the number of samples with --train-num-samples")
        table = synthetic_table(config.train_num_samples)
    elif not config.train_data:
        return None
    elif kind == "csv":
        table = csv_table(config.train_data, config.csv_img_key, config.csv_caption_key, config.csv_separator)
    else:
        return _shard_data(config, config.train_data, wanted)
    return TrainingData(table, len(table), len(table), len(table), wanted and "index")


def dataset_type(path: str | None, given: str) -> str:
    """What `--dataset-type` means for the data at `path`: itself, or what `auto` finds by the name."""
    if given != "auto":
        return given
    return "csv" if path and path.endswith((".csv", ".tsv")) else "webdataset"


def _shard_data(config: RunConfig, sources: str, wanted: str | None) -> TrainingData:
    listing = list_shards(sources, config.train_data_upsampling_factors)
    require_caption_key(listing.urls, config.caption_key)
    num_samples = config.train_num_samples or listing.length
    index = "openclip-ext shards index " + (os.path.dirname(listing.urls[0]) or ".")
    if num_samples is None:
        raise UserError(
            f"--train-data {config.train_data}: the number of samples is not known; write sizes.json with: {index}, "
            "or give --train-num-samples"
        )
    size = num_ids = listing.length or num_samples
    if wanted == "hash":
        num_ids = size if config.sample_id_table is None else config.sample_id_table
        if num_ids < 1:
            raise UserError(f"--sample-id-table {num_ids}: must be at least 1")
    elif wanted == "index" and listing.sizes is None:
        raise UserError(
            f"--loss {config.loss}: needs sample ids, and {config.train_data} has no sizes.json to number samples by; "
            f"write it with: {index}, or use --sample-id hash"
        )
    return TrainingData(listing, num_samples, size, num_ids, wanted)


def require_sizes(listing: ShardListing, progress: bool) -> None:
    """`--check-shards`. Raises UserError: a shard holds another number of samples than `sizes.json` says."""
    for report in check_shards(listing, decode=False, progress=progress):
        if report.faults or report.expected is None:
            fault = ", ".join(report.faults) or "not in sizes.json"
            raise UserError(
                f"--check-shards: {report.url} holds {report.samples} samples, sizes.json says {report.expected} "
                f"({fault}); write it anew with: openclip-ext shards index {os.path.dirname(report.url) or '.'}"
            )


def caption_format(config: RunConfig) -> CaptionFormat:
    """Where captions are, of training and of validation data."""
    return CaptionFormat(separator=config.caption_separator, key=config.caption_key)


def _wants_image_views(config: RunConfig, plan: ObjectivePlan) -> bool:
    return config.pairs == "views" or "image_aug" in (data_needs(plan) if config.fusion else plan.needs)


def row_format(config: RunConfig, plan: ObjectivePlan, transform, tokenizer) -> dict[str, Any]:
    """What training rows hold: the fields of `RowFormat`, second views only where they are needed."""
    needs = data_needs(plan) if config.fusion else plan.needs
    if config.task in TWO_IMAGES and config.task in QUESTIONS:
        transform = Pictures(transform)
    image_aug = Compose([AutoAugment(), transform]) if config.view_aug == "auto" else transform
    return {
        "image_transform": transform,
        "tokenizer": tokenizer,
        "image_aug_transform": image_aug if _wants_image_views(config, plan) else None,
        "text_aug": "text_aug" in needs,
        "row_seeds": "row_seeds" in needs,
        "captions": None if config.pairs == "views" else caption_format(config),
    }
