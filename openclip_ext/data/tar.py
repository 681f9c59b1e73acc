"""Reading one shard: its samples in order, and what is wrong with it."""

import collections
import contextlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from PIL import Image
from webdataset.gopen import gopen, gopen_schemes
from webdataset.tariterators import base_plus_ext, tar_file_iterator

# In the order in which OpenCLIP looks for them.
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
CAPTION_EXTENSION = "txt"
JSON_EXTENSION = "json"

#: What Pillow raises on files that are no image, or too large a one: each of its decoders has its own.
IMAGE_ERRORS = (Exception,)

END_MARKER = 1024  # bytes of zeros that close a tar

# Files that webdataset reads as remarks on the shard.
_META = re.compile(r"__[^/]*__($|/)")

#: What can be wrong, by name, as counted and reported.
UNREADABLE_SHARD = "unreadable shard"
TRUNCATED_SHARD = "truncated shard"
MISSING_IMAGE = "missing image"
MISSING_CAPTION = "missing caption"
CORRUPT_IMAGE = "corrupt image"
CORRUPT_CAPTION = "corrupt caption"
MORE_SAMPLES = "more samples than sizes.json says"
FEWER_SAMPLES = "fewer samples than sizes.json says"

#: Takes what is wrong, in which shard, and in which of its samples; None: in the shard itself.
Record = Callable[[str, str, int | None], None]


class Skips(collections.Counter):
    """What went wrong how often: (kind, shard) to count.

    What is recorded is counted once, however often the same sample or shard is read. Memory: an entry per fault.
    """

    def __init__(self, *counts: dict[tuple[str, str], int]) -> None:
        super().__init__(*counts)
        self._known: set[tuple[str, str, int | None]] = set()

    def record(self, kind: str, url: str, ordinal: int | None) -> None:
        fault = kind, url, ordinal
        if fault not in self._known:
            self._known.add(fault)
            self[kind, url] += 1

    def flush(self) -> list[tuple[str, str, int]]:
        """All counts, which start anew; what has been recorded stays known."""
        rows = [(kind, url, count) for (kind, url), count in self.items()]
        self.clear()
        return rows


def read_shard(url: str, record: Record) -> Iterator[dict]:
    """The samples of a shard, in order.

    A sample is a run of files with one name up to the first dot, as webdataset and OpenCLIP group them. Each is a dict
    of its files' bytes by lower-case extension plus `__key__`, `__url__` and `__ordinal__`, its position in the shard.
    Samples that lack something count too, so that positions do not depend on what is usable.

    A shard that cannot be opened yields nothing, one that breaks off yields what is whole; both are recorded.
    """
    started = False
    try:
        with contextlib.closing(open_shard(url)) as stream:
            for sample in _group(_files(stream, url), url):
                started = True
                yield sample
    except GeneratorExit:
        raise
    except Exception:  # tarfile, zlib, the operating system and remote readers each raise their own
        record(TRUNCATED_SHARD if started else UNREADABLE_SHARD, url, None)


def open_shard(url: str) -> IO[bytes]:
    """A shard to read from: a path, what webdataset opens (`pipe:`, `https:`, `gs:`), or by fsspec, where it is
    installed with what the scheme needs, anything else (`s3:`)."""
    scheme, separator, _ = url.partition("://")
    if not separator or scheme in ("file", *gopen_schemes) or url.startswith("pipe:"):
        return gopen(url)
    import fsspec

    return fsspec.open(url, "rb").open()


def _files(stream: IO[bytes], url: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a shard's files. Raises EOFError after the last one if the shard breaks off."""
    for file in tar_file_iterator(stream):
        yield file["fname"], file["data"]
    _require_end(url)


def _require_end(url: str) -> None:
    """Raise EOFError if a local tar lacks its end marker: tarfile takes a break within a header for the end."""
    if not os.path.isfile(url) or not url.endswith(".tar"):
        return
    with open(url, "rb") as file:
        file.seek(max(0, os.path.getsize(url) - END_MARKER))
        if any(file.read()):
            raise EOFError(url)


def count_samples(path: str, record: Record) -> int:
    """How many samples `read_shard` finds in a local shard: from the headers alone, unless it breaks off."""
    try:
        _require_end(path)
        with tarfile.open(path) as shard:
            return sum(1 for _ in _group(((member.name, b"") for member in shard if member.isreg()), path))
    except (EOFError, tarfile.TarError, OSError):
        return sum(1 for _ in read_shard(path, record))


def _group(files: Iterable[tuple[str, bytes]], url: str) -> Iterator[dict]:
    """Samples of a stream of (name, content). The last one comes only if the stream ends well."""
    sample: dict = {}
    ordinal = -1
    for name, data in files:
        key, extension = base_plus_ext(name)
        if key is None or _META.match(name):
            continue
        extension = extension.lower()
        if key != sample.get("__key__") or extension in sample:
            if sample:
                yield sample
            ordinal += 1
            sample = {"__key__": key, "__url__": url, "__ordinal__": ordinal}
        sample[extension] = data
    if sample:
        yield sample


def decode_image(sample: dict, record: Record) -> Image.Image | None:
    """The sample's picture in RGB, or None, recorded, where there is none or it cannot be decoded."""
    data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    if data is None:
        record(MISSING_IMAGE, sample["__url__"], sample["__ordinal__"])
        return None
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except IMAGE_ERRORS:
        record(CORRUPT_IMAGE, sample["__url__"], sample["__ordinal__"])
        return None


def decode_caption(sample: dict, record: Record) -> str | None:
    """The sample's caption, or None, recorded, where there is none or it is no UTF-8."""
    data = sample.get(CAPTION_EXTENSION)
    if data is None:
        record(MISSING_CAPTION, sample["__url__"], sample["__ordinal__"])
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        record(CORRUPT_CAPTION, sample["__url__"], sample["__ordinal__"])
        return None
