"""Which samples each data worker of each rank reads in an epoch, also where another number of them began it."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from webdataset.filters import _shuffle

from openclip_ext.data.listing import ShardListing
from openclip_ext.data.passes import Place, ShardPass
from openclip_ext.data.position import Layout, Position

#: OpenCLIP's, for shards: size, and how far it is filled before the first one leaves.
SHARD_BUFFER = (2000, 500)


class Part(NamedTuple):
    """Samples of a shard that one worker reads.

    Attributes:
        url: of the shard.
        ordinals: their positions in it, in order; None: all there are.
    """

    url: str
    ordinals: Sequence[int] | None = None


def shards_of(urls: Sequence[str], seed: int, epoch: int, layout: Layout, rank: int, worker: int) -> Iterator[str]:
    """A worker's shards: of one order on all ranks and workers each takes its share."""
    shuffled = _shuffle(iter(urls), *SHARD_BUFFER, random.Random(seed + epoch))
    own_rank = islice(shuffled, rank, None, layout.world_size)
    return islice(own_rank, worker, None, layout.workers)


def pass_random(seed: int, epoch: int, rank: int, worker: int, number: int) -> random.Random:
    """What orders pass `number` of a worker."""
    return random.Random(f"{seed} {epoch} {rank} {worker} {number}")


def shares(source: ShardListing, seed: int, epoch: int, position: Position) -> list[list[list[Part]]]:
    """What each worker of each rank reads in its first pass over an epoch, by rank and worker. Needs sizes.

    Where others began the epoch, what they have left is cut into parts that differ by one sample at most.
    """
    layout = position.layout
    if position.before is None:
        return [
            [[Part(url) for url in shards_of(source.urls, seed, epoch, layout, rank, worker)]
             for worker in range(layout.workers)] for rank in range(layout.world_size)
        ]  # fmt: skip
    line = list(left(source, seed, epoch, position.before))
    readers = layout.world_size * layout.workers
    total = sum(len(part.ordinals or ()) for part in line)
    cuts = [total * reader // readers for reader in range(readers + 1)]
    parts = [list(_section(line, start, stop)) for start, stop in zip(cuts, cuts[1:], strict=False)]
    return [parts[rank * layout.workers :][: layout.workers] for rank in range(layout.world_size)]


def _section(line: Sequence[Part], start: int, stop: int) -> Iterator[Part]:
    """Of all samples of the parts, one after another, those from `start` to `stop`."""
    first = 0
    for url, ordinals in line:
        assert ordinals is not None
        own = ordinals[max(0, start - first) : max(0, stop - first)]
        if len(own):
            yield Part(url, own)
        first += len(ordinals)


def left(source: ShardListing, seed: int, epoch: int, position: Position) -> Iterator[Part]:
    """What no worker has drawn yet of an epoch. Reads nothing."""
    for rank, of_rank in enumerate(shares(source, seed, epoch, position)):
        for worker, parts in enumerate(of_rank):
            place = position.places[rank][worker]
            if place.number > 0:  # it has come to the end of its share
                continue
            rng = pass_random(seed, epoch, rank, worker, place.number)
            passed = ShardPass(len(parts), _nothing, rng, Place(0, place.drawn, list(place.sizes)))
            for _ in passed.pass_over():
                pass
            for number, (url, ordinals) in enumerate(parts):
                there = range(source.size_of[url]) if ordinals is None else ordinals
                undrawn = [there[nth] for nth in passed.undrawn(number, len(there)) if nth < len(there)]
                if undrawn:
                    yield Part(url, undrawn)


def _nothing(shard: int, told: int | None) -> Iterator[dict]:
    raise AssertionError("what is passed over is not read")
