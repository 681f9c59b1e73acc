"""Markov chains over negatives, and the loss that is made of them."""

from openclip_ext.losses.emc2.loss import SPEC

__all__ = ["SPEC"]
