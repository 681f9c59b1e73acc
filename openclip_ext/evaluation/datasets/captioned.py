"""Pictures with one or more captions each, from shards and from CSV files, and a model's features of both."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from openclip_ext.data import tar
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.check import EMPTY_CAPTION
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pack import pairs_from_csv
from openclip_ext.errors import RankError, UserError
from openclip_ext.evaluation.datasets.rows import ShardRows, first_error, opened
from openclip_ext.evaluation.loading import LoadedModel


class CaptionedFiles(Dataset):
    """(picture, captions) of image files, or the error of one that cannot be opened; `files` is all that is read."""

    def __init__(self, path: str, rows: Sequence[tuple[str, list[str]]]) -> None:
        self.rows, self.files = rows, [path, *(image for image, _ in rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]] | RankError:
        path, captions = self.rows[index]
        picture = opened(path)
        return picture if isinstance(picture, RankError) else (picture, captions)


class CaptionedShards(ShardRows):
    """(picture, captions) of samples, or the error of one; `files` is all that is read."""

    def __init__(self, urls: Sequence[str], captions: CaptionFormat) -> None:
        super().__init__(urls)
        self.files, self.captions = urls, captions

    def row(self, sample: dict, record: tar.Record) -> tuple[Image.Image, list[str]] | None:
        captions = self.captions.of_sample(sample, record)
        if captions is None:
            return None
        captions = [caption for caption in captions if caption.strip()]
        if not captions:
            record(EMPTY_CAPTION, sample["__url__"])
            return None
        picture = tar.decode_image(sample, record)
        return None if picture is None else (picture, captions)


def captioned_csv(
    path: str, flag: str, image_key: str, caption_key: str, separator: str | None, captions: CaptionFormat
) -> CaptionedFiles:
    """The images of a CSV's rows, each once, with the captions of all its rows.

    Raises:
        UserError: no such file or column, or a row without a caption or whose image does not exist.
    """
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file; give a CSV with a header row, or shards")
    captions_of: dict[str, list[str]] = {}
    for image, text in pairs_from_csv(path, image_key, caption_key, separator):
        captions_of.setdefault(image, []).extend(captions.split(text))
    return CaptionedFiles(path, list(captions_of.items()))


def captioned_shards(path: str, flag: str, captions: CaptionFormat) -> CaptionedShards:
    """The samples of a folder or pattern of shards. Raises UserError: no shard matches."""
    return CaptionedShards(list_shards(path, flag=flag).urls, captions)


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
    """Unit features in float32 on the CPU: `image` (N, D), `text` (M, D), and `image_of_text` (M,), a row of `image`.

    Raises:
        UserError: a picture or caption that cannot be read, or there is none at all.
    """
    count = len(dataset) if isinstance(dataset, CaptionedFiles) else None
    workers = workers if count else min(workers, len(dataset.files))
    collate = functools.partial(_collate, model.transform, model.tokenizer)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    images, texts, owners, done = [], [], [], 0
    with tqdm(total=count, desc=desc, unit="image", disable=not progress, leave=False) as bar:
        for batch in loader:
            if isinstance(batch, RankError):
                raise batch
            pictures, tokens, owner = batch
            images.append(model.encode_images(pictures).float().cpu())
            texts += [model.encode_texts(part).float().cpu() for part in tokens.split(batch_size)]
            owners.append(owner + done)
            done += len(pictures)
            bar.update(len(pictures))
    if not images:
        raise UserError(f"{dataset.files[0]}: holds no sample")
    return {"image": torch.cat(images), "text": torch.cat(texts), "image_of_text": torch.cat(owners)}


def _collate(transform, tokenizer, rows: list) -> Any:
    """(pictures, token ids of all captions, their pictures' places), or the error of one of the rows."""
    if error := first_error(rows):
        return error
    pictures, captions = zip(*rows, strict=True)
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(texts) for texts in captions]))
    return (
        torch.stack([transform(picture) for picture in pictures]),
        tokenizer([text for texts in captions for text in texts]),
        owner,
    )
