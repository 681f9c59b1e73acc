"""`sizes.json` beside shards: how many samples each holds, and where their captions are."""

import dataclasses
import json
import os
from typing import Any

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
