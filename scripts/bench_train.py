"""Samples per second of this package's training loop against stock OpenCLIP's, in one run, on the same shards.

Stock is `open_clip_train.main`, ours `openclip-ext train`; both in this process, turn by turn, several times, on a
model of some 10 M parameters. The first epoch of each run warms up, the others count; medians over repetitions. Then
the parts that a step of ours is made of, by PyTorch's profiler, in a run of its own.

    python scripts/bench_train.py --shards shards/ --workers 0 2
"""

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip_train import main as stock

from openclip_ext.data.listing import list_shards
from openclip_ext.training import profile, run
from openclip_ext.training.flags import parse_args

MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "head_width": 48, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}


def flags(args, folder: str, name: str, workers: int) -> list[str]:
    urls = list_shards(args.shards).urls
    # Stock expands braces only.
    data = "{" + ",".join(urls) + "}" if len(urls) > 1 else urls[0]
    return [str(part) for part in (
        "--model", "bench", "--train-data", data, "--dataset-type", "webdataset", "--batch-size", args.batch_size,
        "--epochs", args.epochs, "--workers", workers, "--device", args.device, "--precision", args.precision,
        "--save-frequency", 0, "--warmup", 10, "--logs", folder, "--name", name,
    )]  # fmt: skip


def calls(module, name: str, action) -> list[tuple[float, Any]]:
    """Seconds of each call of `module.name` while `action` runs, and what it returns."""
    original, found = getattr(module, name), []

    def timed(*args, **kwargs):
        started = time.perf_counter()
        result = original(*args, **kwargs)
        found.append((time.perf_counter() - started, result))
        return result

    setattr(module, name, timed)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            action()
    finally:
        setattr(module, name, original)
    return found


def ours(args, folder: str, workers: int, loss: str) -> list[float]:
    command = flags(args, folder, f"ours-{loss}", workers) + ["--loss", loss]
    return [seconds for seconds, _ in calls(run._Run, "_steps", lambda: run.train(parse_args(command)))]


def parts(args, folder: str, workers: int, loss: str) -> dict[str, float]:
    """The share of a step that each of its parts takes; empty: the run is too short to profile as many steps."""
    command = flags(args, folder, f"parts-{loss}", workers) + ["--loss", loss, "--profile", str(args.profile)]
    found = calls(profile, "step_shares", lambda: run.train(parse_args(command)))
    return found[0][1][1] if found else {}


def theirs(args, folder: str, workers: int) -> list[float]:
    handlers = list(logging.root.handlers)
    try:
        found = calls(stock, "train_one_epoch", lambda: stock.main(flags(args, folder, "stock", workers)))
        return [seconds for seconds, _ in found]
    finally:
        for handler in set(logging.root.handlers) - set(handlers):
            logging.root.removeHandler(handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="a folder with shards and sizes.json")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3, help="the first one is not counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", type=int, default=10, metavar="STEPS", help="whose parts are looked at; 0: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = os.path.join(folder, "bench.json")
        with open(config, "w") as file:
            json.dump(MODEL, file)
        open_clip.add_model_config(config)
        for workers in args.workers:
            measured: dict[str, list[float]] = {"stock clip": [], "ours clip": [], "ours gamma_decomp": []}
            for repeat in range(args.repeats):
                place = os.path.join(folder, f"{workers}-{repeat}")
                jobs = [
                    ("stock clip", partial(theirs, args, place, workers)),
                    ("ours clip", partial(ours, args, place, workers, "clip")),
                    ("ours gamma_decomp", partial(ours, args, place, workers, "gamma_decomp")),
                ]
                for name, job in jobs[repeat % 3 :] + jobs[: repeat % 3]:
                    measured[name] += job()[1:]
                    print(f"workers {workers}, {name}: {measured[name][-1]:.2f} s an epoch", file=sys.stderr)
            median = {name: statistics.median(seconds) for name, seconds in measured.items()}
            rows.append(
                {
                    "workers": workers,
                    "seconds_per_epoch": median,
                    "ours_over_stock": median["stock clip"] / median["ours clip"],
                    "gamma_decomp_over_clip": median["ours clip"] / median["ours gamma_decomp"],
                    "parts": {
                        loss: parts(args, folder, workers, loss) for loss in ("clip", "gamma_decomp") if args.profile
                    },
                }
            )
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"workers {row['workers']}: ours / stock {row['ours_over_stock']:.3f}, "
              f"gamma_decomp / clip {row['gamma_decomp_over_clip']:.3f}  (samples per second, medians)")  # fmt: skip
        for loss, shares in row["parts"].items():
            text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
            print(f"workers {row['workers']}: a step with {loss}: {text or 'too few steps to profile'}")


if __name__ == "__main__":
    main()
