"""`openclip-ext structure`: how checkpoints lay out held-out images and texts, as numbers and as a picture."""

import argparse
import collections
import datetime
import json
import os
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from openclip_ext import upstream
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.errors import UserError, counted
from openclip_ext.evaluation.loading import checkpoint_file, choose_device, load_model
from openclip_ext.evaluation.metrics.structure import TITLES, Structure, structure_metrics
from openclip_ext.files import load_tensors, make_out_folder
from openclip_ext.options import NoOptions
from openclip_ext.terms.feature_separation import FeatureSeparationTerm
from openclip_ext.training.log import report_skips, start_logging, stop_logging
from openclip_ext.training.pair_model import PairModel

HEADS = "terms.feature_separation."  # where a checkpoint's loss state keeps the private heads


def run_structure(args: argparse.Namespace) -> dict:
    """Encode the first `--num-samples` pairs with each checkpoint; write `structure.json` and `structure.png`.

    Args:
        args: the flags of `openclip-ext structure`.

    Returns:
        What `structure.json` holds: `created, versions, model, data, num_pairs`, and for each of `checkpoints` its
        `label`, its `path`, and its `metrics` as `structure_metrics` returns them.

    Raises:
        UserError: a wrong flag, a checkpoint that is none or of another architecture, or fewer than two usable pairs.
    """
    _require_positive(args)
    choose_device(args.device)
    listing = list_shards(args.data, flag="--data")
    paths = [checkpoint_file(path, "--checkpoint") for path in args.checkpoint]
    if args.model_config:
        upstream.register_model_config(args.model_config)
    make_out_folder(args.out)
    structures = []
    start_logging(None, console=True, debug=False)
    try:
        for label, path in zip(_labels(paths), paths, strict=True):
            features = _encode(path, label, args, listing)
            structures.append(Structure(label, features, structure_metrics(**features)))
    finally:
        stop_logging()
    report = {
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("openclip-ext", "open_clip_torch", "torch")},
        "model": args.model,
        "data": args.data,
        "num_pairs": len(structures[0].features["image"]),
        "checkpoints": [
            {"label": structure.label, "path": path, "metrics": structure.metrics}
            for structure, path in zip(structures, paths, strict=True)
        ],
    }
    _write(report, structures, args.out)
    return report


def _write(report: dict, structures: list[Structure], out: str) -> None:
    from openclip_ext.commands.structure.picture import draw_structure

    with open(os.path.join(out, "structure.json"), "w") as file:
        json.dump(report, file, indent=1)
    title = f"{report['model']} on {report['num_pairs']} pairs"
    draw_structure(structures, title, os.path.join(out, "structure.png"))
    print(_table(structures, report["num_pairs"]))
    print(f"{out}/structure.json, {out}/structure.png")


def _table(structures: list[Structure], num_pairs: int) -> str:
    widths = [max(12, len(structure.label) + 2) for structure in structures]
    columns = list(zip(structures, widths, strict=True))
    lines = [f"{f'{num_pairs} pairs':30}" + "".join(f"{structure.label:>{width}}" for structure, width in columns)]
    for name, title in TITLES.items():
        cells = [f"{structure.metrics[name]:.4f}" if name in structure.metrics else "–" for structure in structures]
        if any(cell != "–" for cell in cells):
            lines.append(f"{title:30}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def _require_positive(args: argparse.Namespace) -> None:
    for name, least, words in (("num_samples", 2, "be at least 2"), ("batch_size", 1, "be at least 1"),
                               ("workers", 0, "not be negative")):  # fmt: skip
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must {words}")
    if args.caption_separator == "":
        raise UserError("--caption-separator: must not be empty")


def _labels(paths: list[str]) -> list[str]:
    """What tells the paths apart: without their common folder, `checkpoints/` and the extension."""
    absolute = [Path(path).absolute() for path in paths]
    common = os.path.commonpath([path.parent for path in absolute])
    relative = [path.relative_to(common).with_suffix("") for path in absolute]
    return ["/".join(part for part in path.parts if part != "checkpoints") for path in relative]


@torch.no_grad()
def _encode(path: str, label: str, args: argparse.Namespace, listing: ShardListing) -> dict[str, Tensor]:
    """Unit features (M, D) of the first `--num-samples` usable pairs, on CPU: `image`, `text`, and with heads
    `…_private`."""
    loaded = load_model(path, name=args.model, device=args.device, precision="fp32", flag="--checkpoint")
    device, limit = loaded.device, args.num_samples
    loss_state = load_tensors(path, "--checkpoint", mapped=True).get("loss")
    heads = _private_heads(loss_state if isinstance(loss_state, dict) else {}, device)
    paired = PairModel(loaded.model, trunk_features=heads is not None).eval()
    config = StreamConfig(
        source=listing,
        batch_size=args.batch_size,
        image_transform=loaded.transform,
        tokenizer=loaded.tokenizer,
        captions=CaptionFormat(separator=args.caption_separator, key=args.caption_key),
    )
    parts, skipped, count = collections.defaultdict(list), [], 0
    with tqdm(total=min(limit, listing.length or limit), desc=label, unit="pair") as bar:
        for batch in eval_loader(config, workers=args.workers):
            out = paired(batch["image"].to(device), batch["text"].to(device))
            for modality in ("image", "text"):
                parts[modality].append(out[f"{modality}_features"].float().cpu())
                if heads is not None:
                    private = heads.private(modality, out[f"{modality}_trunk_features"])
                    parts[f"{modality}_private"].append(private.float().cpu())
            skipped += batch["skipped"]
            count += len(batch["image"])
            bar.update(min(count, limit) - bar.n)
            if count >= limit:
                break
    report_skips(skipped, label)
    if count < 2:
        raise UserError(
            f"--data {args.data}: {counted(count, 'usable pair')}, and at least 2 are needed; look at the shards with: "
            "openclip-ext shards check"
        )
    features = {name: torch.cat(rows)[:limit] for name, rows in parts.items()}
    if not all(x.isfinite().all() for x in features.values()):
        raise UserError(f"--checkpoint {path}: its features are not finite; take a checkpoint from before it diverged")
    return features


def _private_heads(loss_state: dict[str, Tensor], device: torch.device) -> FeatureSeparationTerm | None:
    """The term as trained, None where the checkpoint was trained without it."""
    state = {key.removeprefix(HEADS): value for key, value in loss_state.items() if key.startswith(HEADS)}
    if not state:
        return None
    term = FeatureSeparationTerm(NoOptions(), num_samples=1, rank=0, world_size=1)
    embed, image_trunk = state["heads.image.0.weight"].shape
    term.set_widths(image_trunk=image_trunk, text_trunk=state["heads.text.0.weight"].shape[1], embed=embed)
    term.load_state_dict(state)
    return term.to(device)
