"""What losses cost on up to thousands of ranks: memory, bytes per step, and shares of its time.

    python scripts/simulate_scale.py                                   # by the constants in scripts/scale/measured.json
    python scripts/simulate_scale.py --measure                         # measure those anew, and check them
    python scripts/simulate_scale.py --table scripts/README.md --picture scripts/scale/scale.png
    python scripts/simulate_scale.py --link 25e9 --latency 10e-6 --flops 5e13 --encoders 0.3 --batch 1024

`--measure` runs two gloo processes with three batch sizes, whose CPU seconds give three constants for each loss: of a
step, of an own row, and of a pair. With those, and with what a collective call takes, and a byte that it moves, it
predicts runs with 2, 4 and 8 processes that it then measures too. Bytes and calls follow from formulas
(`runs/scale.py`), which are compared with those that are counted.

A plan takes the flops, links and encoders that flags give. How much work a loss is, beside the four products that
every loss over pairs takes, is by the constants measured here. With `--loss-comm ring` columns go round instead of
being gathered: twice their bytes, as far as tiles are not worked on meanwhile.
"""

import argparse
import dataclasses
import json
import os
import sys

import numpy as np
from matplotlib.figure import Figure
from runs.marks import put_between_marks
from runs.rank_steps import gather_seconds, measure_steps
from runs.scale import FLOAT, Cluster, Constants, Step, moved
from scipy.optimize import nnls
from tabulate import tabulate

from openclip_ext.errors import UserError
from openclip_ext.files import atomic, write_json
from openclip_ext.report.palette import row_style
from openclip_ext.testing import RankPool

METHODS = ("clip", "dcl", "batch_corrected", "siglip", "sogclr", "sogclr+rate_shard=true",
           "gamma_decomp", "gamma_decomp+rate_shard=true", "emc2", "emc2+bank_shard=true")  # fmt: skip
WORLD_SIZES = (8, 64, 512, 4096)
SAMPLES = (10**6, 10**7, 4 * 10**8, 5 * 10**9)
MARKS = "<!-- scale -->", "<!-- /scale -->"
LARGE = 2**18  # numbers that are gathered to learn what a byte takes
FREE = 0.05  # of a step's time
CONSTANTS = os.path.join(os.path.dirname(__file__), "scale", "measured.json")


def measure(args: argparse.Namespace) -> dict:
    """Constants of each loss, and predictions beside what was measured then."""
    with RankPool() as pool:

        def run(world_size: int, batch: int) -> list[dict]:
            of_ranks = pool.run(
                measure_steps, world_size, list(METHODS), batch, args.measured_width, args.measured_samples, args.steps
            )
            return [{key: float(np.median([row[key] for row in rows])) for key in rows[0]}
                    for rows in zip(*of_ranks, strict=True)]  # fmt: skip

        call = {size: float(np.median(pool.run(gather_seconds, size, 1, 200))) for size in args.check_processes}
        byte = (float(np.median(pool.run(gather_seconds, 2, LARGE, 50))) - call[2]) / (LARGE * FLOAT)
        known = {batch: run(2, batch) for batch in args.fit_batches}
        constants = {
            method: fit(
                {Step(method, batch, args.measured_width, 2): rows[index]["cpu"] for batch, rows in known.items()},
                call[2],
                byte,
            )
            for index, method in enumerate(METHODS)
        }
        checks = []
        for world_size in args.check_processes:
            for method, found in zip(METHODS, run(world_size, args.check_batch), strict=True):
                step = Step(method, args.check_batch, args.measured_width, world_size, args.measured_samples)
                predicted = constants[method].seconds(step, call[world_size], byte)
                checks.append(
                    {
                        "method": method,
                        "processes": world_size,
                        "predicted": predicted,
                        "seconds": found["cpu"],
                        "bytes": [step.bytes, found["bytes"]],
                        "calls": [step.calls, found["calls"]],
                        "state": [step.state_bytes, found["state"]],
                    }
                )
    return {"constants": {method: dataclasses.asdict(value) for method, value in constants.items()}, "checks": checks}


def fit(seconds: dict[Step, float], call: float, byte: float) -> Constants:
    """From CPU seconds of steps with several batch sizes; relative errors count."""
    taken = np.array(list(seconds.values()))
    terms = np.array([[1.0, step.batch, step.batch * step.rows] for step in seconds])
    rest = np.array([max(own - moved(step, call, byte), 0.0) for step, own in seconds.items()])
    found, _ = nnls(terms / taken[:, None], rest / taken)
    return Constants(*found)


def cost(cluster: Cluster, step: Step, relative: float) -> dict[str, float]:
    """Seconds of the parts of a step."""
    return {
        "gather": cluster.gather(step),
        "exchange": cluster.exchange(step),
        "loss": cluster.loss(step, relative),
        "ring": cluster.ring(step, relative),
    }


def relative_work(measured: dict) -> dict[str, float]:
    """Seconds of a pair, in those of `clip`, whose work is four products."""
    pairs = {method: measured["constants"][method]["pair"] for method in METHODS}
    return {method: pairs[method] / pairs["clip"] if pairs["clip"] else 1.0 for method in METHODS}


def shares(args: argparse.Namespace, cluster: Cluster, method: str, world_size: int, work: float) -> dict[str, float]:
    """Of a step's time, with features gathered; `ring`: of a step in which they go round."""
    parts = cost(cluster, Step(method, args.batch, args.width, world_size), work)
    ring = parts.pop("ring")
    whole = cluster.encoders + sum(parts.values())
    around = cluster.encoders + parts["loss"] + parts["exchange"] + ring
    return {name: seconds / whole for name, seconds in parts.items()} | {
        "all": 1 - cluster.encoders / whole,
        "ring": 1 - cluster.encoders / around,
    }


def free_until(args: argparse.Namespace, cluster: Cluster, method: str, work: float) -> str:
    """The last power of two of ranks up to which a loss takes less than `FREE` of a step."""
    sizes = [2**power for power in range(1, 15)]
    free = [size for size in sizes if shares(args, cluster, method, size, work)["all"] < FREE]
    return f"{free[-1]:,}" + (" or more" if free[-1] == sizes[-1] else "") if free else "none"


def tables(args: argparse.Namespace, cluster: Cluster, measured: dict) -> str:
    work = relative_work(measured)
    errors = [check["predicted"] / check["seconds"] - 1 for check in measured["checks"]]
    inside = sum(abs(error) <= 0.25 for error in errors)
    checked = [
        [f"`{method}`", *(f"{1e3 * check['predicted']:.0f} / {1e3 * check['seconds']:.0f}"
                          for check in measured["checks"] if check["method"] == method)]
        for method in METHODS
    ]  # fmt: skip
    counts = list(dict.fromkeys(check["processes"] for check in measured["checks"]))
    plan = []
    for method in METHODS:
        row = [f"`{method}`"]
        for size in WORLD_SIZES:
            step, share = Step(method, args.batch, args.width, size), shares(args, cluster, method, size, work[method])
            row.append(f"{step.bytes / 1e6:,.0f} MB; {100 * share['gather']:.1f} + {100 * share['exchange']:.1f} + "
                       f"{100 * share['loss']:.1f} %, {100 * share['ring']:.1f} %")  # fmt: skip
        plan.append([*row, free_until(args, cluster, method, work[method])])
    memory = []
    for method in (name for name in METHODS if "shard=true" in name and not name.startswith("sogclr")):
        for samples in SAMPLES:
            steps = [Step(method, args.batch, args.width, size, samples) for size in WORLD_SIZES]
            whole = f"{steps[0].bytes_per_sample * samples / 1e9:,.3g}"
            memory.append([f"`{method}`", f"{samples:,}", whole, *(f"{step.state_bytes / 1e9:,.3g}" for step in steps)])
    ranks = [f"W = {size:,}" for size in WORLD_SIZES]
    texts = [
        f"Predicted / measured CPU milliseconds of a rank's step, {args.check_batch} pairs on each, width "
        f"{args.measured_width}; {inside} of {len(errors)} within 25 %, the farthest "
        f"{100 * max(errors, key=abs):+.0f} %:",
        table(["loss", *(f"{size} processes" for size in counts)], checked),
        f"Planned: {args.batch} pairs on each rank, width {args.width}, encoders {1e3 * args.encoders:.0f} ms, "
        f"{args.flops:.3g} flops, {args.link / 1e9:.3g} GB/s and {1e6 * args.latency:.3g} µs. Bytes that a rank "
        "receives; shares of the step of gather + exchange of state + loss; of all, where columns go round; and the "
        f"number of ranks up to which they are less than {100 * FREE:.0f} %:",
        table(["loss", *ranks, "free up to"], plan),
        "GB of state on each rank, whole and in parts (`sogclr`: as `gamma_decomp`):",
        table(["loss", "N", "whole", *ranks], memory),
    ]
    return "\n\n".join(texts)


def table(header: list[str], rows: list[list[str]]) -> str:
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def draw(args: argparse.Namespace, cluster: Cluster, measured: dict, path: str) -> None:
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes, work = [2**power for power in range(1, 13)], relative_work(measured)
    for index, method in enumerate(METHODS):
        found = [100 * shares(args, cluster, method, size, work[method])["all"] for size in sizes]
        left.plot(sizes, found, label=method, **row_style(index))
    left.axhline(100 * FREE, color="black", linewidth=0.8)
    left.set(
        title="share of a step: gather, exchange of state, loss", xlabel="ranks", ylabel="%", xscale="log", yscale="log"
    )
    for check in measured["checks"]:
        style = row_style(METHODS.index(check["method"]))
        right.plot(1e3 * check["seconds"], 1e3 * check["predicted"], marker="o", color=style["color"])
    ends = [1e3 * pick(check["seconds"] for check in measured["checks"]) for pick in (min, max)]
    for factor in (0.75, 1.0, 1.25):
        right.plot(ends, [factor * end for end in ends], color="black", linewidth=0.8)
    right.set(title="2, 4 and 8 gloo processes, ± 25 %", xlabel="measured, CPU ms of a step", ylabel="predicted",
              xscale="log", yscale="log")  # fmt: skip
    left.legend(fontsize="small", frameon=False)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="pairs of each rank")
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--encoders", type=float, default=0.25, help="seconds of a step without its loss")
    parser.add_argument("--flops", type=float, default=4e13, help="per second, of products in float32")
    parser.add_argument("--link", type=float, default=25e9, help="bytes per second into each rank")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds of a call, for each doubling of ranks")
    parser.add_argument("--constants", default=CONSTANTS, help="read, or with --measure written")
    parser.add_argument("--measure", action="store_true", help="measure and check the constants on this machine")
    parser.add_argument("--fit-batches", type=int, nargs="+", default=[32, 128, 384], help="on each of two processes")
    parser.add_argument("--check-batch", type=int, default=128)
    parser.add_argument("--check-processes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--measured-width", type=int, default=256)
    parser.add_argument("--measured-samples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=15, help="that are timed")
    parser.add_argument("--table", metavar="FILE", help=f"put tables between {MARKS[0]} and {MARKS[1]}")
    parser.add_argument("--picture", metavar="FILE")
    args = parser.parse_args()
    cluster = Cluster(args.flops, args.link, args.latency, args.encoders)
    if args.measure:
        measured = measure(args)
        write_json(measured, args.constants)
    else:
        with open(args.constants) as file:
            measured = json.load(file)
    try:
        if args.table:
            put_between_marks(tables(args, cluster, measured), args.table, MARKS)
        else:
            print(tables(args, cluster, measured))
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.picture:
        draw(args, cluster, measured, args.picture)


if __name__ == "__main__":
    main()
