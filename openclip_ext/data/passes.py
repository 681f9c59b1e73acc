"""A pass of a data worker over its shards, from any place on: what was drawn before is passed over without reading.

The order of a pass is that of a shuffle buffer, which is a function of the generator and of how many samples each shard
holds. So the buffer is never stored: it is filled again with stand-ins for the samples it held, and those are read when
they are drawn. A shard whose samples were all drawn is not opened.
"""

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from webdataset.filters import _shuffle

#: OpenCLIP's: size, and how far it is filled before the first sample leaves.
SAMPLE_BUFFER = (5000, 1000)

#: Yields the samples of a shard, by its number in the pass. Faults of so many of its first samples have been told
#: before, and are not again; None: all that can be.
Read = Callable[[int, int | None], Iterator[dict]]


@dataclasses.dataclass
class Place:
    """Where a data worker is in an epoch.

    Attributes:
        number: of the pass over its shards; it starts over where the epoch is longer.
        drawn: samples drawn from the shuffle buffer in this pass, usable or not.
        sizes: how many samples each shard held that was read to its end in this pass, in their order.
    """

    number: int = 0
    drawn: int = 0
    sizes: list[int] = dataclasses.field(default_factory=list)

    def advance(self, number: int, drawn: int, sizes: list[int]) -> None:
        """Follow a worker that has drawn so many in this pass, and read shards of these sizes to their end since."""
        if number != self.number:
            self.number, self.sizes = number, []
        self.drawn = drawn
        self.sizes += sizes


class Unread(NamedTuple):
    """Stands in the shuffle buffer for a sample by the number of its shard in the pass, and its own in the shard."""

    shard: int
    nth: int


class ShardPass:
    """Undecoded samples of one pass, in its order.

    Args:
        num_shards: of the pass.
        read: the samples of one of them.
        rng: of the shuffle buffer; as it was when the pass began.
        place: to go on from, in this pass; it follows what is drawn.
    """

    def __init__(self, num_shards: int, read: Read, rng: random.Random, place: Place) -> None:
        self._num_shards, self._read, self._place = num_shards, read, place
        self._finished = len(place.sizes)  # shards that were read to their end before
        self._passing = place.drawn > 0
        self._taken = 0  # samples that the buffer took before of the shard after those
        self._waiting: dict[int, set[int]] = collections.defaultdict(set)  # by shard: created as `Unread`, not drawn
        self._found: dict[Unread, dict] = {}
        self._shuffled = _shuffle(self._undecoded(), *SAMPLE_BUFFER, rng)

    def pass_over(self) -> Iterator[Unread]:
        """What was drawn before; once, and before anything else is drawn. Reads nothing."""
        for sample in islice(self._shuffled, self._place.drawn):
            self._waiting[sample.shard].remove(sample.nth)
            yield sample
        self._passing = False

    def undrawn(self, shard: int, size: int) -> Sequence[int]:
        """After `pass_over`: which samples of a shard of this size were not drawn."""
        if shard > self._finished:
            return range(size)
        rest = range(self._taken, size) if shard == self._finished else ()
        return [*sorted(self._waiting.get(shard, ())), *rest]

    def __iter__(self) -> Iterator[dict]:
        collections.deque(self.pass_over(), maxlen=0)
        for sample in self._shuffled:
            self._place.drawn += 1
            if isinstance(sample, Unread):
                sample = self._read_late(sample)
            if sample is not None:
                yield sample

    def _undecoded(self) -> Iterator[dict | Unread]:
        for shard in range(self._num_shards):
            if shard < self._finished:
                for nth in range(self._place.sizes[shard]):
                    yield self._stand_in(shard, nth)
                continue
            while self._passing:  # this one was being read
                self._taken += 1
                yield self._stand_in(shard, self._taken - 1)
            count = before = self._taken if shard == self._finished else 0
            for nth, sample in enumerate(self._read(shard, before)):
                if nth >= before:
                    count = nth + 1
                    yield sample
                elif nth in self._waiting[shard]:
                    self._found[Unread(shard, nth)] = sample
            self._place.sizes.append(count)

    def _stand_in(self, shard: int, nth: int) -> Unread:
        self._waiting[shard].add(nth)
        return Unread(shard, nth)

    def _read_late(self, sample: Unread) -> dict | None:
        """The sample that waits in the buffer; its shard is read once for all that do. None: it is there no more."""
        waiting = self._waiting.pop(sample.shard, set())
        if sample.shard < self._finished and waiting:
            for nth, found in enumerate(self._read(sample.shard, None)):
                if nth in waiting:
                    self._found[Unread(sample.shard, nth)] = found
                    waiting.remove(nth)
                if not waiting:
                    break
        return self._found.pop(sample, None)
