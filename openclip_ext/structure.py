"""`openclip-ext structure`: how checkpoints lay out held-out images and texts, as numbers and as a picture."""

import argparse
import collections
import datetime
import json
import os
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from openclip_ext import _host
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.errors import UserError
from openclip_ext.evaluation.structure import TITLES, Structure, structure_metrics
from openclip_ext.options import NoOptions
from openclip_ext.terms.feature_separation import FeatureSeparationTerm
from openclip_ext.training.checkpoint import latest_checkpoint, load_checkpoint
from openclip_ext.training.flags import parse_args
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
    flags = _model_flags(args)
    device = _device(args.device)
    listing = list_shards(args.data, flag="--data")
    paths = [_checkpoint_file(path) for path in args.checkpoint]
    if args.model_config:
        _host.register_model_config(args.model_config)
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be made a folder ({error.strerror}); give another") from error
    structures = []
    start_logging(None, console=True, debug=False)
    try:
        for label, path in zip(_labels(paths), paths, strict=True):
            features = _encode(path, label, flags, listing, args.num_samples, device)
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
    from openclip_ext.evaluation.structure_picture import draw_structure

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


def _model_flags(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of `openclip-ext train` that say how to make the model and read the data, checked."""
    if args.num_samples < 2:
        raise UserError(f"--num-samples {args.num_samples}: must be at least 2")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: must not be negative")
    given = {
        "--model": args.model,
        "--val-data": args.data,
        "--batch-size": args.batch_size,
        "--workers": args.workers,
        "--caption-separator": args.caption_separator,
        "--caption-key": args.caption_key,
        "--precision": "fp32",
    }
    return parse_args([f"{flag}={value}" for flag, value in given.items() if value is not None])


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def _checkpoint_file(path: str) -> str:
    """The file itself, or of a run's folder the checkpoint of its last epoch."""
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise UserError(f"--checkpoint {path}: no such file; give a checkpoint, or the folder of a run")
    folder = os.path.join(path, "checkpoints")
    latest = latest_checkpoint(folder, most_recent=False) or latest_checkpoint(folder, most_recent=True)
    if latest is None:
        raise UserError(f"--checkpoint {path}: no checkpoints/epoch_N.pt in this folder; give the folder of a run")
    return latest


def _labels(paths: list[str]) -> list[str]:
    """What tells the paths apart: without their common folder, `checkpoints/` and the extension."""
    absolute = [Path(path).absolute() for path in paths]
    common = os.path.commonpath([path.parent for path in absolute])
    relative = [path.relative_to(common).with_suffix("") for path in absolute]
    return ["/".join(part for part in path.parts if part != "checkpoints") for path in relative]


@torch.no_grad()
def _encode(
    path: str, label: str, flags: argparse.Namespace, listing: ShardListing, limit: int, device: torch.device
) -> dict[str, Tensor]:
    """Unit features (M, D) of the first `limit` usable pairs, on CPU: `image`, `text`, and with heads `…_private`."""
    model, heads, transform, tokenizer = _load(path, flags, device)
    paired = PairModel(model, trunk_features=heads is not None).eval()
    config = StreamConfig(
        source=listing,
        batch_size=flags.batch_size,
        image_transform=transform,
        tokenizer=tokenizer,
        captions=CaptionFormat(separator=flags.caption_separator, key=flags.caption_key),
    )
    parts, skipped, count = collections.defaultdict(list), [], 0
    with tqdm(total=min(limit, listing.length or limit), desc=label, unit="pair") as bar:
        for batch in eval_loader(config, workers=flags.workers):
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
            f"--data {flags.val_data}: {count} usable pair(s), and at least 2 are needed; look at the shards with: "
            "openclip-ext shards check"
        )
    features = {name: torch.cat(rows)[:limit] for name, rows in parts.items()}
    if not all(x.isfinite().all() for x in features.values()):
        raise UserError(f"--checkpoint {path}: its features are not finite; take a checkpoint from before it diverged")
    return features


def _load(path: str, flags: argparse.Namespace, device: torch.device):
    """(model, private heads or None, transform, tokenizer)."""
    content = _read(path)
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"--checkpoint {path}: holds no weights; give a file that OpenCLIP's --pretrained takes")
    # The bias of a model trained as SigLIP is in no model config: its weights alone tell.
    logit_bias = any(str(key).endswith("logit_bias") for key in weights)
    flags.pretrained = path
    try:
        model, _, transform, tokenizer = _host.create_model(flags, device, logit_bias=logit_bias)
    except UserError as error:  # it knows the file by the flag of training
        raise UserError(str(error).replace("--pretrained", "--checkpoint")) from error
    return model, _private_heads(content.get("loss"), device), transform, tokenizer


def _read(path: str) -> dict:
    """What the file holds."""
    if not path.endswith(".safetensors"):
        return load_checkpoint(path, flag="--checkpoint").content
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"--checkpoint {path}: not a safetensors file ({error})") from error


def _private_heads(loss_state: dict[str, Tensor] | None, device: torch.device) -> FeatureSeparationTerm | None:
    """The term as trained, None where the checkpoint was trained without it."""
    loss_state = loss_state if isinstance(loss_state, dict) else {}
    state = {key.removeprefix(HEADS): value for key, value in loss_state.items() if key.startswith(HEADS)}
    if not state:
        return None
    term = FeatureSeparationTerm(NoOptions(), num_samples=1, rank=0, world_size=1)
    embed, image_trunk = state["heads.image.0.weight"].shape
    term.set_widths(image_trunk=image_trunk, text_trunk=state["heads.text.0.weight"].shape[1], embed=embed)
    term.load_state_dict(state)
    return term.to(device)
