"""Intervals from a handful of seeds."""

from collections.abc import Sequence

import numpy as np

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond ten it is close to the normal one.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; None from a single value."""
    if len(values) < 2:
        return None
    degrees = len(values) - 1
    t = _T95[degrees - 1] if degrees <= len(_T95) else 1.96
    return float(t * np.std(values, ddof=1) / len(values) ** 0.5)
