"""Weights on the line between two checkpoints of one architecture (WiSE-FT, https://arxiv.org/abs/2109.01903)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from openclip_ext.errors import UserError

STEPS = 1000  # at most, of a range of alphas
#: Integers that count training steps of a normalization layer: no output depends on them.
_COUNTERS = "num_batches_tracked"


def parse_alphas(text: str) -> list[float]:
    """`0:1:0.1`, from and to and step, both ends included; or values joined by commas.

    Raises:
        UserError: another syntax, a value outside of [0, 1], or more than 1,000.
    """
    try:
        if ":" not in text:
            alphas = [float(part) for part in text.split(",")]
        else:
            start, end, step = (float(part) for part in text.split(":"))
            count = (end - start) / step
            if not 0 <= count <= STEPS:
                raise ValueError
            alphas = [round(start + index * step, 10) for index in range(int(count + 1e-9) + 1)]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"--alpha {text}: give a range such as 0:1:0.1, or values such as 0,0.5,1") from error
    return [require_share(alpha, f"--alpha {text}") for alpha in alphas]


def require_share(alpha: float, flag: str) -> float:
    """The same number. Raises UserError: it is outside of [0, 1]."""
    if not 0 <= alpha <= 1:
        raise UserError(f"{flag}: {alpha:g} is outside of [0, 1]; 0 is the first checkpoint and 1 the second")
    return alpha


def require_same_architecture(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raises UserError: names, shapes, or integers such as indices differ, and nothing lies between the two."""
    for name in sorted(first.keys() ^ second.keys()):
        raise UserError(f"A and B have different architectures: only {'A' if name in first else 'B'} has {name}")
    for name, value in first.items():
        other = second[name]
        if value.shape != other.shape:
            shapes = f"{tuple(value.shape)} in A, {tuple(other.shape)} in B"
            raise UserError(f"A and B have different architectures: {name} is {shapes}")
        if not value.is_floating_point() and not name.endswith(_COUNTERS) and not torch.equal(value, other):
            raise UserError(f"A and B have different architectures: the integers in {name} differ")


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float, name: str) -> Tensor:
    """`(1 - alpha) first[name] + alpha second[name]` in float32, or float64 for such; integers of the nearer one."""
    a, b = first[name], second[name]
    if not a.is_floating_point():
        return a if alpha < 0.5 else b
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (1 - alpha) * a.to(dtype) + alpha * b.to(dtype)
