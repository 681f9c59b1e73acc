"""Image-text retrieval over paired features.

N   images      M   texts      D   width
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
RETRIEVAL_METRICS = tuple(
    f"{way}_{score}"
    for way in ("image_to_text", "text_to_image")
    for score in (*(f"R@{k}" for k in RECALL_AT), "mean_rank", "median_rank")
)
OWN_BLOCK = 128  # texts at a time whose scores with their own images are read off a diagonal


@torch.no_grad()
def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor | None = None,
    *,
    image_block: int = 1024,
    text_block: int = 4096,
) -> dict[str, float]:
    """Rank of each query's own partner among all candidates, both ways.

    An image is found by the best of its own texts: its rank is one more than the number of other images' texts ahead
    of that one, so that a hit among the first k is a rank of at most k. A text has one image. Images without a text
    are candidates only.

    Scores that differ by less than their rounding error, `sqrt(D) * 2^-23`, are equal, and what is said of ranks is the
    mean over all orders of equals: a tie is neither a hit nor a miss. Let a candidates be ahead of the query's best own
    one, and e others be equal to it and to m own ones in all. Then the rank is `1 + a + e / (m + 1)`, and in a share
    `1 - C(e, k - a) / C(e + m, k - a)` of the orders one of the m is among the first k; for m = 1 that is
    `(k - a) / (e + 1)`. Constant features thus score as chance would. A score that is not a number is ahead of others,
    and finds nothing.

    Every score is computed once, in tiles of `image_block` x `text_block`; beside the features, memory is that of a
    few tiles and of a few numbers per image and text.

    Args:
        image_features: (N, D), unit norm.
        text_features: (M, D), unit norm.
        image_of_text: (M,) row of the image that each text belongs to; None: row i of the texts belongs to row i of
            the images.
        image_block, text_block: size of a tile.

    Returns:
        `image_to_text_R@1`, `@5`, `@10`, `_mean_rank`, `_median_rank`, and the same for `text_to_image`; shares are
        in [0, 1], ranks start at 1. Names as in OpenCLIP.
    """
    if image_of_text is None:
        image_of_text = torch.arange(len(text_features))
    image_of_text = image_of_text.to(text_features.device)
    tolerance = text_features.shape[1] ** 0.5 * torch.finfo(torch.float32).eps
    own = _own_scores(image_features, text_features, image_of_text)
    best = own.new_full((len(image_features),), -torch.inf).scatter_reduce_(0, image_of_text, own, "amax")
    level_with_best = (own >= best[image_of_text] - tolerance).long()
    by_image = _Standing(best, tolerance, torch.zeros_like(best, dtype=torch.long))
    by_image.own_equals.index_add_(0, image_of_text, level_with_best)
    by_text = _Standing(own, tolerance, (~own.isnan()).long())
    for rows in _blocks(len(image_features), image_block):
        for columns in _blocks(len(text_features), text_block):
            scores = image_features[rows].float() @ text_features[columns].float().T
            by_image.count(rows, scores)
            by_text.count(columns, scores.T)
    return _metrics(by_image, by_text, image_of_text)


def score_metrics(image_to_text: Tensor, text_to_image: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """`retrieval_metrics` of scores that may differ by way; equal ones are those that are the same number.

    Args:
        image_to_text: (N, M), by which images choose among texts.
        text_to_image: (M, N), by which texts choose among images.
        image_of_text: (M,), row of the image that each text belongs to.
    """
    texts = torch.arange(len(image_of_text), device=image_of_text.device)
    own = image_to_text[image_of_text, texts]
    best = own.new_full((len(image_to_text),), -torch.inf).scatter_reduce_(0, image_of_text, own, "amax")
    by_image = _Standing(best, 0.0, torch.zeros_like(best, dtype=torch.long))
    by_image.own_equals.index_add_(0, image_of_text, (own == best[image_of_text]).long())
    by_text = _Standing(text_to_image[texts, image_of_text], 0.0, torch.ones_like(texts))
    by_image.count(slice(None), image_to_text)
    by_text.count(slice(None), text_to_image)
    return _metrics(by_image, by_text, image_of_text)


def _metrics(by_image: "_Standing", by_text: "_Standing", image_of_text: Tensor) -> dict[str, float]:
    images, texts = len(by_image.own), len(by_text.own)
    has_text = torch.zeros(images, dtype=torch.bool)
    has_text[image_of_text.cpu()] = True
    places = {
        "image_to_text": [numbers[has_text] for numbers in by_image.places(texts)],
        "text_to_image": by_text.places(images),
    }
    return {f"{way}_{name}": value for way, numbers in places.items() for name, value in _summary(*numbers).items()}


@dataclasses.dataclass
class _Standing:
    """How many candidates are seen to be behind each query's own score, (queries,) each."""

    own: Tensor
    tolerance: float
    own_equals: Tensor  # how many of the scores equal to `own` are the query's own

    def __post_init__(self) -> None:
        self.behind = torch.zeros_like(self.own_equals)
        self.behind_or_equal = torch.zeros_like(self.own_equals)

    def count(self, queries: slice, scores: Tensor) -> None:
        """Add candidates' scores, (queries, candidates)."""
        own = self.own[queries, None]
        self.behind[queries] += (scores < own - self.tolerance).sum(1, dtype=torch.int32)
        self.behind_or_equal[queries] += (scores <= own + self.tolerance).sum(1, dtype=torch.int32)

    def places(self, candidates: int) -> list[Tensor]:
        """Of `candidates` in all: how many are ahead, how many others are equal, and `own_equals`; on the CPU."""
        others_equal = (self.behind_or_equal - self.behind - self.own_equals).clamp(min=0)
        return [(candidates - self.behind_or_equal).cpu(), others_equal.cpu(), self.own_equals.cpu()]


def _own_scores(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> Tensor:
    """(M,) score of each text with its image, by the same kind of product as the others: a GPU may round its inputs."""
    parts = []
    for texts in _blocks(len(text_features), OWN_BLOCK):
        images = image_features[image_of_text[texts]].float()
        parts.append((images @ text_features[texts].float().T).diagonal())
    return torch.cat(parts)


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _summary(ahead: Tensor, others_equal: Tensor, own_equals: Tensor) -> dict[str, float]:
    mean_ahead = ahead + others_equal.double() / (own_equals + 1)
    shares = {f"R@{k}": _found(ahead, others_equal, own_equals, k).mean().item() for k in RECALL_AT}
    ranks = {"mean_rank": mean_ahead.mean().item() + 1, "median_rank": float(np.median(mean_ahead)) // 1 + 1}
    return ranks | shares


def _found(ahead: Tensor, others_equal: Tensor, own_equals: Tensor, k: int) -> Tensor:
    """The share of orders of equals in which an own candidate is among the first k, float64."""
    missed = torch.ones_like(ahead, dtype=torch.float64)
    for drawn in range(k):  # the places that are left to equals are filled one after the other
        others, all_equal = (others_equal - drawn).clamp(min=0), (others_equal + own_equals - drawn).clamp(min=1)
        missed = torch.where(drawn < k - ahead, missed * others / all_equal, missed)
    return torch.where(own_equals > 0, 1 - missed, 0.0)
