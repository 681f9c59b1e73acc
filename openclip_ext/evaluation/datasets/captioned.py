"""Pictures with one or more captions each, from shards and from CSV files, and a model's features of both."""

import collections
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
from openclip_ext.errors import RankError, UserError
from openclip_ext.evaluation.datasets.content import content_id
from openclip_ext.evaluation.datasets.rows import ShardRows, first_error, opened
from openclip_ext.evaluation.loading import LoadedModel


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
    desc: str = "retrieval",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Unit features in float32 on the CPU, of the pictures and of all their captions.

    Returns:
        `image` (N, D), `text` (M, D), `image_of_text` (M,), a row of `image`, and `image_id` (N,) and `text_id` (M,),
        the `content_id` of each picture's file and of each caption.

    Raises:
        UserError: a picture or caption that cannot be read, or there is none at all.
    """
    count = len(dataset) if isinstance(dataset, CaptionedFiles) else None
    workers = workers if count else min(workers, len(dataset.files))
    collate = functools.partial(_collate, model.transform, model.tokenizer)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    parts, done = collections.defaultdict(list), 0
    with tqdm(total=count, desc=desc, unit="image", disable=not progress, leave=False) as bar:
        for batch in loader:
            if isinstance(batch, RankError):
                raise batch
            pictures, tokens, owner, ids = batch
            parts["image"].append(model.encode_images(pictures).float().cpu())
            parts["text"] += [model.encode_texts(part).float().cpu() for part in tokens.split(batch_size)]
            parts["image_of_text"].append(owner + done)
            for name, values in ids.items():
                parts[name].append(values)
            done += len(pictures)
            bar.update(len(pictures))
    if not parts:
        raise UserError(f"{dataset.files[0]}: holds no sample")
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


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
