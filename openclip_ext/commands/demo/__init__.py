"""`openclip-ext demo`."""

import argparse
import os

HELP = "train on handwritten digits with several losses, on CPU, in minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder of data, runs and report (default: %(default)s)")
    parser.add_argument(
        "--losses", help="joined by commas, each a name, or a name and terms such as clip+brownian_bridge=0.25"
    )
    parser.add_argument("--full", action="store_true", help="more losses, with 3 seeds each: 9 minutes instead of 3")
    parser.add_argument("--seeds", type=int, help="runs per loss (default: 6)")
    parser.add_argument("--epochs", type=int, default=8, help="per run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--fusion", action="store_true",
        help="instead: a fusion model on generated scenes, from nothing to its scores on four tasks",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.fusion:
        from openclip_ext.commands.demo.fusion import run_fusion_demo

        run_fusion_demo(os.path.join(args.out, "fusion"))
        return 0
    from openclip_ext.commands.demo.body import ALL_LOSSES, ALL_SEEDS, LOSSES, SEEDS, run_demo

    names, number = (ALL_LOSSES, ALL_SEEDS) if args.full else (LOSSES, SEEDS)
    losses = args.losses.split(",") if args.losses else names
    seeds = number if args.seeds is None else args.seeds
    run_demo(args.out, losses=losses, seeds=seeds, epochs=args.epochs, batch_size=args.batch_size)
    return 0
