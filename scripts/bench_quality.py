"""Which loss learns best at which batch size: scores, intervals, seconds, and a picture per task.

    python scripts/bench_quality.py --quick
    python scripts/bench_quality.py --task stream --out runs/quality --jobs 2
    python scripts/bench_quality.py --task flickr --flickr train.npz test.npz --methods clip dcl dcl+recent=16
    python scripts/bench_quality.py --task photos --photos pairs.csv start.pt model.json --batch-sizes 64
    python scripts/bench_quality.py --task stream --out runs/quality --time
    python scripts/bench_quality.py --out runs/quality --publish

Small towers are trained on a simulated stream of pairs (`stream`, and `stream2` with other constants), or on features
of photographs and their captions (`flickr`). More tasks go through `openclip-ext train`: a small CLIP from scratch on
handwritten digits (`digits`), the same fine-tuned to how they are written when it knows which they are, all of it
(`digits_tuned`; take `--rates 1e-5`) or a low-rank change (`digits_lora`), and a checkpoint that is fine-tuned on
pictures (`photos`).

The learning rate is chosen per method, batch size and logit scale, on a validation split, by climbing one grid from its
middle; at the best one, every seed is trained and scored on the test split. All methods of a seed see the same pairs in
the same order from the same initial parameters.

A method is `NAME[+OPTION=VALUE…]`: `dcl+recent=16` has pairs of sixteen recent steps, `clip+accumulate=1024` makes one
step of 1,024 pairs out of batches that are encoded twice, `gamma_decomp+gamma=0.5` sets an option of the loss.

Every run that is done is a line of OUT/runs.jsonl, and is not done again: started anew after a break, or with other
flags, only what is missing is done. A change of the code is not noticed; take another folder then.
"""

import argparse
import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence

from quality.loop import Run, score
from quality.methods import Method
from quality.published import MARKS, publish
from quality.store import Row, open_store
from quality.summary import draw, markdown, summarise
from quality.tasks import FLICKR_VALIDATION, Setting
from quality.trained import PRETRAINED, TRAINED, pretrain_on_digits, splits_of
from quality.turns import time_rows
from runs.pool import finish
from runs.script import add_arguments, carry_out
from runs.store import Store

from openclip_ext.errors import UserError
from openclip_ext.files import write_json

TASKS = {
    "stream": Setting(pairs=50_000, epochs=6, scale=30.0, decay=0.01),
    "stream2": Setting(pairs=20_000, epochs=10, scale=20.0, decay=0.01, centres=1),
    "flickr": Setting(pairs=6_000 - FLICKR_VALIDATION, epochs=15, scale=50.0, decay=0.1),
    "digits": Setting(pairs=0, epochs=8, scale=0.0, decay=0.1),
    "digits_tuned": Setting(pairs=0, epochs=16, scale=0.0, decay=0.1),
    "digits_lora": Setting(pairs=0, epochs=16, scale=0.0, decay=0.1),
    "photos": Setting(pairs=0, epochs=3, scale=0.0, decay=0.1),
}
METHODS = (
    *("clip", "dcl", "batch_corrected", "sogclr", "gamma_decomp", "emc2", "siglip"),
    *(f"{name}+recent=16" for name in ("clip", "dcl", "batch_corrected", "sogclr")),
    "gamma_decomp+recent=0",
    *("clip+accumulate=1024", "dcl+accumulate=1024"),
)
BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
QUICK = {
    "task": ["quick"],
    "methods": ["clip", "dcl", "batch_corrected", "dcl+recent=16", "batch_corrected+recent=16"],
    "batch_sizes": [64],
    "scales": ["fixed"],
    "rates": [2e-3, 4e-3],
    "seeds": 2,
}
QUICK_SETTING = Setting(pairs=20_000, epochs=4, scale=30.0, decay=0.01)


def main() -> None:
    args = parse()
    runs = os.path.join(args.out, "runs.jsonl")
    if args.publish:
        return publish(runs)
    store = open_store(runs)
    work = time_tasks if args.time else train
    carry_out(args, lambda: work(args, store), lambda: markdown(report(store, args.out)), MARKS)


def train(args: argparse.Namespace, store: Store) -> None:
    for task in args.task:
        work = functools.partial(score, files=files_of(task, args))
        finish(plan(task, args), store, work, args.jobs, lambda: report(store, args.out), title)


def time_tasks(args: argparse.Namespace, store: Store) -> None:
    for task in args.task:
        if task in TRAINED:
            raise UserError(f"--time --task {task}: steps of openclip-ext train cannot be taken in turns")
        time_rows(task, store, files_of(task, args))


def files_of(task: str, args: argparse.Namespace) -> Sequence[str]:
    """What a task is read from; the checkpoint that some are fine-tuned from is made where it is not there yet."""
    if task not in PRETRAINED:
        return getattr(args, task, ())
    checkpoint = os.path.join(args.out, "pretrained.pt")
    if not os.path.exists(checkpoint):
        pretrain_on_digits(checkpoint)
    return [checkpoint]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["stream", "stream2"])
    parser.add_argument(
        "--flickr", nargs=2, default=(), metavar=("TRAIN", "TEST"), help=".npz files with `x` and `tokens`"
    )
    parser.add_argument(
        "--photos", nargs=3, default=(), metavar=("PAIRS", "CHECKPOINT", "CONFIG"),
        help="a CSV with the columns filepath and title or a folder of pictures, and a model to start from",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME[+OPTION=VALUE…]")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--scales", nargs="+", choices=["fixed", "learned"], default=["fixed", "learned"])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates to choose from")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--time", action="store_true",
        help="score nothing: train each row that is scored once more, all in turns, so that their seconds compare",
    )  # fmt: skip
    parser.add_argument(
        "--publish", action="store_true",
        help="train nothing: keep the runs of --out in quality/runs.jsonl, and make the READMEs and pictures of those",
    )  # fmt: skip
    add_arguments(parser, "runs/quality", MARKS, quick="a small stream in five minutes; most flags do not count")
    args = parser.parse_args()
    for task in ("flickr", "photos"):
        if task in args.task and not (getattr(args, task) or args.table or args.publish):
            parser.error(f"--task {task}: name what it is read from, --{task} …")
    return argparse.Namespace(**vars(args) | QUICK) if args.quick else args


def plan(task: str, args: argparse.Namespace) -> list[Row]:
    """Rows of a task, batch size by batch size. Raises UserError: a method that there is not, or not for this task."""
    methods = [Method(text) for text in args.methods]
    for method in methods:
        if method.terms and task not in TRAINED:
            raise UserError(f"--methods {method.text}: terms go with --task {', '.join(TRAINED)}, not with {task}")
    setting, scales = QUICK_SETTING if task == "quick" else TASKS[task], args.scales
    if task in TRAINED:
        scales = ["learned"]  # as OpenCLIP does
        setting = dataclasses.replace(setting, pairs=len(splits_of(task, getattr(args, task, ()))["train"]))
    rows = []
    for scale, size, method in itertools.product(scales, args.batch_sizes, methods):
        if "accumulate" in method.options and size >= method.pairs_per_step(size):
            continue
        base = Run(
            task=task, setting=setting, method=method.text, batch_size=size, scale=scale, lr=0.0, seed=0, split="",
        )  # fmt: skip
        rows.append(Row(base=base, rates=tuple(sorted(args.rates)), seeds=args.seeds))
    return rows


def report(store: Store, out: str) -> list[dict]:
    """Write OUT/results.json and OUT/TASK.png of all that is done, and return the records."""
    records = summarise(store)
    write_json(records, os.path.join(out, "results.json"))
    for task, of_task in itertools.groupby(records, key=lambda record: record["task"]):
        draw(list(of_task), os.path.join(out, f"{task}.png"))
    return records


def title(run: Run) -> str:
    return f"{run.method} at {run.batch_size}, {run.scale} scale"


if __name__ == "__main__":
    main()
