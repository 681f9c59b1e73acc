"""Logistic regression by L-BFGS, against scikit-learn's where that has converged."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference
from sklearn.preprocessing import StandardScaler

from openclip_ext.evaluation.metrics.logistic import LogisticRegression


def gaussians(samples, spread, seed, classes=20, width=48):
    """Features around one centre per class, in units that differ, one of them constant."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    features = centres[labels] + spread * torch.randn(samples, width, generator=generator)
    features = features * torch.logspace(-2, 2, width) + 3
    features[:, 5] = 7.0
    return features, labels


@pytest.mark.parametrize("spread", [2.0, 5.0])
def test_a_path_of_penalties_gives_the_accuracy_of_scikit_learn_at_each(spread):
    train, test = gaussians(1500, spread, 1), gaussians(4000, spread, 2)
    scaler = StandardScaler().fit(train[0].double().numpy())
    scaled = [scaler.transform(features.double().numpy()) for features in (train[0], test[0])]
    probe = LogisticRegression(*train, 20, block=400)
    for strength in (0.001, 0.01, 0.1, 1.0, 10.0):
        reference = Reference(C=strength, tol=1e-8, max_iter=5000).fit(scaled[0], train[1].numpy())
        expected = reference.score(scaled[1], test[1].numpy())
        assert probe.fit(strength).accuracy(*test) == pytest.approx(expected, abs=0.001)
        torch.testing.assert_close(
            probe.weight.double(), torch.from_numpy(reference.coef_), rtol=0, atol=0.02 * abs(reference.coef_).max()
        )


def test_scores_do_not_depend_on_the_size_of_blocks():
    train, test = gaussians(300, 2.0, 1), gaussians(300, 2.0, 2)
    found = [LogisticRegression(*train, 20, block=block).fit(0.1).predict(test[0]) for block in (1000, 300, 7)]
    assert all((one == found[0]).float().mean() > 0.99 for one in found)
