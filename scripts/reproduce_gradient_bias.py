"""Which losses reach the optimum of the loss over all pairs from small, noisy batches (Chen et al., NeurIPS 2022).

    python scripts/reproduce_gradient_bias.py --quick
    python scripts/reproduce_gradient_bias.py --jobs 2
    python scripts/reproduce_gradient_bias.py --table scripts/README.md

The paper reports simulated data with heavy injected noise on which ten runs from ten initial values all reach the
optimum (1.0), and none with the ordinary loss; its set-up is not public. Here a model of six weights learns 128
simulated pairs (see `reproduce/gradient_bias/data.py`), and the noise is such that the optimum of the loss over all
pairs is the same with it and without. So what keeps a run from it is its loss's bias, once the noise of single steps is
averaged out: by a step size that falls, and by averaging the second half of the steps.

A run has reached the optimum when its weights are within a tenth of it. Each loss is held to its own target: the loss
over all pairs with the positive in its denominator, or without it.

Every run that is done is a line of OUT/runs.jsonl, and is not done again.
"""

import argparse
import itertools
import math
import os

from reproduce.gradient_bias.summary import draw, markdown, summarise
from reproduce.gradient_bias.train import Run, is_decoupled, train
from runs.pool import finish
from runs.rows import Single
from runs.script import add_arguments, carry_out, write_report
from runs.store import Store

METHODS = (
    *("clip", "dcl", "batch_corrected"),
    *("gamma_decomp+gamma=0.01+recent=0", "emc2+bank=index", "emc2+bank_dtype=float32"),
)
BATCH_SIZES = (4, 16, 64)
NOISES = (0.0, 1.0, 2.0)
QUICK = {"batch_sizes": [4], "noises": [0.0], "steps": 500}
MARKS = ("<!-- gradient bias -->", "<!-- /gradient bias -->")


def main() -> None:
    args = parse()
    store = Store(os.path.join(args.out, "runs.jsonl"), lambda record: Run(**record))
    carry_out(args, lambda: do(args, store), lambda: markdown(report(store, args.out)), MARKS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME[+OPTION=VALUE…]")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--noises", nargs="+", type=float, default=NOISES, help="standard deviation of scores, logits")
    parser.add_argument("--starts", type=int, default=10, help="initial values")
    parser.add_argument("--steps", type=int, default=4000, help="at batch 4; as one over the root of the batch size")
    add_arguments(parser, "runs/gradient_bias", MARKS, quick="one batch size, no noise, few steps: a minute")
    args = parser.parse_args()
    return argparse.Namespace(**vars(args) | QUICK) if args.quick else args


def do(args: argparse.Namespace, store: Store) -> None:
    """Do what is not done. Raises UserError: a method that there is not."""
    runs = []
    for noise, size, method in itertools.product(args.noises, args.batch_sizes, args.methods):
        steps = round(args.steps * math.sqrt(4 / size))
        runs.append(Run(method=method, batch_size=size, noise=noise, starts=args.starts, steps=steps))
    for method in args.methods:
        is_decoupled(method)
    rows = [Single(run, cost=run.steps * (1 + 2 * ("emc2" in run.method))) for run in runs]
    finish(rows, store, train, args.jobs, lambda: report(store, args.out), title)


def report(store: Store, out: str) -> list[dict]:
    """Write OUT/results.json and OUT/gradient_bias.png of all that is done, and return the records."""
    return write_report(summarise(store), out, draw, "gradient_bias.png")


def title(run: Run) -> str:
    return f"{run.method} at {run.batch_size}, noise {run.noise:g}"


if __name__ == "__main__":
    main()
