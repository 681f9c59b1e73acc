"""Scores formed tile by tile: any tile gives what the whole matrix gives, over ranks and with stored pairs too."""

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss

import oracles
import rank_jobs
from openclip_ext import UserError, create_loss
from openclip_ext.ops.pairs import Columns, fitting_tile

G, D, N = 9, 4, 40
TILES = (1, 2, 7, G, G + 1)
FORMS = {
    "clip": {},
    "dcl": {},
    "batch_corrected": {"num_samples": N},
    "sogclr": {"num_samples": N, "gamma": 0.5},
    "gamma_decomp": {"num_samples": N, "gamma": 0.5},
}


def steps(name, tile, recent_batches):
    """Values, gradients and states of four steps, in which recent pairs join as soon as they can."""
    loss = create_loss(
        name, **FORMS[name], loss_tile=tile, recent_batches=recent_batches, recent_check=1, recent_limit=1e9
    )
    found, kept = [], None
    for step in range(4):
        image, text = (x.requires_grad_() for x in oracles.unit(2, G, D, seed=step))
        scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
        ids = torch.arange(G) % (G - 1) + step  # one sample comes twice
        loss.begin_step(step=step, total_steps=4)
        again = {}
        if loss.probe == "keep":
            kept = {"image_features_again": image.detach(), "text_features_again": text.detach()}
        elif loss.probe == "encode":
            again = kept
        outputs = loss(image, text, scale, sample_ids=ids, **again)
        value = outputs["contrastive_loss"]
        found.append([value.detach(), *torch.autograd.grad(value, (image, text, scale))])
        loss.commit()
    if recent_batches:
        assert outputs["recent_batches_used"] == recent_batches
    return found, loss.state_dict()


@pytest.mark.parametrize("recent_batches", [0, 2])
@pytest.mark.parametrize("name", FORMS)
def test_any_tile_gives_what_one_gives(name, recent_batches):
    whole = steps(name, None, recent_batches)
    for tile in TILES:
        torch.testing.assert_close(steps(name, tile, recent_batches), whole, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("tile", [None, *TILES])
def test_clip_is_openclips_loss(tile):
    image, text = (x.requires_grad_() for x in oracles.unit(2, G, D, seed=1))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    values = (
        create_loss("clip", loss_tile=tile)(image, text, scale, output_dict=False),
        ClipLoss()(image, text, scale),
    )
    torch.testing.assert_close(*values)
    gradients = [torch.autograd.grad(value, (image, text, scale)) for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tile", [None, *TILES])
def test_siglip_is_openclips_loss(tile):
    image, text = (x.requires_grad_() for x in oracles.unit(2, G, D, seed=2))
    leaves = image, text, *(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (9.0, -2.0))
    loss = create_loss("siglip", loss_tile=tile)
    values = loss(*leaves[:3], logit_bias=leaves[3], output_dict=False), SigLipLoss()(*leaves)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*[torch.autograd.grad(value, leaves) for value in values], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_of_unequal_size_equal_one(ranks, num_ranks):
    (single,) = ranks.run(rank_jobs.tiled_steps, 1, [12], 5)
    sizes = [12 // num_ranks + (1 if rank == 0 else -1 if rank == 1 else 0) for rank in range(num_ranks)]
    gradients = [torch.cat(parts) for parts in zip(*ranks.run(rank_jobs.tiled_steps, num_ranks, sizes, 2), strict=True)]
    for found, expected in zip(gradients, single, strict=True):
        torch.testing.assert_close(found / num_ranks, expected, rtol=1e-10, atol=1e-10)


def test_no_more_than_a_tile_of_scores_is_formed():
    """Whatever is asked of the columns, and each of them exactly once."""
    anchors, ids = torch.randn(6, D), torch.arange(6)
    columns = Columns(anchors, torch.randn(10, D), ids, torch.arange(10), torch.tensor(2.0), tile=4)
    tiles = [(place, scores.shape, same.shape) for place, scores, same in columns]
    assert tiles == [(slice(s, e), (6, e - s), (6, e - s)) for s, e in ((0, 4), (4, 8), (8, 10))]
    assert fitting_tile(2**15, torch.device("cpu")) == 32 and fitting_tile(8, torch.device("cpu")) > 2**15


@pytest.mark.parametrize("tile", [0, -1, 2.0, True])
def test_a_tile_that_is_no_number_of_columns_is_refused(tile):
    with pytest.raises(UserError, match="--loss-tile"):
        create_loss("clip", loss_tile=tile)
