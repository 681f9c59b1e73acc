"""`openclip-ext train`."""

import argparse
from collections.abc import Sequence

HELP = "train or fine-tune a model (all of OpenCLIP's flags, and ours)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: they are OpenCLIP's and ours, which `run_command_line` parses."""


def run(args: argparse.Namespace) -> int:
    return run_command_line([])


def run_command_line(argv: Sequence[str]) -> int:
    """What follows `openclip-ext train`, by a parser of its own; returns the exit code."""
    from openclip_ext.training.flags import parse_args

    config = parse_args(argv)
    from openclip_ext.training.run import train

    train(config)
    return 0
