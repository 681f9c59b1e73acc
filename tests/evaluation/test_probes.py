"""Nearest neighbours and linear probes, against slow references and data whose answer is known."""

import collections
import contextlib
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import oracles
from openclip_ext import UserError
from openclip_ext.cli import main
from openclip_ext.evaluation.datasets.probe_sets import probe_data, probe_features
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.evaluation.metrics.probes import (
    class_scores,
    few_shot_accuracies,
    held_out_tenth,
    knn_accuracy,
    knn_hits,
    linear_probe,
    linear_probe_accuracy,
    place_in_class,
)
from pictures import class_folders


def clouds(count, classes=3, spread=0.1, seed=0):
    """Points around one corner per class: (features, labels)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return torch.eye(classes)[labels] + spread * torch.randn(count, classes, generator=generator), labels


def slow_knn(train, train_labels, features, labels, k, temperature):
    hits = 0
    for feature, label in zip(features, labels, strict=True):
        cosines = [float(feature @ x / (feature.norm() * x.norm())) for x in train]
        nearest = sorted(range(len(train)), key=lambda j: -cosines[j])[:k]
        votes = collections.Counter()
        for j in nearest:
            votes[int(train_labels[j])] += math.exp(cosines[j] / temperature)
        hits += max(votes, key=votes.get) == int(label)
    return hits / len(labels)


@pytest.mark.parametrize(("k", "temperature", "block"), [(20, 0.07, 7), (5, 0.5, 256), (500, 1.0, 256), (1, 0.07, 64)])
def test_knn_equals_a_slow_reference(k, temperature, block):
    train, train_labels = clouds(60, spread=1.0)
    features, labels = clouds(40, spread=1.0, seed=1)
    data = (train.double(), train_labels, features.double(), labels)
    fast = knn_accuracy(*data, k=k, temperature=temperature, block=block)
    assert fast == slow_knn(*data, k, temperature) and 0.4 < fast < 1


def test_a_vote_counts_by_similarity_and_a_cold_one_does_not_overflow():
    train, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    query, label = torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    assert knn_accuracy(train, labels, query, label) == 1  # outvoted by number, not by weight
    assert knn_accuracy(train, labels, query, label, temperature=10.0) == 0
    assert knn_accuracy(train, labels, query, label, temperature=1e-4) == 1


def shared_knn(train, train_labels, features, labels, k, temperature):
    """The vote where all orders of equals count alike, in float64; similarities are exact to nine digits."""
    hits = []
    for feature, label in zip(features, labels, strict=True):
        cosines = [round(float(feature @ x / (feature.norm() * x.norm())), 9) for x in train]
        last = sorted(cosines, reverse=True)[k - 1]
        left = k - sum(cosine > last for cosine in cosines)
        votes = collections.Counter()
        for cosine, of in zip(cosines, train_labels.tolist(), strict=True):
            place = 1 if cosine > last else left / cosines.count(last) if cosine == last else 0
            votes[of] += place * math.exp(cosine / temperature)
        winners = [c for c, vote in votes.items() if math.isclose(vote, max(votes.values()), rel_tol=1e-9)]
        hits.append(1 / len(winners) if int(label) in winners else 0.0)
    return hits


@pytest.mark.parametrize("k", [1, 3, 20, 59])
def test_ties_are_shared_in_whatever_order_neighbours_come(k):
    """Of corners of a cube, each several times and with several classes."""
    generator = torch.Generator().manual_seed(0)
    train, features = (torch.randint(2, (n, 3), generator=generator).double() * 2 - 1 for n in (60, 30))
    train_labels, labels = (torch.randint(4, (n,), generator=generator) for n in (60, 30))
    data = train, train_labels, features, labels
    hits = knn_hits(*data, k=k, temperature=0.5, block=7)
    assert hits.tolist() == pytest.approx(shared_knn(*data, k, 0.5))
    assert k > 1 or ((hits > 0) & (hits < 1)).any()
    order = torch.randperm(60, generator=generator)
    assert torch.equal(knn_hits(train[order], train_labels[order], *data[2:], k=k, temperature=0.5), hits)


def test_features_that_are_all_the_same_score_as_chance():
    constant = oracles.unit(1, 509, dtype=torch.float32).expand(80, -1)
    labels = torch.arange(80) % 4
    assert knn_accuracy(constant, labels, constant, labels) == 0.25
    more_of_one = torch.where(labels == 3, 2, labels)  # and then the largest class wins
    assert knn_accuracy(constant, more_of_one, constant[:4], torch.arange(4) % 3) == 0.25


def test_probes_find_what_is_separable_and_guess_where_nothing_is():
    train, test = clouds(120), clouds(60, seed=1)
    assert knn_accuracy(*train, *test) == 1
    assert linear_probe_accuracy(*train, *test) == 1
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(300) % 3
    data = noise[:150], labels[:150], noise[150:], labels[150:]
    assert knn_accuracy(*data) < 0.5
    assert linear_probe_accuracy(*data) < 0.5


def test_the_linear_probe_is_logistic_regression_at_the_best_held_out_penalty():
    (train, train_labels), (features, labels) = clouds(200, spread=0.8), clouds(200, spread=0.8, seed=1)
    train = train * torch.tensor([1.0, 100.0, 0.01])  # units do not matter
    features = features * torch.tensor([1.0, 100.0, 0.01])
    held = held_out_tenth(train_labels)

    def score(strength, x, y, x_test, y_test):
        mean, deviation = x.mean(0), x.std(0, correction=0)
        probe = LogisticRegression(C=strength, max_iter=1000, tol=1e-7).fit((x - mean) / deviation, y)
        return probe.score((x_test - mean) / deviation, y_test)

    grid = (0.001, 0.01, 0.1, 1.0, 10.0)
    held_out = [score(c, train[~held], train_labels[~held], train[held], train_labels[held]) for c in grid]
    expected = score(grid[int(np.argmax(held_out))], train, train_labels, features, labels)
    data = (train, train_labels, features, labels)
    assert linear_probe_accuracy(*data) == pytest.approx(expected)
    assert 0.6 < expected < 1


@pytest.mark.parametrize("counts", [[100, 50, 50], [2, 3], [9, 1], [1] * 30, [10, 10], [5] * 10])
def test_the_held_out_tenth_leaves_every_class(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    held = held_out_tenth(labels)
    assert labels[~held].unique().tolist() == list(range(len(counts)))
    assert held.sum() <= len(labels) / 10
    if min(counts) > 4 and len(labels) >= 10:
        assert held.sum() == len(labels) // 10


def test_few_images_are_enough():
    features, labels = clouds(4, classes=2)
    assert linear_probe_accuracy(features, labels, features, labels) == 1


def test_the_penalty_is_chosen_on_a_given_split():
    """Where most of a feature is noise, new data asks for a strong penalty, and the training data itself for none."""
    (train, train_labels), (features, _) = clouds(200, spread=0.8), clouds(200, spread=0.8, seed=1)
    train, features = (torch.cat([x, torch.randn(200, 60)], 1) for x in (train, features))
    for selection, lowest, highest in ((None, 0.001, 0.1), ((train, train_labels), 1, 10)):
        found, strength = linear_probe(train, train_labels, features, selection)
        assert lowest <= strength <= highest
        scaled = [((x - train.mean(0)) / train.std(0, correction=0)).numpy() for x in (train, features)]
        fitted = LogisticRegression(C=strength, max_iter=1000, tol=1e-7).fit(scaled[0], train_labels)
        assert (found.numpy() == fitted.predict(scaled[1])).mean() > 0.99


@pytest.mark.parametrize("given", [False, True])
def test_few_shot_probes_are_linear_probes_of_the_first_of_each_class(given):
    (train, train_labels), (features, labels) = clouds(90, spread=0.7), clouds(60, spread=0.7, seed=1)
    selection = (features[:20], labels[:20]) if given else None
    shots = (1, 6, 40)  # a class has thirty
    data = (train, train_labels, features, labels, selection)
    accuracies = few_shot_accuracies(*data, shots=shots, seeds=2, progress=False)
    assert list(accuracies) == list(shots)
    for seed in range(2):
        place = place_in_class(train_labels, seed)
        members = [
            (train_labels == label).nonzero().flatten()[place[train_labels == label].argsort()] for label in range(3)
        ]
        for k in shots:
            drawn = torch.cat([rows[:k] for rows in members]).sort().values
            following = torch.cat([rows[k : k + min(k, 4)] for rows in members]).sort().values
            chosen_on = selection or (train[following], train_labels[following])
            found, _ = linear_probe(train[drawn], train_labels[drawn], features, chosen_on)
            assert accuracies[k][seed] == pytest.approx((found == labels).double().mean().item())
    assert np.mean(accuracies[1]) < np.mean(accuracies[40])


def test_places_are_a_random_order_of_each_class():
    labels = torch.tensor([3, 1, 3, 3, 1, 3] * 20)
    draws = torch.stack([place_in_class(labels, seed) for seed in range(30)])
    for label, count in ((1, 40), (3, 80)):
        places = draws[:, labels == label]
        assert (places.sort().values == torch.arange(count)).all()
        # Each sample's mean place is that of a uniform one, within five standard errors.
        assert (places.double().mean(0) - (count - 1) / 2).abs().max() < 5 * count / 12**0.5 / 30**0.5
    assert (draws[0] == place_in_class(labels, 0)).all() and (draws[0] != draws[1]).any()


def test_scores_count_images_and_classes():
    scores = class_scores(torch.tensor([1, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1]))
    assert scores == {"top1": 0.8, "mean_per_class": 0.75}


# On images.


@pytest.fixture
def folders(tmp_path):
    return class_folders(tmp_path / "fit", "train", 100), class_folders(tmp_path / "measure", "val", 40)


def test_features_are_the_towers_with_the_labels_of_the_training_folder(folders, model_config, tmp_path):
    open_clip.add_model_config(model_config)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-test", output_dict=True)
    for name in ("0", "1", "2"):  # classes are matched by name, whatever their place
        for path in (folders[1] / name).iterdir():
            path.unlink()
        (folders[1] / name).rmdir()
    data = probe_data(*map(str, folders), preprocess, batch_size=16, workers=0)
    encoder = Encoder(
        model=model.eval(), tokenizer=open_clip.tokenize, device=torch.device("cpu"),
        autocast=contextlib.nullcontext, dtype=None,
    )  # fmt: skip
    features, labels = probe_features(encoder, data.val, progress=False)
    assert sorted(labels.unique().tolist()) == list(range(3, 10))
    images = torch.cat([images for images, _ in data.val])
    with torch.no_grad():
        torch.testing.assert_close(features, model.encode_image(images))


def test_probes_are_logged_with_the_other_metrics(train_flags, tmp_path, folders, val_shards):
    fit, measure = folders
    flags = ("--probe-train", fit, "--probe-val", measure, "--epochs", 3, "--val-frequency", 2)
    assert main(train_flags(*flags, "--val-data", val_shards)) == 0
    path = tmp_path / "logs" / "run" / "checkpoints" / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [2, 3]
    assert all({"knn-top1", "linear-probe-top1", "clip_val_loss"} <= row.keys() for row in rows)
    assert all(0.1 < row["linear-probe-top1"] <= 1 for row in rows)
    assert "knn-top1" in (tmp_path / "logs" / "run" / "out.log").read_text()


def test_a_model_is_probed_without_training(train_flags, folders, capsys):
    flags = train_flags("--probe-train", folders[0], "--probe-val", folders[1])
    position = flags.index("--train-data")
    del flags[position : position + 2]
    assert main(flags) == 0
    assert "after epoch 0: knn-top1" in capsys.readouterr().err


def test_folders_that_do_not_fit_are_named(folders, tmp_path):
    fit, measure = map(str, folders)

    def refused(train, val, message):
        with pytest.raises(UserError, match=message):
            probe_data(train, val, None, batch_size=4, workers=0)

    refused("/nowhere", measure, "--probe-train /nowhere: no such folder")
    refused(fit, "/nowhere", "--probe-val /nowhere: no such folder")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), measure, "--probe-train .*empty: holds no class folders")
    (tmp_path / "empty" / "3").mkdir()
    refused(fit, str(tmp_path / "empty"), "--probe-val .*empty: no picture in class folder 3")
    one = class_folders(tmp_path / "one", "train", 1)
    refused(str(one), measure, "holds one class folder")
    (folders[0] / "3").rename(tmp_path / "three")
    refused(fit, measure, "its class folder 3 is not in --probe-train")
