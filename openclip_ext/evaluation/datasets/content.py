"""What a data set holds, as a checksum: the same for the same content, on whichever machine and in whichever folder."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from openclip_ext.data.listing import is_local


def content_id(data: bytes) -> int:
    """64 bits of a hash, as int64: equal for equal bytes, and else hardly ever."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def checksum_of_pairs(image_ids: Tensor, text_ids: Tensor, image_of_text: Tensor) -> str:
    """SHA-256 over pictures with their captions, in any order.

    Args:
        image_ids: (N,) `content_id` of each picture's file.
        text_ids: (M,) that of each caption.
        image_of_text: (M,) position of the picture that a caption belongs to.
    """
    texts: list[list[int]] = [[] for _ in image_ids]
    for image, text in zip(image_of_text.tolist(), text_ids.tolist(), strict=True):
        texts[image].append(text)
    return _sha256(sorted([image, sorted(own)] for image, own in zip(image_ids.tolist(), texts, strict=True)))


def checksum_of_files(samples: Iterable[tuple[str, int]]) -> str:
    """SHA-256 over names, from the deepest folder that holds them all, sizes and classes of files, in any order."""
    samples = list(samples)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path, _ in samples])
    return _sha256(sorted(
        [os.path.relpath(path, root).replace(os.sep, "/"), os.path.getsize(path), int(label)] for path, label in samples
    ))  # fmt: skip


def checksum_of_shards(urls: Sequence[str]) -> str | None:
    """SHA-256 over names and sizes of the files in shards, in any order of these; None: not all are on this machine.

    Not over sizes of shards: a tar is padded, so that those of different pictures may have the same.
    """
    if not all(is_local(url) and os.path.isfile(url) for url in urls):
        return None
    return _sha256(sorted([os.path.basename(url), _members(url)] for url in urls))


def checksum_of_pictures(dataset: Any) -> str | None:
    """That of a foreign data set: of its files, or of its arrays; None: it has neither, as torchvision names them."""
    samples, arrays = getattr(dataset, "samples", None), getattr(dataset, "data", None)
    if isinstance(samples, list):
        return checksum_of_files(samples)
    if isinstance(arrays, np.ndarray) and hasattr(dataset, "targets"):
        labels = np.asarray(dataset.targets, dtype=np.int64)
        return hashlib.sha256(np.ascontiguousarray(arrays).tobytes() + labels.tobytes()).hexdigest()
    return None


def _members(shard: str) -> list[list]:
    """[name, size] of each file, from the headers, as far as they can be read."""
    found = []
    try:
        with tarfile.open(shard) as file:
            found += [[member.name, member.size] for member in file if member.isreg()]
    except (tarfile.TarError, OSError, EOFError):
        found.append(["", os.path.getsize(shard)])
    return found


def _sha256(rows: list) -> str:
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()
