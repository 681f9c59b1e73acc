"""How well frozen features tell classes apart: nearest neighbours, and a linear classifier.

M   training features       Q   features to classify       D   their width
"""

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

NEIGHBOURS = 20
TEMPERATURE = 0.07
#: Inverse strengths of the L2 penalty among which a linear probe chooses; the middle one where it cannot.
GRID = (0.001, 0.01, 0.1, 1.0, 10.0)
MAX_ITERATIONS = 1000


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    block: int = 256,
) -> float:
    """Share of features whose class wins the vote of their k nearest training features.

    With unit features x, a neighbour j votes for its own class with weight `exp(<x_i, x_j> / temperature)`. Works on
    blocks of queries, so no (Q, M) matrix is formed.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, with the
    k and temperature of DINO (Caron et al., ICCV 2021).

    Args:
        train_features: (M, D).
        train_labels: (M,) class indices.
        features: (Q, D).
        labels: (Q,).
        k: neighbours that vote; all where there are fewer.
        temperature: of the votes.
        block: queries at a time.
    """
    num_classes = int(train_labels.max()) + 1
    train, queries = normalize(train_features.float(), dim=1), normalize(features.float(), dim=1)
    hits = 0
    for rows, expected in zip(queries.split(block), labels.split(block), strict=True):
        similarity, neighbours = (rows @ train.T).topk(min(k, len(train)), dim=1)
        # Less the largest: the winner is the same, and nothing overflows.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(rows), num_classes).scatter_add_(1, train_labels[neighbours], weight)
        hits += (votes.argmax(1) == expected).sum().item()
    return hits / len(labels)


def linear_probe_accuracy(
    train_features: np.ndarray, train_labels: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> float:
    """Share of features that a logistic regression classifies correctly.

    Minimises cross entropy plus `|W|^2 / (2 C)` with L-BFGS, over features scaled to mean 0 and variance 1 in training.
    C is the value of `GRID` that does best on a held-out tenth of the training features (`held_out_tenth`), the
    smallest of equals; the fit is then repeated on all of them.

    Args:
        train_features: (M, D).
        train_labels: (M,) class indices, of two classes at least.
        features: (Q, D).
        labels: (Q,).
    """
    held_out = held_out_tenth(train_labels)
    strength = GRID[len(GRID) // 2]
    if held_out.any():
        split = train_features[~held_out], train_labels[~held_out], train_features[held_out], train_labels[held_out]
        strength = max(GRID, key=lambda candidate: _fit_and_score(candidate, *split))
    return _fit_and_score(strength, train_features, train_labels, features, labels)


def held_out_tenth(labels: np.ndarray) -> np.ndarray:
    """Which tenth of the samples, (M,) bool, leaves the others with all classes in about the same shares.

    Every tenth sample in the order of their classes, unless it is the first of its class; none where there are fewer
    than ten.
    """
    order = np.argsort(labels, kind="stable")
    first_of_class = np.diff(labels[order], prepend=-1) != 0
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[order] = (np.arange(len(labels)) % 10 == 9) & ~first_of_class
    return held_out


def _fit_and_score(strength: float, train_features, train_labels, features, labels) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a weak penalty may end at the limit, close to its optimum
        probe.fit(train_features, train_labels)
    return float(probe.score(features, labels))
