"""Options of losses whose batch the pairs of recent steps can join, and what these losses need."""

import dataclasses
from typing import Any

import torch

from openclip_ext.options import option
from openclip_ext.state.recent_pairs import RecentPairs


def recent_batches(default: int) -> int:
    """The option that says how many steps are kept, with the default of a loss."""
    return option(
        default, "K, recent steps whose pairs may join the batch, as far as they are fresh; 0: none", allowed=">= 0",
        check=lambda steps: steps >= 0,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecentOptions:
    """Part of the options of a loss."""

    recent_batches: int = recent_batches(0)
    recent_check: int = option(
        100,
        "steps between two measurements of how fresh recent pairs are",
        allowed=">= 1",
        check=lambda every: every >= 1,
    )
    recent_limit: float = option(
        0.1, "largest error of scores, over their spread, with which recent pairs may join", allowed="> 0",
        check=lambda limit: limit > 0,
    )  # fmt: skip
    recent_enough: float = option(
        1.0, "negatives that count in a batch, per anchor, of which on recent pairs stay out; inf: never",
        allowed="> 0", check=lambda enough: enough > 0,
    )  # fmt: skip


def recent_needs(options: RecentOptions) -> frozenset[str]:
    """What a loss needs for its recent pairs, beyond its own needs."""
    return frozenset({"sample_ids", "encoded_again"}) if options.recent_batches else frozenset()


def recent_pairs(options: Any, device: torch.device) -> RecentPairs | None:
    """The memory that a loss's options ask for; None: none."""
    if not isinstance(options, RecentOptions) or not options.recent_batches:
        return None
    limits = options.recent_limit, device, options.recent_enough
    return RecentPairs(options.recent_batches, options.recent_check, *limits)
