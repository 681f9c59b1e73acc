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

from openclip_ext.ops.column_draws import first_reaching


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
    (steps, anchors), columns = proposals.shape, scores.shape[1]
    rows = torch.arange(anchors, device=scores.device) * columns
    places = proposals + rows  # in the flattened matrix, for which gathers are fast
    scores = scores.contiguous()
    proposed = scores.take(places)
    threshold = proposed + noise
    reach, score = threshold.clone(), proposed.clone()
    _scan_(reach, score)
    # The maps were composed for a chain that starts at -inf. Another one joins it at the first step it accepts.
    at_start = scores.take(rows + start.clamp_min(0)).masked_fill_(start < 0, -torch.inf)
    accepted = (proposed > -torch.inf).logical_and_(at_start <= reach)
    accepted[1:].logical_and_(score[:-1] <= threshold[1:])
    begun, state = (_state_after(accepted[:count], proposals, start) for count in (burn_in + 1, steps))
    # Runs of one state among the steps that are kept, by anchor: from a step that accepts to the next that does.
    begins = accepted[burn_in:].T.clone(memory_format=torch.contiguous_format)
    begins[:, 0] = True
    place = places[burn_in:].T.clone(memory_format=torch.contiguous_format)
    nowhere = scores.numel()  # of a chain that has no state yet
    place[:, 0] = torch.where(begun < 0, nowhere, begun + rows)
    begin = begins.flatten().nonzero().squeeze(1)
    length = torch.diff(begin, append=begin.new_full((1,), begins.numel())).to(scores.dtype)
    weights = scores.new_zeros(nowhere + 1).scatter_add_(0, place.flatten()[begin], length)[:-1].view_as(scores)
    weights /= weights.sum(1, keepdim=True).clamp_min_(1)
    return Visit(weights, state, accepted.float().mean())


def _state_after(accepted: Tensor, proposals: Tensor, start: Tensor) -> Tensor:
    """The column accepted last, (B,); that of `start` where none was."""
    steps = torch.arange(len(accepted), dtype=torch.int32, device=accepted.device)
    last = torch.where(accepted, steps[:, None], -1).amax(0)
    return torch.where(last < 0, start, proposals.gather(0, last.clamp_min(0).long()[None])[0])


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
    state, _ = first_reaching(weights, uniform.to(weights.dtype) * weights.sum(1))
    state = state.masked_fill(weights.sum(1) == 0, -1)
    return Visit(weights, state, (state != start).float().mean())
