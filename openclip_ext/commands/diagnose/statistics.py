"""Signal, bias and noise of drawn gradients, with intervals, and the batch size at which `clip` has the same signal.

With g the gradient of one step, F that of the loss's target over all pairs, and E the mean over batches:

    signal      E cos(g, F)                     what one step is worth
    bias        |E g - F| / |F|                 what is wrong with the mean of many steps
    noise       sqrt(E |g - E g|^2) / |F|       how far single steps lie around it
    direction   cos(E g, F)                     what is left of the bias where the length of steps does not count
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from openclip_ext.commands.diagnose.gradients import GROUPS, Draws
from openclip_ext.report.intervals import half_width

Value = dict[str, float | list[float]]


def summarise(draws: Draws, full: Tensor) -> dict[str, Value]:
    """`signal`, `clip_signal` (against the gradient of `clip` over all pairs), `bias`, `noise` and `direction`.

    Each is `value` and `interval`, 95 %: of signals by Student's t over draws, of the others by the jackknife over
    groups of draws. Bias and noise are without what a finite number of draws adds to them; the bias is 0 where nothing
    can be told from that.
    """
    found = {"signal": _mean(draws.cosines), "clip_signal": _mean(draws.clip_cosines)}
    groups = _Groups.of(draws, full)
    bias, half = jackknife(lambda kept: groups.part(kept).square_bias())
    root = [math.sqrt(max(value, 0.0)) for value in (bias, bias - half, bias + half)]
    found["bias"] = {"value": root[0], "interval": root[1:]}
    noise, half = jackknife(lambda kept: groups.part(kept).noise())
    found["noise"] = {"value": noise, "interval": [max(noise - half, 0.0), noise + half]}
    direction, half = jackknife(lambda kept: groups.part(kept).direction())
    found["direction"] = {"value": direction, "interval": [max(direction - half, -1.0), min(direction + half, 1.0)]}
    return found


def _mean(values: Sequence[float]) -> Value:
    mean, half = float(np.mean(values)), half_width(values) or 0.0
    return {"value": mean, "interval": [mean - half, mean + half]}


def jackknife(estimate: Callable[[NDArray], float]) -> tuple[float, float]:
    """An estimate from all groups, and half its 95 % interval from what leaving each out changes.

    Args:
        estimate: of the groups of a mask (GROUPS,).
    """
    masks = ~np.eye(GROUPS, dtype=bool)
    each = np.array([estimate(mask) for mask in masks])
    error = math.sqrt((GROUPS - 1) / GROUPS * ((each - each.mean()) ** 2).sum())
    return estimate(np.ones(GROUPS, dtype=bool)), float(stats.t.ppf(0.975, GROUPS - 1)) * error


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Products of what is known of groups of draws, in units of |F|^2.

    Attributes:
        errors: (groups, groups), of the mean errors e = g - F with each other.
        along: (groups,), of the mean errors with F.
        squares: (groups,), means of |g|^2.
    """

    errors: NDArray
    along: NDArray
    squares: NDArray

    @classmethod
    def of(cls, draws: Draws, full: Tensor) -> "_Groups":
        errors, full = draws.errors.double(), full.cpu().double()
        unit = (full @ full).item()
        parts = np.array_split(np.array(draws.squares), _starts(len(draws.squares)))
        return cls((errors @ errors.T / unit).numpy(), (errors @ full / unit).numpy(),
                   np.array([part.mean() for part in parts]) / unit)  # fmt: skip

    def part(self, kept: NDArray) -> "_Groups":
        return _Groups(self.errors[np.ix_(kept, kept)], self.along[kept], self.squares[kept])

    def square_bias(self) -> float:
        """|E g - F|^2, from products of different groups, whose noise is independent."""
        count = len(self.along)
        return float(self.errors.sum() - np.trace(self.errors)) / (count * (count - 1))

    def _square_mean(self) -> float:
        """|E g|^2."""
        return 1 + 2 * float(self.along.mean()) + self.square_bias()

    def noise(self) -> float:
        return math.sqrt(max(float(self.squares.mean()) - self._square_mean(), 0.0))

    def direction(self) -> float:
        length = math.sqrt(max(self._square_mean(), 1e-12))
        return min(1.0, (1 + float(self.along.mean())) / length)


def _starts(draws: int) -> list[int]:
    """Where groups but the first begin, as `measure_draws` deals draws to them."""
    return [math.ceil(group * draws / GROUPS) for group in range(1, GROUPS)]


def group_means(cosines: Sequence[float]) -> NDArray:
    """(GROUPS,), means over the draws of each group."""
    return np.array([part.mean() for part in np.array_split(np.array(cosines), _starts(len(cosines)))])


def equivalent_batch(signals: NDArray, clip: dict[int, NDArray], most: int) -> dict:
    """The batch size at which `clip` has the same signal.

    Between the sizes measured, `s^2 / (1 - s^2)`, which grows in proportion to the batch of an unbiased gradient, goes
    along a line in both logarithms; beyond them it is taken to grow so.

    Args:
        signals: (GROUPS,), of the loss, by group of draws.
        clip: the same of `clip`, by batch size.
        most: pairs of the sample, where the signal is 1.

    Returns:
        value, interval, and whether it lies beyond the sizes that were measured: `extrapolated`.
    """
    sizes = sorted(clip)

    def log_batch(kept: NDArray) -> float:
        curve = np.maximum.accumulate([_power(clip[size][kept].mean()) for size in sizes])
        power = _power(signals[kept].mean())
        if not curve[0] < power < curve[-1]:
            end = 0 if power <= curve[0] else -1
            return math.log(sizes[end]) + power - curve[end]
        return float(np.interp(power, curve, np.log(sizes)))

    value, half = jackknife(log_batch)
    bound = [min(max(math.exp(log), 1.0), float(most)) for log in (value, value - half, value + half)]
    return {
        "value": bound[0],
        "interval": bound[1:],
        "extrapolated": not 0.999 * sizes[0] <= bound[0] <= 1.001 * sizes[-1],
    }


def _power(signal: float) -> float:
    """`log(s^2 / (1 - s^2))`."""
    square = min(max(signal, 1e-6), 1 - 1e-6) ** 2
    return math.log(square / (1 - square))
