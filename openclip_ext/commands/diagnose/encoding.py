"""A sample of the training data, encoded once: features, what the last projections are given, words and thumbnails."""

import argparse
import collections
import dataclasses
import random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize
from tqdm import tqdm

from openclip_ext import upstream
from openclip_ext.data import tar
from openclip_ext.data.captions import CaptionFormat, require_caption_key
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.data.table import Table, csv_table
from openclip_ext.errors import UserError, counted
from openclip_ext.evaluation.datasets.content import content_id
from openclip_ext.evaluation.feature_cache import files_identity, model_identity, open_cache, require_finite
from openclip_ext.evaluation.flags import caption_format, csv_columns
from openclip_ext.evaluation.loading import LoadedModel
from openclip_ext.training.log import report_skips, start_logging, stop_logging

Source = ShardListing | Table
THUMBNAIL = 12  # pixels, each way


def choose_source(args: argparse.Namespace) -> Source:
    """Where the sample is from: rows of the CSV drawn at random, or as many shards drawn at random as it takes.

    Raises:
        UserError: there is no such data, or the shards have no sizes.
    """
    rng = random.Random(args.seed)
    if columns := csv_columns(args, args.train_data):
        table = csv_table(args.train_data, *columns)
        rows = sorted(rng.sample(range(len(table)), min(args.samples, len(table))))
        return Table(table.name, [table.rows[row] for row in rows])
    listing = list_shards(args.train_data)
    require_caption_key(listing.urls, args.caption_key)
    if listing.sizes is None:
        raise UserError(
            f"--train-data {args.train_data}: has no sizes.json to draw a sample of shards by; write it with: "
            "openclip-ext shards index"
        )
    drawn: list[int] = []
    for index in rng.sample(range(len(listing.urls)), len(listing.urls)):
        if sum(listing.sizes[other] for other in drawn) < args.samples:
            drawn.append(index)
    drawn.sort()
    urls, sizes = tuple(listing.urls[index] for index in drawn), tuple(listing.sizes[index] for index in drawn)
    return dataclasses.replace(listing, urls=urls, sizes=sizes, length=sum(sizes))


def pairs_in(source: Source) -> int:
    """How many pairs there are, usable or not."""
    return len(source) if isinstance(source, Table) else sum(source.sizes or ())


def cached_encoding(model: LoadedModel, source: Source, args: argparse.Namespace) -> dict[str, Tensor]:
    """What `encode` returns, from the feature cache where it is there.

    Raises:
        UserError: fewer than two usable pairs, or features that are not finite or all the same.
    """
    captions = caption_format(args)
    noted: tuple[str, ...] = ()
    if isinstance(source, Table):
        paths = [source.name, *(path for path, _ in source.rows if path)]
    else:
        paths, noted = list(source.urls), source.caption_keys
    files = files_identity(paths)
    identity = None
    if files is not None:
        reading = {"captions": dataclasses.asdict(captions), "csv": csv_columns(args, args.train_data), "noted": noted,
                   "samples": args.samples}  # fmt: skip
        identity = {"of": "diagnose", "files": files, "reading": reading, **model_identity(model)}
    encoded, _ = open_cache(args.feature_cache, args.no_feature_cache).get(
        identity, lambda: encode(model, source, captions, args)
    )
    return _require_varied(encoded, model)


@torch.no_grad()
def encode(model: LoadedModel, source: Source, captions: CaptionFormat, args: argparse.Namespace) -> dict[str, Tensor]:
    """The first `--samples` usable pairs of the source, M of them, on the CPU.

    Returns:
        `image_inputs`, `image_outputs` and the same of texts, as `Tower` has them; `logit_scale` and, of a model that
        has one, `logit_bias` (); `tokens` (M, L), `thumbnail` (M, 432), a picture's colours at 12 x 12 pixels, less
        their mean and of unit norm; `image_id` (M,), equal for pictures that the model cannot tell apart; `position`
        (M,), in the source.

    Raises:
        UserError: fewer than two usable pairs.
    """
    config = StreamConfig(
        source=source, batch_size=args.batch_size, image_transform=model.transform, tokenizer=model.tokenizer,
        captions=captions,
    )  # fmt: skip
    # Several workers take turns at shards, whose samples would not be told by their position.
    loader = eval_loader(config, workers=args.workers if isinstance(source, Table) else min(args.workers, 1))
    projections = upstream.find_projections(model.model)
    parts, skipped, count = collections.defaultdict(list), [], 0
    start_logging(None, console=True, debug=False)
    with tqdm(total=min(args.samples, pairs_in(source)), desc="encoding", unit="pair") as bar:
        for batch in loader:
            skipped += batch["skipped"]
            if batch["position"][0] < 0:  # none of its pairs can be used
                continue
            for name, rows in _encoded(model, projections, batch).items():
                parts[name].append(rows.cpu())
            count += len(batch["image"])
            bar.update(min(count, args.samples) - bar.n)
            if count >= args.samples:
                break
    report_skips(skipped, "encoding")
    stop_logging()
    if count < 2:
        raise UserError(f"--train-data {args.train_data}: {counted(count, 'usable pair')}, and at least 2 are needed")
    encoded = {name: torch.cat(rows)[: args.samples] for name, rows in parts.items()}
    encoded["logit_scale"] = model.model.logit_scale.detach().exp().float().cpu()
    if getattr(model.model, "logit_bias", None) is not None:
        encoded["logit_bias"] = model.model.logit_bias.detach().float().cpu()
    return encoded


def _encoded(model: LoadedModel, projections: dict, batch: dict[str, Any]) -> dict[str, Tensor]:
    with upstream.watched(projections) as seen:
        outputs = {
            "image": model.encode_images(batch["image"], normalize=False),
            "text": model.encode_texts(batch["text"], normalize=False),
        }
    found = {}
    for name, output in outputs.items():
        found[f"{name}_outputs"] = output.float()
        found[f"{name}_inputs"] = normalize(output.float(), dim=-1)
        if name in projections:
            found[f"{name}_inputs"] = projections[name].pool(seen[name], batch[name].to(output.device)).float()
    small = adaptive_avg_pool2d(batch["image"].float(), THUMBNAIL).flatten(1)
    return found | {
        "tokens": batch["text"],
        "thumbnail": normalize(small - small.mean(1, keepdim=True), dim=1),
        "image_id": torch.tensor([content_id(picture.numpy().tobytes()) for picture in batch["image"]]),
        "position": batch["position"],
    }


def _require_varied(encoded: dict[str, Tensor], model: LoadedModel) -> dict[str, Tensor]:
    """Raises UserError: features are not finite, or those of all images or of all texts are the same."""
    require_finite({name: value for name, value in encoded.items() if value.is_floating_point()}, model)
    for name in ("image", "text"):
        features = normalize(encoded[f"{name}_outputs"], dim=1)
        if (features - features[0]).abs().max() < 1e-5:
            raise UserError(
                f"--pretrained {model.source}: gives every {name} the same features; take a checkpoint from before it "
                "collapsed, and look at the data with: openclip-ext shards check"
            )
    return encoded


def keys_and_captions(source: Source, positions: set[int], captions: CaptionFormat) -> dict[int, tuple[str, str]]:
    """By position in the source: the sample's key (of a CSV the image's path), and its first caption."""
    if isinstance(source, Table):
        return {place: (str(source.rows[place][0]), captions.split(source.rows[place][1])[0]) for place in positions}
    found: dict[int, tuple[str, str]] = {}
    samples = (sample for url in source.urls for sample in tar.read_shard(url, tar.Skips().record))
    for place, sample in enumerate(samples):
        if place in positions:
            texts = captions.of_sample(sample, tar.Skips().record, source.caption_keys)
            found[place] = f"{sample['__url__']}:{sample['__key__']}", texts[0] if texts else ""
            if len(found) == len(positions):
                break
    return found
