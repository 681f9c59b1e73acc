"""Ranks and recall against slow references over the whole matrix of scores."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics

WAYS = ("image_to_text", "text_to_image")


def slow_firsts(scores, is_own):
    """How many are ahead of the first own candidate, in each order that equal candidates may have."""
    best = max(score for score, own in zip(scores, is_own, strict=True) if own)
    ahead = sum(score > best for score in scores)
    equals = [own for score, own in zip(scores, is_own, strict=True) if score == best]
    # Which of their places the own ones may have.
    return [ahead + min(own) for own in itertools.combinations(range(len(equals)), sum(equals))]


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


@pytest.mark.parametrize("width", [4, 1])  # corners of a square, or one point: scores are exact and many are equal
@pytest.mark.parametrize("captions", [1, 3])
def test_among_equals_scores_are_means_over_their_orders(captions, width):
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.eye(width)[torch.randint(width, (n,), generator=generator)] for n in (6, 6 * captions))
    owner = torch.arange(6).repeat(captions)
    scores = (image.double() @ text.double().T).tolist()
    metrics = retrieval_metrics(image, text, owner, image_block=4, text_block=5)
    firsts = [
        [slow_firsts(scores[i], (owner == i).tolist()) for i in range(6)],
        [slow_firsts([row[j] for row in scores], (torch.arange(6) == owner[j]).tolist()) for j in range(6 * captions)],
    ]
    for way, of_queries in zip(WAYS, firsts, strict=True):
        ahead = [np.mean(orders) for orders in of_queries]
        assert metrics[f"{way}_mean_rank"] == pytest.approx(np.mean(ahead) + 1)
        assert metrics[f"{way}_median_rank"] == np.floor(np.median(ahead)) + 1
        for k in (1, 5, 10):
            found = [np.mean(np.array(orders) < k) for orders in of_queries]
            assert metrics[f"{way}_R@{k}"] == pytest.approx(np.mean(found))


def test_copies_of_an_image_share_its_hits():
    """Each caption is nearest to its own picture, which is there twice."""
    image = oracles.unit(20, 8, dtype=torch.float32).repeat_interleave(2, dim=0)
    text = torch.nn.functional.normalize(image + 0.01 * oracles.unit(40, 8, seed=1, dtype=torch.float32), dim=1)
    metrics = retrieval_metrics(image, text)
    assert metrics["text_to_image_R@1"] == 0.5 and metrics["text_to_image_R@5"] == 1
    assert metrics["text_to_image_mean_rank"] == 1.5
    assert metrics["image_to_text_R@1"] == 0.5  # the nearer of two captions is the own one of one


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
    assert metrics["text_to_image_mean_rank"] == 51
    assert metrics["image_to_text_mean_rank"] == pytest.approx(100 * captions / (captions + 1) + 1)
    for k in (1, 5, 10):
        assert metrics[f"text_to_image_R@{k}"] == pytest.approx(k / 101)
        missed = math.comb(100 * captions, k) / math.comb(101 * captions, k)
        assert metrics[f"image_to_text_R@{k}"] == pytest.approx(1 - missed)


def test_features_that_are_not_finite_find_nothing():
    image, text = oracles.unit(2, 20, 6, dtype=torch.float32)
    for broken in (image * torch.nan, torch.where(torch.arange(20)[:, None] == 3, torch.nan, image)):
        metrics = retrieval_metrics(broken, text)
        assert metrics["text_to_image_R@1"] == 0
        assert metrics["image_to_text_R@1"] < 1
    for few in (20, 4):  # fewer candidates than places too
        metrics = retrieval_metrics(image[:few] * torch.nan, text[:few])
        assert all(metrics[f"{way}_R@{k}"] == 0 for way in WAYS for k in (1, 5, 10))


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
