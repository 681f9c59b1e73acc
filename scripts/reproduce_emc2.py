"""How far the exact gradient of the loss over all images falls with batches of four (after Yau et al., ICML 2024).

    python scripts/reproduce_emc2.py --quick
    python scripts/reproduce_emc2.py --jobs 2
    python scripts/reproduce_emc2.py --images FOLDER --out runs/emc2-folder
    python scripts/reproduce_emc2.py --table scripts/README.md

The paper's setting: 500 images in two augmentations each, made once and kept; batches of 4, inverse temperature 5, SGD
with step size 1e-3, 10 epochs, burn-in 0.5. Here the images are scikit-learn's digits or those of a folder, the encoder
is a perceptron of two layers, and an anchor's negatives are the other views of other images, where the paper also has
their same views. Every 25 steps: the squared norm of the gradient of the decoupled loss over all images, with respect
to all parameters. (The published code logs another objective's, with the inverse temperature squared.)

`emc2` is run with both kernels, with states whose embedding is kept, and with states that this script encodes again
(`bank=index`), as in the paper. `steps=6` is the paper's number of proposals for batches of 4.

Every run that is done is a line of OUT/runs.jsonl, and is not done again.
"""

import argparse
import itertools
import os

from reproduce.emc2.summary import draw, markdown, summarise
from reproduce.emc2.train import Run, build, train
from reproduce.emc2.views import stored_views
from runs.pool import finish
from runs.rows import Single
from runs.script import add_arguments, carry_out, write_report
from runs.store import Store

METHODS = (
    *("clip", "sogclr", "dcl", "gamma_decomp+gamma=0.1+decoupled=true+recent=0"),
    *("emc2+kernel=mh+steps=6", "emc2+kernel=mh+steps=6+bank=index", "emc2+kernel=isir", "emc2+kernel=isir+bank=index"),
)
QUICK = {"seeds": 2, "epochs": 1}
MARKS = ("<!-- emc2 -->", "<!-- /emc2 -->")


def main() -> None:
    args = parse()
    store = Store(os.path.join(args.out, "runs.jsonl"), lambda record: Run(**record))
    carry_out(args, lambda: do(args, store), lambda: markdown(report(store, args.out)), MARKS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="", metavar="FOLDER", help="of images (default: handwritten digits)")
    parser.add_argument("--count", type=int, default=500, help="images")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME[+OPTION=VALUE…]")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--scale", type=float, default=5.0, help="inverse temperature")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--every", type=int, default=25, help="steps between two exact gradients")
    parser.add_argument("--seeds", type=int, default=5)
    add_arguments(parser, "runs/emc2", MARKS, quick="one epoch and two seeds: a minute")
    args = parser.parse_args()
    return argparse.Namespace(**vars(args) | QUICK) if args.quick else args


def do(args: argparse.Namespace, store: Store) -> None:
    """Do what is not done. Raises UserError: a method or a folder that there is not."""
    for method in args.methods:
        build(method, args.count)
    folder = os.path.abspath(args.images) if args.images else ""
    stored_views(folder, args.count)
    runs = [
        Run(
            method=method, folder=folder, images=args.count, batch_size=args.batch_size, scale=args.scale, lr=args.lr,
            epochs=args.epochs, every=args.every, seed=seed,
        )
        for seed, method in itertools.product(range(args.seeds), args.methods)
    ]  # fmt: skip
    rows = [Single(run, cost=run.epochs * run.images * (1 + 2 * ("emc2" in run.method))) for run in runs]
    finish(rows, store, train, args.jobs, lambda: report(store, args.out), lambda run: f"{run.method}, seed {run.seed}")


def report(store: Store, out: str) -> list[dict]:
    """Write OUT/results.json and OUT/emc2.png of all that is done, and return the records."""
    return write_report(summarise(store), out, draw, "emc2.png")


if __name__ == "__main__":
    main()
