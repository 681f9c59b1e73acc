"""Streams of batches from shards, whose order is a function of seed, epoch, rank and worker."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import multiprocessing
import random
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from openclip_ext.data import tar
from openclip_ext.data.listing import ShardListing
from openclip_ext.data.passes import Place, ShardPass
from openclip_ext.data.position import Layout, Position
from openclip_ext.data.rows import RowFormat, random_state_kept, row_seed
from openclip_ext.data.shares import Part, pass_random, shards_of
from openclip_ext.data.table import Table
from openclip_ext.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig(RowFormat):
    """What batches depend on, besides what a row holds.

    Attributes:
        source: shards, or a table of pairs.
        batch_size: per rank.
        sample_id: None: none wanted; "index": position in the source; "hash": 63 bits of the key's hash.
        resampled: draw shards with replacement.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
    """

    source: ShardListing | Table
    batch_size: int
    sample_id: str | None = None
    resampled: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1


class Start(NamedTuple):
    """An epoch that goes on from where it was left.

    Attributes:
        epoch: which.
        position: there.
        batches_per_worker: of the epoch since `position.layout` reads it; for shards.
        shares: what each worker of each rank reads in the first pass of it, where others began the epoch.
    """

    epoch: int
    position: Position
    batches_per_worker: int = 0
    shares: list[list[list[Part]]] | None = None


class TrainStream(IterableDataset):
    """Batches of one epoch: dicts of `image` (B, 3, H, W), `text` (B, L), and `skipped`; no `text` without
    captions.

    If asked for, they hold second views, `image_aug` and `text_aug`, and `sample_ids` (B,). `origins` (B, 2) are the
    number of a sample's shard in the listing, and its position there. `skipped` lists (kind,
    shard, count) of what could not be used since the last batch, each fault once per epoch and worker. `place` is what
    `Position.advance` takes. A worker whose shards hold no full batch yields `{"error": message}`. Batches are always
    full; a worker that runs out starts over in another order, as in OpenCLIP.
    """

    def __init__(self, config: StreamConfig, layout: Layout, batches_per_worker: int, start: Start | None) -> None:
        self.config, self.layout = config, layout
        self.batches_per_worker = batches_per_worker
        self._start = start
        # Shared, since workers persist over epochs.
        self._epoch = multiprocessing.Value("i", 0)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, epoch = info.id if info else 0, self._epoch.value
        left, place = self.batches_per_worker, Place()
        parts: list[Part] | None = None
        if self._start and self._start.epoch == epoch:
            # Batches come from workers by turns, beginning with the first: it is to be the one whose turn it is.
            done = self._start.position.batches
            worker = (worker + done) % self.layout.workers
            left = max(0, self._start.batches_per_worker - len(range(worker, done, self.layout.workers)))
            place = copy.deepcopy(self._start.position.places[self.config.rank][worker])
            if self._start.shares is not None:
                parts = self._start.shares[self.config.rank][worker]
        batches = islice(self._passes(epoch, worker, place, parts), left)
        while True:
            # Without workers this runs in the training process, whose random state must not depend on it.
            with contextlib.nullcontext() if info else random_state_kept():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _passes(self, epoch: int, worker: int, place: Place, first: list[Part] | None) -> Iterator[dict]:
        """Batches from a place on, of a first pass over these parts; None: over the worker's shards, as the others."""
        skips, config = tar.Skips(), self.config
        while True:
            rng = pass_random(config.seed, epoch, config.rank, worker, place.number)
            rest = first if place.number == 0 else None
            parts = list(self._parts(epoch, worker, rng)) if rest is None else rest
            anew, told = place.drawn == 0, len(place.sizes)
            samples = ShardPass(len(parts), functools.partial(self._read, parts, skips.record), rng, place)
            decoded = filter(None, (self._decode(sample, epoch, skips.record) for sample in samples))
            while len(rows := list(islice(decoded, config.batch_size))) == config.batch_size:
                anew = False
                moved = (worker, place.number, place.drawn, place.sizes[told:])
                told = len(place.sizes)
                yield config.batch(rows) | {"skipped": skips.flush(), "place": moved}
            if anew and rest is None:
                yield {"error": self._no_batch(len(rows), skips), "skipped": skips.flush()}
                return
            place = Place(place.number + 1)

    def _parts(self, epoch: int, worker: int, rng: random.Random) -> Iterator[Part]:
        """What this worker reads in a pass, in its order."""
        config = self.config
        assert isinstance(config.source, ShardListing)
        urls = config.source.urls
        if config.resampled:
            # A pass ends, so that shards without anything usable are noticed.
            yield from map(Part, rng.choices(urls, config.source.weights, k=max(16, len(urls))))
        else:
            yield from map(Part, shards_of(urls, config.seed, epoch, self.layout, config.rank, worker))

    def _read(self, parts: list[Part], record: tar.Record, number: int, told: int | None) -> Iterator[dict]:
        """Samples of a part, as `ShardPass` asks for them."""

        def untold(kind: str, url: str, ordinal: int | None) -> None:
            if kind == tar.UNREADABLE_SHARD or (told is not None and (ordinal is None or ordinal >= told)):
                record(kind, url, ordinal)

        url, ordinals = parts[number]
        samples = self._numbered(url, untold)
        if ordinals is None:
            return samples
        wanted = set(ordinals)
        return islice((sample for sample in samples if sample["__ordinal__"] in wanted), len(wanted))

    def _numbered(self, url: str, record: tar.Record) -> Iterator[dict]:
        """Samples of a shard with their `sample_id`; none of one that has no ids."""
        if self.config.sample_id == "hash":
            for sample in tar.read_shard(url, record):
                digest = hashlib.blake2b(sample["__key__"].encode(), digest_size=8).digest()
                yield sample | {"sample_id": int.from_bytes(digest, "big") >> 1}
            return
        assert isinstance(self.config.source, ShardListing)
        size = self.config.source.size_of.get(url)
        ids = self.config.source.ids_of(url)
        ordinal = -1
        for sample in tar.read_shard(url, record):
            ordinal = sample["__ordinal__"]
            if size is not None and ordinal >= size:
                record(tar.MORE_SAMPLES, url, ordinal)
            if ids:
                yield sample | {"sample_id": ids[ordinal % len(ids)]}
        for missing in range(ordinal + 1, size or 0):
            record(tar.FEWER_SAMPLES, url, missing)

    def _decode(self, sample: dict, epoch: int, record: tar.Record) -> dict | None:
        """A training row, None where the sample cannot be used."""
        pair = _decoded(sample, self.config, record)
        if pair is None:
            return None
        assert isinstance(self.config.source, ShardListing)
        origin = self.config.source.number_of[sample["__url__"]], sample["__ordinal__"]
        return _with_id(self.config, pair, epoch, sample["sample_id"], origin)

    def _no_batch(self, usable: int, skips: tar.Skips) -> str:
        assert isinstance(self.config.source, ShardListing)
        faults = ", ".join(f"{kind} in {url}" for kind, url in list(skips)[:3])
        return (
            f"--batch-size {self.config.batch_size}: a data worker of rank {self.config.rank} finds only {usable} "
            f"usable samples in its share of {len(self.config.source.urls)} shards ({self.layout.workers} workers x "
            f"{self.config.world_size} processes); use a smaller --batch-size or fewer --workers"
            + (f" (skipped: {faults})" if faults else "")
        )


class TableStream(Dataset):
    """Rows of a table as batches of the same form.

    A row that cannot be used is recorded; in training the next one is taken, in evaluation it is left out.
    """

    def __init__(self, config: StreamConfig, *, training: bool) -> None:
        assert isinstance(config.source, Table)
        self.config, self.training, self._table = config, training, config.source
        self._epoch = multiprocessing.Value("i", 0)
        self._skips = tar.Skips()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict | None:
        for attempt in range(len(self) if self.training else 1):
            row = (index + attempt) % len(self)
            try:
                image, caption = self._table.load(row)
            except tar.IMAGE_ERRORS:
                if attempt == 0:  # else it is another row's turn to tell
                    self._skips[tar.CORRUPT_IMAGE, self._table.name] += 1
                continue
            pair = image, self.config.captions.split(caption) if self.config.captions else []
            if not self.training:
                return self.config.evaluation_row(*pair) | {"position": index}
            with contextlib.nullcontext() if get_worker_info() else random_state_kept():
                return _with_id(self.config, pair, self._epoch.value, row, (0, row)) | self._table.columns(row)
        if not self.training:
            return None
        raise UserError(f"{self._table.name}: none of its images can be opened")

    def collate(self, rows: list[dict | None]) -> dict:
        usable = [row for row in rows if row is not None]
        return self.config.batch(usable or padding(self.config)) | {"skipped": self._skips.flush()}


class EvalStream(IterableDataset):
    """Every usable pair of a listing once: dicts of `image`, `text`, `position` (B,), and `skipped`.

    A batch is what can be used of `batch_size` samples in a row, `padding` if nothing can. In order with up to one
    worker; several take turns. Of several ranks each reads all shards and decodes every so many batches, which sorted
    by `position` are those of one rank. All yield as many: one that lacks a batch yields `padding`, as all do after the
    last batch if there are faults left to tell.
    """

    def __init__(self, config: StreamConfig) -> None:
        self.config = config

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        config, skips = self.config, tar.Skips()
        assert isinstance(config.source, ShardListing)
        urls = config.source.urls[worker::num_workers]
        samples = (sample for url in urls for sample in tar.read_shard(url, skips.record))
        number = 0
        while block := list(islice(samples, config.batch_size)):
            if number % config.world_size == config.rank:
                start = (number * num_workers + worker) * config.batch_size
                rows = list(self._rows(block, start, skips.record)) or padding(config)
                yield config.batch(rows) | {"skipped": skips.flush()}
            skips.clear()  # of shards: all ranks find the same, and the one whose batch comes next tells
            number += 1
        if 0 < number % config.world_size <= config.rank:
            yield config.batch(padding(config)) | {"skipped": []}
        if skips:
            yield config.batch(padding(config)) | {"skipped": skips.flush() if config.rank == 0 else []}

    def _rows(self, samples: list[dict], start: int, record: tar.Record) -> Iterator[dict]:
        for position, sample in enumerate(samples, start):
            if pair := _decoded(sample, self.config, record):
                yield self.config.evaluation_row(*pair) | {"position": position}


def padding(config: StreamConfig) -> list[dict]:
    """A row of no pair: a black picture, no words, and position -1."""
    return [config.evaluation_row(Image.new("RGB", (8, 8)), [""]) | {"position": -1}]


def _decoded(sample: dict, config: StreamConfig, record: tar.Record) -> tuple[Image.Image, list[str]] | None:
    """The sample's picture and captions, or None, recorded, where either is missing or broken."""
    assert isinstance(config.source, ShardListing)
    captions = config.captions.of_sample(sample, record, config.source.caption_keys) if config.captions else []
    image = tar.decode_image(sample, record) if captions is not None else None
    return None if image is None or captions is None else (image, captions)


def _with_id(
    config: StreamConfig, pair: tuple[Image.Image, list[str]], epoch: int, sample_id: int, origin: tuple[int, int]
) -> dict:
    """A training row: a function of seed, epoch and sample, on whichever worker and rank it is made."""
    row = config.training_row(*pair, seed=row_seed(config.seed, epoch, sample_id)) | {"origins": origin}
    return row | {"sample_ids": sample_id} if config.sample_id else row
