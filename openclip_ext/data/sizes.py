"""`sizes.json` beside shards: how many samples each holds, and where their captions are."""

import dataclasses
import json
import os
from typing import Any

from tqdm import tqdm

from openclip_ext.data import tar
from openclip_ext.errors import UserError
from openclip_ext.files import read_json, write_json

SIZES_FILE = "sizes.json"
MOST_SAMPLES = 1 << 53  # ids are int64, and some pass through floats

# Stock OpenCLIP looks up shards by name, and readers of sizes alone take each value for a number: so a note is a name.
_CAPTION_KEY = "caption_key="


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What `sizes.json` says.

    Attributes:
        of_shard: samples by shard name.
        caption_key: in the samples' JSON, holds their captions; None: a sample's caption is its text.
    """

    of_shard: dict[str, int]
    caption_key: str | None = None

    @property
    def total(self) -> int:
        return sum(self.of_shard.values())


def read_sizes(folder: str) -> Sizes | None:
    """What the folder's `sizes.json` says; None where there is none. Raises UserError: it is no table of sizes."""
    path = os.path.join(folder, SIZES_FILE)
    if not os.path.exists(path):
        return None
    try:
        entries = {name: _size(size) for name, size in read_json(path).items()}
        if sum(entries.values()) > MOST_SAMPLES:
            raise ValueError(f"{sum(entries.values()):.3g} samples in all")
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        what = "not valid JSON" if isinstance(error, json.JSONDecodeError) else "not a table of sizes by shard"
        raise UserError(f"{path}: {what} ({error}); write it anew with: openclip-ext shards index") from error
    notes = [name.removeprefix(_CAPTION_KEY) for name in entries if name.startswith(_CAPTION_KEY)]
    sizes = {name: size for name, size in entries.items() if not name.startswith(_CAPTION_KEY)}
    return Sizes(sizes, notes[0] if notes else None)


def _size(value: Any) -> int:
    """Raises ValueError: no number of samples. Sizes in text or with a point occur."""
    size = int(value)
    if size < 0 or size != float(value) or isinstance(value, bool):
        raise ValueError(f"{value!r} samples")
    return size


def write_sizes(folder: str, sizes: Sizes) -> None:
    """Write `sizes.json`, whole or not at all."""
    note = {} if sizes.caption_key is None else {_CAPTION_KEY + sizes.caption_key: 0}
    write_json(sizes.of_shard | note, os.path.join(folder, SIZES_FILE))


def index(folder: str, *, skip_unreadable: bool = False, progress: bool = True) -> tuple[Sizes, list[str]]:
    """Count the samples of every `*.tar` in a folder and write `sizes.json`, whole or not at all.

    Where captions are is kept from a `sizes.json` that is there.

    Args:
        folder: of the shards.
        skip_unreadable: go on past a shard that cannot be read to its end, and count what can be read of it, which is
            what training reads.
        progress: show a progress bar.

    Returns:
        What was written, and a line for each shard that cannot be read to its end.

    Raises:
        UserError: no shard in the folder, or, unless they are skipped, one that cannot be read to its end.
    """
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar")) if os.path.isdir(folder) else []
    if not names:
        raise UserError(f"{folder}: no *.tar in this folder; give the folder that holds the shards")
    of_shard, faults = {}, []
    for name in tqdm(names, unit="shard", desc="index", disable=not progress):
        skips = tar.Skips()
        of_shard[name] = tar.count_samples(os.path.join(folder, name), skips.record)
        for kind, url in skips:
            if not skip_unreadable:
                raise UserError(f"{url}: {kind}; replace or remove it, or count what there is with --skip-unreadable")
            faults.append(f"{url}: {kind}; {of_shard[name]} samples can be read")
    sizes = Sizes(of_shard, _noted_caption_key(folder))
    write_sizes(folder, sizes)
    return sizes, faults


def _noted_caption_key(folder: str) -> str | None:
    try:
        sizes = read_sizes(folder)
    except UserError:  # a broken file, which is about to be written anew
        return None
    return sizes.caption_key if sizes else None
