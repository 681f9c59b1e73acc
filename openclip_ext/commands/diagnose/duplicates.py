"""Pairs that are negatives of each other and should not be: the same caption or picture, or nearly so.

Judged by words and by thumbnails, so that it does not depend on the model: two captions are near where the cosine of
their words, each weighted by its rarity (tf-idf), is at least 0.9, and two pictures where the correlation of their
colours at 12 x 12 pixels is at least 0.98.
"""

from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer
from torch import Tensor

from openclip_ext.losses import Vocabulary
from openclip_ext.losses.words import Words

NEAR_CAPTION, NEAR_IMAGE = 0.9, 0.98
ROWS = 1024
WORST = 10


def find_duplicates(encoded: dict[str, Tensor], vocabulary: Vocabulary) -> dict[str, Any]:
    """Compare all pairs of a sample with each other.

    Args:
        encoded: as `encoding.encode` returns it.
        vocabulary: of its tokens.

    Returns:
        same_caption, same_image: shares of pairs that have another with the same; near_caption, near_image: with one
        that is near, or the same; any: with one of any kind. worst: the closest pairs of those, at most ten, as
        (row, row, cosine of captions, correlation of pictures).
    """
    words = word_vectors(encoded["tokens"], vocabulary)
    thumbnails = encoded["thumbnail"]
    same = {
        "caption": torch.from_numpy(np.unique(encoded["tokens"].numpy(), axis=0, return_inverse=True)[1]).flatten(),
        "image": encoded["image_id"],
    }
    size = len(thumbnails)
    has = {name: torch.zeros(size, dtype=torch.bool) for name in ("near_caption", "near_image", "any")}
    worst: list[tuple[int, int, float, float]] = []
    for rows in torch.arange(size).split(ROWS):
        caption = torch.from_numpy((words[rows.numpy()] @ words.T).toarray())
        image = thumbnails[rows] @ thumbnails.T
        for name, likeness in (("caption", caption), ("image", image)):
            likeness.masked_fill_(same[name][rows, None] == same[name], 1.0)
            likeness[torch.arange(len(rows)), rows] = -1.0
        close = {"near_caption": caption >= NEAR_CAPTION, "near_image": image >= NEAR_IMAGE}
        close["any"] = close["near_caption"] | close["near_image"]
        for name, found in close.items():
            has[name][rows] = found.any(1)
        worst = _worst(worst, close["any"], caption, image, rows)
    shares = {name: found.double().mean().item() for name, found in has.items()}
    shares |= {f"same_{name}": _share_repeated(ids) for name, ids in same.items()}
    return shares | {"worst": worst}


def word_vectors(tokens: Tensor, vocabulary: Vocabulary) -> sparse.csr_matrix:
    """(M, V) counts of each caption's words, weighted by their rarity and of unit norm; a caption without words: 0."""
    row, column = Words(vocabulary).words(tokens).nonzero(as_tuple=True)
    entries = np.ones(len(row), np.float32), (row.numpy(), tokens[row, column].numpy())
    counts = sparse.csr_matrix(entries, shape=(len(tokens), vocabulary.size), dtype=np.float32)
    return TfidfTransformer().fit_transform(counts)


def _worst(worst: list, close: Tensor, caption: Tensor, image: Tensor, rows: Tensor) -> list:
    """The closest of those found before and of this block's, each pair once."""
    row, column = (close & (rows[:, None] < torch.arange(close.shape[1]))).nonzero(as_tuple=True)
    likeness = torch.stack([caption[row, column], image[row, column]])
    best = likeness.sum(0).topk(min(WORST, len(row))).indices
    new = [
        (int(rows[row[index]]), int(column[index]), *(round(value, 4) for value in likeness[:, index].tolist()))
        for index in best
    ]
    return sorted(worst + new, key=lambda pair: (-pair[2] - pair[3], pair[0], pair[1]))[:WORST]


def _share_repeated(ids: Tensor) -> float:
    """The share of samples whose id another one has too."""
    counts = ids.unique(return_counts=True)[1]
    return counts[counts > 1].sum().item() / len(ids)
