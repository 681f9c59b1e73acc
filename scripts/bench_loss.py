"""Time and peak memory of the geometric consistency term, forward and backward, against its form over pairs.

    python scripts/bench_loss.py
    python scripts/bench_loss.py --batches 512 4096 --width 512 --device cuda --json

The naive form builds the matrices of similarities, as the formula is written. Each measurement runs in a process of its
own; its peak is what the process (or the GPU) holds beyond the features. Time is the median of several repeats.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from openclip_ext import create_loss


def naive(image: Tensor, text: Tensor, image_aug: Tensor, text_aug: Tensor) -> Tensor:
    cross, images, texts = image @ text.T, image @ image.T, text @ text.T
    total = (cross - cross.T).square().sum() + (images - texts).square().sum()
    total = total + (images - image_aug @ image_aug.T).square().sum() + (texts - text_aug @ text_aug.T).square().sum()
    gaps = (image * text).sum(1) - (image_aug * text_aug).sum(1)
    return total / len(image) + gaps.square().mean()


def ours():
    objective = create_loss("clip", num_samples=2, terms={"geometric_consistency": {}})
    term = objective.terms["geometric_consistency"]

    def value(image, text, image_aug, text_aug):
        views = {"image_features_aug": image_aug, "text_features_aug": text_aug}
        return term(image, text, torch.tensor(1.0), **views, output_dict=False)

    return value


def measure(form: str, batch: int, width: int, device: str, repeats: int) -> dict:
    """Median seconds, peak bytes beyond the features, and the value, in this process."""
    function = naive if form == "naive" else ours()
    torch.manual_seed(0)
    leaves = [normalize(torch.randn(batch, width, device=device), dim=-1).requires_grad_() for _ in range(4)]
    cuda = device.startswith("cuda")

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    small = [leaf[:32].detach().requires_grad_() for leaf in leaves]
    function(*small).backward()  # libraries allocate on first use
    before, seconds = peak(), []
    for _ in range(repeats):
        start = time.perf_counter()
        value = function(*leaves)
        value.backward()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        for leaf in leaves:
            leaf.grad = None
    return {"seconds": statistics.median(seconds), "bytes": peak() - before, "value": value.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--form", choices=["ours", "naive"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args.form, args.batches[0], args.width, args.device, args.repeats)))
        return
    if not args.json:
        print(f"{'G':>7}{'ours':>12}{'naive':>12}{'time':>9}{'ours':>12}{'naive':>12}{'memory':>9}")
    for batch in args.batches:
        row = {"batch": batch, "width": args.width, "device": args.device}
        for form in ("ours", "naive"):
            command = [sys.executable, __file__, "--form", form, "--batches", batch, "--width", args.width]
            command += ["--device", args.device, "--repeats", args.repeats]
            output = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
            row[form] = json.loads(output)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        columns = [f"{batch:>7}"]
        for key, factor, unit in (("seconds", 1e3, "ms"), ("bytes", 1e-6, "MB")):
            mine, other = row["ours"][key], row["naive"][key]
            columns.append(
                f"{factor * mine:>9.0f} {unit}{factor * other:>9.0f} {unit}{mine / other if other else math.nan:>9.3f}"
            )
        print("".join(columns), flush=True)


if __name__ == "__main__":
    main()
