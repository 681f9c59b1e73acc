"""The candidates of a chain's visit, and what to tell of it."""

import dataclasses

import torch
from torch import Tensor

from openclip_ext.ops.gather import gather_rows, mean_over_ranks
from openclip_ext.ops.pairs import Columns, PairBatch


@dataclasses.dataclass(frozen=True)
class Moves:
    """What a visit makes of the chains of this rank's anchors in one direction.

    Attributes:
        state: (B,) columns, the chains' states after the visit; -1 where there is no candidate.
        stored_weight: (B,), weights of stored states in the gradient's expectation.
        square: (B,), `sum_j w_j^2` over all candidates.
        acceptance: (), the share of proposals accepted (mh), or of chains that moved (isir).
    """

    state: Tensor
    stored_weight: Tensor
    square: Tensor
    acceptance: Tensor


class Chain:
    """What the chains of this rank's anchors in one direction choose from.

    Candidates are the columns of the global batch, and those of recent steps behind them. An anchor's own column, its
    positive, holds its stored state, unless that is a sample of the batch: then the chain starts at its column, whose
    embedding is current.

    Attributes:
        anchors: (B, D).
        own: (B,) own columns.
        start: (B,) column of the state before the visit; -1: there is none.
        waiting: (B,), whether the own column holds a stored state.
        stored: (B, D), the embeddings of stored states, of any precision.
        held: (B,), score of the stored state that waits; -inf: none does.
        recent: the anchors and columns of recent steps; None: none join.

    Args:
        pairs: the global batch.
        direction: 0: images are anchors; 1: texts are.
        stored_ids: (B,) ids of the stored states; negative: none.
        stored: (B, D) their embeddings.
    """

    def __init__(self, pairs: PairBatch, direction: int, stored_ids: Tensor, stored: Tensor) -> None:
        anchors = pairs.text if direction else pairs.image
        self._pairs, self._direction = pairs, direction
        self.own = torch.arange(len(anchors), device=anchors.device) + pairs.own_rows.start
        column = _first_column(pairs.all_ids, stored_ids)
        self.waiting = (stored_ids >= 0) & (column < 0)
        self.anchors, self.stored = anchors.detach(), stored
        self.held = (pairs.logit_scale.detach() * self._products()).masked_fill_(~self.waiting, -torch.inf)
        self.start = torch.where(self.waiting, self.own, column)
        self.recent: Columns | None = None
        if pairs.stored is not None:
            columns = pairs.stored.image if direction else pairs.stored.text
            # A recent column of the sample that waits would be that candidate twice.
            self.recent = Columns(
                anchors, columns, pairs.ids, pairs.stored.ids, pairs.logit_scale, pairs.tile, stored_ids
            )

    @torch.no_grad()
    def _products(self) -> Tensor:
        """`<x_i, z_i>` of anchors and stored states, (B,)."""
        rows = zip(self.anchors.split(1024), self.stored.split(1024), strict=True)
        return torch.cat([torch.linalg.vecdot(x, z.to(x.dtype)) for x, z in rows])

    @property
    def columns(self) -> int:
        """C = G + S, of candidates."""
        return len(self._pairs.all_ids) + (0 if self.recent is None else len(self.recent))

    def scores(self, rows: slice) -> Tensor:
        """Scores of the candidates of the anchors `rows`, (b, C), -inf for what is none."""
        in_batch, same = self._pairs.scores_of(self._direction, rows)
        scores = in_batch.masked_fill(same, -torch.inf).scatter_(1, self.own[rows, None], self.held[rows, None])
        if self.recent is None:
            return scores
        recent, same = self.recent.of_rows(rows)
        return torch.cat([scores, recent.masked_fill(same, -torch.inf)], dim=1)

    def scores_of_block(self, rows: Tensor, place: slice) -> Tensor:
        """The same of any anchors `rows` (b,) and the columns `place`, all of the batch or all of recent steps."""
        size = len(self._pairs.all_ids)
        if place.start >= size:
            assert self.recent is not None
            scores, same = self.recent.of_block(rows, slice(place.start - size, place.stop - size))
            return scores.masked_fill(same, -torch.inf)
        scores, same = self._pairs.scores_of_block(self._direction, rows, place)
        scores = scores.masked_fill(same, -torch.inf)
        own = torch.arange(place.start, place.stop, device=rows.device) == self.own[rows, None]
        return torch.where(own, self.held[rows, None], scores)

    def moved_to(self, moves: Moves) -> Tensor:
        """Columns to which the chains moved, (B,); -1 for those that stayed at their stored state."""
        return moves.state.masked_fill(moves.state == self.own, -1)


def _first_column(all_ids: Tensor, ids: Tensor) -> Tensor:
    """Where in the batch the samples `ids` (B,) come first; -1: nowhere."""
    in_order, columns = all_ids.sort(stable=True)
    place = torch.searchsorted(in_order, ids).clamp_max(len(all_ids) - 1)
    return torch.where(in_order[place] == ids, columns[place], -1)


@torch.no_grad()
def chain_report(chains: list[Chain], moves: list[Moves], ages: Tensor, world_size: int) -> dict[str, Tensor]:
    """How chains do, over all ranks and both directions. A collective call when `world_size > 1`.

    Args:
        chains: per direction.
        moves: what a kernel made of them.
        ages: (2, B), optimizer steps since the stored states were stored.
        world_size: W.

    Returns:
        acceptance: share of proposals accepted (mh), or of chains that moved (isir).
        stored_weight: share of the gradient's weight on stored states.
        age_mean, age_max: of the stored states that were no samples of the batch.
        effective_samples: mean over anchors of `1 / sum_j w_j^2`.
    """
    waiting = torch.stack([chain.waiting for chain in chains])
    ages = ages * waiting
    anchors = waiting.shape[1]
    accepted, weight, square = (
        torch.stack([getattr(move, name) for move in moves]) for name in ("acceptance", "stored_weight", "square")
    )
    sums = torch.stack(
        [
            accepted.sum() * anchors,
            weight.sum(),
            (1 / square.clamp_min(1e-12)).sum(),
            ages.sum(),
            waiting.sum(),
            torch.full((), 2.0 * anchors, device=ages.device),
        ]
    ).float()
    accepted, stored, effective, age, held, anchors = mean_over_ranks(sums, world_size)
    return {
        "acceptance": accepted / anchors,
        "stored_weight": stored / anchors,
        "age_mean": age / held.clamp_min(1e-12),
        "age_max": gather_rows(ages.max()[None], (1,) * world_size).max().float(),
        "effective_samples": effective / anchors,
    }
