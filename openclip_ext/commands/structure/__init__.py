"""`openclip-ext structure`."""

import argparse

from openclip_ext.evaluation.flags import WEIGHTS, add_caption_arguments, add_loading_arguments, add_model_arguments

HELP = "show how checkpoints lay out images and texts, in one picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", nargs="+", required=True, metavar="WEIGHTS", help=f"{WEIGHTS}; several are compared"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, metavar="SHARDS_OR_CSV",
        help="held-out pairs: a folder or pattern of shards, or a CSV; of several captions of an image in shards the "
        "first counts",
    )  # fmt: skip
    add_caption_arguments(parser)
    parser.add_argument("--num-samples", type=int, default=2000, help="pairs to look at (default: %(default)s)")
    add_loading_arguments(parser)
    parser.add_argument("--out", default="runs/structure", metavar="FOLDER", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from openclip_ext.commands.structure.body import run_structure

    run_structure(args)
    return 0
