"""Pictures with a class each: from one folder per class, and from shards."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from openclip_ext.data import tar
from openclip_ext.data.pipeline import shared_batches
from openclip_ext.errors import RankError, UserError
from openclip_ext.evaluation.datasets.content import checksum_of_files, checksum_of_pictures, checksum_of_shards
from openclip_ext.evaluation.datasets.rows import ShardRows, first_error, opened
from openclip_ext.evaluation.ranks import ALONE, Ranks

CLASS_EXTENSION = "cls"  # a sample's class index in a shard, as text


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """Pictures with classes, and how to say a class in words.

    Attributes:
        pictures: dataset of (picture, class index) for `LabelledBatches`.
        class_names: by class index.
        templates: format strings, or functions of a class name.
        note: what one has to know to compare scores on it; may be empty.
    """

    pictures: Dataset
    class_names: Sequence[str]
    templates: Sequence[str | Callable[[str], str]]
    note: str = ""

    def checksum(self) -> str | None:
        """Of the pictures and their classes; None where it would take reading them. See `datasets.content`."""
        if isinstance(self.pictures, LabelledFiles | LabelledShards):
            return self.pictures.checksum()
        return checksum_of_pictures(self.pictures)


class LabelledFiles(Dataset):
    """(picture, class index) of image files, or the error of one that cannot be opened."""

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int] | RankError:
        path, label = self.samples[index]
        picture = opened(path)
        return picture if isinstance(picture, RankError) else (picture, label)

    def checksum(self) -> str:
        return checksum_of_files(self.samples)


class LabelledShards(ShardRows):
    """(picture, class index) of samples with an image and a `cls` file, or the error of one."""

    def __init__(self, urls: Sequence[str], num_classes: int) -> None:
        super().__init__(urls)
        self.num_classes = num_classes

    def row(self, sample: dict, record: tar.Record) -> tuple[Image.Image, int] | None:
        text = sample.get(CLASS_EXTENSION, b"").decode("ascii", "replace").strip()
        if not (text.isdigit() and int(text) < self.num_classes):
            found = repr(text[:20]) if CLASS_EXTENSION in sample else "none"
            raise UserError(f"needs a .cls file with a class from 0 to {self.num_classes - 1}, and has {found}")
        picture = tar.decode_image(sample, record)
        return None if picture is None else (picture, int(text))

    def checksum(self) -> str | None:
        return checksum_of_shards(self.urls)


class _Transformed(Dataset):
    def __init__(self, dataset: Dataset, transform: Callable[[Any], Tensor]) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int] | RankError:
        return _transformed(self.dataset[index], self.transform)


class _TransformedStream(IterableDataset):
    def __init__(self, dataset: IterableDataset, transform: Callable[[Any], Tensor]) -> None:
        self.dataset, self.transform = dataset, transform

    def __iter__(self) -> Iterator[tuple[Tensor, int] | RankError]:
        return (_transformed(row, self.transform) for row in self.dataset)


def _transformed(row: Any, transform: Callable[[Any], Tensor]) -> tuple[Tensor, int] | RankError:
    return row if isinstance(row, RankError) else (transform(row[0]), row[1])


class LabelledBatches:
    """Batches of (images (B, 3, H, W), class indices (B,)), the last one partial.

    Of several ranks each takes every so many whole batches: these are the same batches as one rank's, so features of
    a picture do not depend on the number of ranks. All take as many: one that lacks a batch at the end gets a black
    picture of class -1 instead; of shards, whose number of pictures is not known, some take one batch less.

    Args:
        dataset: of (picture, class index).
        transform: picture to tensor.
        batch_size: pictures in a batch.
        workers: processes that load data; 0: this one.
        ranks: this process, of how many.

    Raises:
        RankError: while iterating: a picture that cannot be opened, or a class that is none.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[Any], Tensor],
        *,
        batch_size: int,
        workers: int,
        ranks: Ranks = ALONE,
    ) -> None:
        source: Dataset
        options: dict[str, Any]
        if isinstance(dataset, LabelledShards):
            source = _TransformedStream(dataset.shared(batch_size, ranks), transform)
            options = {"batch_size": batch_size}
            workers = min(workers, len(dataset.urls))
        else:
            source = _Transformed(dataset, transform)
            options = {
                "batch_sampler": shared_batches(len(cast(Sized, dataset)), batch_size, ranks.rank, ranks.world_size)
            }
        collate = functools.partial(_collate, transform)
        self._loader = DataLoader(
            source, num_workers=workers, collate_fn=collate, pin_memory=torch.cuda.is_available(), **options
        )

    def __len__(self) -> int:
        """On this rank. Raises TypeError: shards do not tell."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            if isinstance(batch, RankError):
                raise batch
            yield batch


def _collate(transform: Callable[[Any], Tensor], rows: list) -> Any:
    """A batch; or the error of one of its rows, which would lose its one line if it were raised by a worker."""
    if not rows:
        rows = [(transform(Image.new("RGB", (8, 8))), -1)]
    return first_error(rows) or default_collate(rows)
