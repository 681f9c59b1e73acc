"""`openclip-ext demo`."""

import argparse
import os

from openclip_ext.errors import UserError

HELP = "train on handwritten digits with several losses, on CPU, in minutes"
EPOCHS, BATCH_SIZE = 8, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder of data, runs and report (default: %(default)s)")
    parser.add_argument(
        "--losses", help="joined by commas, each a name, or a name and terms such as clip+brownian_bridge=0.25"
    )
    parser.add_argument("--full", action="store_true", help="more losses, with 3 seeds each: 9 minutes instead of 3")
    parser.add_argument("--seeds", type=int, help="runs per loss (default: 6)")
    parser.add_argument("--epochs", type=int, help=f"per run (default: {EPOCHS})")
    parser.add_argument("--batch-size", type=int, help=f"(default: {BATCH_SIZE})")
    parser.add_argument(
        "--fusion", action="store_true",
        help="instead: a fusion model on generated scenes, from nothing to scores on four tasks, in 15 minutes",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.fusion:
        for name in ("losses", "full", "seeds", "epochs", "batch_size"):
            if getattr(args, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag}: does not go with --fusion; scripts/reproduce_fusion.py has losses and seeds")
        from openclip_ext.commands.demo.fusion import run_fusion_demo

        run_fusion_demo(os.path.join(args.out, "fusion"))
        return 0
    from openclip_ext.commands.demo.body import ALL_LOSSES, ALL_SEEDS, LOSSES, SEEDS, run_demo

    names, number = (ALL_LOSSES, ALL_SEEDS) if args.full else (LOSSES, SEEDS)
    losses = args.losses.split(",") if args.losses else names
    seeds = number if args.seeds is None else args.seeds
    epochs = EPOCHS if args.epochs is None else args.epochs
    batch_size = BATCH_SIZE if args.batch_size is None else args.batch_size
    run_demo(args.out, losses=losses, seeds=seeds, epochs=epochs, batch_size=batch_size)
    return 0
