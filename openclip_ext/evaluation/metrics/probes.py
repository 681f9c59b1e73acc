"""How well frozen features tell classes apart: nearest neighbours, and linear classifiers of many or a few images.

M   training features       Q   features to classify       D   their width
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from openclip_ext.evaluation.metrics.logistic import LogisticRegression

NEIGHBOURS = 20
TEMPERATURE = 0.07
#: Inverse strengths of the L2 penalty among which a linear probe chooses; the middle one where it cannot.
GRID = (0.001, 0.01, 0.1, 1.0, 10.0)
#: Per class, at most so many further training images choose the penalty of a few-shot probe.
MOST_TO_CHOOSE_ON = 4


@torch.no_grad()
def knn_hits(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    block: int = 256,
) -> Tensor:
    """(Q,) in [0, 1], float64: whether each feature's class wins the vote of its k nearest training features.

    With unit features x, a neighbour j votes for its own class with weight `exp(<x_i, x_j> / temperature)`. Works on
    blocks of queries, so that only (block, M) matrices are formed.

    Ties are shared, so that the order of training features does not count: similarities that differ by less than their
    rounding error, `sqrt(D) * 2^-23`, are equal; of neighbours equally near at the k-th place each votes with its share
    of the places that are left; of n classes with equally many votes each wins 1 / n.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, with the
    k and temperature of DINO (Caron et al., ICCV 2021).

    Args:
        train_features: (M, D).
        train_labels: (M,) class indices.
        features: (Q, D).
        labels: (Q,) class indices, of classes in `train_labels`.
        k: neighbours that vote; all where there are fewer.
        temperature: of the votes.
        block: queries at a time.
    """
    num_classes = int(train_labels.max()) + 1
    tolerance = train_features.shape[1] ** 0.5 * torch.finfo(torch.float32).eps
    train, queries = normalize(train_features.float(), dim=1), normalize(features.float(), dim=1)
    hits = []
    for rows, own in zip(queries.split(block), labels.split(block), strict=True):
        similarity = rows @ train.T
        nearest, neighbours = similarity.topk(min(k + 1, len(train)), dim=1)
        # Less the largest: the winner is the same, and nothing overflows.
        weight = ((nearest[:, :k] - nearest[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(rows), num_classes).scatter_add_(1, train_labels[neighbours[:, :k]], weight)
        if len(train) > k:
            tied = nearest[:, k - 1] - nearest[:, k] <= tolerance
            places = _places(similarity[tied], nearest[tied, k - 1 : k], k, tolerance)
            weight = places * ((similarity[tied] - nearest[tied, :1]) / temperature).exp()
            votes[tied] = weight.new_zeros(len(weight), num_classes).index_add_(1, train_labels, weight)
        winners = votes >= votes.amax(1, keepdim=True) * (1 - tolerance / temperature)
        hits.append(winners.gather(1, own[:, None])[:, 0].double() / winners.sum(1))
    return torch.cat(hits)


def _places(similarity: Tensor, last: Tensor, k: int, tolerance: float) -> Tensor:
    """The share of a place among the nearest k that each has, where those as similar as the `last` share theirs."""
    nearer = similarity > last + tolerance
    level = (similarity - last).abs() <= tolerance
    return nearer + level * (k - nearer.sum(1, keepdim=True)) / level.sum(1, keepdim=True)


def knn_accuracy(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, **options) -> float:
    """The mean of `knn_hits`; its `options`."""
    return knn_hits(train_features, train_labels, features, labels, **options).mean().item()


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    selection: tuple[Tensor, Tensor] | None = None,
    *,
    progress: bool = False,
) -> tuple[Tensor, float]:
    """(Q,) classes by logistic regression, and the inverse strength C of its penalty.

    Minimises cross entropy plus `|W|^2 / (2 C)` with L-BFGS (`LogisticRegression`), over features scaled to mean 0 and
    variance 1 in training, on the device of the features. C is the value of `GRID` that does best on `selection`, or
    without it on a held-out tenth of the training features (`held_out_tenth`), the smallest of equals; the fit is then
    one on all training features. Where there is nothing to choose on, C is the middle of the grid.

    Args:
        train_features: (M, D).
        train_labels: (M,) class indices, of two classes at least.
        features: (Q, D).
        selection: features and labels to choose C on; None: a tenth of the training features.
        progress: show a progress bar.
    """
    num_classes = int(train_labels.max()) + 1
    fitted_on = train_features, train_labels
    if selection is None:
        held_out = held_out_tenth(train_labels)
        fitted_on = train_features[~held_out], train_labels[~held_out]
        selection = train_features[held_out], train_labels[held_out]
    strength, start = GRID[len(GRID) // 2], None
    if len(selection[1]):
        probe, best = LogisticRegression(*fitted_on, num_classes), -1.0
        for candidate in tqdm(GRID, desc="linear probe", unit="fit", disable=not progress, leave=False):
            accuracy = probe.fit(candidate).accuracy(*selection)
            if accuracy > best:
                best, strength, start = accuracy, candidate, (probe.weight, probe.bias)
        del probe  # with its features, before those of the last fit
    final = LogisticRegression(train_features, train_labels, num_classes)
    if start is not None:
        final.weight, final.bias = start
    return final.fit(strength).predict(features), strength


def linear_probe_accuracy(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> float:
    """Share of features that `linear_probe` classifies correctly."""
    found, _ = linear_probe(train_features, train_labels, features)
    return (found == labels).double().mean().item()


def few_shot_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    selection: tuple[Tensor, Tensor] | None = None,
    *,
    shots: Sequence[int],
    seeds: int,
    progress: bool = True,
) -> dict[int, list[float]]:
    """Accuracy of `linear_probe` fitted to k training features per class, by k, one per seed.

    A seed puts each class's training features in an order; the first k of it are fitted to, so that more shots include
    fewer. C is chosen on `selection`, or without it on the `min(k, 4)` per class that follow (as many as there are; the
    4 is CoOp's, Zhou et al., IJCV 2022). A class that has fewer than k gives all it has.

    Args:
        train_features, train_labels, features, selection: see `linear_probe`.
        labels: (Q,).
        shots: values of k.
        seeds: 0, 1, …: how many draws.
        progress: show a progress bar.
    """
    accuracies: dict[int, list[float]] = {k: [] for k in shots}
    draws = [(seed, k) for seed in range(seeds) for k in shots]
    for seed, k in tqdm(draws, desc="few-shot", unit="probe", disable=not progress, leave=False):
        place = place_in_class(train_labels, seed)
        drawn = place < k
        following = ~drawn & (place < k + min(k, MOST_TO_CHOOSE_ON))
        chosen_on = selection or (train_features[following], train_labels[following])
        found, _ = linear_probe(train_features[drawn], train_labels[drawn], features, chosen_on)
        accuracies[k].append((found == labels).double().mean().item())
    return accuracies


def place_in_class(labels: Tensor, seed: int) -> Tensor:
    """(M,) each sample's place, from 0, in a random order of its class's, the same on every device."""
    order = torch.argsort(torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))).to(labels.device)
    order = order[torch.argsort(labels[order], stable=True)]
    _, counts = torch.unique(labels, return_counts=True)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(labels), device=labels.device) - first.repeat_interleave(counts)
    return place


def class_scores(hits: Tensor, labels: Tensor) -> dict[str, float]:
    """`top1`, the share of samples whose class was found, and `mean_per_class`, the mean of that over the classes.

    Args:
        hits: (Q,) whether it was; a number between 0 and 1 where it was one of several.
        labels: (Q,) class indices.
    """
    hits = hits.double()
    per_class = torch.stack([hits[labels == label].mean() for label in labels.unique()])
    return {"top1": hits.mean().item(), "mean_per_class": per_class.mean().item()}


def held_out_tenth(labels: Tensor) -> Tensor:
    """Which tenth of the samples, (M,) bool, leaves the others with all classes in about the same shares.

    Every tenth sample in the order of their classes, unless it is the first of its class; none where there are fewer
    than ten.
    """
    order = torch.argsort(labels, stable=True)
    first_of_class = labels[order].diff(prepend=labels.new_tensor([-1])) != 0
    held_out = torch.zeros_like(first_of_class)
    held_out[order] = (torch.arange(len(labels), device=labels.device) % 10 == 9) & ~first_of_class
    return held_out
