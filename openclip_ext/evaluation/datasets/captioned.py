"""Pictures with one or more captions each, from shards and from CSV files, and a model's features of both."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from openclip_ext.data import tar
from openclip_ext.data.captions import CaptionFormat, require_caption_key
from openclip_ext.data.check import EMPTY_CAPTION
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pairs import captions_by_image, pairs_from_csv
from openclip_ext.data.pipeline import shared_batches
from openclip_ext.errors import RankError, UserError
from openclip_ext.evaluation.datasets.content import content_id
from openclip_ext.evaluation.datasets.rows import ShardRows, first_error, opened
from openclip_ext.evaluation.loading import LoadedModel
from openclip_ext.evaluation.ranks import ALONE, Ranks


class Captioned(NamedTuple):
    """A picture, the `content_id` of its file, and its captions."""

    picture: Image.Image
    id: int
    captions: list[str]


class CaptionedFiles(Dataset):
    """A `Captioned` of image files, or the error of one that cannot be opened; `files` is all that is read."""

    def __init__(self, path: str, rows: Sequence[tuple[str, list[str]]]) -> None:
        self.rows, self.files = rows, [path, *(image for image, _ in rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Captioned | RankError:
        path, captions = self.rows[index]
        picture = opened(path)
        if isinstance(picture, RankError):
            return picture
        return Captioned(picture, content_id(Path(path).read_bytes()), captions)


class CaptionedShards(ShardRows):
    """A `Captioned` of samples, or the error of one.

    Attributes:
        files: all that is read.
        noted: caption keys that `sizes.json` has, used where the format names none.
    """

    def __init__(self, listing: ShardListing, captions: CaptionFormat) -> None:
        super().__init__(listing.urls)
        self.files, self.noted, self.captions = listing.urls, listing.caption_keys, captions

    def row(self, sample: dict, record: tar.Record) -> Captioned | None:
        captions = self.captions.of_sample(sample, record, self.noted)
        if captions is None:
            return None
        captions = [caption for caption in captions if caption.strip()]
        if not captions:
            raise UserError(EMPTY_CAPTION)
        picture = tar.decode_image(sample, record)
        if picture is None:
            return None
        data = next(sample[extension] for extension in tar.IMAGE_EXTENSIONS if extension in sample)
        return Captioned(picture, content_id(data), captions)


def captioned_csv(
    path: str, flag: str, image_key: str, caption_key: str, separator: str | None, captions: CaptionFormat
) -> CaptionedFiles:
    """The images of a CSV's rows, each once, with the captions of all its rows.

    Raises:
        UserError: no such file or column, or a row without a caption or whose image does not exist.
    """
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file; give a CSV with a header row, or shards")
    texts_of = captions_by_image(pairs_from_csv(path, image_key, caption_key, separator))
    rows = [(image, [part for text in texts for part in captions.split(text)]) for image, texts in texts_of.items()]
    return CaptionedFiles(path, rows)


def captioned_shards(path: str, flag: str, captions: CaptionFormat) -> CaptionedShards:
    """The samples of a folder or pattern of shards. Raises UserError: no shard matches, or none has `captions.key`."""
    listing = list_shards(path, flag=flag)
    require_caption_key(listing.urls, captions.key)
    return CaptionedShards(listing, captions)


@torch.no_grad()
def pair_features(
    model: LoadedModel,
    dataset: CaptionedFiles | CaptionedShards,
    *,
    batch_size: int,
    workers: int,
    ranks: Ranks = ALONE,
    desc: str = "retrieval",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Unit features in float32 on the CPU, of the pictures and of all their captions.

    Of several ranks each encodes every so many whole batches, the same as one rank's, and the first has the features
    of all, in the order of one rank's batches if they are of files.

    Returns:
        `image` (N, D), `text` (M, D), `image_of_text` (M,), a row of `image`, and `image_id` (N,) and `text_id` (M,),
        the `content_id` of each picture's file and of each caption. Nothing on ranks other than the first.

    Raises:
        UserError: a picture or caption that cannot be read, or there is none at all.
    """
    loader, count = _loader(model, dataset, batch_size, workers, ranks)
    own = []
    with tqdm(total=count, desc=desc, unit="image", disable=not (progress and ranks.first), leave=False) as bar:
        for batch in loader:
            if isinstance(batch, RankError):
                raise batch
            pictures, tokens, owner, ids = batch
            texts = [model.encode_texts(part).float().cpu() for part in tokens.split(batch_size)]
            images = model.encode_images(pictures).float().cpu()
            own.append({"image": images, "text": torch.cat(texts), "image_of_text": owner, **ids})
            bar.update(len(pictures) * ranks.world_size)
    batches = ranks.in_turn(own)
    if not ranks.first:
        return {}
    if not batches:
        raise UserError(f"{dataset.files[0]}: holds no sample")
    done = 0
    for batch in batches:
        batch["image_of_text"] += done
        done += len(batch["image"])
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def loader_of(model: LoadedModel, dataset: Any, batch_size: int, workers: int) -> DataLoader:
    """Batches of (pictures, token ids of all captions, their pictures' places, ids of both), or the error of a row."""
    return _loader(model, dataset, batch_size, workers, ALONE)[0]


def _loader(
    model: LoadedModel, dataset: CaptionedFiles | CaptionedShards, batch_size: int, workers: int, ranks: Ranks
) -> tuple[DataLoader, int | None]:
    """A rank's batches, and how many pictures all ranks have; None: not known."""
    collate = functools.partial(_collate, model.transform, model.tokenizer)
    if isinstance(dataset, CaptionedShards):
        shared, workers = dataset.shared(batch_size, ranks), min(workers, len(dataset.files))
        return DataLoader(shared, batch_size=batch_size, num_workers=workers, collate_fn=collate), None
    batches: Any = list(filter(len, shared_batches(len(dataset), batch_size, ranks.rank, ranks.world_size)))
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate), len(dataset)


def _collate(transform, tokenizer, rows: list) -> Any:
    """(pictures, token ids of all captions, their pictures' places, ids of both), or the error of one of the rows."""
    if error := first_error(rows):
        return error
    texts = [text for row in rows for text in row.captions]
    ids = {"image_id": [row.id for row in rows], "text_id": [content_id(text.encode()) for text in texts]}
    return (
        torch.stack([transform(row.picture) for row in rows]),
        tokenizer(texts),
        torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row.captions) for row in rows])),
        {name: torch.tensor(values) for name, values in ids.items()},
    )
