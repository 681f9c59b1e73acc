"""What an anchor's negatives in the whole sample are like: how heavy their tail is, and exact draws from it.

M   pairs of the sample     K   negatives of an anchor, M - 1
r_ij = exp(s_ij - s_ii)     ratio of a negative's score to the positive's
"""

import dataclasses
import math

import torch
from torch import Tensor

from openclip_ext.commands.diagnose.sample import Sample
from openclip_ext.losses.emc2.kernels import resampled
from openclip_ext.ops.counter_random import uniform

ROWS = 1024  # anchors at a time: the scores of all would not fit


@dataclasses.dataclass(frozen=True)
class Negatives:
    """By direction, images as anchors first, and anchor, (2, M) each.

    Attributes:
        log_mean: `log mean_j r_ij` over its K negatives.
        square: CV^2, the variance of its ratios over the square of their mean.
        hardest: share of its largest ratio in their sum.
        drawn: a negative drawn with probability in proportion to its ratio.
    """

    log_mean: Tensor
    square: Tensor
    hardest: Tensor
    drawn: Tensor

    def summary(self, batch_sizes: list[int]) -> dict:
        """Medians over anchors and directions.

        Returns:
            cv2: of CV^2; effective_negatives: of `1 / sum_j p_j^2` = K / (1 + CV^2), p_j the share of negative j.
            kz: the three quartiles of `K Z`, the sum of an anchor's ratios: what stands beside the positive's 1.
            hardest_share: of the share of the hardest negative in it.
            hardest_outside: by batch size, the share of anchors whose hardest negative is not in their batch.
        """
        negatives = self.log_mean.shape[1] - 1
        quartiles = torch.tensor([0.25, 0.5, 0.75], device=self.log_mean.device, dtype=self.log_mean.dtype)
        square = self.square.median().item()
        return {
            "cv2": square,
            "effective_negatives": negatives / (1 + square),
            "kz": (self.log_mean.flatten().quantile(quartiles) + math.log(negatives)).exp().tolist(),
            "hardest_share": self.hardest.median().item(),
            "hardest_outside": {str(size): 1 - (size - 1) / negatives for size in batch_sizes},
        }


@torch.no_grad()
def scan_negatives(sample: Sample, seed: int) -> Negatives:
    """Look at all M (M - 1) negatives in both directions."""
    image, text = sample.image.features(), sample.text.features()
    positive = sample.logit_scale * (image * text).sum(1)
    both = [
        torch.cat([_block(sample, anchors, columns, positive, rows, 2 * seed + direction)
                   for rows in torch.arange(len(sample), device=sample.device).split(ROWS)], dim=1)
        for direction, (anchors, columns) in enumerate(((image, text), (text, image)))
    ]  # fmt: skip
    log_mean, square, hardest, drawn = torch.stack(both, dim=1)
    return Negatives(log_mean, square, hardest, drawn.long())


def _block(sample: Sample, anchors: Tensor, columns: Tensor, positive: Tensor, rows: Tensor, stream: int) -> Tensor:
    """What `Negatives` has of the anchors `rows`, (4, rows)."""
    count = len(sample) - 1
    scores = sample.logit_scale * anchors[rows] @ columns.T
    scores[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
    none = torch.full_like(rows, -1)
    drawn = resampled(scores, none, uniform(torch.zeros_like(rows[0]), rows, stream)).state
    largest = scores.amax(1)
    ratios = (scores - largest[:, None]).exp_()
    total = ratios.sum(1)
    square = (count * ratios.square_().sum(1) / total.square() - 1).clamp_min(0)
    return torch.stack([largest + (total / count).log() - positive[rows], square, 1 / total, drawn.to(total.dtype)])
