"""Intervals from a handful of seeds."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; None from a single value."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def half_width_of_difference(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of `mean(values) - mean(others)`, two independent samples.

    Welch's: the samples' variances may differ, and degrees of freedom come from Welch and Satterthwaite's formula.
    None where a sample has a single value.
    """
    if min(len(values), len(others)) < 2:
        return None
    shares = [float(np.var(sample, ddof=1)) / len(sample) for sample in (values, others)]
    variance = sum(shares)
    if not variance > 0:  # no spread; or no number, as of a run that diverged
        return variance
    degrees = variance**2 / sum(s**2 / (len(x) - 1) for s, x in zip(shares, (values, others), strict=True))
    return float(stats.t.ppf(0.975, degrees) * variance**0.5)
