"""Loaders over the streams: how many batches an epoch has, and whether the data can give them."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from openclip_ext.data.listing import ShardListing
from openclip_ext.data.streams import EvalStream, StreamConfig, TableStream, TrainStream
from openclip_ext.data.table import Table
from openclip_ext.errors import UserError, counted


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
    global_batch = config.batch_size * config.world_size
    batches_per_worker = math.ceil(math.ceil(num_samples / global_batch) / max(1, workers))
    num_batches = batches_per_worker * max(1, workers)
    stream = TrainStream(config, batches_per_worker)
    batches = _loader(stream, workers, pin_memory, batch_size=None)
    return TrainLoader(stream.set_epoch, batches, num_batches, num_batches * global_batch)


def _table_train_loader(config: StreamConfig, workers: int, pin_memory: bool) -> TrainLoader:
    """Rounded down, as OpenCLIP does for CSV files: what fills no batch on each rank waits for another epoch."""
    stream = TableStream(config, training=True)
    assert isinstance(config.source, Table)
    sampler: DistributedSampler = DistributedSampler(
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
            f"--batch-size {config.batch_size}: the data has only {counted(len(config.source), 'pair')} for "
            f"{counted(config.world_size, 'process')}; use a smaller --batch-size"
        )
    return TrainLoader(set_epoch, batches, len(batches), len(batches) * config.batch_size * config.world_size)


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
        **options,
    )
