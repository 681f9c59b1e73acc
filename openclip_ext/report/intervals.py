"""Intervals from a handful of seeds."""

import warnings
from collections.abc import Sequence

from scipy import stats


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; None from a single value."""
    return _half_width(values) if len(values) > 1 else None


def half_width_of_difference(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of `mean(values) - mean(others)`, two independent samples.

    Welch's: the samples' variances may differ. None where a sample has a single value.
    """
    return _half_width(values, others) if min(len(values), len(others)) > 1 else None


def _half_width(values: Sequence[float], others: Sequence[float] | None = None) -> float:
    with warnings.catch_warnings():
        # Values that are all the same are no reason to doubt that their spread is none.
        warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
        test = stats.ttest_1samp(values, 0) if others is None else stats.ttest_ind(values, others, equal_var=False)
        interval = test.confidence_interval(0.95)
    return float(interval.high - interval.low) / 2
