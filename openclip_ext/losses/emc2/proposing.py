"""Metropolis-Hastings over the candidates of as many anchors at a time as make a tile."""

from collections.abc import Iterator

import torch
from torch import Tensor

from openclip_ext.losses.emc2.chain import Chain, Moves
from openclip_ext.losses.emc2.kernels import Visit, walk
from openclip_ext.ops.counter_random import uniform
from openclip_ext.ops.given_weights import add_all, add_columns, add_rows
from openclip_ext.ops.pair_sums import PairSums
from openclip_ext.ops.pairs import PairBatch, fitting_tile


def propose(
    pairs: PairBatch, chains: list[Chain], share: Tensor, step: Tensor, steps: int, burn_in: float
) -> tuple[list[Moves], PairSums]:
    """One visit of the own anchors' chains, and what it makes of the gradient, which is nothing if gradients are off.

    A tile holds all candidates of some anchors: proposals are as many by default, so that a product of matrices is
    faster than rows gathered for each of them. A collective call over several ranks.

    Args:
        pairs: the global batch.
        chains: per direction.
        share: (2, B), by which the weights of an anchor's candidates are multiplied.
        step: (), of the draws.
        steps: R, proposals per visit; 0: as many as there are candidates but one.
        burn_in: share of them left out of the weights.
    """
    with_gradient = torch.is_grad_enabled()
    with torch.no_grad():
        gradient = _Gradient(pairs, chains, share)
        moves = [_empty(pairs) for _ in chains]
        for first, rows in gradient.tiles():
            visits = _walk(chains, rows, pairs.ids[rows], step, steps or chains[0].columns - 1, burn_in)
            for direction, visit in enumerate(visits):
                _write(moves[direction], chains[direction], rows, visit)
                if with_gradient:
                    gradient.add(direction, first, rows, visit.weights)
        return moves, gradient.complete()


class _Gradient:
    """Adds up weights tile by tile.

    Where all anchors of every rank are one tile, its weights serve anchors and columns in one product.
    """

    def __init__(self, pairs: PairBatch, chains: list[Chain], share: Tensor) -> None:
        self._pairs, self._chains, self._share = pairs, chains, share
        self._sums = PairSums(pairs)
        columns, device = chains[0].columns, pairs.image.device
        self._tile = pairs.tile or fitting_tile(columns, device)
        self._together = max(pairs.sizes) <= self._tile
        if pairs.tile is None and not self._together:
            self._tile = fitting_tile(2 * columns, device)  # walks keep several numbers of each proposal
        self._kept: list[Tensor] = []

    def tiles(self) -> Iterator[tuple[int, slice]]:
        """Where each tile begins on any rank, and its anchors on this one; as many tiles on all ranks."""
        own = len(self._pairs.ids)
        for first in range(0, max(self._pairs.sizes), self._tile):
            yield first, slice(min(first, own), min(first + self._tile, own))

    def add(self, direction: int, first: int, rows: slice, weights: Tensor) -> None:
        """Weights of all candidates of the anchors `rows`, (b, C), which are overwritten."""
        pairs, chain = self._pairs, self._chains[direction]
        weights *= self._share[direction, rows, None]
        if chain.recent is not None:
            weights, of_recent = weights.split([len(pairs.all_ids), len(chain.recent)], dim=1)
            add_columns(self._sums, chain.recent, direction, rows, of_recent)
        weights.scatter_(1, chain.own[rows, None], 0.0)
        if self._together:
            self._kept.append(weights)
        else:
            add_rows(self._sums, pairs, direction, first, self._tile, weights)

    def complete(self) -> PairSums:
        if self._kept:
            add_all(self._sums, self._pairs, self._kept)
        return self._sums


def _walk(chains: list[Chain], rows: slice, ids: Tensor, step: Tensor, steps: int, burn_in: float) -> list[Visit]:
    """Per direction, the visit of the anchors `rows`, whose samples are `ids` (b,)."""
    columns = chains[0].columns
    at_once = fitting_tile(16 * columns, ids.device)
    some = [slice(first, first + at_once) for first in range(0, max(1, len(ids)), at_once)]
    draws = [_Draws(step, ids, steps, direction) for direction in range(2)]
    whole = [(chain.scores(rows), chain.start[rows]) for chain in chains]

    def drawn(part: int) -> tuple[Tensor, Tensor]:
        direction, place = divmod(part, len(some))
        proposals, noise = (draws[direction].of(which, some[place]) for which in range(2))
        return proposals.mul_(columns).int().clamp_max_(columns - 1), noise.clamp_min_(2.0**-25).log_().neg_()

    parts = [(scores[own], start[own]) for scores, start in whole for own in some]
    visits = walk(parts, drawn, steps, int(burn_in * steps))
    return [_one(visits[: len(some)]), _one(visits[len(some) :])]


class _Draws:
    """Uniform draws, independent over the steps of each anchor: common ones, turned by the anchor's own."""

    def __init__(self, step: Tensor, ids: Tensor, steps: int, direction: int) -> None:
        every = torch.arange(steps, device=ids.device)
        streams = [2 * (2 * direction + which) for which in range(2)]  # of proposals and of noise
        self._common = [uniform(step, every, stream)[:, None] for stream in streams]
        self._own = [uniform(step, ids, stream + 1) for stream in streams]

    def of(self, which: int, rows: slice) -> Tensor:
        """(R, b), of the anchors `rows`."""
        return (self._common[which] + self._own[which][rows]).frac_()


def _one(visits: list[Visit]) -> Visit:
    """Visits of some anchors, and of those behind them, as one."""
    weights, state = (torch.cat([getattr(visit, name) for visit in visits]) for name in ("weights", "state"))
    return Visit(weights, state, visits[0].acceptance)


def _empty(pairs: PairBatch) -> Moves:
    """Made before the first tile: what stays of each would lie between large blocks of memory, which then grows."""
    state = torch.empty_like(pairs.ids)
    stored_weight, square = torch.empty_like(pairs.positive), torch.empty_like(pairs.positive)
    return Moves(state, stored_weight, square, pairs.positive.new_zeros(()))


def _write(moves: Moves, chain: Chain, rows: slice, visit: Visit) -> None:
    """Put the visit of the anchors `rows` among those of all."""
    moves.state[rows] = visit.state
    moves.stored_weight[rows] = visit.weights.gather(1, chain.own[rows, None]).squeeze(1)
    moves.square[rows] = torch.linalg.vecdot(visit.weights, visit.weights)
    moves.acceptance.add_(visit.acceptance, alpha=len(visit.state) / max(1, len(moves.state)))
