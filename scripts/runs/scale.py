"""What a step of a loss takes on many ranks: bytes, memory, and seconds by constants of a machine.

B, G, W, D, N   pairs of a rank and of all, ranks, width, samples
"""

import dataclasses

import torch

from openclip_ext.state.negative_bank import bank_bytes
from openclip_ext.state.rate_table import rate_bytes

from .methods import parse_method

FLOAT, LONG = 4, 8  # bytes


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a method.

    Attributes:
        method: `NAME[+OPTION=VALUE…]`.
        batch, width, world_size, samples: B, D, W and N.
    """

    method: str
    batch: int
    width: int
    world_size: int
    samples: int = 0

    @property
    def name(self) -> str:
        return parse_method(self.method)[0]

    @property
    def in_parts(self) -> bool:
        return "shard=true" in self.method and self.world_size > 1

    @property
    def rows(self) -> int:
        """G."""
        return self.batch * self.world_size

    @property
    def features_bytes(self) -> int:
        """That a rank receives of the others' features."""
        return (self.rows - self.batch) * 2 * self.width * FLOAT

    @property
    def bytes_per_sample(self) -> int:
        """Of a loss's tables."""
        if self.name == "emc2":
            return bank_bytes(1, self.width, torch.float16)
        return rate_bytes(1) if self.name in ("sogclr", "gamma_decomp") else 0

    @property
    def exchange_bytes(self) -> int:
        """That a rank receives of rows that others keep."""
        return round(self.batch * self.bytes_per_sample * (1 - 1 / self.world_size)) if self.in_parts else 0

    @property
    def scalar_bytes(self) -> int:
        """That a rank receives of numbers per anchor, ids, and sums."""
        others, share = self.world_size - 1, 2 * (1 - 1 / self.world_size)
        ids = LONG if self.bytes_per_sample else 0
        if self.name == "siglip":
            return LONG * others + round(share * FLOAT)
        per_anchor = {"sogclr": 3 * FLOAT, "gamma_decomp": 7 * FLOAT, "emc2": 2 * LONG}.get(self.name, 0)
        sums = LONG * others + 6 * round(share * FLOAT) if self.name == "emc2" else 0
        return others * (LONG + self.batch * (ids + 4 * FLOAT + per_anchor)) + sums

    @property
    def bytes(self) -> int:
        return self.features_bytes + self.exchange_bytes + self.scalar_bytes

    @property
    def calls(self) -> int:
        """Collective calls."""
        return {"sogclr": 5, "gamma_decomp": 6, "emc2": 7}.get(self.name, 3) + self.in_parts

    @property
    def state_bytes(self) -> float:
        """Of tables, on each rank."""
        return self.bytes_per_sample * self.samples / (self.world_size if self.in_parts else 1)


@dataclasses.dataclass(frozen=True)
class Constants:
    """CPU seconds of a method on this machine: of a step, and for each own row and each pair, at one width."""

    step: float
    row: float
    pair: float

    def seconds(self, step: Step, call: float, byte: float) -> float:
        """Of a rank's step, where a collective call takes `call` seconds, and `byte` for each byte that it receives."""
        return moved(step, call, byte) + self.step + self.row * step.batch + self.pair * step.batch * step.rows


def moved(step: Step, call: float, byte: float) -> float:
    """CPU seconds of a rank's collective calls."""
    return step.calls * call + step.bytes * byte


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A machine to plan for.

    Attributes:
        flops: per second, of products in float32.
        link: bytes per second into a rank from others.
        latency: seconds of a collective call, for each doubling of the ranks.
        encoders: seconds of forward, backward and optimizer.
    """

    flops: float
    link: float
    latency: float
    encoders: float

    def gather(self, step: Step) -> float:
        """Seconds of features, ids and scalars of the other ranks."""
        calls = step.calls - step.in_parts
        return (step.bytes - step.exchange_bytes) / self.link + calls * self.latency * self._depth(step)

    def exchange(self, step: Step) -> float:
        """Seconds of rows of the state; none where it is whole."""
        return step.in_parts * (step.exchange_bytes / self.link + self.latency * self._depth(step))

    def loss(self, step: Step, relative: float) -> float:
        """Seconds of its sums over pairs, `relative` times those of four products of B x G x D."""
        return relative * 8 * step.batch * step.rows * step.width / self.flops

    def ring(self, step: Step, relative: float) -> float:
        """Seconds of columns that go round twice, beyond those in which tiles are worked on."""
        rounds = 2 * (step.features_bytes / self.link + (step.world_size - 1) * self.latency)
        return max(0.0, rounds - self.loss(step, relative))

    def _depth(self, step: Step) -> int:
        return max(1, step.world_size - 1).bit_length()
