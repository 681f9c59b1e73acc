"""Random draws that are a function of a counter: the same for a sample on whichever rank, batch row or device it is."""

import torch
from torch import Tensor

# The constants of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) as signed 64-bit integers.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output for a state, elementwise on int64 (arithmetic wraps around)."""
    z = state + _INCREMENT
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right, which int64 does not have."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(step: Tensor, ids: Tensor, stream: int) -> Tensor:
    """Independent uniform draws in (0, 1), one per id: float32, shape of `ids`.

    Args:
        step: () int64, what changes between optimizer steps; or of a shape that goes with that of `ids`.
        ids: int64 sample ids.
        stream: tells several draws of one sample in one step apart.
    """
    bits = _mix(_mix(_mix(step) + stream) ^ ids)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32).add(0.5).mul(2.0**-24)


def log_gamma_mean(step: Tensor, ids: Tensor, stream: int, draws: int) -> Tensor:
    """log of the mean of `draws` independent Exp(1) variables, that is of a Gamma(draws, draws) draw, one per id.

    Args:
        step: () int64, what changes between optimizer steps.
        ids: int64 sample ids.
        stream: tells several draws of one sample in one step apart.
        draws: m, at least 1.

    Returns:
        float32, shape of `ids`.
    """
    draw = (-uniform(step, ids, stream * draws + index).log() for index in range(draws))
    return (sum(draw, start=torch.zeros_like(ids, dtype=torch.float32)) / draws).log()
