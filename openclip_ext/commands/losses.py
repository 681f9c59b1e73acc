"""`openclip-ext losses`."""

import argparse
import json

HELP = "list the registered losses and terms, or show one with its options"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a loss or term")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from openclip_ext.describe import describe_all, describe_one

    text, data = describe_one(args.name) if args.name else describe_all()
    print(json.dumps(data, indent=1) if args.json else text)
    return 0
