"""`openclip-ext train`."""

import argparse
import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence

HELP = "train or fine-tune a model (all of OpenCLIP's flags, and ours)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: they are OpenCLIP's and ours, which `run_command_line` parses."""


def run(args: argparse.Namespace) -> int:
    return run_command_line([])


def run_command_line(argv: Sequence[str]) -> int:
    """What follows `openclip-ext train`, by a parser of its own; returns the exit code."""
    with _interrupts_end_at_once():
        from openclip_ext.training.flags import parse_args

        config = parse_args(argv)
        from openclip_ext.training.run import train

    train(config)
    return 0


@contextlib.contextmanager
def _interrupts_end_at_once() -> Iterator[None]:
    """In the block, which imports PyTorch and others: some of these go on after a KeyboardInterrupt as if none came."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_at_once(number: int, frame: object) -> None:
    os.write(2, b"openclip-ext: interrupted\n")
    os._exit(130)
