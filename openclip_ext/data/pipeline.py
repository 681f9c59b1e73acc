"""Streams of batches from shards, whose order is a function of seed, epoch, rank and worker."""

import contextlib
import dataclasses
import hashlib
import math
import multiprocessing
import random
import zlib
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info
from webdataset.filters import _shuffle

from openclip_ext.data import tar
from openclip_ext.data.listing import ShardListing
from openclip_ext.data.table import Table
from openclip_ext.errors import UserError

# OpenCLIP's buffers: (size, filled before the first sample leaves).
SHARD_BUFFER = (2000, 500)
SAMPLE_BUFFER = (5000, 1000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What batches depend on.

    Attributes:
        source: shards, or a table of pairs.
        batch_size: per rank.
        image_transform: picture to tensor.
        tokenizer: captions to (B, L) ids.
        sample_id: None: none wanted; "index": position in the source; "hash": 63 bits of the key's hash.
        resampled: draw shards with replacement.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
    """

    source: ShardListing | Table
    batch_size: int
    image_transform: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    sample_id: str | None = None
    resampled: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1


class TrainStream(IterableDataset):
    """Batches of one epoch: dicts of `image` (B, 3, H, W), `text` (B, L), `sample_id` (B,) if asked for, and `skipped`.

    `skipped` lists (kind, shard, count) of what could not be used since the last batch. A worker whose shards hold no
    full batch yields `{"error": message}`. Batches are always full; a worker that runs out starts over in another
    order, as in OpenCLIP.
    """

    def __init__(self, config: StreamConfig, batches_per_worker: int) -> None:
        self.config = config
        self.batches_per_worker = batches_per_worker
        # Shared, since workers persist over epochs.
        self._epoch = multiprocessing.Value("i", 0)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        epoch = self._epoch.value
        batches = islice(self._passes(epoch, worker, num_workers), self.batches_per_worker)
        while True:
            # Without workers this runs in the training process, whose random state must not depend on it.
            with contextlib.nullcontext() if info else _random_state_kept():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _passes(self, epoch: int, worker: int, num_workers: int) -> Iterator[dict]:
        skips = tar.Skips()
        for number in count():
            rng = random.Random(f"{self.config.seed} {epoch} {self.config.rank} {worker} {number}")
            urls = self._urls(epoch, worker, num_workers, rng)
            samples = (sample for url in urls for sample in self._numbered(url, skips.record))
            shuffled = _shuffle(samples, *SAMPLE_BUFFER, rng)
            decoded = filter(None, (self._decode(sample, epoch, skips.record) for sample in shuffled))
            batches = 0
            while len(rows := list(islice(decoded, self.config.batch_size))) == self.config.batch_size:
                batches += 1
                yield _collated(rows, self.config) | {"skipped": skips.flush()}
            if batches == 0:
                yield {"error": self._no_batch(len(rows), num_workers, skips), "skipped": skips.flush()}
                return

    def _urls(self, epoch: int, worker: int, num_workers: int, rng: random.Random) -> Iterator[str]:
        """This worker's shards in this pass."""
        config = self.config
        if config.resampled:
            # A pass ends, so that shards without anything usable are noticed.
            yield from rng.choices(config.source.urls, config.source.weights, k=max(16, len(config.source.urls)))
            return
        # The same order on all ranks and workers, of which each takes its share.
        shuffled = _shuffle(iter(config.source.urls), *SHARD_BUFFER, random.Random(config.seed + epoch))
        own_rank = islice(shuffled, config.rank, None, config.world_size)
        yield from islice(own_rank, worker, None, num_workers)

    def _numbered(self, url: str, record: tar.Record) -> Iterator[dict]:
        """Samples of a shard with their `sample_id`."""
        if self.config.sample_id == "hash":
            for sample in tar.read_shard(url, record):
                digest = hashlib.blake2b(sample["__key__"].encode(), digest_size=8).digest()
                yield sample | {"sample_id": int.from_bytes(digest, "big") >> 1}
            return
        size = self.config.source.size_of.get(url)
        start = self.config.source.offsets[url] if size is not None else zlib.crc32(url.encode()) << 31
        ordinal = -1
        for sample in tar.read_shard(url, record):
            ordinal = sample["__ordinal__"]
            if size is not None and ordinal >= size:
                record(tar.MORE_SAMPLES, url)
            # Beyond the recorded size ids repeat within the shard: they must not run into the next one's.
            position = ordinal if size is None else ordinal % max(size, 1)
            yield sample | {"sample_id": start + position}
        if size is not None and ordinal + 1 < size:
            record(tar.FEWER_SAMPLES, url)

    def _decode(self, sample: dict, epoch: int, record: tar.Record) -> tuple | None:
        pair = tar.decode_pair(sample, record)
        if pair is None:
            return None
        # Augmentation is a function of seed, epoch and sample, on whichever worker and rank it happens.
        _seed_all(hash((self.config.seed, epoch, sample["sample_id"])))
        return self.config.image_transform(pair[0]), pair[1], sample["sample_id"]

    def _no_batch(self, usable: int, num_workers: int, skips: tar.Skips) -> str:
        faults = ", ".join(f"{kind} in {url}" for kind, url in list(skips)[:3])
        return (
            f"--batch-size {self.config.batch_size}: a data worker of rank {self.config.rank} finds only {usable} "
            f"usable samples in its share of {len(self.config.source.urls)} shards ({num_workers} workers x "
            f"{self.config.world_size} processes); use a smaller --batch-size or fewer --workers"
            + (f" (skipped: {faults})" if faults else "")
        )


class TableStream(Dataset):
    """Rows of a table as batches of the same form. A row that cannot be used is recorded and the next one taken."""

    def __init__(self, config: StreamConfig, *, training: bool) -> None:
        self.config, self.training = config, training
        self._epoch = multiprocessing.Value("i", 0)
        self._skips = tar.Skips()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def __len__(self) -> int:
        return len(self.config.source)

    def __getitem__(self, index: int) -> tuple:
        for attempt in range(len(self)):
            row = (index + attempt) % len(self)
            try:
                image, caption = self.config.source.load(row)
            except tar.IMAGE_ERRORS:
                self._skips.record(tar.CORRUPT_IMAGE, self.config.source.name)
                continue
            if not self.training:
                return self.config.image_transform(image), caption, row
            with contextlib.nullcontext() if get_worker_info() else _random_state_kept():
                _seed_all(hash((self.config.seed, self._epoch.value, row)))
                return self.config.image_transform(image), caption, row
        raise UserError(f"{self.config.source.name}: none of its images can be opened")

    def collate(self, rows: list[tuple]) -> dict:
        return _collated(rows, self.config) | {"skipped": self._skips.flush()}


class EvalStream(IterableDataset):
    """Every usable pair of a listing once: dicts of `image`, `text`, `skipped`, the last one partial.

    In order with up to one worker; several take turns.
    """

    def __init__(self, config: StreamConfig) -> None:
        self.config = config

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        urls = self.config.source.urls[info.id :: info.num_workers] if info else self.config.source.urls
        skips = tar.Skips()
        samples = (sample for url in urls for sample in tar.read_shard(url, skips.record))
        pairs = filter(None, (tar.decode_pair(sample, skips.record) for sample in samples))
        while batch := list(islice(pairs, self.config.batch_size)):
            rows = [(self.config.image_transform(image), caption, 0) for image, caption in batch]
            yield _collated(rows, self.config) | {"skipped": skips.flush()}


@dataclasses.dataclass(frozen=True)
class TrainLoader:
    """A training loader with its numbers, as in OpenCLIP's `DataInfo`.

    Attributes:
        set_epoch: to be called before each pass over `batches`.
        batches: iterable over the batches of this rank.
        num_batches: batches per epoch on each rank.
        num_samples: samples per epoch on all ranks, rounded up to whole batches.
    """

    set_epoch: Callable[[int], None]
    batches: DataLoader
    num_batches: int
    num_samples: int


def train_loader(config: StreamConfig, *, num_samples: int, workers: int, pin_memory: bool = False) -> TrainLoader:
    """Batches of training epochs; see `TrainStream` and `TableStream`.

    Args:
        config: what batches depend on.
        num_samples: per epoch and over all ranks, for shards; a table's epoch is the table.
        workers: processes that load data; 0: this one.
        pin_memory: for copies to a GPU.

    Raises:
        UserError: there are fewer shards than data workers over all ranks, or less than a batch.
    """
    if isinstance(config.source, Table):
        return _table_train_loader(config, workers, pin_memory)
    return _shard_train_loader(config, num_samples, workers, pin_memory)


def _shard_train_loader(config: StreamConfig, num_samples: int, workers: int, pin_memory: bool) -> TrainLoader:
    """Rounded up, so that all ranks and workers give as many batches."""
    readers = max(1, workers) * config.world_size
    if not config.resampled and len(config.source.urls) < readers:
        fitting = len(config.source.urls) // config.world_size
        fewer = f"--workers {fitting}, " if fitting else ""
        raise UserError(
            f"--workers {workers}: {config.world_size} process(es) need at least {readers} shards and there are "
            f"{len(config.source.urls)}; use {fewer}--dataset-resampled, or more and smaller shards"
        )
    global_batch = config.batch_size * config.world_size
    batches_per_worker = math.ceil(math.ceil(num_samples / global_batch) / max(1, workers))
    num_batches = batches_per_worker * max(1, workers)
    stream = TrainStream(config, batches_per_worker)
    batches = _loader(stream, workers, pin_memory, batch_size=None)
    return TrainLoader(stream.set_epoch, batches, num_batches, num_batches * global_batch)


def _table_train_loader(config: StreamConfig, workers: int, pin_memory: bool) -> TrainLoader:
    """Rounded down, as OpenCLIP does for CSV files: what fills no batch on each rank waits for another epoch."""
    stream = TableStream(config, training=True)
    sampler = DistributedSampler(
        stream, num_replicas=config.world_size, rank=config.rank, shuffle=True, seed=config.seed, drop_last=True
    )

    def set_epoch(epoch: int) -> None:
        stream.set_epoch(epoch)
        sampler.set_epoch(epoch)

    batches = _loader(
        stream, workers, pin_memory,
        batch_size=config.batch_size, sampler=sampler, collate_fn=stream.collate, drop_last=True,
    )  # fmt: skip
    if len(batches) == 0:
        raise UserError(
            f"--batch-size {config.batch_size}: the data has only {len(config.source)} pairs for {config.world_size} "
            "process(es); use a smaller --batch-size"
        )
    return TrainLoader(set_epoch, batches, len(batches), len(batches) * config.batch_size * config.world_size)


def eval_loader(config: StreamConfig, *, workers: int, pin_memory: bool = False) -> DataLoader:
    """Every usable pair once, in order with up to one worker, the last batch partial."""
    if isinstance(config.source, Table):
        stream = TableStream(config, training=False)
        return _loader(stream, workers, pin_memory, batch_size=config.batch_size, collate_fn=stream.collate)
    return _loader(EvalStream(config), min(workers, len(config.source.urls)), pin_memory, batch_size=None)


def _loader(dataset: Dataset, workers: int, pin_memory: bool, **options) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from the training process's
        **options,
    )


def _collated(rows: list[tuple], config: StreamConfig) -> dict:
    """A batch of (image tensor, caption, sample id)."""
    images, captions, sample_ids = zip(*rows, strict=True)
    batch = {"image": torch.stack(images), "text": config.tokenizer(list(captions))}
    return batch | {"sample_id": torch.tensor(sample_ids)} if config.sample_id else batch


def _seed_all(seed: int) -> None:
    """The generators that image transforms draw from. Not `torch.manual_seed`, which would reset CUDA's too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def _random_state_kept():
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
