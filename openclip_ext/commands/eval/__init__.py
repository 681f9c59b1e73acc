"""`openclip-ext eval`."""

import argparse

from openclip_ext.evaluation.flags import WEIGHTS, add_model_arguments
from openclip_ext.evaluation.tasks import EVAL_FAMILIES, add_task_arguments

HELP = "score a checkpoint on one or more tasks, in one JSON"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretrained", metavar="WEIGHTS", help=WEIGHTS)
    add_model_arguments(parser)
    parser.add_argument(
        "--out", metavar="FILE", help="JSON to write (default: eval-TIME.json in a run's folder, else in runs/eval)"
    )
    add_task_arguments(parser, EVAL_FAMILIES)


def run(args: argparse.Namespace) -> int:
    from openclip_ext.commands.eval.body import run_eval

    run_eval(args)
    return 0
