"""Flags that every command that evaluates has, in the same words. Imports no torch: they are part of `--help`."""

import argparse
import os

from openclip_ext.errors import UserError

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


def add_loading_arguments(group) -> None:
    """How data is loaded; `require_loading` checks the values."""
    group.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    cores = min(4, os.cpu_count() or 1)
    group.add_argument("--workers", type=int, default=cores, help="processes that load data (default: %(default)s)")


def require_loading(args: argparse.Namespace) -> None:
    """Raises UserError: a flag of `add_loading_arguments` is below what it can be."""
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
