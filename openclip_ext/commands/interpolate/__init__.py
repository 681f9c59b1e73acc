"""`openclip-ext interpolate`."""

import argparse

from openclip_ext.evaluation.flags import WEIGHTS, add_model_arguments
from openclip_ext.evaluation.tasks import add_task_arguments

HELP = "mix the weights of two checkpoints in several shares and score each mixture (WiSE-FT)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help=f"where alpha is 0, such as the model before fine-tuning: {WEIGHTS}")
    parser.add_argument("b", metavar="B", help="where alpha is 1, such as the fine-tuned model")
    parser.add_argument(
        "--alpha", default="0:1:0.1", metavar="RANGE",
        help="shares of B: from, to and step, or values joined by commas (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--save", nargs=2, metavar=("ALPHA", "FILE"), help="write the mixture of this share as a checkpoint"
    )
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help="score to show, or a pattern such as '*top5'; repeatable"
    )
    parser.add_argument("--out", default="runs/interpolate", metavar="FOLDER", help="default: %(default)s")
    add_model_arguments(parser)
    add_task_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from openclip_ext.commands.interpolate.body import run_interpolate

    run_interpolate(args)
    return 0
