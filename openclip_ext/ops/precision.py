"""Losses are computed in float32 at least, whatever the autocast dtype."""

import torch
from torch import Tensor


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half-precision tensors as float32, others as they are."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
