"""OpenCLIP's losses."""

from typing import Any


def clip_loss(**options: Any):
    """`open_clip.loss.ClipLoss`."""
    from open_clip.loss import ClipLoss

    return ClipLoss(**options)


def siglip_loss(**options: Any):
    """`open_clip.loss.SigLipLoss`."""
    from open_clip.loss import SigLipLoss

    return SigLipLoss(**options)


def distill_loss(**options: Any):
    """`open_clip.loss.DistillClipLoss`."""
    from open_clip.loss import DistillClipLoss

    return DistillClipLoss(**options)
