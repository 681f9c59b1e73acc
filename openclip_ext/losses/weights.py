"""The weight of a loss or term: a number, or a line over training."""

import dataclasses
import math
import re

_SYNTAX = re.compile(r"([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?")


@dataclasses.dataclass(frozen=True)
class Weight:
    """Goes from `start` to `end` along a line over the first `share` of training, and stays there."""

    start: float
    end: float
    share: float = 1.0

    @property
    def constant(self) -> bool:
        return self.start == self.end

    def at(self, step: int, total_steps: int) -> float:
        """The weight at an optimizer step of `total_steps`."""
        progress = min(step / max(self.share * total_steps, 1e-12), 1.0)
        return self.start + (self.end - self.start) * progress


def parse_weight(value: str | float | Weight) -> Weight:
    """`0.5`; `0:0.5`, a line over the whole of training; `0:0.5@0.2`, one over its first fifth.

    Raises:
        ValueError: another syntax, a weight that is negative or not finite, a share outside of (0, 1].
    """
    if isinstance(value, Weight):
        return value
    match = _SYNTAX.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"{value!r} is no weight")
    start = float(match[1])
    weight = Weight(start, start if match[2] is None else float(match[2]), float(match[3] or 1.0))
    accepted = all(math.isfinite(x) and x >= 0 for x in (weight.start, weight.end)) and 0 < weight.share <= 1
    if not accepted or (match[3] and not match[2]):
        raise ValueError(f"{value!r} is no weight")
    return weight
