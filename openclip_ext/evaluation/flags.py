"""Flags that every command that evaluates has, in the same words. Imports no torch: they are part of `--help`."""

import argparse
import os
from typing import TYPE_CHECKING

from openclip_ext.errors import UserError

if TYPE_CHECKING:
    from openclip_ext.data.captions import CaptionFormat

#: What weights may be, for the help of the flags that take some.
WEIGHTS = "a file (.pt, .bin, .safetensors), the folder of a run, one of OpenCLIP's tags, hf-hub:… or local-dir:…"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load_model` takes beside the weights."""
    parser.add_argument(
        "--model", metavar="NAME", help="the architecture; default: the run's, and what hf-hub: and local-dir: bring"
    )
    parser.add_argument("--model-config", metavar="FILE", help="an OpenCLIP model config in JSON, as in training")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if any")
    parser.add_argument(
        "--precision",
        choices=["amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32"],
        help="as in training (default: amp on a GPU, else fp32)",
    )
    parser.add_argument("--cache-dir", metavar="FOLDER", help="where OpenCLIP keeps what it downloads")


def add_loading_arguments(group, batch_size_is: str = "") -> None:
    """How data is loaded; `require_loading` checks the values. `batch_size_is`: what `--batch-size` means besides."""
    group.add_argument("--batch-size", type=int, default=64, help=f"{batch_size_is}default: %(default)s")
    cores = min(4, os.cpu_count() or 1)
    group.add_argument("--workers", type=int, default=cores, help="processes that load data (default: %(default)s)")


def add_cache_arguments(group, what: str) -> None:
    """Where `what` is kept, in the words of `feature_cache.open_cache`."""
    group.add_argument(
        "--feature-cache", metavar="FOLDER", help=f"where {what} are kept (default: openclip-ext/features in ~/.cache)"
    )
    group.add_argument("--no-feature-cache", action="store_true", help="neither keep them nor take kept ones")


def require_loading(args: argparse.Namespace) -> None:
    """Raises UserError: a flag of `add_loading_arguments` is below what it can be."""
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")


def add_caption_arguments(group) -> None:
    """Where captions are in what a flag for pairs takes; `caption_format` and `csv_columns` read them."""
    group.add_argument("--caption-separator", metavar="TEXT", help="splits a caption into several")
    group.add_argument(
        "--caption-key", metavar="KEY",
        help="where a sample's JSON holds its captions; default: where sizes.json says, else its text",
    )  # fmt: skip
    group.add_argument("--csv-img-key", default="filepath", help="column of image paths (default: %(default)s)")
    group.add_argument("--csv-caption-key", default="title", help="column of captions (default: %(default)s)")
    group.add_argument("--csv-separator", metavar="CHARACTER", help="between columns; default: recognised")


def caption_format(args: argparse.Namespace) -> "CaptionFormat":
    """Raises UserError: `--caption-separator` is empty."""
    from openclip_ext.data.captions import CaptionFormat

    if args.caption_separator == "":
        raise UserError("--caption-separator: must not be empty")
    return CaptionFormat(separator=args.caption_separator, key=args.caption_key)


def csv_columns(args: argparse.Namespace, path: str) -> tuple[str, str, str | None] | None:
    """Of images and of captions, and what separates columns; None: what `path` names is no CSV.

    Raises:
        UserError: it is one, and `--caption-key` is given.
    """
    if not path.endswith((".csv", ".tsv")):
        return None
    if args.caption_key is not None:
        raise UserError(f"--caption-key {args.caption_key}: is for shards; a CSV takes --csv-caption-key")
    return args.csv_img_key, args.csv_caption_key, args.csv_separator
