"""`openclip-ext structure`: how checkpoints lay out held-out images and texts, as numbers and as a picture."""

import argparse
import dataclasses
import datetime
import json
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from openclip_ext import upstream
from openclip_ext.data.captions import CaptionFormat, require_caption_key
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.data.table import Table, csv_table
from openclip_ext.errors import UserError, counted
from openclip_ext.evaluation.feature_cache import require_finite
from openclip_ext.evaluation.flags import caption_format, csv_columns, require_loading
from openclip_ext.evaluation.loading import LoadedModel, choose_device, load_model, local_file
from openclip_ext.evaluation.metrics.structure import TITLES, Structure, structure_metrics
from openclip_ext.evaluation.ranks import Ranks, join_ranks, leave_ranks
from openclip_ext.files import load_tensors, make_out_folder
from openclip_ext.losses import LossContext, Widths
from openclip_ext.options import NoOptions
from openclip_ext.terms.feature_separation import FeatureSeparationTerm
from openclip_ext.training.log import report_skips, start_logging, stop_logging
from openclip_ext.training.pair_model import PairModel

HEADS = "terms.feature_separation."  # where a checkpoint's loss state keeps the private heads


def run_structure(args: argparse.Namespace) -> dict:
    """Encode the first `--num-samples` pairs with each checkpoint; write `structure.json` and `structure.png`.

    Processes that `accelerate launch` or `torchrun` has started share the batches; the first one measures and writes.

    Args:
        args: the flags of `openclip-ext structure`.

    Returns:
        What `structure.json` holds; nothing on other processes than the first: `created, versions, model` (names of the
        architectures, joined by commas), `precision, data, num_pairs`, and for each of `checkpoints` its `label`, its
        `source` (as given), `path` (of the file, null: from the hub), `model`, and its `metrics` as `structure_metrics`
        returns them.

    Raises:
        UserError: a wrong flag, a checkpoint that is none or of another architecture, or fewer than two usable pairs.
    """
    require_loading(args)
    if args.num_samples < 2:
        raise UserError(f"--num-samples {args.num_samples}: must be at least 2")
    device_type = choose_device(args.device).type
    captions, source = caption_format(args), _source(args)
    labels = _labels(args.checkpoint, [local_file(given, "--checkpoint") for given in args.checkpoint])
    make_out_folder(args.out)
    ranks, device = join_ranks(device_type)
    structures, rows = [], []
    start_logging(None, console=ranks.first, debug=False)
    try:
        for given, label in zip(args.checkpoint, labels, strict=True):
            model = load_model(
                given, name=args.model, model_config=args.model_config, device=device, precision=args.precision,
                cache_dir=args.cache_dir, flag="--checkpoint",
            )  # fmt: skip
            features = _encode(model, label, args, source, captions, ranks)
            if not ranks.first:
                continue
            structures.append(Structure(label, features, structure_metrics(**features)))
            rows.append({"label": label, "source": given, "path": model.path, "model": model.name,
                         "metrics": structures[-1].metrics})  # fmt: skip
    finally:
        stop_logging()
    leave_ranks(ranks)
    if not ranks.first:
        return {}
    report = {
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("openclip-ext", "open_clip_torch", "torch")},
        "model": ", ".join(dict.fromkeys(row["model"] for row in rows)),
        "precision": model.precision,
        "data": args.data,
        "num_pairs": len(structures[0].features["image"]),
        "checkpoints": rows,
    }
    _write(report, structures, args.out)
    return report


def _source(args: argparse.Namespace) -> ShardListing | Table:
    """What `--data` names. Raises UserError: there is none."""
    if columns := csv_columns(args, args.data):
        return csv_table(args.data, *columns)
    listing = list_shards(args.data, flag="--data")
    require_caption_key(listing.urls, args.caption_key)
    return listing


def _write(report: dict, structures: list[Structure], out: str) -> None:
    from openclip_ext.commands.structure.picture import draw_structure

    with open(os.path.join(out, "structure.json"), "w") as file:
        json.dump(report, file, indent=1)
    title = f"{report['model']} on {report['num_pairs']} pairs"
    draw_structure(structures, title, os.path.join(out, "structure.png"))
    print(_table(structures, report["num_pairs"]))
    print(f"{out}/structure.json, {out}/structure.png")


def _table(structures: list[Structure], num_pairs: int) -> str:
    rows = [
        [title, *(f"{structure.metrics[name]:.4f}" if name in structure.metrics else "–" for structure in structures)]
        for name, title in TITLES.items()
        if any(name in structure.metrics for structure in structures)
    ]
    head = [f"{num_pairs} pairs", *(structure.label for structure in structures)]
    alignment = ["left", *("right" for _ in structures)]
    return tabulate(rows, head, tablefmt="plain", colalign=alignment, disable_numparse=True)


def _labels(sources: list[str], paths: list[str | None]) -> list[str]:
    """What tells checkpoints apart: of files without their common folder, `checkpoints/` and the extension."""
    files = {
        source: Path(path).absolute()
        for source, path in zip(sources, paths, strict=True)
        if path is not None and not source.startswith(upstream.SCHEMES)
    }
    common = os.path.commonpath([path.parent for path in files.values()]) if files else ""
    short = {}
    for source, path in files.items():
        parts = path.relative_to(common).with_suffix("").parts
        short[source] = "/".join(part for part in parts if part != "checkpoints")
    return [short.get(source, source) for source in sources]


@torch.no_grad()
def _encode(
    model: LoadedModel, label: str, args: argparse.Namespace, source: ShardListing | Table, captions: CaptionFormat,
    ranks: Ranks,
) -> dict[str, Tensor]:  # fmt: skip
    """Unit features (M, D) of the first `--num-samples` usable pairs, on CPU: `image`, `text`, and with heads
    `…_private`. Nothing on ranks other than the first."""
    heads, limit = _private_heads(model), args.num_samples
    encoder = dataclasses.replace(model, model=PairModel(model.model, trunk_features=heads is not None).eval())
    config = StreamConfig(
        source=source,
        batch_size=args.batch_size,
        image_transform=model.transform,
        tokenizer=model.tokenizer,
        captions=captions,
    )
    length = len(source) if isinstance(source, Table) else source.length
    # Several workers take turns at shards: the first pairs would depend on how many there are.
    part_of_shards = isinstance(source, ShardListing) and (length is None or length > limit)
    loader = eval_loader(config, workers=min(args.workers, 1) if part_of_shards else args.workers)
    own: list[dict[str, Tensor]] = []
    skipped: list[tuple[str, str, int]] = []
    with tqdm(total=min(limit, length or limit), desc=label, unit="pair", disable=not ranks.first) as bar:
        for _, out in encoder.paired(_own_batches(loader, limit, ranks, skipped, bar)):
            parts = {}
            for modality in ("image", "text"):
                parts[modality] = out[f"{modality}_features"].float().cpu()
                if heads is not None:
                    private = heads.private(modality, out[f"{modality}_trunk_features"].float())
                    parts[f"{modality}_private"] = private.cpu()
            own.append(parts)
    batches = ranks.in_turn(own)
    if not ranks.first:
        return {}
    report_skips(skipped, label)
    if (count := sum(len(parts["image"]) for parts in batches)) < 2:
        raise UserError(
            f"--data {args.data}: {counted(count, 'usable pair')}, and at least 2 are needed; look at shards with: "
            "openclip-ext shards check"
        )
    features = {name: torch.cat([parts[name] for parts in batches])[:limit] for name in batches[0]}
    return require_finite(features, model, "--checkpoint")


def _own_batches(loader: Iterable[dict], limit: int, ranks: Ranks, skipped: list, bar: tqdm) -> Iterator[dict]:
    """This rank's share, every so many, of the batches that hold the first `limit` usable pairs.

    Every rank reads all of them, since which pairs are usable shows only then. Samples that are not go to `skipped`.
    """
    count = taken = 0
    for batch in loader:
        skipped += batch["skipped"]
        if batch["position"][0] < 0:  # none of its pairs can be used
            continue
        if taken % ranks.world_size == ranks.rank:
            yield batch
        taken, count = taken + 1, count + len(batch["image"])
        bar.update(min(count, limit) - bar.n)
        if count >= limit:
            return


def _private_heads(model: LoadedModel) -> FeatureSeparationTerm | None:
    """The term as trained, None where the checkpoint was trained without it."""
    loss = load_tensors(model.path, "--checkpoint", mapped=True).get("loss") if model.path else None
    entries = loss.items() if isinstance(loss, dict) else ()
    state = {key.removeprefix(HEADS): value for key, value in entries if key.startswith(HEADS)}
    if not state:
        return None
    embed, image_trunk = state["heads.image.0.weight"].shape
    widths = Widths(embed=embed, image_trunk=image_trunk, text_trunk=state["heads.text.0.weight"].shape[1])
    term = FeatureSeparationTerm(NoOptions(), LossContext(widths=widths))
    term.load_state_dict(state)
    return term.to(model.device)
