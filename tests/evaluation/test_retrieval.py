"""Ranks and recall against slow references over the whole matrix of scores."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics

WAYS = ("image_to_text", "text_to_image")


def slow_ahead(scores, is_own):
    """How many of the others are ahead of the first own candidate, as a mean over all orders of equal candidates."""
    best = max(score for score, own in zip(scores, is_own, strict=True) if own)
    ahead = sum(score > best for score in scores)
    equals = [own for score, own in zip(scores, is_own, strict=True) if score == best]
    places = itertools.combinations(range(len(equals)), sum(equals))  # that the own ones among them may have
    return ahead + np.mean([min(own) for own in places])


@pytest.mark.parametrize("blocks", [(7, 11), (1024, 4096), (40, 1)])
@pytest.mark.parametrize("captions", [1, 5, "unequal"])
def test_recall_is_that_of_sorted_lists(blocks, captions):
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 5, (40,), generator=generator) if captions == "unequal" else torch.full((40,), captions)
    owner = torch.arange(40).repeat_interleave(counts)
    owner = owner[torch.randperm(len(owner), generator=generator)]  # in any order
    image = oracles.unit(40, 6, dtype=torch.float32)
    text = oracles.unit(len(owner), 6, seed=1, dtype=torch.float32)
    text = torch.nn.functional.normalize(text + image[owner], dim=1)
    metrics = retrieval_metrics(image, text, owner, image_block=blocks[0], text_block=blocks[1])
    for k in (1, 5, 10):
        recall = [metrics[f"{way}_R@{k}"] for way in WAYS]
        assert recall == pytest.approx(oracles.slow_recall(image, text, owner, k)) and 0.05 < min(recall) < 1


@pytest.mark.parametrize("captions", [1, 3])
def test_among_equals_a_rank_is_the_mean_over_their_orders(captions):
    generator = torch.Generator().manual_seed(1)
    # Corners of a square: scores are exact and many are equal.
    image, text = (torch.eye(4)[torch.randint(4, (count,), generator=generator)] for count in (6, 6 * captions))
    owner = torch.arange(6).repeat(captions)
    scores = image @ text.T
    metrics = retrieval_metrics(image, text, owner, image_block=4, text_block=5)
    ahead = [
        [slow_ahead(scores[i].tolist(), (owner == i).tolist()) for i in range(6)],
        [slow_ahead(scores[:, j].tolist(), (torch.arange(6) == owner[j]).tolist()) for j in range(6 * captions)],
    ]
    for way, expected in zip(WAYS, ahead, strict=True):
        assert metrics[f"{way}_mean_rank"] == pytest.approx(np.mean(expected) + 1)
        assert metrics[f"{way}_median_rank"] == np.floor(np.median(expected)) + 1
        assert metrics[f"{way}_R@1"] == np.mean(np.array(expected) < 1)


def test_pairs_are_the_case_of_one_text_per_image_and_openclips_where_no_scores_are_equal():
    train = pytest.importorskip("open_clip_train.train")
    image, text = oracles.unit(2, 40, 6, dtype=torch.float32)
    metrics = retrieval_metrics(image, text)
    assert metrics == retrieval_metrics(image, text, torch.arange(40), image_block=9, text_block=13)
    reference = train.get_clip_metrics(image, text, torch.tensor(10.0))
    assert metrics == pytest.approx({key: float(value) for key, value in reference.items()})


@pytest.mark.parametrize(("captions", "blocks"), [(1, (1024, 4096)), (1, (10, 33)), (5, (1024, 4096)), (5, (10, 33))])
def test_a_collapsed_model_scores_as_chance(captions, blocks):
    """Its scores differ by rounding alone, which depends on where in a tile they are."""
    constant = oracles.unit(1, 509, dtype=torch.float32)
    owner = torch.arange(101).repeat_interleave(captions)
    image, text = constant.expand(101, -1), constant.expand(len(owner), -1)
    metrics = retrieval_metrics(image, text, owner, image_block=blocks[0], text_block=blocks[1])
    assert metrics["text_to_image_mean_rank"] == 51 and metrics["text_to_image_R@10"] == 0
    assert metrics["image_to_text_mean_rank"] == pytest.approx(100 * captions / (captions + 1) + 1)
    assert metrics["image_to_text_R@10"] == 0


def test_features_that_are_not_finite_find_nothing():
    image, text = oracles.unit(2, 20, 6, dtype=torch.float32)
    for broken in (image * torch.nan, torch.where(torch.arange(20)[:, None] == 3, torch.nan, image)):
        metrics = retrieval_metrics(broken, text)
        assert metrics["text_to_image_R@1"] == 0
        assert metrics["image_to_text_R@1"] < 1
    assert retrieval_metrics(image * torch.nan, text)["image_to_text_R@10"] == 0


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_more_than_a_tile_of_scores_is_held():
    image, text = oracles.unit(500, 4), oracles.unit(2500, 4, seed=1)
    owner = torch.arange(500).repeat_interleave(5)
    with LargestTensor() as largest:
        metrics = retrieval_metrics(image, text, owner, image_block=128, text_block=160)
    assert largest.elements <= 128 * 160
    assert metrics == pytest.approx(retrieval_metrics(image, text, owner, image_block=500, text_block=2500))
