"""The candidates of a chain's visit, and what to tell of it."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from openclip_ext.losses.emc2.kernels import Visit
from openclip_ext.ops.gather import gather_rows, mean_over_ranks
from openclip_ext.ops.pair_matrix import scores_in_batch, scores_with_stored
from openclip_ext.ops.pairs import PairBatch


class Chain:
    """What the chains of this rank's anchors in one direction choose from.

    Candidates are the columns of the global batch, and those of recent steps behind them. An anchor's own column, its
    positive, holds its stored state, unless that is a sample of the batch: then the chain starts at its column, whose
    embedding is current.

    Attributes:
        scores: (B, G + S), -inf for what is no candidate.
        start: (B,) column of the state before the visit; -1: there is none.
        waiting: (B,), whether the own column holds a stored state.
        stored_gap: (B,), score of the stored state minus that of the positive, with gradient; 0 where none waits.

    Args:
        pairs: the global batch.
        direction: 0: images are anchors; 1: texts are.
        stored_ids: (B,) ids of the stored states; negative: none.
        stored: (B, D) their embeddings.
    """

    def __init__(self, pairs: PairBatch, direction: int, stored_ids: Tensor, stored: Tensor) -> None:
        anchors, partners = (pairs.text, pairs.image) if direction else (pairs.image, pairs.text)
        self._pairs, self._direction = pairs, direction
        self._anchors = anchors
        self.own = torch.arange(len(anchors), device=anchors.device)[:, None] + pairs.own_rows.start
        self._positive = pairs.logit_scale * (anchors * partners).sum(1)
        stored_score = pairs.logit_scale * (anchors * stored).sum(1)
        column = _first_column(pairs.all_ids, stored_ids)
        self.waiting = (stored_ids >= 0) & (column < 0)
        self.stored_gap = torch.where(self.waiting, stored_score - self._positive, 0.0)
        with torch.no_grad():
            in_batch, same = scores_in_batch(pairs, direction)
            scores = in_batch.masked_fill(same, -torch.inf)
            held = torch.where(self.waiting, stored_score, -torch.inf)[:, None]
            self.scores = scores.scatter_(1, self.own, held)
            if pairs.stored is not None:
                # A recent column of the sample that waits would be that candidate twice.
                recent, same = scores_with_stored(pairs, direction)
                recent = recent.masked_fill(same | (pairs.stored.ids == stored_ids[:, None]), -torch.inf)
                self.scores = torch.cat([self.scores, recent], dim=1)
            self.start = torch.where(self.waiting, self.own[:, 0], column)

    def in_batch(self, weights: Tensor) -> Tensor:
        """Weights of the batch's columns, without those of stored states, (B, G)."""
        return weights[:, : len(self._pairs.all_ids)].scatter(1, self.own, 0.0)

    def recent_gap(self, weights: Tensor) -> Tensor | float:
        """The weighted sum of `s_ij - s_ii` over the columns j of recent steps, (B,), with gradient."""
        recent = self._pairs.stored
        if recent is None:
            return 0.0
        weights = weights[:, len(self._pairs.all_ids) :].to(self._anchors.dtype)
        mixed = weights @ (recent.image if self._direction else recent.text)
        return self._pairs.logit_scale * (self._anchors * mixed).sum(1) - weights.sum(1) * self._positive

    def stored_weight(self, visit: Visit) -> Tensor:
        """Weights of stored states, (B,)."""
        return visit.weights.gather(1, self.own).squeeze(1)

    def moved_to(self, visit: Visit) -> Tensor:
        """Columns to which the chains moved, (B,); -1 for those that stayed at their stored state."""
        return visit.state.masked_fill(visit.state == self.own[:, 0], -1)


def _first_column(all_ids: Tensor, ids: Tensor) -> Tensor:
    """Where in the batch the samples `ids` (B,) come first; -1: nowhere."""
    in_order, columns = all_ids.sort(stable=True)
    place = torch.searchsorted(in_order, ids).clamp_max(len(all_ids) - 1)
    return torch.where(in_order[place] == ids, columns[place], -1)


@torch.no_grad()
def chain_report(chains: list[Chain], visits: list[Visit], ages: Tensor, world_size: int) -> dict[str, Tensor]:
    """How chains do, over all ranks and both directions. A collective call when `world_size > 1`.

    Args:
        chains: per direction.
        visits: what a kernel made of them.
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
    sums = torch.stack(
        [
            _sum(visit.acceptance * anchors for visit in visits),
            _sum(chain.stored_weight(visit).sum() for chain, visit in zip(chains, visits, strict=True)),
            _sum(
                (1 / torch.linalg.vector_norm(visit.weights, dim=1).square().clamp_min(1e-12)).sum() for visit in visits
            ),
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


def _sum(values: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)
