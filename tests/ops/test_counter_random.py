import math

import torch

from openclip_ext.ops.counter_random import log_gamma_mean, uniform

IDS = torch.arange(200_000)
STEP = torch.tensor(7)


def test_draws_belong_to_the_sample_not_to_its_place():
    order = torch.randperm(len(IDS))
    assert torch.equal(uniform(STEP, IDS[order], 3), uniform(STEP, IDS, 3)[order])


def test_uniform_draws_are_uniform_and_independent_over_ids_steps_and_streams():
    samples = [uniform(STEP, IDS, 0), uniform(STEP, IDS, 1), uniform(STEP + 1, IDS, 0), uniform(STEP, IDS + 1, 0)]
    for draws in samples:
        assert draws.min() > 0 and draws.max() < 1
        counts = torch.histc(draws, bins=50, min=0, max=1)
        expected = len(IDS) / 50
        # Chi-square with 49 degrees of freedom: 99.99 % quantile.
        assert ((counts - expected) ** 2 / expected).sum() < 95
    correlations = torch.corrcoef(torch.stack(samples)) - torch.eye(4)
    assert correlations.abs().max() < 4.5 / math.sqrt(len(IDS))


def test_the_mean_of_exponentials_has_the_moments_of_a_gamma():
    for draws in (1, 5):
        sample = log_gamma_mean(STEP, IDS, 0, draws).exp().double()
        assert abs(sample.mean() - 1) < 4.5 / math.sqrt(draws * len(IDS))
        assert abs(sample.var() * draws - 1) < 0.05
