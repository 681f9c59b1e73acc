"""The memory of a loss as it is after long training at these parameters.

Rates start at their exact mean, the rate over all negatives, and pass over the sample until their spread is that of
a running average. Chains start at exact draws from the softmax over all negatives, which is their law. Recent pairs
fill up with drawn batches. Of another memory nothing is known: it passes over the sample a fixed number of times.
"""

import math
from typing import Any

import torch
from torch import Tensor

from openclip_ext.commands.diagnose.gradients import Walk
from openclip_ext.commands.diagnose.negatives import Negatives
from openclip_ext.losses.emc2.loss import EMC2Loss
from openclip_ext.losses.rates import RateLoss

SETTLED = 0.99  # of the variance that a running average has in the end
MOST_PASSES = 30
PASSES_OF_UNKNOWN = 10


def settle(walk: Walk, negatives: Negatives, batch_size: int, seed: int) -> dict[str, Any]:
    """Bring the loss's memory to its stationary state.

    Returns:
        passes: over the sample; share: of the stationary variance that rates have reached, 1 where there are none;
        null where it is not known whether the memory has settled.
    """
    loss: Any = walk.loss.base
    if not walk.loss.has_state:
        return {"passes": 0, "share": 1.0}
    known = isinstance(loss, RateLoss | EMC2Loss) or getattr(loss, "recent", None) is not None
    weight, passes, share = 1.0, 0, 1.0
    if isinstance(loss, RateLoss):
        weight = _fill_rates(loss.rates, loss.estimate(negatives.log_mean), loss.batch_weight)
    if isinstance(loss, EMC2Loss):
        _fill_chains(loss, walk, negatives)
        if loss.rates is not None:
            weight = _fill_rates(loss.rates, negatives.log_mean + loss.log_negatives, loss.options.gamma)
    if weight < 1:
        keep = 2 * math.log1p(-weight)  # of the variance, per visit
        passes = min(math.ceil(math.log(1 - SETTLED) / keep), MOST_PASSES)
        share = 1 - math.exp(keep * passes)
    passes = passes if known else PASSES_OF_UNKNOWN
    steps = passes * max(1, len(walk.sample) // batch_size)
    if getattr(loss, "recent", None) is not None:
        steps = max(steps, 2 * loss.recent.num_steps + 2)  # one check from its first age to its last
    _pass_over(walk, batch_size, steps, seed)
    return {"passes": passes, "share": share if known else None}


def _fill_rates(rates: Any, log_rate: Tensor, weight: float) -> float:
    """Write the rate over all negatives of every sample; returns the weight of a visit."""
    rates.stage(torch.arange(log_rate.shape[1], device=log_rate.device), log_rate.to(rates.values.dtype))
    rates.commit()
    return weight


def _fill_chains(loss: EMC2Loss, walk: Walk, negatives: Negatives) -> None:
    """Put every sample's chain at the negative that was drawn for it."""
    ids = torch.arange(len(walk.sample), device=walk.sample.device)
    loss.bank.stage(ids, negatives.drawn, ids, walk.sample.text.features(), walk.sample.image.features())
    loss.bank.commit(loss.steps_taken)


def _pass_over(walk: Walk, batch_size: int, steps: int, seed: int) -> None:
    """Show the loss so many batches, in passes over the sample, each in another order."""
    generator = torch.Generator().manual_seed(hash((seed, batch_size, 1)) % 2**63)
    size, left = len(walk.sample), steps
    while left:
        order = torch.randperm(size, generator=generator).to(walk.sample.device)
        for ids in order[: size // batch_size * batch_size].split(batch_size)[:left]:
            walk.advance(ids)
            left -= 1
