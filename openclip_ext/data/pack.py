"""Writing shards: from a CSV or a folder of images, and `sizes.json` for shards that exist already."""

import csv
import io
import os
import random
from collections.abc import Iterable, Iterator, Sequence

import webdataset as wds
from PIL import Image
from tqdm import tqdm

from openclip_ext.data import tar
from openclip_ext.data.listing import SIZES_FILE
from openclip_ext.errors import UserError
from openclip_ext.files import write_json

_EXTENSION_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def pairs_from_csv(
    path: str, image_key: str, caption_key: str, separator: str | None, *, check_images: bool = True
) -> list[tuple[str, str]]:
    """(image path, caption) of each row. Relative image paths start at the CSV's folder if the first one exists there,
    else at the current folder.

    Args:
        path: the CSV file, with a header row.
        image_key: its column of image paths.
        caption_key: its column of captions.
        separator: None: a tab for .tsv, else a comma.
        check_images: make sure that each image exists.

    Raises:
        UserError: no such file or column, or a row without a value in one.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give a CSV with a header row, or a folder of images")
    separator = separator or ("\t" if path.endswith(".tsv") else ",")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter=separator)
        for flag, key in (("--csv-img-key", image_key), ("--csv-caption-key", caption_key)):
            if key not in (reader.fieldnames or ()):
                raise UserError(
                    f"{flag} {key}: {path} has no such column; its columns, split at {separator!r} "
                    f"(--csv-separator): {reader.fieldnames}"
                )
        pairs = [(row[image_key], row[caption_key]) for row in reader]
    if not pairs:
        raise UserError(f"{path}: holds no rows below its header")
    base = os.path.dirname(path)
    if pairs[0][0] and os.path.isfile(os.path.join(base, pairs[0][0])):
        pairs = [(image and os.path.join(base, image), caption) for image, caption in pairs]
    for number, (image, caption) in enumerate(pairs, start=2):
        if not image or not caption or (check_images and not os.path.isfile(image)):
            what = f"names {image}, which does not exist" if image and caption else "lacks an image or a caption"
            raise UserError(f"{path}: row {number} {what}; mend or remove the row")
    return pairs


def pairs_from_folder(folder: str, template: str) -> list[tuple[str, str]]:
    """(image path, caption) of each image below `folder`, in path order.

    The caption is the text file of the same name if there is one, else `template` filled with the name of the
    image's folder, underscores read as spaces.

    Raises:
        UserError: no image below the folder.
    """
    pairs = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in _IMAGE_FILES:
                continue
            sidecar = os.path.join(parent, stem + ".txt")
            if os.path.exists(sidecar):
                with open(sidecar, encoding="utf-8") as file:
                    caption = file.read().strip()
            else:
                caption = template.format(os.path.basename(os.path.abspath(parent)).replace("_", " "))
            pairs.append((os.path.join(parent, name), caption))
    if not pairs:
        raise UserError(f"{folder}: no image below this folder (looked for {', '.join(_IMAGE_FILES)})")
    return pairs


def pack(
    pairs: Sequence[tuple[str | bytes, str]],
    out: str,
    *,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write pairs as shards `00000.tar`, … and their `sizes.json`.

    Bytes of JPEG, PNG and WebP images are kept as they are, others become PNG. An image that cannot be opened is left
    out, with a warning. Equal input gives equal bytes. Shards appear under their names when all are written.

    Args:
        pairs: (image path or bytes, caption).
        out: the folder to make.
        samples_per_shard: at most so many in one.
        shuffle_seed: shuffle the pairs first, so that each shard is a mixture; None: keep their order.
        progress: show a progress bar.

    Returns:
        Shard name to number of samples, as in `sizes.json`.

    Raises:
        UserError: `out` holds shards already, or no image could be opened.
    """
    os.makedirs(out, exist_ok=True)
    if any(name.endswith(".tar") for name in os.listdir(out)):
        raise UserError(f"{out}: holds shards already; give another folder, or remove them")
    if shuffle_seed is not None:
        pairs = list(pairs)
        random.Random(shuffle_seed).shuffle(pairs)
    bar = tqdm(total=len(pairs), unit="pair", desc="pack", disable=not progress)
    written: list[tuple[str, int]] = []
    try:
        samples = _samples(pairs, bar)
        while sample := next(samples, None):
            name = f"{len(written):05d}.tar"
            path = os.path.join(out, name + ".partial")
            written.append((name, 0))
            with wds.TarWriter(path, encoder=False, mtime=0) as shard:
                size = 0
                while sample:
                    shard.write(sample)
                    size += 1
                    sample = next(samples, None) if size < samples_per_shard else None
            written[-1] = (name, size)
    except BaseException:
        for name, _ in written:
            os.remove(os.path.join(out, name + ".partial"))
        raise
    finally:
        bar.close()
    if not written:
        raise UserError("none of the images could be opened; nothing was written")
    for name, _ in written:
        os.replace(os.path.join(out, name + ".partial"), os.path.join(out, name))
    write_sizes(out, dict(written))
    return dict(written)


def _samples(pairs: Iterable[tuple[str | bytes, str]], bar: tqdm) -> Iterator[dict]:
    for index, (source, caption) in enumerate(pairs):
        bar.update()
        try:
            extension, data = _image_bytes(source)
        except tar.IMAGE_ERRORS as error:
            bar.write(f"left out: {source if isinstance(source, str) else f'image {index}'} ({error})")
            continue
        yield {"__key__": f"{index:09d}", extension: data, tar.CAPTION_EXTENSION: caption.encode("utf-8")}


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


def index(folder: str, *, progress: bool = True) -> dict[str, int]:
    """Count the samples of every `*.tar` in a folder and write `sizes.json`, whole or not at all.

    Raises:
        UserError: no shard in the folder, or one that cannot be read to its end.
    """
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar")) if os.path.isdir(folder) else []
    if not names:
        raise UserError(f"{folder}: no *.tar in this folder; give the folder that holds the shards")
    sizes = {}
    for name in tqdm(names, unit="shard", desc="index", disable=not progress):
        skips = tar.Skips()
        sizes[name] = tar.count_samples(os.path.join(folder, name), skips.record)
        for (kind, url), _ in skips.items():
            raise UserError(f"{url}: {kind}; replace or remove it, then index again")
    write_sizes(folder, sizes)
    return sizes


def write_sizes(folder: str, sizes: dict[str, int]) -> None:
    """Write `sizes.json`, whole or not at all."""
    write_json(sizes, os.path.join(folder, SIZES_FILE))
