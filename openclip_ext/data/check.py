"""What is wrong with a set of shards."""

import collections
import dataclasses
import os
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from openclip_ext.data import tar
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.listing import ShardListing

DUPLICATE_KEY = "duplicate key"
EMPTY_CAPTION = "empty caption"


@dataclasses.dataclass
class ShardReport:
    """One shard: samples found, samples that `sizes.json` says (None without one), faults by kind."""

    url: str
    samples: int
    expected: int | None
    faults: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_shards(listing: ShardListing, *, decode: bool = True, progress: bool = True) -> list[ShardReport]:
    """Read every shard to its end and count what training would skip or misread.

    Args:
        listing: the shards.
        decode: decode every image and caption too, else only count samples.
        progress: show a progress bar.
    """
    seen: collections.Counter[tuple[str, str]] = collections.Counter()  # folder and key
    bar = tqdm(listing.urls, unit="shard", desc="check", disable=not progress)
    return [_check_shard(url, listing, seen, decode) for url in bar]


def _check_shard(url: str, listing: ShardListing, seen: collections.Counter, decode: bool) -> ShardReport:
    expected = listing.size_of.get(url)
    skips = tar.Skips()
    samples = 0
    for sample in tar.read_shard(url, skips.record):
        samples += 1
        if not decode:
            continue
        key = os.path.dirname(url), sample["__key__"]
        seen[key] += 1
        if seen[key] > 1:
            skips.record(DUPLICATE_KEY, url, sample["__ordinal__"])
        captions = CaptionFormat().of_sample(sample, skips.record, listing.caption_keys)
        if captions is not None and not all(map(str.strip, captions)):
            skips.record(EMPTY_CAPTION, url, sample["__ordinal__"])
        tar.decode_image(sample, skips.record)
    if expected is not None and samples != expected:
        skips[tar.MORE_SAMPLES if samples > expected else tar.FEWER_SAMPLES, url] += abs(samples - expected)
    return ShardReport(url, samples, expected, {kind: count for (kind, _), count in skips.items()})


def format_table(reports: list[ShardReport]) -> str:
    """One line per shard that has faults, and a line of totals."""
    rows = []
    for report in reports:
        if report.faults:
            faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(report.faults.items()))
            rows.append([report.url, f"{report.samples} samples", faults])
    lines = [tabulate(rows, tablefmt="plain", colalign=("left", "right", "left"))] if rows else []
    samples = sum(report.samples for report in reports)
    verdict = f"{len(rows)} with faults" if rows else "no faults"
    return "\n".join([*lines, f"{len(reports)} shards, {samples} samples, {verdict}"])
