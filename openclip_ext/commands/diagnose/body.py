"""`openclip-ext diagnose`: what a small batch costs on a checkpoint and its data, and which loss gives it back."""

import argparse
import os
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from openclip_ext import upstream
from openclip_ext.commands.diagnose.advice import LOSSES, recommend
from openclip_ext.commands.diagnose.drift import probe_drift
from openclip_ext.commands.diagnose.duplicates import find_duplicates
from openclip_ext.commands.diagnose.encoding import (
    Source,
    cached_encoding,
    choose_source,
    keys_and_captions,
    pairs_in,
)
from openclip_ext.commands.diagnose.gradients import GROUPS
from openclip_ext.commands.diagnose.measure import measure_losses, parse_loss
from openclip_ext.commands.diagnose.negatives import scan_negatives
from openclip_ext.commands.diagnose.picture import draw_diagnosis
from openclip_ext.commands.diagnose.sample import make_sample
from openclip_ext.commands.eval.body import describe
from openclip_ext.errors import UserError, counted
from openclip_ext.evaluation.flags import caption_format, require_loading
from openclip_ext.evaluation.loading import LoadedModel, choose_device, load_model
from openclip_ext.evaluation.ranks import Ranks, join_ranks, leave_ranks
from openclip_ext.files import make_out_folder, write_json
from openclip_ext.losses import Vocabulary
from openclip_ext.state.table import NoRoomError, require_room


def run_diagnose(args: argparse.Namespace) -> dict[str, Any] | None:
    """Encode a sample of pairs once, then measure each loss on its features; write `diagnosis.json` and `.png`.

    Returns:
        The report, whose entries `README.md` beside this file tells; None on ranks other than the first.

    Raises:
        UserError: a wrong flag, fewer pairs than the largest batch, data without sizes, or a checkpoint whose features
            are not finite or all the same.
    """
    sizes = _batch_sizes(args)
    plans = {name: parse_loss(name) for name in dict.fromkeys(("clip", *(args.losses or LOSSES)))}
    source = choose_source(args)
    _require_pairs(args, pairs_in(source), sizes)
    ranks, device = join_ranks(choose_device(args.device).type)
    _require_room(args, min(pairs_in(source), args.samples), device)
    model = load_model(
        args.pretrained, name=args.model, model_config=args.model_config, device=device, precision=args.precision,
        cache_dir=args.cache_dir,
    )  # fmt: skip
    make_out_folder(args.out)
    encoded = _encode_on_first(model, source, args, ranks)
    _require_pairs(args, len(encoded["image_id"]), sizes)
    drift = None if args.probe_lr is None else probe_drift(model, source, args)
    if drift and drift["usable"] and not args.losses:
        name = f"gamma_decomp:recent_batches={drift['usable']}"
        plans[name] = parse_loss(name)
    sample = make_sample(encoded, model.device)
    negatives = scan_negatives(sample, args.seed)
    losses = measure_losses(plans, sample, negatives, sizes, args.draws, args.seed, ranks, progress=ranks.first)
    leave_ranks(ranks)
    if not ranks.first:
        return None
    report = describe(model) | {
        "data": args.train_data,
        "num_pairs": len(sample),
        "batch_size": args.batch_size,
        "draws": args.draws,
        "seed": args.seed,
        "gradients": _projections(model),
        "losses": losses,
        "negatives": negatives.summary(sizes),
        "duplicates": _duplicates(encoded, model, source, args),
        "drift": drift,
    }
    report["recommendation"] = recommend(report)
    _write(report, args.out)
    return report


def _batch_sizes(args: argparse.Namespace) -> list[int]:
    """Those to measure, in order. Raises UserError: a number that is too small."""
    require_loading(args)
    sizes = sorted({*args.batch_sizes, args.batch_size})
    if sizes[0] < 2:
        raise UserError(f"--batch-sizes {sizes[0]}: must be at least 2, a pair and a negative")
    if args.samples < 2:
        raise UserError(f"--samples {args.samples}: must be at least 2")
    if args.draws < 2 * GROUPS:
        raise UserError(f"--draws {args.draws}: must be at least {2 * GROUPS}, for intervals")
    if args.probe_lr is not None and args.probe_lr <= 0:
        raise UserError(f"--probe-lr {args.probe_lr}: must be above 0")
    return sizes


def _require_pairs(args: argparse.Namespace, pairs: int, sizes: list[int]) -> None:
    """Raises UserError: the largest batch is larger than the sample."""
    pairs = min(pairs, args.samples)
    if pairs < sizes[-1]:
        fitting = " ".join(str(size) for size in sizes if size <= pairs)
        instead = f"use --batch-sizes {fitting}" if fitting else "use smaller ones"
        raise UserError(
            f"--batch-sizes {sizes[-1]}: a batch is drawn from {counted(pairs, 'usable pair')} of --train-data "
            f"{args.train_data} (--samples {args.samples}); {instead}"
        )


def _require_room(args: argparse.Namespace, pairs: int, device: str) -> None:
    """Raises UserError: the scores of all pairs with each other, in about seven copies, do not fit into memory."""
    try:
        require_room(7 * 4 * pairs**2, torch.device(device), f"matrix of scores of {pairs} pairs")
    except NoRoomError as error:
        raise UserError(f"--samples {args.samples}: {error}; use fewer") from error


def _encode_on_first(model: LoadedModel, source: Source, args: argparse.Namespace, ranks: Ranks) -> dict[str, Tensor]:
    """`cached_encoding` of the first rank, on all. Raises UserError: what it raises, on all."""
    encoded: dict[str, Tensor] | UserError | None = None
    if ranks.first:
        try:
            encoded = cached_encoding(model, source, args)
        except UserError as error:
            encoded = error
    encoded = ranks.on_all(encoded)[0]
    if isinstance(encoded, UserError):
        raise encoded
    assert encoded is not None
    return encoded


def _projections(model: LoadedModel) -> dict[str, str]:
    """By tower, with respect to what gradients are taken."""
    seen = upstream.find_projections(model.model)
    return {name: "last projection" if name in seen else "linear map behind the features" for name in ("image", "text")}


def _duplicates(
    encoded: dict[str, Tensor], model: LoadedModel, source: Source, args: argparse.Namespace
) -> dict[str, Any]:
    """`find_duplicates`, its worst pairs with their keys and captions."""
    found = find_duplicates(encoded, Vocabulary(*upstream.read_vocabulary(model.tokenizer)))
    places = encoded["position"].tolist()
    needed = {places[row] for first, second, *_ in found["worst"] for row in (first, second)}
    named = keys_and_captions(source, needed, caption_format(args))
    found["worst"] = [
        {
            "keys": [named[places[row]][0] for row in (first, second)],
            "captions": [named[places[row]][1] for row in (first, second)],
            "caption_cosine": caption,
            "image_correlation": image,
        }
        for first, second, caption, image in found["worst"]
    ]
    return found


def _write(report: dict[str, Any], out: str) -> None:
    """The files, and for people a table and what follows from it."""
    paths = [os.path.join(out, f"diagnosis.{kind}") for kind in ("json", "png")]
    write_json(report, paths[0])
    draw_diagnosis(report, paths[1])
    print(_table(report["losses"]))
    print(*_remarks(report), "", *report["recommendation"], ", ".join(paths), sep="\n")


def _table(losses: list[dict[str, Any]]) -> str:
    head = ["loss", "batch", "signal", "worth a batch", "towards clip's target", "bias", "noise", "direction"]
    rows = []
    for loss in losses:
        for number, row in enumerate(loss["batches"]):
            worth = [_worth(row[name]) for name in ("equivalent_batch", "clip_equivalent_batch")]
            worth = ["", ""] if loss["name"] == "clip" else worth
            numbers = (_cell(row[name]) for name in ("bias", "noise", "direction"))
            rows.append(
                ["" if number else loss["name"], f"{row['batch_size']:,}", _cell(row["signal"]), *worth, *numbers]
            )
    table = tabulate(rows, head, tablefmt="plain", colalign=["left", *["right"] * 7], disable_numparse=True)
    return table + "\n* beyond the batch sizes measured: extrapolated" * ("*" in table)


def _worth(found: dict[str, Any]) -> str:
    value, low, high = (f"{number:,.0f}" for number in (found["value"], *found["interval"]))
    return f"{value} ({low} to {high}){' *' * found['extrapolated']}"


def _cell(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['value']:.3f} ± {(high - low) / 2:.3f}"


def _remarks(report: dict[str, Any]) -> list[str]:
    """What the table does not say, a line each."""
    negatives, duplicates, drift = report["negatives"], report["duplicates"], report["drift"]
    low, middle, high = negatives["kz"]
    size = report["batch_size"]
    lines = [
        f"negatives: CV² of the ratios {negatives['cv2']:.3g}, so that {negatives['effective_negatives']:,.0f} of "
        f"{report['num_pairs'] - 1:,} count; K·Z {middle:.3g} (quartiles {low:.3g} and {high:.3g}); at batch {size:,}, "
        f"{negatives['hardest_outside'][str(size)]:.1%} of anchors have their hardest negative outside it",
        f"duplicates: {duplicates['any']:.1%} of pairs have another with the same or nearly the same caption "
        f"({duplicates['near_caption']:.1%}) or picture ({duplicates['near_image']:.1%})",
    ]
    if drift:
        errors = ", ".join(f"{error:.3g} at age {age}" for age, error in drift["errors"].items())
        lines.append(
            f"drift at lr {drift['lr']:g}: scores err by {errors}; {drift['usable']} recent batches are usable"
        )
    for name, what in report["gradients"].items():
        if what != "last projection":
            lines.append(f"the {name} tower shows no last projection: its gradient is that of a {what}")
    return lines
