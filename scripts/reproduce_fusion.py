"""A fusion model with a base loss and the terms of Jiang et al. (CVPR 2023) on generated scenes, on four tasks.

    python scripts/reproduce_fusion.py --quick
    python scripts/reproduce_fusion.py --jobs 2
    python scripts/reproduce_fusion.py --table scripts/README.md

What `openclip-ext demo --fusion` does: with the base loss alone, with each term (Sep: `feature_separation`, Br:
`brownian_bridge`, GC: `geometric_consistency`), and with all three; weights are not tuned.

Every run that is done is a line of OUT/runs.jsonl, and is not done again.
"""

import argparse
import itertools
import os

from reproduce.fusion.summary import draw, markdown, summarise
from reproduce.fusion.train import ROWS, Run, train
from runs.pool import finish
from runs.rows import Single
from runs.script import add_arguments, carry_out, write_report
from runs.store import Store

from openclip_ext.registry import get_spec

QUICK = {"seeds": 1, "epochs": 0.01, "scenes": 60, "rows": ["base", "all"]}
MARKS = ("<!-- fusion -->", "<!-- /fusion -->")


def main() -> None:
    args = parse()
    store = Store(os.path.join(args.out, "runs.jsonl"), lambda record: Run(**record))
    carry_out(args, lambda: do(args, store), lambda: markdown(report(store, args.out)), MARKS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", default="clip", help="the base loss (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0, help="a factor on those of the demo")
    parser.add_argument("--scenes", type=int, default=3000, help="to train each stage on (default: %(default)s)")
    add_arguments(parser, "runs/fusion", MARKS, quick="two rows, one seed, few scenes, which show nothing: a minute")
    args = parser.parse_args()
    return argparse.Namespace(**vars(args) | QUICK) if args.quick else args


def do(args: argparse.Namespace, store: Store) -> None:
    """Do what is not done. Raises UserError: a loss that there is not."""
    get_spec(args.loss)
    runs = [
        Run(row=row, loss=args.loss, scenes=args.scenes, epochs=args.epochs, seed=seed)
        for seed, row in itertools.product(range(args.seeds), args.rows)
    ]
    rows = [Single(run, cost=run.scenes * run.epochs) for run in runs]
    finish(rows, store, train, args.jobs, lambda: report(store, args.out), lambda run: f"{run.row}, seed {run.seed}")


def report(store: Store, out: str) -> list[dict]:
    """Write OUT/results.json and OUT/fusion.png of all that is done, and return the records."""
    return write_report(summarise(store), out, draw, "fusion.png")


if __name__ == "__main__":
    main()
