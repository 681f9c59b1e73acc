"""`openclip-ext report`."""

import argparse

HELP = "show runs beside each other: curves, scores over seeds, differences to the first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="folder of a run, logs/NAME, stock OpenCLIP's too, or a folder of such, or a JSON of openclip-ext eval; "
        "the others are compared with the first, and runs that differ only in --seed are one row",
    )  # fmt: skip
    parser.add_argument(
        "--metric", action="append", metavar="NAME",
        help="metric to show, or a pattern such as '*R@5'; repeatable (default: top-1, recall@1 and clip_val_loss)",
    )  # fmt: skip
    parser.add_argument("--out", default="runs/report", metavar="FOLDER", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from openclip_ext.report.compare import run_report

    run_report(args)
    return 0
