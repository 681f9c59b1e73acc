"""Writing shards of images and their captions."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence

import webdataset as wds
from PIL import Image
from tqdm import tqdm

from openclip_ext.data import tar
from openclip_ext.data.sizes import Sizes, write_sizes
from openclip_ext.errors import UserError
from openclip_ext.files import atomic

CAPTION_KEY = "captions"  # of several, in a sample's JSON

_EXTENSION_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclasses.dataclass(frozen=True)
class Packed:
    """What was written: sizes as in `sizes.json`, and the number of captions."""

    sizes: Sizes
    num_captions: int


def pack(
    pairs: Sequence[tuple[str | bytes, str | Sequence[str]]],
    out: str,
    *,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = None,
    progress: bool = True,
) -> Packed:
    """Write each pair as a sample of shards `00000.tar`, …, and their `sizes.json`.

    Bytes of JPEG, PNG and WebP images are kept as they are, others become PNG. A list of captions is kept in the
    sample's JSON under `CAPTION_KEY`, which `sizes.json` notes, and its first as the sample's text. An image that
    cannot be opened is left out, with a warning. Equal input gives equal bytes. Shards appear under their names when
    all are written.

    Args:
        pairs: (image path or bytes, caption or list of captions); lists for all or for none.
        out: the folder to make.
        samples_per_shard: at most so many in one.
        shuffle_seed: shuffle the pairs first, so that each shard is a mixture; None: keep their order.
        progress: show a progress bar.

    Raises:
        UserError: `out` holds shards already, or no image could be opened.
    """
    os.makedirs(out, exist_ok=True)
    if any(name.endswith(".tar") for name in os.listdir(out)):
        raise UserError(f"{out}: holds shards already; give another folder, or remove them")
    if shuffle_seed is not None:
        pairs = list(pairs)
        random.Random(shuffle_seed).shuffle(pairs)
    of_shard: dict[str, int] = {}
    captions: list[str | Sequence[str]] = []
    bar = tqdm(total=len(pairs), unit="image", desc="pack", disable=not progress)
    with contextlib.ExitStack() as shards, bar:
        usable = _usable(pairs, bar)
        while first := next(usable, None):
            name = f"{len(of_shard):05d}.tar"
            partial = shards.enter_context(atomic(os.path.join(out, name)))
            written = _write_shard(partial, itertools.chain([first], itertools.islice(usable, samples_per_shard - 1)))
            of_shard[name] = len(written)
            captions += written
    if not captions:
        raise UserError("none of the images could be opened; nothing was written")
    listed = not isinstance(captions[0], str)
    sizes = Sizes(of_shard, CAPTION_KEY if listed else None)
    write_sizes(out, sizes)
    return Packed(sizes, sum(map(len, captions)) if listed else len(captions))


def _write_shard(path: str, samples: Iterable[tuple[dict, str | Sequence[str]]]) -> list[str | Sequence[str]]:
    """Write samples, (key and image, captions); what their captions were."""
    written = []
    with wds.TarWriter(path, encoder=False, mtime=0) as shard:
        for image, captions in samples:
            shard.write(image | _caption_files(captions))
            written.append(captions)
    return written


def _usable(
    pairs: Iterable[tuple[str | bytes, str | Sequence[str]]], bar: tqdm
) -> Iterator[tuple[dict, str | Sequence[str]]]:
    """(key and image of a sample, captions) of what can be opened; the rest is said."""
    for index, (source, captions) in enumerate(pairs):
        bar.update()
        try:
            extension, data = _image_bytes(source)
        except tar.IMAGE_ERRORS as error:
            bar.write(f"left out: {source if isinstance(source, str) else f'image {index}'} ({error})")
            continue
        yield {"__key__": f"{index:09d}", extension: data}, captions


def _caption_files(captions: str | Sequence[str]) -> dict[str, bytes]:
    """A sample's files of captions, by extension."""
    if isinstance(captions, str):
        return {tar.CAPTION_EXTENSION: captions.encode()}
    listed = json.dumps({CAPTION_KEY: list(captions)}, ensure_ascii=False)
    return {tar.CAPTION_EXTENSION: captions[0].encode(), tar.JSON_EXTENSION: listed.encode()}


def _image_bytes(source: str | bytes) -> tuple[str, bytes]:
    if isinstance(source, str):
        with open(source, "rb") as file:
            source = file.read()
    with Image.open(io.BytesIO(source)) as image:
        if image.format in _EXTENSION_OF:
            return _EXTENSION_OF[image.format], source
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
    return "png", buffer.getvalue()
