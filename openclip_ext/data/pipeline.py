"""Loaders over the streams: how many batches an epoch has, and whether the data can give them."""

import copy
import dataclasses
import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from openclip_ext.data.listing import ShardListing
from openclip_ext.data.position import Layout, Position
from openclip_ext.data.shares import Part, shares
from openclip_ext.data.streams import EvalStream, Start, StreamConfig, TableStream, TrainStream
from openclip_ext.data.table import Table
from openclip_ext.errors import UserError, counted


@dataclasses.dataclass(frozen=True)
class TrainLoader:
    """A training loader with its numbers, as in OpenCLIP's `DataInfo`.

    Attributes:
        set_epoch: to be called before each pass over `batches`.
        batches: iterable over the batches of this rank; in the epoch of `start` those that are left.
        num_batches: batches per epoch on each rank.
        num_samples: samples per epoch on all ranks, rounded up to whole batches.
        layout: who reads how much at once.
        start: where to go on; None: from the beginning of whichever epoch.
        left: batches for each rank in that epoch.
        remarks: for the log: what becomes of samples where others began that epoch.
    """

    set_epoch: Callable[[int], None]
    batches: DataLoader
    num_batches: int
    num_samples: int
    layout: Layout
    start: Start | None = None
    left: int = 0
    remarks: Sequence[str] = ()

    def position(self, epoch: int) -> Position:
        """Where an epoch begins."""
        if self.start is None or self.start.epoch != epoch:
            return Position(self.layout)
        return copy.deepcopy(self.start.position)

    def batches_left(self, epoch: int) -> int:
        """How many batches an epoch has for each rank."""
        return self.left if self.start and self.start.epoch == epoch else self.num_batches


def train_loader(
    config: StreamConfig, *, num_samples: int, workers: int, pin_memory: bool = False, start: Start | None = None
) -> TrainLoader:
    """Batches of training epochs; see `TrainStream` and `TableStream`.

    Args:
        config: what batches depend on.
        num_samples: per epoch and over all ranks, for shards; a table's epoch is the table.
        workers: processes that load data; 0: this one.
        pin_memory: for copies to a GPU.
        start: where to go on.

    Raises:
        UserError: there are fewer shards than data workers over all ranks, or less than a batch.
    """
    if isinstance(config.source, Table):
        return _table_train_loader(config, workers, pin_memory, start)
    return _shard_train_loader(config, num_samples, workers, pin_memory, start)


def _shard_train_loader(
    config: StreamConfig, num_samples: int, workers: int, pin_memory: bool, start: Start | None
) -> TrainLoader:
    """Rounded up, so that all ranks and workers give as many batches."""
    assert isinstance(config.source, ShardListing)
    readers = max(1, workers) * config.world_size
    if not config.resampled and len(config.source.urls) < readers:
        fitting = len(config.source.urls) // config.world_size
        fewer = f"--workers {fitting}, " if fitting else ""
        raise UserError(
            f"--workers {workers}: takes at least {counted(readers, 'shard')} for "
            f"{counted(config.world_size, 'process')}, and there are {len(config.source.urls)}; use "
            f"{fewer}--dataset-resampled, or more and smaller shards"
        )
    layout = Layout(config.world_size, max(1, workers), config.batch_size, _data_name(config))
    batches_per_worker = layout.batches_per_worker(num_samples)
    num_batches = batches_per_worker * layout.workers
    remarks: list[str] = []
    left = 0
    if start:
        start, remarks = _dealt(config, start, layout, num_samples)
        left = max(0, start.batches_per_worker * layout.workers - start.position.batches)
    stream = TrainStream(config, layout, batches_per_worker, start)
    batches = _loader(stream, workers, pin_memory, batch_size=None)
    num_samples = num_batches * layout.global_batch
    return TrainLoader(stream.set_epoch, batches, num_batches, num_samples, layout, start, left, remarks)


def _dealt(config: StreamConfig, start: Start, layout: Layout, num_samples: int) -> tuple[Start, list[str]]:
    """Where this layout goes on; if it begins where another one left an epoch, what to say of that."""
    assert isinstance(config.source, ShardListing)
    position, source, remarks = start.position, config.source, []
    begins = position.layout != layout
    if begins:
        position = Position(layout, position)
    before = position.before
    per_worker = layout.batches_per_worker(max(0, num_samples - (before.samples if before else 0)))
    dealt = None
    if before and position.of_one_order and source.sizes is not None and not config.resampled:
        dealt = shares(source, config.seed, start.epoch, position)
    if begins and before:
        what = f"epoch {start.epoch + 1} was begun by {before.layout}, and goes on with {layout}: "
        if dealt is None:
            position = Position(layout, before, before.next_pass)
            why = "the data is another" if not position.of_one_order else "its samples have no numbers"
            why = "it is drawn with replacement" if config.resampled else why
            remarks.append(what + f"{why}, so the rest of it comes from all samples, those seen too")
        else:
            remarks.append(what + _accounted(dealt, per_worker, layout.batch_size))
    return Start(start.epoch, position, per_worker, dealt), remarks


def _accounted(dealt: list[list[list[Part]]], per_worker: int, batch_size: int) -> str:
    """How many samples are left, and how many of them come twice, to fill batches, or not at all."""
    total = twice = never = 0
    for of_worker in (worker for rank in dealt for worker in rank):
        own = sum(len(part.ordinals or ()) for part in of_worker)
        once = min(per_worker, own // batch_size) * batch_size
        total, twice, never = total + own, twice + per_worker * batch_size - once, never + own - once
    return f"of {counted(total, 'sample')} left, {never} do not come, and {twice} come again"


def _data_name(config: StreamConfig) -> str:
    """The same for the same samples in the same order, wherever they are."""
    source = config.source
    parts: tuple = (config.seed, config.resampled)
    if isinstance(source, ShardListing):
        parts += (tuple(os.path.basename(url) for url in source.urls), source.weights, source.sizes)
    else:
        parts += (len(source),)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _table_train_loader(config: StreamConfig, workers: int, pin_memory: bool, start: Start | None) -> TrainLoader:
    """Rounded down, as OpenCLIP does for CSV files: what fills no batch on each rank waits for another epoch."""
    stream = TableStream(config, training=True)
    assert isinstance(config.source, Table)
    layout = Layout(config.world_size, max(1, workers), config.batch_size, _data_name(config))
    if start and start.position.layout != layout:
        start = Start(start.epoch, Position(layout, start.position))
    left = max(0, len(config.source) - start.position.samples) // layout.global_batch if start else 0
    sampler = RowOrder(len(config.source), config, start)

    def set_epoch(epoch: int) -> None:
        stream.set_epoch(epoch)
        sampler.set_epoch(epoch)

    batches = _loader(
        stream, workers, pin_memory,
        batch_size=config.batch_size, sampler=sampler, collate_fn=stream.collate, drop_last=True,
    )  # fmt: skip
    num_batches = len(config.source) // layout.global_batch
    if num_batches == 0:
        raise UserError(
            f"--batch-size {config.batch_size}: the data has only {counted(len(config.source), 'pair')} for "
            f"{counted(config.world_size, 'process')}; use a smaller --batch-size"
        )
    remarks = []
    if start and not start.position.of_one_order:
        remarks.append(f"epoch {start.epoch + 1} was begun with other data: of its rows some come twice or not at all")
    num_samples = num_batches * layout.global_batch
    return TrainLoader(set_epoch, batches, num_batches, num_samples, layout, start, left, remarks)


class RowOrder(Sampler[int]):
    """This rank's rows of a table in an epoch, or of what is left of it; in the order of torch's `DistributedSampler`.

    All ranks have as many.
    """

    def __init__(self, num_rows: int, config: StreamConfig, start: Start | None) -> None:
        self._num_rows, self._config, self._start, self._epoch = num_rows, config, start, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def _left(self) -> range:
        """Places in the epoch's order of all ranks."""
        done = self._start.position.samples if self._start and self._start.epoch == self._epoch else 0
        world_size = self._config.world_size
        return range(done, done + max(0, self._num_rows - done) // world_size * world_size)

    def __len__(self) -> int:
        return len(self._left()) // self._config.world_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._config.seed + self._epoch)
        order = torch.randperm(self._num_rows, generator=generator).tolist()
        left = self._left()
        return iter(order[left.start + self._config.rank : left.stop : self._config.world_size])


def eval_loader(config: StreamConfig, *, workers: int, pin_memory: bool = False) -> DataLoader:
    """Every usable pair once, in order with up to one worker, the last batch partial.

    Of several ranks each takes every so many batches, and all take as many; see `EvalStream`.
    """
    if isinstance(config.source, Table):
        stream = TableStream(config, training=False)
        batches = shared_batches(len(stream), config.batch_size, config.rank, config.world_size)
        return _loader(stream, workers, pin_memory, batch_sampler=batches, collate_fn=stream.collate)
    return _loader(EvalStream(config), min(workers, len(config.source.urls)), pin_memory, batch_size=None)


def shared_batches(count: int, batch_size: int, rank: int, world_size: int) -> list[range]:
    """Indices of the batches of `rank`: every so many of those of one rank, and an empty one where that is too few."""
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    batches += [range(0)] * (-len(batches) % world_size)
    return batches[rank::world_size]


def _loader(dataset: Dataset, workers: int, pin_memory: bool, **options) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from the training process's
        worker_init_fn=outlive_first_signal,
        **options,
    )


def outlive_first_signal(worker: int) -> None:
    """Let a data worker go on when its process group is asked to end: the training process finishes its step first."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))
