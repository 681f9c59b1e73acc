"""Images and their captions as users keep them: a CSV file, or a folder of images."""

import csv
import os
from collections.abc import Iterable, Mapping
from typing import TextIO

from openclip_ext.errors import UserError

SEPARATORS = (",", "\t", ";", "|")
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
        separator: None: that of `SEPARATORS` at which the header splits into both columns.
        check_images: make sure that each image exists.

    Raises:
        UserError: no such file or column, a separator at which the header does not split, or a row without a value.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give a CSV with a header row, or a folder of images")
    separator = _character(separator)
    columns = {"--csv-img-key": image_key, "--csv-caption-key": caption_key}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            delimiter = _delimiter(file, path, columns, separator)
            pairs = [(row[image_key], row[caption_key]) for row in csv.DictReader(file, delimiter=delimiter)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a CSV in UTF-8 ({error}); save it as one") from error
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


def _character(separator: str | None) -> str | None:
    """What `--csv-separator` means: a backslash and a t are a tab, as in OpenCLIP. Raises UserError: no character."""
    if separator == "\\t":
        return "\t"
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise UserError(
            f"--csv-separator {separator!r}: must be one character, such as ',' or '\\t'; without the flag it is "
            "recognised"
        )
    return separator


def _delimiter(file: TextIO, path: str, columns: Mapping[str, str], given: str | None) -> str:
    """Where the file's header is split: `given`, or what makes it hold the columns, by flag, that are asked for.

    Raises:
        UserError: it is empty, or then lacks a column.
    """
    headers: dict[str, list[str]] = {}
    for candidate in SEPARATORS if given is None else (given, *SEPARATORS):
        file.seek(0)
        headers[candidate] = next(csv.reader(file, delimiter=candidate), [])
    file.seek(0)
    if not any(headers.values()):
        raise UserError(f"{path}: is empty; its first line must name its columns, such as {','.join(columns.values())}")
    fitting = [candidate for candidate, header in headers.items() if set(columns.values()) <= set(header)]
    if fitting and given in (None, fitting[0]):
        return fitting[0]
    if fitting:
        raise UserError(f"--csv-separator {given!r}: the header of {path} splits at {fitting[0]!r}; drop the flag")
    chosen = given or max(headers, key=lambda candidate: len(headers[candidate]))
    flag, key = next((flag, key) for flag, key in columns.items() if key not in headers[chosen])
    raise UserError(
        f"{flag} {key}: {path} has no such column; its columns, split at {chosen!r} (--csv-separator): "
        f"{headers[chosen]}"
    )


def captions_by_image(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The captions of each image, in order; images in the order of their first."""
    captions_of: dict[str, list[str]] = {}
    for image, caption in pairs:
        captions_of.setdefault(image, []).append(caption)
    return captions_of


def pairs_from_folder(folder: str, template: str) -> list[tuple[str, str]]:
    """(image path, caption) of each image below `folder`, in path order.

    The caption is the text file of the same name if there is one, else `template` filled with the name of the
    image's folder, underscores read as spaces.

    Raises:
        UserError: no image below the folder, a text file that is no UTF-8, or a template that cannot be filled.
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
                caption = _text(sidecar)
            else:
                caption = _filled(template, os.path.basename(os.path.abspath(parent)).replace("_", " "))
            pairs.append((os.path.join(parent, name), caption))
    if not pairs:
        raise UserError(f"{folder}: no image below this folder (looked for {', '.join(_IMAGE_FILES)})")
    return pairs


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error}); save it as one") from error


def _filled(template: str, name: str) -> str:
    try:
        return template.format(name)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--template {template}: cannot be filled ({error}); use {{}} for the folder's name") from error
