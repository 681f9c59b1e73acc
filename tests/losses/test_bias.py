"""Bias at fixed parameters: the mean gradient over many small batches against the gradient of the full-data loss."""

import pytest
import torch

import oracles
from openclip_ext import create_loss

N, D, B = 128, 8, 8
SCALE = torch.tensor(10.0)


@pytest.fixture(scope="module")
def features():
    return oracles.near_pairs(N, D)  # ratios are heavy-tailed but positives stand out


def gradient(loss, image, text, **extra):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (image, text)]
    return torch.autograd.grad(loss(*leaves, SCALE, **extra)["contrastive_loss"], leaves)


def mean_gradient(loss, features, epochs, warm_up):
    """Averaged over random batches after `warm_up` epochs, scaled like the full-data gradient."""
    generator = torch.Generator().manual_seed(0)
    total = [torch.zeros_like(part) for part in features]
    for epoch in range(epochs + warm_up):
        for ids in torch.randperm(N, generator=generator).split(B):
            parts = gradient(loss, *(part[ids] for part in features), sample_ids=ids)
            loss.commit()
            if epoch >= warm_up:
                for sum_, part in zip(total, parts, strict=True):
                    sum_[ids] += part * B / N
    return torch.cat(total) / epochs


def relative_bias(loss, features, full, epochs=75, warm_up=25):
    estimate = mean_gradient(loss, features, epochs, warm_up)
    return ((estimate - full).norm() / full.norm()).item()


def test_the_bias_falls_with_gamma_and_stays_below_openclips(features):
    full = torch.cat(gradient(create_loss("batch_corrected", num_samples=N), *features))
    bias = {
        gamma: relative_bias(create_loss("gamma_decomp", num_samples=N, gamma=gamma, recent_batches=0), features, full)
        for gamma in (1.0, 0.3, 0.1)
    }
    # OpenCLIP's loss of the same batches, against its own target: the InfoNCE loss over all N pairs.
    openclip = relative_bias(create_loss("clip", num_samples=N), features, full)
    assert bias[1.0] > bias[0.3] > bias[0.1]
    assert bias[0.1] < 0.5 * bias[1.0]
    assert bias[0.1] < 0.5 * openclip
