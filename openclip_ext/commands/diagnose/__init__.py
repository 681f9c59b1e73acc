"""`openclip-ext diagnose`."""

import argparse

from openclip_ext.commands.diagnose.advice import LOSSES
from openclip_ext.evaluation.flags import (
    WEIGHTS,
    add_cache_arguments,
    add_caption_arguments,
    add_loading_arguments,
    add_model_arguments,
)

HELP = "measure what a small batch costs on a checkpoint and its data, and which loss gives it back"
BATCH_SIZES = (16, 64, 256, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretrained", required=True, metavar="WEIGHTS", help=WEIGHTS)
    add_model_arguments(parser)
    parser.add_argument(
        "--train-data", required=True, metavar="SHARDS_OR_CSV",
        help="what is trained on: a folder or pattern of shards with sizes.json, or a CSV; of several captions of an "
        "image in shards the first counts",
    )  # fmt: skip
    add_caption_arguments(parser)
    parser.add_argument(
        "--samples", type=int, default=10_000,
        help="pairs to look at, of shards, or rows, drawn at random; they stand for all (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, metavar="B",
        help=f"to measure, beside --batch-size (default: {' '.join(map(str, BATCH_SIZES))})",
    )  # fmt: skip
    parser.add_argument(
        "--losses", nargs="+", metavar="NAME[:KEY=VALUE,…]",
        help=f"default: {' '.join(LOSSES)}, and with --probe-lr recent pairs, as far as they are fresh; clip is always "
        "measured",
    )  # fmt: skip
    parser.add_argument("--draws", type=int, default=100, help="batches of each size (default: %(default)s)")
    parser.add_argument(
        "--probe-lr", type=float, metavar="LR",
        help="train a copy of the model for some steps at this learning rate, and measure how fast it moves away from "
        "the pairs of recent steps",
    )  # fmt: skip
    add_loading_arguments(parser, "pairs of a step in your training, which the recommendation is about; ")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    add_cache_arguments(parser, "features")
    parser.add_argument("--out", default="runs/diagnose", metavar="FOLDER", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from openclip_ext.commands.diagnose.body import run_diagnose

    run_diagnose(args)
    return 0
