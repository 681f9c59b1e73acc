"""A base loss with terms that shape features, weights chosen on validation (after Jiang et al., CVPR 2023).

    python scripts/reproduce_structures.py --quick
    python scripts/reproduce_structures.py --jobs 2
    python scripts/reproduce_structures.py --pairs pairs.csv --classes category --model-config small.json
    python scripts/reproduce_structures.py --pairs FOLDER --model-config small.json --weights start.pt --frozen
    python scripts/reproduce_structures.py --table scripts/README.md

Small models are trained by `openclip-ext train` with a base loss, with each term (Sep: `feature_separation`, Br:
`brownian_bridge`, GC: `geometric_consistency`), and with all three. As many candidates for each, three by default: the
weights, in steps of three, or for the base loss, which has none, the learning rate. The best mean recall on the
validation split chooses; the test split is scored once, by zero-shot classification, a linear probe, retrieval, and
what `openclip-ext structure` measures.

The data are scikit-learn's handwritten digits, a CSV with the columns filepath, title and one of classes, or a folder
that holds a folder per class.

Every run that is done is a line of OUT/runs.jsonl, and is not done again.
"""

import argparse
import os
from itertools import groupby

from reproduce.structures.data import Source, load
from reproduce.structures.rows import rows
from reproduce.structures.summary import data_name, draw, markdown, summarise
from reproduce.structures.train import Run, read_run, train
from runs.pool import finish
from runs.script import add_arguments, carry_out
from runs.store import Store

from openclip_ext.files import write_json

QUICK = {"epochs": 1, "factors": [1.0], "seeds": 1}
MARKS = ("<!-- structures -->", "<!-- /structures -->")


def main() -> None:
    args = parse()
    store = Store(os.path.join(args.out, "runs.jsonl"), read_run)
    carry_out(args, lambda: do(args, store), lambda: markdown(report(store, args.out)), MARKS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="", metavar="CSV_OR_FOLDER", help="default: handwritten digits")
    parser.add_argument("--captions", default="title", help="column of captions (default: %(default)s)")
    parser.add_argument("--classes", default="", help="column of classes")
    parser.add_argument("--model-config", default="", metavar="JSON", help="an architecture (default: a tiny one)")
    parser.add_argument("--weights", default="", metavar="PT", help="to start from (default: from scratch)")
    parser.add_argument("--frozen", action="store_true", help="keep the image tower as it is")
    parser.add_argument("--loss", default="clip", help="the base loss (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--factors", nargs="+", type=float, default=[1 / 3, 1.0, 3.0], help="candidates, see above")
    parser.add_argument("--seeds", type=int, default=3)
    add_arguments(parser, "runs/structures", MARKS, quick="one epoch, one seed, nothing chosen: a minute")
    args = parser.parse_args()
    return argparse.Namespace(**vars(args) | QUICK) if args.quick else args


def do(args: argparse.Namespace, store: Store) -> None:
    """Do what is not done. Raises UserError: data, a loss or a model that there is not."""
    source = Source(
        pairs=args.pairs and os.path.abspath(args.pairs), captions=args.captions, classes=args.classes,
        model_config=args.model_config and os.path.abspath(args.model_config),
        weights=args.weights and os.path.abspath(args.weights), frozen=args.frozen,
    )  # fmt: skip
    load(source)
    base = Run(
        source=source, loss=args.loss, terms=(), lr=args.lr, epochs=args.epochs, batch_size=args.batch_size, seed=0,
        split="",
    )  # fmt: skip
    table = rows(base, tuple(args.factors), args.seeds)
    finish(table, store, train, args.jobs, lambda: report(store, args.out), title)


def report(store: Store, out: str) -> list[dict]:
    """Write OUT/results.json and OUT/structures-DATA.png of all that is done, and return the records."""
    records = summarise(store)
    write_json(records, os.path.join(out, "results.json"))
    for name, own in groupby(records, key=data_name):
        draw(list(own), os.path.join(out, f"structures-{name}.png"))
    return records


def title(run: Run) -> str:
    terms = "".join(f" + {name}={weight:g}" for name, weight in run.terms)
    return f"{run.loss}{terms}, {run.split}, seed {run.seed}"


if __name__ == "__main__":
    main()
