"""Image-text retrieval over paired features."""

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def retrieval_metrics(image_features: Tensor, text_features: Tensor, *, block: int = 1024) -> dict[str, float]:
    """Rank of each query's own partner among all candidates, both ways.

    Works on blocks of queries, so no (M, M) matrix is formed. Candidates with an equal score count as half ahead,
    so that constant features score as chance would.

    Args:
        image_features: (M, D), unit norm.
        text_features: (M, D), unit norm; row i belongs to row i of the images.
        block: queries at a time.

    Returns:
        `image_to_text_R@1`, `@5`, `@10`, `_mean_rank`, `_median_rank`, and the same for `text_to_image`; shares are
        in [0, 1], ranks start at 1. Names as in OpenCLIP.
    """
    metrics = {}
    directions = {"image_to_text": (image_features, text_features), "text_to_image": (text_features, image_features)}
    for name, (queries, candidates) in directions.items():
        ranks = torch.cat(
            [_ranks(queries[start : start + block], candidates, start) for start in range(0, len(queries), block)]
        )
        metrics[f"{name}_mean_rank"] = ranks.mean().item() + 1
        metrics[f"{name}_median_rank"] = float(np.median(ranks)) // 1 + 1
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = (ranks < k).double().mean().item()
    return metrics


def _ranks(queries: Tensor, candidates: Tensor, start: int) -> Tensor:
    """Number of candidates ahead of each query's partner, (block,) float64."""
    scores = queries.float() @ candidates.float().T
    own = scores.gather(1, torch.arange(start, start + len(queries), device=scores.device)[:, None])
    ahead = (scores > own).sum(1)
    equal = (scores == own).sum(1) - 1
    return (ahead + equal / 2).double().cpu()
