"""Markov chains over negatives whose law is the softmax of their scores, for all anchors at once.

    B   anchors         C   candidates of an anchor: negatives of the batch and its stored state
    R   proposals per visit

A visit restricts the target `p(j) ~ exp(score_j)` to the candidates. Since the batch is a uniform draw and the stored
state is among the candidates, any kernel that leaves the restriction invariant leaves the target over all negatives
invariant too. Proposals from the batch alone would not: a long chain would forget the stored state and sample the
softmax of the batch, whose bias the chain is there to remove.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Visit:
    """What a kernel makes of the candidates.

    Attributes:
        weights: (B, C), the share of the candidates in the gradient's expectation; rows sum to 1, or to 0 where there
            is no candidate.
        state: (B,) columns, the chain's state after the visit; -1 where there is no candidate.
        acceptance: (), the share of proposals that were accepted.
    """

    weights: Tensor
    state: Tensor
    acceptance: Tensor


@torch.no_grad()
def metropolis_hastings(scores: Tensor, start: Tensor, proposals: Tensor, noise: Tensor, burn_in: int) -> Visit:
    """Metropolis-Hastings with symmetric proposals; weights are shares of the R - `burn_in` last steps.

    Step r moves to its proposal c with probability `min(1, exp(score[c] - score[state]))`, else stays.

    Without a loop over steps: a step is the map `x -> p if x <= t else x` of the current score, p the proposal's score
    and `t = p + noise`. Maps of this form are closed under composition, `(t, p)` then `(t', p')` being
    `(max(t, t'), p' if p <= t' else p)`, so all prefixes come from a parallel scan of depth 2 log R.

    Args:
        scores: (B, C), -inf for what is no candidate; such a proposal is refused.
        start: (B,) column of the state before the visit; -1: none, so the first candidate proposed is accepted.
        proposals: (R, B) columns, for each anchor independent uniform draws.
        noise: (R, B), for each anchor independent draws of Exp(1).
        burn_in: steps left out of the weights.
    """
    steps = len(proposals)
    proposed = scores.T.gather(0, proposals)
    threshold = proposed + noise
    reach, score = threshold.clone(), proposed.clone()
    _scan_(reach, score)
    # The maps were composed for a chain that starts at -inf. Another one joins it at the first step it accepts.
    start_score = scores.gather(1, start.clamp_min(0)[:, None]).squeeze(1).masked_fill(start < 0, -torch.inf)
    joined = (start_score <= reach) & (score > -torch.inf)
    accepted = joined & (proposed > -torch.inf)
    accepted[1:] &= score[:-1] <= threshold[1:]
    # Runs of one state, by anchor: from the step that accepted it to the next that accepts another.
    anchor, begin = accepted.T.nonzero(as_tuple=True)
    last = torch.ones_like(anchor, dtype=torch.bool)
    last[:-1] = anchor[1:] != anchor[:-1]
    end = torch.where(last, steps, begin.roll(-1))
    column = proposals[begin, anchor]
    weights = torch.zeros_like(scores)
    kept = (end.clamp_min(burn_in) - begin.clamp_min(burn_in)).to(weights.dtype)
    weights.index_put_((anchor, column), kept, accumulate=True)
    waiting = torch.where(start < 0, 0, (~joined[burn_in:]).sum(0)).to(weights.dtype)
    weights.scatter_add_(1, start.clamp_min(0)[:, None], waiting[:, None])
    weights /= weights.sum(1, keepdim=True).clamp_min(1)
    state = start.scatter(0, anchor[last], column[last])
    return Visit(weights, state, torch.tensor(len(begin) / max(1, accepted.numel()), device=scores.device))


def _scan_(threshold: Tensor, score: Tensor) -> None:
    """Replace each step's map by the composition of all up to it, started at a score of -inf (Brent & Kung, 1982).

    Both (R, B).
    """
    length, stride = len(score), 1

    def compose(first: slice, second: slice) -> None:
        """Write the composition of the maps at `first`, then those at `second`, to `second`."""
        torch.where(score[first] > threshold[second], score[first], score[second], out=score[second])
        torch.maximum(threshold[first], threshold[second], out=threshold[second])

    while stride < length:
        compose(slice(stride - 1, length - stride, 2 * stride), slice(2 * stride - 1, length, 2 * stride))
        stride *= 2
    while stride > 1:
        stride //= 2
        compose(slice(2 * stride - 1, length - stride, 2 * stride), slice(3 * stride - 1, length, 2 * stride))


@torch.no_grad()
def resampled(scores: Tensor, start: Tensor, uniform: Tensor) -> Visit:
    """One step of iterated sampling importance resampling (i-SIR): the state is drawn from the softmax of the scores.

    The weights are that softmax, the expectation of the draw. A draw of another state than `start` counts as accepted.

    Args:
        scores: (B, C), -inf for what is no candidate.
        start: (B,) column of the state before the visit; -1: none.
        uniform: (B,) draws in (0, 1).
    """
    weights = scores.softmax(1).nan_to_num_(0.0)
    cumulated = weights.cumsum(1)
    target = uniform[:, None].to(weights.dtype) * cumulated[:, -1:]
    state = torch.searchsorted(cumulated, target).squeeze(1).clamp_max(scores.shape[1] - 1)
    state = state.masked_fill(cumulated[:, -1] == 0, -1)
    return Visit(weights, state, (state != start).float().mean())
