"""Pictures per second of our evaluation against a bare `encode_image` loop over the same decoded batches.

Both run the same model over the same batches in memory, turn by turn; medians over repetitions. The classifier is made
before: its texts are encoded once per set, whatever the number of pictures.

    python scripts/bench_eval.py --model ViT-B-32 --batches 8
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable

import open_clip
import torch
from PIL import Image

from openclip_ext import _host
from openclip_ext.data import digits
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.evaluation.loading import choose_device
from openclip_ext.evaluation.zero_shot import zero_shot_counts, zero_shot_scores


def make_encoder(args: argparse.Namespace) -> Encoder:
    device = choose_device(args.device)
    model, _, transform = open_clip.create_model_and_transforms(args.model, precision=args.precision, device=device)
    return Encoder(
        model=model.eval(), tokenizer=open_clip.get_tokenizer(args.model), transform=transform, device=device,
        autocast=_host.autocast(args.precision, device), dtype=_host.input_dtype(args.precision),
    )  # fmt: skip


def decoded_batches(encoder: Encoder, count: int, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Real pictures, the digits again and again, as the model takes them."""
    rows = digits.digit_splits()["test"]
    pictures = [encoder.transform(Image.open(io.BytesIO(image))) for image, _, _ in rows[:batch_size]]
    batch = torch.stack([pictures[number % len(pictures)] for number in range(batch_size)])
    labels = torch.arange(batch_size) % 1000
    return [(batch.clone(), labels) for _ in range(count)]


def zero_shot(encoder: Encoder, batches: list) -> Callable[[], object]:
    """Against a classifier of ImageNet's size."""
    (width,) = encoder.encode_images(batches[0][0][:1])[0].shape
    classifier = torch.nn.functional.normalize(torch.randn(width, 1000, device=encoder.device), dim=0)
    classifier = classifier.to(encoder.encode_images(batches[0][0][:1]).dtype)
    return lambda: zero_shot_scores(zero_shot_counts(encoder, classifier, batches, progress=False))


def bare(encoder: Encoder, batches: list) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> torch.Tensor:
        for images, _ in batches:
            with encoder.autocast():
                features = encoder.model.encode_image(images.to(encoder.device, encoder.dtype))
        return features.sum().item()  # waits for a GPU

    return run


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(ours: Callable, other: Callable, repeats: int, name: str) -> tuple[float, float]:
    """Median seconds of both, run turn by turn after a first time."""
    functions = {"bare": other, "ours": ours}
    measured: dict[str, list[float]] = {"bare": [], "ours": []}
    for function in functions.values():
        function()
    for repeat in range(repeats):
        for kind in sorted(functions, reverse=bool(repeat % 2)):
            measured[kind].append(seconds(functions[kind]))
            print(f"{name}, {kind}: {measured[kind][-1]:.2f} s", file=sys.stderr)
    return statistics.median(measured["ours"]), statistics.median(measured["bare"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    encoder = make_encoder(args)
    batches = decoded_batches(encoder, args.batches, args.batch_size)
    ours, other = compare(zero_shot(encoder, batches), bare(encoder, batches), args.repeats, "zero-shot")
    pictures = args.batches * args.batch_size
    print(
        f"zero-shot, {args.model} on {encoder.device}: {pictures / ours:.0f} pictures per second, bare "
        f"{pictures / other:.0f}: ours / bare {other / ours:.3f}"
    )


if __name__ == "__main__":
    main()
