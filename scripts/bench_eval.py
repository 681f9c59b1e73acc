"""Time of parts of the evaluation.

    python scripts/bench_eval.py retrieval
    python scripts/bench_eval.py retrieval --images 1000 --captions 5 --width 512 --device cuda --json

`retrieval` times `retrieval_metrics` on random features, next to the bare product of all images with all texts, which
every way of doing it needs. Time is the least of several repeats.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch.nn.functional import normalize

from openclip_ext.evaluation.retrieval import retrieval_metrics


def least_seconds(function: Callable[[], object], repeats: int, device: str) -> float:
    def once() -> float:
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def bench_retrieval(args: argparse.Namespace) -> dict:
    """Images with `captions` texts each, which lie near them."""
    torch.manual_seed(0)
    image = normalize(torch.randn(args.images, args.width, device=args.device), dim=1)
    image_of_text = torch.arange(args.images, device=args.device).repeat_interleave(args.captions)
    noise = torch.randn(len(image_of_text), args.width, device=args.device)
    text = normalize(image[image_of_text] + args.noise * normalize(noise, dim=1), dim=1)
    retrieval_metrics(image[:64], text[:64])  # libraries allocate on first use
    metrics = retrieval_metrics(image, text, image_of_text)
    seconds = least_seconds(lambda: retrieval_metrics(image, text, image_of_text), args.repeats, args.device)

    def product():
        for rows in image.split(1024):
            rows @ text.T

    return {
        "images": len(image), "texts": len(text), "width": args.width, "device": args.device,
        "seconds": seconds, "product_seconds": least_seconds(product, args.repeats, args.device),
        **{name: value for name, value in metrics.items() if name.endswith("R@1")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(metavar="PART", required=True)
    retrieval = parts.add_parser("retrieval", help="recall both ways")
    retrieval.add_argument("--images", type=int, default=5000)
    retrieval.add_argument("--captions", type=int, default=5)
    retrieval.add_argument("--width", type=int, default=512)
    retrieval.add_argument("--noise", type=float, default=8.0, help="how far texts are from their image")
    retrieval.add_argument("--device", default="cpu")
    retrieval.add_argument("--repeats", type=int, default=3)
    retrieval.add_argument("--json", action="store_true")
    retrieval.set_defaults(bench=bench_retrieval)
    args = parser.parse_args()
    row = args.bench(args)
    print(json.dumps(row) if args.json else "\n".join(f"{name:22} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
