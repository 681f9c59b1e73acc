"""A fusion model with a base loss and the terms of Jiang et al. (CVPR 2023) on generated scenes, on four tasks.

    python scripts/reproduce_fusion.py --quick
    python scripts/reproduce_fusion.py --jobs 2
    python scripts/reproduce_fusion.py --table scripts/README.md

What `openclip-ext demo --fusion` does: with the base loss alone, with each term
(Sep: `feature_separation`, Br: `brownian_bridge`, GC: `geometric_consistency`), and with all three; weights are not
tuned. Every run that is done is a folder of OUT with its `fusion.json`, and is not done again.
"""

import argparse
import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

import torch
from runs.script import add_arguments, carry_out

from openclip_ext.commands.demo.fusion import run_fusion_demo
from openclip_ext.files import read_json
from openclip_ext.report.intervals import half_width
from openclip_ext.report.tables import markdown_table

SEP, BR, GC = "feature_separation=0.5", "brownian_bridge=0.25", "geometric_consistency=0.1"
ROWS = {"base": (), "Sep": (SEP,), "Br": (BR,), "GC": (GC,), "all": (SEP, BR, GC)}
SCORES = ("vqa", "nlvr2", "ve", "retrieval", "retrieval-reranked")
QUICK = {"seeds": 1, "epochs": 0.01, "scenes": 60, "rows": ["base", "all"]}
MARKS = ("<!-- fusion -->", "<!-- /fusion -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", default="clip", help="the base loss (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0, help="a factor on those of the demo")
    parser.add_argument("--scenes", type=int, default=3000, help="to train each stage on (default: %(default)s)")
    add_arguments(parser, "runs/fusion", MARKS, quick="two rows, one seed, few scenes, which show nothing: minutes")
    args = parser.parse_args()
    args = argparse.Namespace(**vars(args) | QUICK) if args.quick else args
    carry_out(args, lambda: do(args), lambda: table(args), MARKS)


def do(args: argparse.Namespace) -> None:
    """Do what is not done."""
    jobs = [
        (args, row, seed) for seed in range(args.seeds) for row in args.rows if not result(args, row, seed).exists()
    ]
    if args.jobs == 1:
        for job in jobs:
            run(*job)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(args.jobs, context, torch.set_num_threads, (1,)) as pool:
        for future in [pool.submit(run, *job) for job in jobs]:
            future.result()


def run(args: argparse.Namespace, row: str, seed: int) -> None:
    """One row of one seed. Without a word: several at a time would write through each other."""
    sizes = {"train": args.scenes, "val": min(300, args.scenes)}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run_fusion_demo(
            str(result(args, row, seed).parent),
            loss=args.loss,
            terms=ROWS[row],
            seed=seed,
            epochs=args.epochs,
            sizes=sizes,
            batch_size=min(50, args.scenes),
        )


def result(args: argparse.Namespace, row: str, seed: int) -> Path:
    return Path(args.out) / f"{row}-{seed}" / "fusion.json"


def table(args: argparse.Namespace) -> str:
    """Means over the seeds that are done, with 95 % intervals, in percent; in brackets differences to the first row."""
    found = {row: _found(args, row) for row in args.rows}
    first, *_ = found.values()
    lines = []
    for row, by_seed in found.items():
        line = [row, str(len(by_seed))]
        for name in SCORES:
            line.append(_shown([one["scores"][name] for one in by_seed.values()]))
            if by_seed is not first and (both := by_seed.keys() & first.keys()):
                pairs = [by_seed[seed]["scores"][name] - first[seed]["scores"][name] for seed in both]
                line[-1] += f" ({_shown(pairs, '+')})"
        lines.append(line)
    blind = [one["words_alone"] for one in first.values()]
    lines.append(["words alone", "", *(_shown([of[name] for of in blind if name in of]) for name in SCORES)])
    return markdown_table(["", "seeds", *SCORES], lines)


def _found(args: argparse.Namespace, row: str) -> dict[int, dict]:
    """By seed what the runs of a row found, as far as they are done."""
    paths = {seed: result(args, row, seed) for seed in range(args.seeds)}
    return {seed: read_json(path) for seed, path in paths.items() if path.exists()}


def _shown(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    width = half_width(values) if len(values) > 1 else None
    return f"{100 * mean(values):{sign}.1f}" + ("" if width is None else f" ± {100 * width:.1f}")


if __name__ == "__main__":
    main()
