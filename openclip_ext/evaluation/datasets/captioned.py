"""Pictures with one or more captions each, from shards and from CSV files, and a model's features of both."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from openclip_ext.data import tar
from openclip_ext.data.captions import CaptionFormat, require_caption_key
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pairs import captions_by_image, pairs_from_csv
from openclip_ext.errors import UserError
from openclip_ext.evaluation.datasets.labelled import opened
from openclip_ext.evaluation.encoder import Encoder


class CaptionedFiles(Dataset):
    """(picture, captions) of image files, or the error of one that cannot be opened; `files` is all that is read."""

    def __init__(self, path: str, rows: Sequence[tuple[str, list[str]]]) -> None:
        self.rows, self.files = rows, [path, *(image for image, _ in rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]] | UserError:
        path, captions = self.rows[index]
        picture = opened(path)
        return picture if isinstance(picture, UserError) else (picture, captions)


class CaptionedShards(IterableDataset):
    """(picture, captions) of samples, or the error of one; several workers take turns.

    Attributes:
        files: all that is read.
        noted: caption keys that `sizes.json` has, used where the format names none.
    """

    def __init__(self, listing: ShardListing, captions: CaptionFormat) -> None:
        self.files, self.noted, self.captions = listing.urls, listing.caption_keys, captions

    def __iter__(self) -> Iterator[tuple[Image.Image, list[str]] | UserError]:
        info = get_worker_info()
        for url in self.files[info.id :: info.num_workers] if info else self.files:
            skips = tar.Skips()
            for sample in tar.read_shard(url, skips.record):
                yield self._row(sample, skips)
            if skips:
                yield UserError(f"{url}: {next(iter(skips))[0]}; make it again")

    def _row(self, sample: dict, skips: tar.Skips) -> tuple[Image.Image, list[str]] | UserError:
        captions = self.captions.of_sample(sample, skips.record, self.noted)
        picture = tar.decode_image(sample, skips.record)
        captions = [caption for caption in captions or () if caption.strip()]
        if picture is None or not captions:
            fault = next(iter(skips), ("empty caption",))[0]
            return UserError(f"{sample['__url__']}: sample {sample['__key__']}: {fault}; mend or remove it")
        return picture, captions


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
    encoder: Encoder,
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
    collate = functools.partial(_collate, encoder.transform, encoder.tokenizer)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    images, texts, owners, done = [], [], [], 0
    with tqdm(total=count, desc=desc, unit="image", disable=not progress, leave=False) as bar:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            pictures, tokens, owner = batch
            images.append(encoder.encode_images(pictures).float().cpu())
            texts += [encoder.encode_texts(part).float().cpu() for part in tokens.split(batch_size)]
            owners.append(owner + done)
            done += len(pictures)
            bar.update(len(pictures))
    if not images:
        raise UserError(f"{dataset.files[0]}: holds no sample")
    return {"image": torch.cat(images), "text": torch.cat(texts), "image_of_text": torch.cat(owners)}


def _collate(transform, tokenizer, rows: list) -> Any:
    """(pictures, token ids of all captions, their pictures' places), or the error of one of the rows."""
    if error := next((row for row in rows if isinstance(row, UserError)), None):
        return error
    pictures, captions = zip(*rows, strict=True)
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(texts) for texts in captions]))
    return (
        torch.stack([transform(picture) for picture in pictures]),
        tokenizer([text for texts in captions for text in texts]),
        owner,
    )
