"""Time of parts of the evaluation.

    python scripts/bench_eval.py zero-shot --model ViT-B-32 --batches 4
    python scripts/bench_eval.py retrieval
    python scripts/bench_eval.py retrieval --images 1000 --captions 5 --width 512 --device cuda --json
    python scripts/bench_eval.py probe --images 128000

`zero-shot` runs our loop over pictures, against a classifier of ImageNet's size, and a bare `encode_image` loop over
the same decoded batches, turn by turn; medians of several repeats. The classifier is made before: its texts are encoded
once per set.

`retrieval` times `retrieval_metrics` on random features, next to the bare product of all images with all texts, which
every way of doing it needs. Time is the least of several repeats.

`probe` times the linear probe once, the choice of its penalty included, on random features around one centre per class,
and tells what ImageNet would take: 1,281,167 images of 1,000 classes, in proportion to images and classes.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from PIL import Image
from torch.nn.functional import normalize

from openclip_ext import upstream
from openclip_ext.data import digits
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.evaluation.loading import choose_device
from openclip_ext.evaluation.metrics.probes import linear_probe
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics
from openclip_ext.evaluation.metrics.zero_shot import zero_shot_counts

IMAGENET = 1_281_167  # pictures to train on


def least_seconds(function: Callable[[], object], repeats: int, device: str) -> float:
    def once() -> float:
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def bench_zero_shot(args: argparse.Namespace) -> dict:
    """Of a model of random weights, on handwritten digits."""
    device = choose_device(args.device)
    model, _, transform = open_clip.create_model_and_transforms(args.model, precision=args.precision, device=device)
    encoder = Encoder(
        model=model.eval(), tokenizer=open_clip.get_tokenizer(args.model), device=device,
        autocast=upstream.autocast(args.precision, device), dtype=upstream.input_dtype(args.precision),
    )  # fmt: skip
    rows = digits.digit_splits()["train"][: args.batches * args.batch_size]
    images = torch.stack([transform(Image.open(io.BytesIO(image))) for image, _, _ in rows]).split(args.batch_size)
    batches = [(batch, torch.arange(len(batch))) for batch in images]
    like = encoder.encode_images(images[0][:1])
    classifier = normalize(torch.randn(like.shape[1], 1000).to(like), dim=0)

    def ours():
        zero_shot_counts(encoder, classifier, batches, progress=False)

    @torch.no_grad()
    def bare():
        for batch, _ in batches:
            with encoder.autocast():
                model.encode_image(batch.to(device, encoder.dtype))

    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for repeat in range(-1, args.repeats):  # the first time warms up
        for name, function in (("bare", bare), ("ours", ours)) if repeat % 2 else (("ours", ours), ("bare", bare)):
            once = least_seconds(function, 1, str(device))
            seconds[name] += [once] if repeat >= 0 else []
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": args.model, "device": str(device), "pictures": len(rows),
        "pictures_per_second": len(rows) / median["ours"], "ours_over_bare": median["bare"] / median["ours"],
    }  # fmt: skip


def bench_retrieval(args: argparse.Namespace) -> dict:
    """Images with `captions` texts each, which lie near them."""
    torch.manual_seed(0)
    image = normalize(torch.randn(args.images, args.width, device=args.device), dim=1)
    image_of_text = torch.arange(args.images, device=args.device).repeat_interleave(args.captions)
    noise = torch.randn(len(image_of_text), args.width, device=args.device)
    text = normalize(image[image_of_text] + args.noise * normalize(noise, dim=1), dim=1)
    few = min(64, args.images)
    retrieval_metrics(image[:few], text[:few])  # libraries allocate on first use
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


def bench_probe(args: argparse.Namespace) -> dict:
    """Classes that are hard to tell apart, so that a weak penalty is no better."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(args.classes, args.width, generator=generator)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(args.classes, (count,), generator=generator)
        noise = torch.randn(count, args.width, generator=generator)
        return (centres[labels] + args.noise * noise).to(args.device), labels.to(args.device)

    train, test = draw(args.images), draw(args.images // 10)
    started = time.perf_counter()
    found, strength = linear_probe(*train, test[0], progress=True)
    accuracy = (found == test[1]).double().mean().item()
    seconds = time.perf_counter() - started
    share = args.images / IMAGENET * args.classes / 1000
    return {
        "images": args.images, "classes": args.classes, "width": args.width, "device": args.device, "C": strength,
        "accuracy": accuracy, "seconds": seconds, "imagenet_minutes": seconds / share / 60,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(metavar="PART", required=True)
    zero_shot = parts.add_parser("zero-shot", help="throughput of zero-shot classification")
    zero_shot.add_argument("--model", default="ViT-B-32")
    zero_shot.add_argument("--precision", default="fp32")
    zero_shot.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    zero_shot.add_argument("--batch-size", type=int, default=64)
    zero_shot.add_argument("--batches", type=int, default=8)
    zero_shot.add_argument("--repeats", type=int, default=5)
    zero_shot.add_argument("--json", action="store_true")
    zero_shot.set_defaults(bench=bench_zero_shot)
    retrieval = parts.add_parser("retrieval", help="recall both ways")
    retrieval.add_argument("--images", type=int, default=5000)
    retrieval.add_argument("--captions", type=int, default=5)
    retrieval.add_argument("--width", type=int, default=512)
    retrieval.add_argument("--noise", type=float, default=8.0, help="how far texts are from their image")
    retrieval.add_argument("--device", default="cpu")
    retrieval.add_argument("--repeats", type=int, default=3)
    retrieval.add_argument("--json", action="store_true")
    retrieval.set_defaults(bench=bench_retrieval)
    probe = parts.add_parser("probe", help="logistic regression with a choice of its penalty")
    probe.add_argument("--images", type=int, default=12_800)
    probe.add_argument("--classes", type=int, default=1000)
    probe.add_argument("--width", type=int, default=768)
    probe.add_argument("--noise", type=float, default=5.0, help="how far images are from the centre of their class")
    probe.add_argument("--device", default="cpu")
    probe.add_argument("--json", action="store_true")
    probe.set_defaults(bench=bench_probe)
    args = parser.parse_args()
    row = args.bench(args)
    print(json.dumps(row) if args.json else "\n".join(f"{name:22} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
