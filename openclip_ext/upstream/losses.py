"""OpenCLIP's loss of distillation."""

from typing import Any


def distill_loss(**options: Any):
    """`open_clip.loss.DistillClipLoss`."""
    from open_clip.loss import DistillClipLoss

    return DistillClipLoss(**options)
