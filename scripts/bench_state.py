"""A loss's state spread over processes: memory of each, and the time of a step against one with all of it on each.

    python scripts/bench_state.py
    python scripts/bench_state.py --methods sogclr+rate_shard emc2+bank_shard --samples 2000000 --processes 1 2 4

Steps are forward, backward and `commit` on features, on gloo processes, spread and whole in turns; medians over steps,
of CPU seconds, which other programs disturb least, and of those that passed.
"""

import argparse
import json

import numpy as np
from runs.rank_steps import measure_steps

from openclip_ext.testing import RankPool


def measured(pool: RankPool, method: str, world_size: int, args: argparse.Namespace) -> dict:
    """The largest memory of any process, and ratios of medians over processes."""
    both = [f"{method}={shard}" for shard in ("true", "false")]
    of_ranks = pool.run(measure_steps, world_size, both, args.batch, args.width, args.samples, args.steps)
    spread, whole = zip(*of_ranks, strict=True)
    found = {"method": method, "processes": world_size}
    for key in ("state", "resident"):
        found |= {key: max(row[key] for row in spread), f"{key}_whole": max(row[key] for row in whole)}
    for key in ("cpu", "wall"):
        seconds, of_whole = (float(np.median([row[key] for row in rows])) for rows in (spread, whole))
        found |= {key: seconds, f"{key}_ratio": seconds / of_whole}
    return found


def line(row: dict) -> str:
    memory, whole, grew, grew_whole = (
        f"{row[key] / 1e6:,.1f}" for key in ("state", "state_whole", "resident", "resident_whole")
    )
    return (
        f"{row['method']}, {row['processes']} processes: {memory} of {whole} MB of state on each (memory grew by "
        f"{grew} of {grew_whole}); a step takes {row['cpu_ratio']:.2f} times the CPU time, {row['wall_ratio']:.2f} "
        "times the time"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sogclr+rate_shard", "emc2+bank_shard"],
                        metavar="NAME[+OPTION=VALUE…]+OPTION_shard")  # fmt: skip
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=256, help="pairs of each process")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = []
    with RankPool() as pool:
        for method in args.methods:
            for world_size in args.processes:
                row = measured(pool, method, world_size, args)
                rows.append(row)
                print(line(row), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
