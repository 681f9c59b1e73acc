"""What such scripts take and how they end."""

import argparse
import os
import sys
from collections.abc import Callable

from openclip_ext.errors import UserError
from openclip_ext.files import make_out_folder, write_json

from .marks import put_between_marks


def add_arguments(parser: argparse.ArgumentParser, out: str, marks: tuple[str, str], quick: str) -> None:
    """Flags that all of them have.

    Args:
        parser: to which they are added.
        out: the default of --out.
        marks: between which --table puts tables.
        quick: what --quick does.
    """
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--out", default=out, help="folder of runs.jsonl, results.json and pictures")
    parser.add_argument(
        "--table", nargs="?", const=True, metavar="FILE",
        help=f"train nothing: print what is in --out, or put it into FILE between {marks[0]} and {marks[1]}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=quick)


def carry_out(
    args: argparse.Namespace, do: Callable[[], None], text: Callable[[], str], marks: tuple[str, str]
) -> None:
    """Do the runs, unless --table says not to, and print or put into a file what is said of them.

    Args:
        args: the flags, those of `add_arguments` among them.
        do: does all that is not done.
        text: of what is done, as Markdown.
        marks: as in `add_arguments`.
    """
    try:
        make_out_folder(args.out)
        if not args.table:
            do()
        if isinstance(args.table, str):
            put_between_marks(text(), args.table, marks)
        else:
            print(text())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


def write_report(records: list[dict], out: str, draw: Callable[[list[dict], str], None], picture: str) -> list[dict]:
    """Write OUT/results.json and, unless there are none, the picture of all records, which are returned."""
    write_json(records, os.path.join(out, "results.json"))
    if records:
        draw(records, os.path.join(out, picture))
    return records
