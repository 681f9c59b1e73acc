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
    score = scores.T.gather(0, proposals)
    threshold = score + noise
    accepted = torch.arange(steps, dtype=torch.int32, device=scores.device)[:, None].repeat(1, len(scores))
    _scan_(threshold, score, accepted)
    start_score = scores.gather(1, start.clamp_min(0)[:, None]).squeeze(1).masked_fill(start < 0, -torch.inf)
    # The maps were composed for a chain that starts at -inf. Another one joins it at the first step it accepts.
    moved = (start_score <= threshold) & (score > -torch.inf)
    ends = moved.clone()
    ends[:-1] &= accepted[:-1] != accepted[1:]
    weights = torch.zeros_like(scores)
    step, anchor = ends.nonzero(as_tuple=True)
    begin = accepted[step, anchor].long()
    kept = (step + 1 - begin.clamp_min(burn_in)).clamp_min(0)
    weights.index_put_((anchor, proposals[begin, anchor]), kept.to(weights.dtype), accumulate=True)
    waiting = (~moved[burn_in:]).sum(0).to(weights.dtype)
    weights.scatter_add_(1, start.clamp_min(0)[:, None], torch.where(start < 0, 0, waiting)[:, None])
    weights /= weights.sum(1, keepdim=True).clamp_min(1)
    state = torch.where(moved[-1], proposals.gather(0, accepted[-1:].long()).squeeze(0), start)
    return Visit(weights, state, torch.tensor(len(step) / max(1, accepted.numel()), device=scores.device))


def _scan_(threshold: Tensor, score: Tensor, accepted: Tensor) -> None:
    """Replace each step's map by the composition of all up to it, started at a score of -inf (Brent & Kung, 1982).

    Each (R, B); `accepted` is the step that the score is from.
    """
    length, stride = len(score), 1

    def compose(first: slice, second: slice) -> None:
        """Write the composition of the maps at `first`, then those at `second`, to `second`."""
        stays = score[first] > threshold[second]
        torch.maximum(threshold[first], threshold[second], out=threshold[second])
        torch.where(stays, score[first], score[second], out=score[second])
        torch.where(stays, accepted[first], accepted[second], out=accepted[second])

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
    weights = scores.softmax(1).nan_to_num(0.0)
    cumulated = weights.cumsum(1)
    target = uniform[:, None].to(weights.dtype) * cumulated[:, -1:]
    state = torch.searchsorted(cumulated, target).squeeze(1).clamp_max(scores.shape[1] - 1)
    state = state.masked_fill(cumulated[:, -1] == 0, -1)
    return Visit(weights, state, (state != start).float().mean())
