"""i-SIR: a chain's next state is drawn from the softmax of its candidates' scores, which are formed tile by tile."""

import torch
from torch import Tensor

from openclip_ext.losses.emc2.chain import Chain, Moves
from openclip_ext.ops.column_draws import BlockSums, block_sums, first_reaching, sums_of
from openclip_ext.ops.counter_random import uniform
from openclip_ext.ops.pairs import PairBatch


@torch.no_grad()
def resample(pairs: PairBatch, chains: list[Chain], step: Tensor) -> tuple[list[Moves], Tensor, Tensor]:
    """One visit of the own anchors' chains.

    A draw depends on the step, the sample's id and the scores, and on no tile. A candidate's weight in the gradient is
    its softmax, the expectation of the draw. A draw of another state than before counts as accepted.

    Args:
        pairs: the global batch.
        chains: per direction.
        step: (), of the draws.

    Returns:
        Moves per direction; `log sum_j exp(s_ij)` over the candidates j of own anchors, and over the negatives in the
        batch, (2, B) each.
    """
    in_batch = block_sums(pairs)
    visits = [
        _visit(chain, sums, uniform(step, pairs.ids, stream=direction))
        for direction, (chain, sums) in enumerate(zip(chains, in_batch, strict=True))
    ]
    log_sums = torch.stack([log_sum for _, log_sum in visits])
    return [moves for moves, _ in visits], log_sums, torch.stack([sums.log_sum.logsumexp(1) for sums in in_batch])


def _visit(chain: Chain, in_batch: BlockSums, draw: Tensor) -> tuple[Moves, Tensor]:
    blocks, log_square = in_batch.places, in_batch.log_square
    of_blocks = in_batch.log_sum.clone()
    own = torch.arange(len(draw), device=draw.device), chain.own // in_batch.width
    of_blocks[own] = torch.logaddexp(of_blocks[own], chain.held)
    log_square = torch.logaddexp(log_square, 2 * chain.held)
    if chain.recent is not None:
        recent = sums_of(chain.recent)
        blocks = torch.cat([blocks, recent.places + in_batch.columns])
        of_blocks = torch.cat([of_blocks, recent.log_sum], dim=1)
        log_square = torch.logaddexp(log_square, recent.log_square)
    log_sum = of_blocks.logsumexp(1)
    state = _drawn(chain, of_blocks, log_sum, blocks, draw)
    stored_weight, square = ((log - log_sum).exp().nan_to_num_(0.0) for log in (chain.held, log_square - log_sum))
    return Moves(state, stored_weight, square, (state != chain.start).float().mean()), log_sum


def _drawn(chain: Chain, of_blocks: Tensor, log_sum: Tensor, blocks: Tensor, draw: Tensor) -> Tensor:
    """The columns up to which weights add up to the shares `draw` (B,) of all; -1 where there is no candidate.

    Args:
        chain: whose candidates they are.
        of_blocks: (B, K), log of the sum of exp(score) over each block.
        log_sum: (B,), over all of them.
        blocks: (K, 2), where each begins and ends.
        draw: (B,), in (0, 1).
    """
    weights = (of_blocks - log_sum[:, None]).exp_().nan_to_num_(0.0)
    target = draw * weights.sum(1, dtype=torch.float64)
    block, before = first_reaching(weights, target)
    sizes = block.bincount(minlength=len(blocks)).tolist()
    state = torch.empty_like(chain.start)
    # Anchors whose draws fall into one block are looked up together.
    for place, rows in zip(blocks.tolist(), block.argsort().split(sizes), strict=True):
        if len(rows):
            weights = (chain.scores_of_block(rows, slice(*place)) - log_sum[rows, None]).exp_().nan_to_num_(0.0)
            state[rows] = first_reaching(weights, target[rows] - before[rows])[0] + place[0]
    return state.masked_fill_(log_sum == -torch.inf, -1)
