"""`openclip-ext structure`."""

import argparse

HELP = "show how checkpoints lay out images and texts, in one picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", nargs="+", required=True, metavar="FILE",
        help="files that OpenCLIP's --pretrained takes, or folders of runs for their last epoch; several are compared",
    )  # fmt: skip
    parser.add_argument("--model", required=True, metavar="NAME", help="their architecture")
    parser.add_argument("--model-config", metavar="FILE", help="an OpenCLIP model config in JSON, as in training")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="held-out pairs: a folder or pattern")
    parser.add_argument("--out", default="runs/structure", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--num-samples", type=int, default=2000, help="pairs to look at (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if any")
    parser.add_argument("--caption-separator", metavar="TEXT", help="as in training; the first caption counts")
    parser.add_argument("--caption-key", metavar="KEY", help="as in training; default: as sizes.json notes")


def run(args: argparse.Namespace) -> int:
    from openclip_ext.commands.structure.body import run_structure

    run_structure(args)
    return 0
