"""Samples per second of our pipeline, with sample ids and fault counting, against bare webdataset over the same stages.

Bare is a `webdataset.DataPipeline` of shard list, tar reading, shuffle, decode, transform and batching. Both read the
same shards in this process, turn by turn; medians over repetitions.

With `--resume-at` instead how much longer than at the beginning a run waits for its first batch that goes on at these
shares of an epoch, and how many times as fast that is as making the batches before.

    python scripts/bench_data.py --shards shards/ --image-size 64
    python scripts/bench_data.py --shards shards/ --resume-at 0.5 0.9
"""

import argparse
import random
import statistics
import sys
import time

import open_clip
import torch
import webdataset as wds

from openclip_ext.data.listing import list_shards
from openclip_ext.data.passes import SAMPLE_BUFFER
from openclip_ext.data.pipeline import train_loader
from openclip_ext.data.position import Position
from openclip_ext.data.streams import Start, StreamConfig


def bare(listing, transform, tokenizer, batch_size: int, workers: int, num_batches: int):
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(list(listing.urls)),
        wds.shuffle(100, rng=random.Random(0)),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(SAMPLE_BUFFER[0], initial=SAMPLE_BUFFER[1], rng=random.Random(0)),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform),
        wds.to_tuple("image", "text"),
        wds.batched(batch_size, partial=False, collation_fn=lambda rows: collate(rows, tokenizer)),
    ).with_epoch(num_batches // max(1, workers))
    return wds.WebLoader(pipeline, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def collate(rows, tokenizer):
    images, captions = zip(*rows, strict=True)
    return torch.stack(images), tokenizer(list(captions))


def seconds(loader) -> float:
    started = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - started


def first_batch_after(config: StreamConfig, num_samples: int, start: Start | None) -> float:
    """Seconds until a loader without workers has its first batch."""
    started = time.perf_counter()
    next(iter(train_loader(config, num_samples=num_samples, workers=0, start=start).batches))
    return time.perf_counter() - started


def measure_resuming(config: StreamConfig, num_samples: int, shares: list[float]) -> None:
    """Print a line for each share of an epoch."""
    loader = train_loader(config, num_samples=num_samples, workers=0)
    position, states, times = loader.position(0), {}, {}
    wanted = {int(share * loader.num_batches): share for share in shares}
    begins = first_batch_after(config, num_samples, None)
    started = time.perf_counter()
    for number, batch in enumerate(loader.batches, start=1):
        position.advance(0, batch)
        if number in wanted:
            states[number], times[number] = position.state_dict(), time.perf_counter() - started
    for number, state in states.items():
        seconds = first_batch_after(config, num_samples, Start(0, Position.from_state_dict(state))) - begins
        print(f"after {number * config.batch_size:,} samples, made in {times[number]:.1f} s: goes on in {seconds:.2f} s"
              f" more than at the beginning, {times[number] / max(seconds, 1e-3):.0f} times as fast")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resume-at", type=float, nargs="+", metavar="SHARE")
    args = parser.parse_args()
    listing = list_shards(args.shards)
    transform = open_clip.image_transform(args.image_size, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    assert listing.length is not None  # a folder with sizes.json
    if args.resume_at:
        config = StreamConfig(source=listing, batch_size=args.batch_size, image_transform=transform,
                              tokenizer=tokenizer, sample_id="index")  # fmt: skip
        measure_resuming(config, listing.length, args.resume_at)
        return
    for workers in args.workers:
        num_batches = listing.length // args.batch_size // max(1, workers) * max(1, workers)
        config = StreamConfig(source=listing, batch_size=args.batch_size, image_transform=transform,
                              tokenizer=tokenizer, sample_id="index")  # fmt: skip
        loaders = {
            "bare": bare(listing, transform, tokenizer, args.batch_size, workers, num_batches),
            "ours": train_loader(config, num_samples=num_batches * args.batch_size, workers=workers).batches,
        }
        measured: dict[str, list[float]] = {"bare": [], "ours": []}
        for loader in loaders.values():
            seconds(loader)  # warm up
        for repeat in range(args.repeats):
            for name in sorted(loaders, reverse=bool(repeat % 2)):
                measured[name].append(seconds(loaders[name]))
                print(f"workers {workers}, {name}: {measured[name][-1]:.2f} s", file=sys.stderr)
        ratio = statistics.median(measured["bare"]) / statistics.median(measured["ours"])
        print(f"workers {workers}: ours / bare {ratio:.3f}  (samples per second, medians of {args.repeats})")


if __name__ == "__main__":
    main()
