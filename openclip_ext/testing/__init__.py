"""Checks that the losses of this package pass, for authors of other losses to call."""

from openclip_ext.testing.checks import check_loss
from openclip_ext.testing.ranks import RankPool

__all__ = ["RankPool", "check_loss"]
