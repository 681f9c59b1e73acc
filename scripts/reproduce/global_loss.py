"""The loss over all pairs, written out."""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def global_loss(image: Tensor, text: Tensor, scale: float, decoupled: bool) -> Tensor:
    """`mean_i log sum_{j != i} exp(s_ij - s_ii)`, or `mean_i log(1 + sum)` if not `decoupled`; directions averaged.

    Args:
        image, text: unit features of all pairs, (N, D).
        scale: the inverse temperature.
        decoupled: whether the positive is left out of the denominator.
    """
    scores = scale * image @ text.T
    own = torch.eye(len(scores), dtype=torch.bool)
    total = scores.new_zeros(())
    for direction in (scores, scores.T):
        log_sum = (direction - direction.diagonal()[:, None]).masked_fill(own, -torch.inf).logsumexp(1)
        total = total + (log_sum if decoupled else softplus(log_sum)).mean() / 2
    return total
