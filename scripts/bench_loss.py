"""Time and extra memory of every loss, forward and backward, against OpenCLIP's ClipLoss in the same run.

    python scripts/bench_loss.py
    python scripts/bench_loss.py --losses dcl emc2+kernel=mh --batches 8192 --widths 512 768 --json loss.json
    python scripts/bench_loss.py --losses clip --batches 32768 --alone

Each loss is measured in a process of its own, for each batch and width: first the memory of one step, what the process
(or the GPU) holds at its peak beyond the features and what the loss remembers; then time, in turns with ClipLoss.
Seconds are the CPU's (on a GPU: passed), medians of several repeats. Every sample has been seen before.

`geometric_consistency` is a term; `geometric_consistency_naive` builds its matrices of similarities, as its formula is
written. `--peers` adds losses of other packages, where they are installed.
"""

import argparse
import json
import math
import sys

from runs.loss_picture import draw
from runs.loss_steps import STOCK, VIEWS, measure
from runs.peers import PEERS

from openclip_ext.processes import worker_pool
from openclip_ext.registry import registered_names


def measured(args: argparse.Namespace, name: str, batch: int, width: int) -> dict | None:
    """What `measure` finds in a process of its own; None, and a line: a loss of another package does not run here."""
    with worker_pool(1, ["open_clip", "openclip_ext.losses"]) as pool:
        try:
            found = pool.submit(measure, name, batch, width, args.device, args.repeats, args.alone).result()
        except Exception as error:
            if name in PEERS:
                print(f"{name:<32}skipped: {error}", flush=True)
                return None
            sys.exit(f"error: {name}, batch {batch}, width {width}: {error}")
    return {"loss": name, "batch": batch, "width": width, "device": args.device, **found}


def line(row: dict, stock_bytes: float) -> str:
    ratios = [row["seconds"] / row.get("stock_seconds", math.nan), row["bytes"] / stock_bytes]
    time_ratio, memory_ratio = ("" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios)
    return (
        f"{row['loss']:<32}{row['batch']:>7}{row['width']:>7}{1e3 * row['seconds']:>10.0f} ms{time_ratio:>8}"
        f"{row['bytes'] / 1e6:>10.0f} MB{memory_ratio:>8}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", metavar="NAME[+OPTION=VALUE…]", help="default: all that are registered")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 2048, 8192], help="G")
    parser.add_argument("--widths", type=int, nargs="+", default=[512], help="D")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="0: time the one step whose memory is measured")
    parser.add_argument("--peers", action="store_true", help=f"also {', '.join(PEERS)}")
    parser.add_argument("--alone", action="store_true", help="without ClipLoss, which at 32,768 pairs takes 22 GB")
    parser.add_argument("--json", metavar="FILE", help="write all rows to this file")
    parser.add_argument("--picture", metavar="FILE", help="draw time and memory over the batch, a line per loss")
    args = parser.parse_args()
    names = args.losses or [*registered_names(), "emc2+kernel=mh", *VIEWS]
    names = ([] if args.alone else [STOCK]) + names + (list(PEERS) if args.peers else [])
    rows: list[dict] = []
    print(f"{'loss':<32}{'G':>7}{'D':>7}{'time':>13}{'ratio':>8}{'memory':>13}{'ratio':>8}")
    for width in args.widths:
        for batch in args.batches:
            found = [row for name in names if (row := measured(args, name, batch, width))]
            rows += found
            stock_bytes = math.nan if args.alone else found[0]["bytes"] or math.nan
            print("\n".join(line(row, stock_bytes) for row in found), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "rows": rows}, file, indent=1)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
