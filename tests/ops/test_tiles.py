"""Scores formed tile by tile: any tile gives what the whole matrix gives, over ranks and with stored pairs too."""

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss

import oracles
import rank_jobs
from openclip_ext import UserError, create_loss
from openclip_ext.losses.emc2.kernels import metropolis_hastings, resampled
from openclip_ext.ops.counter_random import uniform
from openclip_ext.ops.pairs import Columns, fitting_tile

G, D, N = 9, 4, 40
TILES = (1, 2, 7, G, G + 1, 64)
FORMS = {
    "clip": {},
    "dcl": {},
    "batch_corrected": {"num_samples": N},
    "sogclr": {"num_samples": N, "gamma": 0.5},
    "gamma_decomp": {"num_samples": N, "gamma": 0.5},
    "emc2": {"num_samples": N, "embed_dim": D, "decoupled": False, "gamma": 0.5},
    "emc2 mh": {"num_samples": N, "embed_dim": D, "kernel": "mh", "bank_dtype": "float32"},
}


def steps(name, tile, recent_batches):
    """Values, gradients and states of four steps, in which recent pairs join as soon as they can."""
    loss = create_loss(
        name.split()[0],
        **FORMS[name],
        loss_tile=tile,
        recent_batches=recent_batches,
        recent_check=1,
        recent_limit=1e9,
        recent_enough=1e9,
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


CHAINS = 70  # anchors and columns, more than a block of them


def dense_visit(loss, pairs, kernel, step):
    """The gradient of one visit with matrices of all candidates, and the samples where the chains are then, (2, B)."""
    (image, text, scale), ids = pairs
    leaves = [x.clone().requires_grad_() for x in (image, text, scale)]
    stored_ids, stored = loss.base.stored_ids(ids), loss.base.bank.embedding.read(ids).double()
    total, states = 0.0, []
    for direction in range(2):
        anchors, columns = leaves[direction], leaves[1 - direction]
        scores = leaves[2] * anchors @ columns.T
        positive, old = scores.diagonal(), stored_ids[direction]
        held = leaves[2] * (anchors * stored[direction]).sum(1)
        present = ids == old[:, None]
        waiting = (old >= 0) & ~present.any(1)
        same = ids == ids[:, None]
        candidates = scores.masked_fill(same, -torch.inf).diagonal_scatter(held.masked_fill(~waiting, -torch.inf))
        own = torch.arange(len(ids))
        start = torch.where(waiting, own, torch.where(present.any(1), present.int().argmax(1), -1))
        if kernel == "isir":
            visit = resampled(candidates.detach(), start, uniform(step, ids, direction))
        else:
            count = len(ids) - 1
            draws = [
                (uniform(step, torch.arange(count), 2 * stream)[:, None] + uniform(step, ids, 2 * stream + 1)).frac()
                for stream in (2 * direction, 2 * direction + 1)
            ]
            proposals = (draws[0] * len(ids)).long().clamp_max(count)
            noise = -draws[1].clamp_min(2.0**-25).log()
            visit = metropolis_hastings(candidates.detach(), start, proposals, noise, count // 2)
        terms = (visit.weights * (candidates - positive[:, None]).nan_to_num(neginf=0.0)).sum(1)
        total = total + terms.mean() / 2
        states.append(torch.where(visit.state == own, old, ids[visit.state]))
    return torch.autograd.grad(total, leaves), torch.stack(states)


@pytest.mark.parametrize("tile", [None, 1, 7, 64, CHAINS, CHAINS + 1])
@pytest.mark.parametrize("kernel", ["isir", "mh"])
def test_chains_are_those_of_matrices(kernel, tile):
    options = {"num_samples": 2 * CHAINS, "embed_dim": D, "bank_dtype": "float32"}
    loss = create_loss("emc2", kernel=kernel, loss_tile=tile, **options)
    for step in range(4):
        image, text = oracles.unit(2, CHAINS, D, seed=step)
        ids = torch.randperm(2 * CHAINS, generator=torch.Generator().manual_seed(step))[:CHAINS]
        ids[3] = ids[8]
        leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(6.0).double().requires_grad_()]
        expected, states = dense_visit(loss, ([x.detach() for x in leaves], ids), kernel, torch.tensor(step))
        value = loss(*leaves, sample_ids=ids)["contrastive_loss"]
        for found, wanted in zip(torch.autograd.grad(value, leaves), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        loss.commit()
        once = ids != ids[3]
        assert torch.equal(loss.base.stored_ids(ids)[:, once], states[:, once])


@pytest.mark.parametrize(("sizes", "tile"), [([30, 40], 1), ([30, 40], 7), ([30, 40], None), ([20, 9, 25, 16], 7)])
@pytest.mark.parametrize("kernel", ["isir", "mh"])
def test_chains_on_ranks_of_unequal_size_equal_those_on_one(ranks, kernel, sizes, tile):
    (single,) = ranks.run(rank_jobs.chain_steps, 1, [CHAINS], None, kernel)
    several = ranks.run(rank_jobs.chain_steps, len(sizes), sizes, tile, kernel)
    for found in several:
        torch.testing.assert_close(found, single, rtol=1e-6, atol=1e-6)  # reports are float32


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


def on_ranks(ranks, sizes, ids, ways):
    """Values and averaged gradients of `rank_jobs.tiled_steps`, one list per way, one entry per loss."""
    found = []
    for steps in zip(*ranks.run(rank_jobs.tiled_steps, len(sizes), sizes, ids, ways), strict=True):
        values, *parts, scales = zip(*steps, strict=True)
        assert all(torch.allclose(value, values[0]) for value in values)
        features = [torch.cat(part) / len(sizes) for part in parts]
        found.append([values[0], *features, sum(scales) / len(sizes)])
    each = len(rank_jobs.TILED)
    return [found[first : first + each] for first in range(0, len(found), each)]


WAYS = [("gather", None), ("gather", 7), *(("ring", tile) for tile in (None, 1, 7, 12, 13, 64))]


@pytest.mark.parametrize("sizes", [[12], [7, 5], [4, 2, 3, 3]])
def test_either_way_of_communication_is_the_dense_loss(ranks, sizes):
    """The losses against loops over all pairs, for batches of ranks that differ in size."""
    negatives, bias = 98, torch.tensor(-1.0, dtype=torch.float64)
    reference = {
        "clip": oracles.clip,
        "dcl": oracles.dcl,
        "batch_corrected": lambda *leaves: oracles.corrected(*leaves, negatives=negatives),
        "sogclr": lambda *leaves: oracles.corrected(*leaves, negatives=1, iota=0),
        "gamma_decomp": lambda *leaves: oracles.corrected(*leaves, negatives=negatives),
        "siglip": lambda *leaves: oracles.siglip(*leaves, bias),
    }
    image, text, *_ = oracles.unit(4, 12, 4, seed=3)
    leaves = image, text, torch.tensor(5.0, dtype=torch.float64)
    expected = {name: (loss(*leaves), *oracles.gradients(loss, *leaves)) for name, loss in reference.items()}
    for way in on_ranks(ranks, sizes, torch.arange(12), WAYS):
        for name, (value, of_image, of_text, _, _, of_scale) in zip(rank_jobs.TILED, way, strict=True):
            if name in expected:
                torch.testing.assert_close((value, of_image, of_text, of_scale), expected[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sizes", [[7, 5], [4, 2, 3, 3]])
def test_ranks_of_unequal_size_equal_one(ranks, sizes):
    """With samples that come twice, and with the terms that sum over pairs."""
    ids = torch.arange(12) % 10
    ((*single,),) = on_ranks(ranks, [12], ids, [("gather", None)])
    for several in on_ranks(ranks, sizes, ids, [("gather", None), ("gather", 2), ("ring", None), ("ring", 2)]):
        torch.testing.assert_close(several, single, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("emc2", {"num_samples": N, "embed_dim": D}, "--loss-comm ring: loss emc2.*; drop it"),
        ("gamma_decomp", {"num_samples": N}, "--loss-comm ring: the memory of recent .*; give --loss-arg recent_ba"),
        ("clip", {"terms": {"distill": {}}}, "--loss-comm ring: loss term distill"),
        ("clip", {}, None),
    ],
)
def test_what_holds_all_features_refuses_a_ring_of_several_ranks(name, options, match):
    create_loss(name, loss_comm="ring", **options)
    if match is None:
        return
    with pytest.raises(UserError, match=match):
        create_loss(name, loss_comm="ring", world_size=2, **options)


def test_no_rank_of_a_ring_gathers_features(ranks):
    """What the ranks gather is as wide as a few scalars per pair."""
    for widths in ranks.run(rank_jobs.gathered_widths, 2, "ring"):
        assert widths and max(widths) <= 4
    assert max(ranks.run(rank_jobs.gathered_widths, 2, "gather")[0]) == 64


def test_another_way_of_communication_is_refused():
    with pytest.raises(UserError, match="--loss-comm star: must be one of gather, ring"):
        create_loss("clip", loss_comm="star")


def test_no_more_than_a_tile_of_scores_is_formed():
    """Whatever is asked of the columns, and each of them exactly once."""
    anchors, ids = torch.randn(6, D), torch.arange(6)
    columns = Columns(anchors, torch.randn(10, D), ids, torch.arange(10), torch.tensor(2.0), tile=4)
    tiles = [(tile.place, tile.scores.shape, tile.same.shape) for tile in columns]
    assert tiles == [(slice(s, e), (6, e - s), (6, e - s)) for s, e in ((0, 4), (4, 8), (8, 10))]
    assert fitting_tile(2**15, torch.device("cpu")) == 32 and fitting_tile(8, torch.device("cpu")) > 2**15


@pytest.mark.parametrize("tile", [0, -1, 2.0, True])
def test_a_tile_that_is_no_number_of_columns_is_refused(tile):
    with pytest.raises(UserError, match="--loss-tile"):
        create_loss("clip", loss_tile=tile)
