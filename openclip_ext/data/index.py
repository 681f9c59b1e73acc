"""Counting the samples of shards, here or elsewhere, into a `sizes.json`."""

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence

from tqdm import tqdm

from openclip_ext.data import tar
from openclip_ext.data.listing import is_local
from openclip_ext.data.sizes import SIZES_FILE, Sizes, read_sizes, write_sizes
from openclip_ext.errors import UserError
from openclip_ext.files import Rows, keep_rows, make_out_folder
from openclip_ext.processes import worker_pool

#: Beside a `sizes.json` that is being made: a line for each shard that has been counted.
COUNTED_FILE = SIZES_FILE + ".counted"
_ENOUGH = 4  # shards that a process is given at a time

Counted = tuple[int, list[str]]  # samples, and what is wrong


def index(
    folder: str, *, skip_unreadable: bool = False, progress: bool = True, jobs: int = 1
) -> tuple[Sizes, list[str]]:
    """Count the samples of every `*.tar` in a folder and write `sizes.json`, whole or not at all.

    Where captions are is kept from a `sizes.json` that is there. What is counted is noted on the way: after an
    interruption, or once a broken shard is replaced, shards that have not changed since are not counted again.

    Args:
        folder: of the shards.
        skip_unreadable: go on past a shard that cannot be read to its end, and count what can be read of it, which is
            what training reads.
        progress: show a progress bar.
        jobs: processes that count.

    Returns:
        What was written, and a line for each shard that cannot be read to its end.

    Raises:
        UserError: no shard in the folder, or, unless they are skipped, one that cannot be read to its end.
    """
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar")) if os.path.isdir(folder) else []
    if not names:
        raise UserError(f"{folder}: no *.tar in this folder; give the folder that holds the shards")
    urls = {name: os.path.join(folder, name) for name in names}
    return _index(urls, folder, _noted_caption_key(folder), skip_unreadable, progress, jobs)


def index_urls(
    urls: Sequence[str], out: str, *, skip_unreadable: bool = False, progress: bool = True, jobs: int = 1
) -> tuple[Sizes, list[str]]:
    """The same of shards that are elsewhere, which are read as training reads them.

    Args:
        urls: of the shards.
        out: the folder for `sizes.json`, which `--train-data` takes for the shards that it names. Made if need be.
        skip_unreadable, progress, jobs: as of `index`.

    Raises:
        UserError: `out` cannot be made, or, unless they are skipped, a shard cannot be read to its end.
    """
    make_out_folder(out)
    return _index({url: url for url in urls}, out, None, skip_unreadable, progress, jobs)


def _index(
    urls: Mapping[str, str], folder: str, caption_key: str | None, skip_unreadable: bool, progress: bool, jobs: int
) -> tuple[Sizes, list[str]]:
    """Of shards by their names in the `sizes.json` of `folder`."""
    path = os.path.join(folder, COUNTED_FILE)
    known, rows = _known(path, urls), Rows(path)
    of_shard, faults = dict(known), []
    left = [name for name in urls if name not in known]
    with tqdm(total=len(urls), initial=len(known), unit="shard", desc="index", disable=not progress) as bar:
        for name, (samples, kinds) in zip(left, _counts([urls[name] for name in left], jobs), strict=True):
            of_shard[name] = samples
            for kind in kinds:
                if not skip_unreadable:
                    raise UserError(
                        f"{urls[name]}: {kind}; replace or remove it, or count what there is with --skip-unreadable"
                    )
                faults.append(f"{urls[name]}: {kind}; {samples} samples can be read")
            if not kinds:
                rows.append({"name": name, "samples": samples, "stamp": _stamp(urls[name])})
            bar.update()
    sizes = Sizes({name: of_shard[name] for name in urls}, caption_key)
    write_sizes(folder, sizes)
    if os.path.exists(path):
        os.remove(path)
    return sizes, faults


def _counts(urls: Sequence[str], jobs: int) -> Iterator[Counted]:
    """Of each shard in turn, by several processes if there are enough shards."""
    if jobs == 1 or len(urls) <= _ENOUGH:
        yield from map(_count, urls)
        return
    with worker_pool(min(jobs, len(urls) // _ENOUGH), [__name__]) as pool:
        try:
            yield from pool.map(_count, urls, chunksize=_ENOUGH)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _count(url: str) -> Counted:
    skips = tar.Skips()
    count = tar.count_samples if is_local(url) else _read
    samples = count(url, skips.record)
    return samples, [kind for kind, _ in skips]


def _read(url: str, record: tar.Record) -> int:
    return sum(1 for _ in tar.read_shard(url, record))


def _known(path: str, urls: Mapping[str, str]) -> dict[str, int]:
    """Samples of shards that were counted before and have not changed; all else is left out of the file."""
    stamps = functools.cache(_stamp)

    def unchanged(row: dict) -> bool:
        return row["name"] in urls and row["samples"] >= 0 and row["stamp"] == stamps(urls[row["name"]])

    keep_rows(path, unchanged)
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    return {row["name"]: int(row["samples"]) for row in rows}


def _stamp(url: str) -> list[int] | None:
    """What changes with a local shard; None: it is elsewhere."""
    if not is_local(url):
        return None
    found = os.stat(url)
    return [found.st_size, found.st_mtime_ns]


def _noted_caption_key(folder: str) -> str | None:
    try:
        sizes = read_sizes(folder)
    except UserError:  # a broken file, which is about to be written anew
        return None
    return sizes.caption_key if sizes else None
