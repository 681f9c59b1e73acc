"""Which shards there are, in which order, and how many samples each holds."""

import dataclasses
import functools
import glob
import math
import os
import zlib
from collections.abc import Iterable, Sequence

import braceexpand

from openclip_ext.data.sizes import SIZES_FILE, Sizes, read_sizes
from openclip_ext.errors import UserError

LENGTH_FILE = "__len__"


@dataclasses.dataclass(frozen=True)
class ShardListing:
    """Shards in listing order, each once.

    Attributes:
        urls: paths or URLs.
        weights: one sampling weight per shard, for sampling with replacement; None: all equal.
        sizes: samples per shard as `sizes.json` says, None where there is no such file.
        length: total number of samples, None if neither `sizes.json` nor `__len__` tells.
        caption_keys: in the samples' JSON, hold their captions, as a `sizes.json` notes; none: captions are text.
    """

    urls: tuple[str, ...]
    weights: tuple[float, ...] | None
    sizes: tuple[int, ...] | None
    length: int | None
    caption_keys: tuple[str, ...] = ()

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """The sample id of each shard's first sample. Needs `sizes`."""
        assert self.sizes is not None
        starts, start = {}, 0
        for url, size in zip(self.urls, self.sizes, strict=True):
            starts[url] = start
            start += size
        return starts

    def ids_of(self, url: str) -> range:
        """The sample ids of a shard, which follow those of the shards before it; of no size, they are far from others'.

        A sample beyond the size in `sizes.json` repeats one of them: it must not run into the next shard's. Of
        size 0 there is none to repeat.
        """
        size = self.size_of.get(url)
        if size is None:
            return range(zlib.crc32(url.encode()) << 31, (zlib.crc32(url.encode()) + 1) << 31)
        return range(self.offsets[url], self.offsets[url] + size)

    @functools.cached_property
    def number_of(self) -> dict[str, int]:
        """Positions of shards in the listing."""
        return {url: number for number, url in enumerate(self.urls)}

    @functools.cached_property
    def size_of(self) -> dict[str, int]:
        return dict(zip(self.urls, self.sizes or (), strict=False))


def list_shards(sources: str, upsampling_factors: str | None = None, flag: str = "--train-data") -> ShardListing:
    """Expand what `--train-data` was given.

    Args:
        sources: patterns joined by `::`. Each is a path or URL with braces (`{000..331}`), or a glob; a folder stands
            for all `*.tar` in it, and a `sizes.json` for all that it names.
        upsampling_factors: numbers joined by `::`, one per source.
        flag: for error messages.

    Raises:
        UserError: a source matches no shard, shards are missing, or the factors do not fit the sources.
    """
    patterns = sources.split("::")
    factors = _factors(upsampling_factors, patterns)
    weight_of: dict[str, float] = {}
    for pattern, factor in zip(patterns, factors, strict=True):
        for url in _expand(pattern, flag):
            weight_of[url] = weight_of.get(url, 0.0) + factor
    urls = tuple(weight_of)
    sizes, length, caption_keys = _noted(urls, [os.path.dirname(pattern) for pattern in patterns if _is_sizes(pattern)])
    return ShardListing(urls, tuple(weight_of.values()) if upsampling_factors else None, sizes, length, caption_keys)


def _factors(upsampling_factors: str | None, patterns: Sequence[str]) -> list[float]:
    if upsampling_factors is None:
        return [1.0] * len(patterns)
    try:
        factors = [float(factor) for factor in upsampling_factors.split("::")]
    except ValueError:
        factors = []
    if not (all(0 <= factor < math.inf for factor in factors) and sum(factors) > 0):
        factors = []
    if len(factors) != len(patterns):
        raise UserError(
            f"--train-data-upsampling-factors {upsampling_factors}: give one number per source of --train-data, "
            f"0 or more, joined by '::'; there are {len(patterns)} sources"
        )
    return factors


def is_local(url: str) -> bool:
    return "://" not in url and not url.startswith("pipe:")


def _expand(pattern: str, flag: str) -> list[str]:
    if not is_local(pattern):
        return expand_urls(pattern, flag)
    urls: list[str] = []
    for path in _paths(pattern, flag):
        if _is_sizes(path) and (sizes := read_sizes(os.path.dirname(path))):
            urls += _named(sizes, os.path.dirname(path))
        else:
            urls += _shards_in(path, flag) if os.path.isdir(path) else [path]
    missing = [url for url in urls if is_local(url) and not os.path.exists(url)]
    if not urls or len(missing) == len(urls):
        raise UserError(f"{flag} {pattern}: no shard matches; check the path (current folder: {os.getcwd()})")
    if missing:
        raise UserError(
            f"{flag} {pattern}: {len(missing)} of {len(urls)} shards do not exist, the first is {missing[0]}; "
            "give a pattern of existing shards, or the folder"
        )
    return urls


def _is_sizes(path: str) -> bool:
    return is_local(path) and os.path.basename(path) == SIZES_FILE


def _named(sizes: Sizes, folder: str) -> dict[str, int]:
    """Samples by the path or URL of each shard that the `sizes.json` of a folder names."""
    return {os.path.join(folder, name) if is_local(name) else name: size for name, size in sizes.of_shard.items()}


def expand_urls(pattern: str, flag: str) -> list[str]:
    """The URLs that one with braces means. Raises UserError: braces do not pair."""
    return list(_braces_expanded(pattern, flag))


def list_folders(pattern: str, flag: str) -> list[str]:
    """The folders of shards that a path with braces or stars means. Raises UserError: a path is no folder."""
    paths = _paths(pattern, flag)
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"{flag} {path}: no such folder; give the folder that holds the shards")
    if not paths:
        raise UserError(f"{flag} {pattern}: no folder matches; check the path (current folder: {os.getcwd()})")
    return paths


def _paths(pattern: str, flag: str) -> list[str]:
    """What a local pattern with braces and stars means; names without stars may not exist."""
    if os.path.exists(pattern):
        return [pattern]
    paths = []
    for path in _braces_expanded(pattern, flag):
        paths += sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    return paths


def _braces_expanded(pattern: str, flag: str) -> Iterable[str]:
    try:
        return braceexpand.braceexpand(pattern)
    except ValueError as error:
        raise UserError(f"{flag} {pattern}: braces that do not pair ({error})") from error


def _shards_in(folder: str, flag: str) -> list[str]:
    urls = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    if not urls:
        raise UserError(f"{flag} {folder}: the folder holds no *.tar; pack one with: openclip-ext shards pack")
    return urls


def _noted(urls: Sequence[str], listings: Sequence[str]) -> tuple[tuple[int, ...] | None, int | None, tuple[str, ...]]:
    """From each `sizes.json`: sizes per shard and the total, if they are known, and caption keys.

    Args:
        urls: of the shards, beside which they are.
        listings: other folders that have one.
    """
    folders = list(dict.fromkeys(os.path.dirname(url) for url in urls))
    known: dict[str, int] = {}
    keys: dict[str, None] = {}
    for folder in dict.fromkeys([*filter(is_local, folders), *listings]):
        if noted := read_sizes(folder):
            known |= _named(noted, folder)
            keys |= {noted.caption_key: None} if noted.caption_key else {}
    if all(url in known for url in urls):
        sizes = tuple(known[url] for url in urls)
        return sizes, sum(sizes), tuple(keys)
    if len(folders) == 1 and is_local(folders[0]) and os.path.exists(os.path.join(folders[0], LENGTH_FILE)):
        return None, _length(os.path.join(folders[0], LENGTH_FILE)), tuple(keys)
    return None, None, tuple(keys)


def _length(path: str) -> int:
    """What a `__len__` file says. Raises UserError: no number of samples."""
    with open(path, "rb") as file:
        text = file.read(64).strip()
    if not text.isdigit() or len(text) > 15:
        raise UserError(f"{path}: holds no number of samples; repair it, or write sizes.json beside it")
    return int(text)
