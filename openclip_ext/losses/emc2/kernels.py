"""Markov chains over negatives whose law is the softmax of their scores, for all anchors at once.

    B   anchors         C   candidates of an anchor: negatives of the batch and its stored state
    R   proposals per visit

A visit restricts the target `p(j) ~ exp(score_j)` to the candidates. Since the batch is a uniform draw and the stored
state is among the candidates, any kernel that leaves the restriction invariant leaves the target over all negatives
invariant too. Proposals from the batch alone would not: a long chain would forget the stored state and sample the
softmax of the batch, whose bias the chain is there to remove.
"""

import dataclasses
from collections.abc import Callable, Sequence

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

    Args:
        scores: (B, C), -inf for what is no candidate; such a proposal is refused.
        start: (B,) column of the state before the visit; -1: none, so the first candidate proposed is accepted.
        proposals: (R, B) columns, for each anchor independent uniform draws.
        noise: (R, B), for each anchor independent draws of Exp(1).
        burn_in: steps left out of the weights.
    """
    (visit,) = walk([(scores, start)], lambda _: (proposals, noise), len(proposals), burn_in)
    return visit


@torch.no_grad()
def walk(
    parts: Sequence[tuple[Tensor, Tensor]], draws: Callable[[int], tuple[Tensor, Tensor]], steps: int, burn_in: int
) -> list[Visit]:
    """`metropolis_hastings` of anchors in several parts, all of which take a step before any takes the next.

    Parts are small on the CPU: what is looked up in the scores of one is in its cache then.

    Args:
        parts: scores and start of some anchors each.
        draws: tells proposals and noise of a part by its place; either may be changed.
        steps: R.
        burn_in: as of `metropolis_hastings`.

    Returns:
        A visit per part, whose acceptance is that of all.
    """
    sizes = [len(start) for _, start in parts]
    limit = parts[0][0].new_empty(steps, sum(sizes))
    candidate = limit.new_empty(steps, 2, sum(sizes))
    before, first = [], 0
    for part, (scores, start) in enumerate(parts):
        rows = slice(first, first + len(start))
        before.append(_look_up(scores, start, *draws(part), limit[:, rows], candidate[:, :, rows]))
        first = rows.stop
    # A loop takes as long for few anchors as for many.
    loop = limit.device.type == "cpu" and sum(sizes) >= 512
    states, accepted = (states_by_steps if loop else states_by_scan)(limit, candidate, torch.cat(before, dim=1))
    acceptance = accepted.sum() / max(1, accepted.numel())
    return [
        _counted(states, scores.shape[1], burn_in, acceptance)
        for states, (scores, _) in zip(states.split(sizes, dim=1), parts, strict=True)
    ]


def states_by_steps(limit: Tensor, candidate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the states after each step, and whether the step accepted its proposal (0 or 1), (R, B) each.

    Args:
        limit: (R, B), a step accepts if the state's score is not above.
        candidate: (R, 2, B), score and column of the proposals; all are finite.
        state: (2, B), those of the state before; where there is none the score is the least number.
    """
    accepted, states = torch.empty_like(limit), torch.empty_like(candidate)
    rows = (x.unbind() for x in (limit, candidate, accepted, states))
    for limits, candidates, accepts, after in zip(*rows, strict=True):
        torch.le(state[0], limits, out=accepts)
        state = torch.lerp(state, candidates, accepts, out=after)  # exact, and twice as fast as a choice
    return states[:, 1], accepted


def states_by_scan(limit: Tensor, candidate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a loop over steps. Overwrites `candidate`.

    A step is the map `x -> p if x <= t else x` of the current score, p the proposal's score and `t` the limit. Maps of
    this form with `p <= t` are closed under composition, `(t, p)` then `(t', p')` being `(max(t, t'), p' if p <= t'
    else p)`, so all prefixes come from a parallel scan of depth 2 log R.
    """
    reach = limit.clone()
    _scan_(reach, candidate)
    # The maps were composed for a chain that starts below all. Another one joins it at the first step it accepts.
    joined = (state[0] <= reach).to(limit.dtype)
    accepted = joined * (limit > -torch.inf)
    accepted[1:] *= candidate[:-1, 0] <= limit[1:]
    return torch.lerp(state[1].expand_as(joined), candidate[:, 1], joined), accepted


def _scan_(limit: Tensor, state: Tensor) -> None:
    """Replace each step's map by the composition of all up to it (Brent & Kung, 1982): limits (R, B), states (R, 2, B).

    A state is that of a chain which has accepted the first step's proposal.
    """
    length, stride = len(limit), 1

    def compose(first: slice, second: slice) -> None:
        """Write the composition of the maps at `first`, then those at `second`, to `second`."""
        stays = (state[first, :1] > limit[second, None]).to(limit.dtype)
        torch.lerp(state[second], state[first], stays, out=state[second])
        torch.maximum(limit[first], limit[second], out=limit[second])

    while stride < length:
        compose(slice(stride - 1, length - stride, 2 * stride), slice(2 * stride - 1, length, 2 * stride))
        stride *= 2
    while stride > 1:
        stride //= 2
        compose(slice(2 * stride - 1, length - stride, 2 * stride), slice(3 * stride - 1, length, 2 * stride))


def _look_up(
    scores: Tensor, start: Tensor, proposals: Tensor, noise: Tensor, limit: Tensor, candidate: Tensor
) -> Tensor:
    """Fill in some anchors' `limit` and `candidate`, and return their `state`, as of `states_by_steps`."""
    least = torch.finfo(scores.dtype).min
    first = torch.arange(len(start), device=start.device) * scores.shape[1]
    flat = scores.flatten()
    places = (proposals + first.to(proposals.dtype)).flatten()
    proposed = flat.index_select(0, places).view_as(noise)
    torch.add(proposed, noise, out=limit)
    torch.clamp_min(proposed, least, out=candidate[:, 0])  # what is no candidate is below all limits anyway
    candidate[:, 1] = proposals
    score = flat[first + start.clamp_min(0)].masked_fill_(start < 0, least)
    return torch.stack([score, start.to(scores.dtype)])


def _counted(states: Tensor, columns: int, burn_in: int, acceptance: Tensor) -> Visit:
    """The visit that is made of the states (R, B) after each step, -1 where there is none."""
    places = states[burn_in:].long().add_(1)  # a column more, for no state
    places += torch.arange(states.shape[1], device=states.device) * (columns + 1)
    one = states.new_ones(()).expand(places.numel())
    counts = states.new_zeros(states.shape[1] * (columns + 1)).scatter_add_(0, places.flatten(), one)
    weights = counts.view(-1, columns + 1)[:, 1:]
    return Visit(weights / weights.sum(1, keepdim=True).clamp_min_(1), states[-1].long(), acceptance)


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
