"""Rows of a data set, or what is wrong with one: a `RankError` is a row too.

Raised in a process that loads data, an error would lose its one line; as a row it comes to where batches are taken.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from openclip_ext.data import tar
from openclip_ext.errors import RankError, UserError
from openclip_ext.evaluation.ranks import ALONE, Ranks


def opened(path: str) -> Image.Image | RankError:
    """The picture in a file, or what to say of one that cannot be opened."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except tar.IMAGE_ERRORS as error:
        return RankError(f"{path}: cannot be opened as a picture ({error})")


class ShardRows(IterableDataset):
    """A row of every sample of shards, none left out; several workers take turns at the shards.

    Attributes:
        urls: the shards.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = urls
        self._batch_size, self._ranks = 1, ALONE

    def shared(self, batch_size: int, ranks: Ranks) -> "ShardRows":
        """The same rows for one of several ranks: every so many whole batches of each worker. It decodes no others."""
        shared = copy.copy(self)
        shared._batch_size, shared._ranks = batch_size, ranks
        return shared

    def row(self, sample: dict, record: tar.Record) -> Any | None:
        """The row of a sample, or None, recorded, where its files cannot be used.

        Raises:
            UserError: what they hold cannot be used; it says what, `ShardRows` in which sample.
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, number = info.id if info else 0, -1
        for url in self.urls[info.id :: info.num_workers] if info else self.urls:
            faults = tar.Skips()
            for sample in tar.read_shard(url, faults.record):
                number += 1
                if (number // self._batch_size + worker) % self._ranks.world_size != self._ranks.rank:
                    continue
                try:
                    row = self.row(sample, faults.record)
                    fault = _first(faults) if row is None else None
                except UserError as error:
                    row, fault = None, str(error)
                yield _error(f"{url}: sample {sample['__key__']}", fault) if fault else row
            if faults:
                yield _error(url, _first(faults))


def _first(faults: tar.Skips) -> str:
    ((kind, _), *_) = faults
    return kind


def _error(where: str, fault: str) -> RankError:
    return RankError(f"{where}: {fault}; mend or remove it")


def first_error(rows: Sequence[Any]) -> RankError | None:
    """What is wrong with the first row that is an error."""
    return next((row for row in rows if isinstance(row, RankError)), None)
