"""What `openclip-ext diagnose` measures on features alone, against slow references and known cases."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import oracles
from openclip_ext import UserError
from openclip_ext.commands.diagnose.advice import LOSSES
from openclip_ext.commands.diagnose.gradients import GROUPS, Walk, draw_batches, full_gradient, target
from openclip_ext.commands.diagnose.measure import measure_losses, parse_loss
from openclip_ext.commands.diagnose.negatives import scan_negatives
from openclip_ext.commands.diagnose.sample import Sample, Tower
from openclip_ext.commands.diagnose.stationary import settle
from openclip_ext.commands.diagnose.statistics import equivalent_batch
from openclip_ext.evaluation.ranks import ALONE

DRAWS = 2 * GROUPS


def random_sample(pairs, width=5, dim=4, scale=10.0, dtype=torch.float64):
    """Trunk features, projections, and the sample that they make; texts lie near images."""
    generator = torch.Generator().manual_seed(0)
    trunk = torch.randn(2, pairs, width, generator=generator, dtype=torch.float64)
    trunk[1] = trunk[0] + 0.5 * trunk[1]
    weights = torch.randn(width, dim, generator=generator, dtype=torch.float64).expand(2, -1, -1)
    towers = [Tower(x.to(dtype), (x @ w).to(dtype)) for x, w in zip(trunk, weights, strict=True)]
    return trunk, weights, Sample(*towers, torch.tensor(scale, dtype=dtype))


def near_pairs(pairs=128, dim=8, scale=10.0):
    """Pairs whose gradients are those with respect to the features of each: a projection per sample."""
    towers = [Tower(torch.eye(pairs), part) for part in oracles.near_pairs(pairs, dim)]
    return Sample(*towers, torch.tensor(scale))


def measured(losses, sample, sizes, draws=DRAWS):
    plans = {name: parse_loss(name) for name in dict.fromkeys(("clip", *losses))}
    rows = measure_losses(plans, sample, scan_negatives(sample, 0), sizes, draws, 0, ALONE, progress=False)
    return {row["name"]: row for row in rows}


def slow_gradient(form, trunk, weights, scale, ids):
    """By autograd from the projections' weights on, through a loop over anchors and negatives."""
    leaves = [w.clone().requires_grad_() for w in weights]
    image, text = (normalize(x[ids] @ w, dim=-1) for x, w in zip(trunk, leaves, strict=True))
    return torch.cat([part.flatten() for part in torch.autograd.grad(form(image, text, scale), leaves)])


def slow_numbers(form, trunk, weights, scale, batches):
    full = slow_gradient(form, trunk, weights, scale, torch.arange(trunk.shape[1]))
    drawn = [slow_gradient(form, trunk, weights, scale, ids) for ids in batches]
    per_group = len(batches) // GROUPS
    groups = [drawn[start : start + per_group] for start in range(0, len(drawn), per_group)]
    means = [sum(group) / per_group for group in groups]
    others = [(a, b) for i, a in enumerate(means) for j, b in enumerate(means) if i != j]
    length = oracles.dot(full, full)
    bias = sum(oracles.dot(a - full, b - full) for a, b in others) / len(others) / length
    mean = sum(oracles.dot(a, b) for a, b in others) / len(others) / length  # of |E g|^2
    square = sum(oracles.dot(g, g) for g in drawn) / len(drawn) / length
    along = sum(oracles.dot(g, full) for g in drawn) / len(drawn) / length
    return {
        "signal": sum(oracles.dot(g, full) / (oracles.dot(g, g) * length).sqrt() for g in drawn) / len(drawn),
        "bias": max(bias, torch.zeros_like(bias)).sqrt(),
        "noise": (square - mean).sqrt(),
        "direction": (along / mean.sqrt()).clamp_max(1),
    }


@pytest.mark.parametrize(
    ("loss", "form"),
    [
        ("clip", oracles.clip),
        ("dcl", oracles.dcl),
        ("batch_corrected", lambda *features: oracles.corrected(*features, negatives=59)),
    ],
)
def test_numbers_equal_a_float64_loop_on_60_pairs(loss, form):
    trunk, weights, sample = random_sample(60)
    expected = slow_numbers(form, trunk, weights, sample.logit_scale, draw_batches(sample, 8, DRAWS, 0))
    (row,) = measured([loss], sample, [8])[loss]["batches"]
    assert {name: row[name]["value"] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-6
    )
    for name in ("signal", "noise"):
        low, high = row[name]["interval"]
        assert low < row[name]["value"] < high


def test_a_batch_of_all_pairs_has_all_the_signal_whatever_the_loss():
    _, _, sample = random_sample(60)
    for name, row in measured(LOSSES, sample, [8, 60]).items():
        few, everything = row["batches"]
        assert everything["signal"]["value"] == pytest.approx(1, abs=1e-5), name
        assert everything["noise"]["value"] < 1e-3 > everything["bias"]["value"], name
        assert 0 < few["signal"]["value"] < 0.9, name


@pytest.mark.parametrize("name", LOSSES)
def test_a_target_is_what_the_loss_gives_for_all_pairs_at_once(name):
    """Without a memory yet, over one batch of all pairs."""
    _, _, sample = random_sample(40)
    plan = parse_loss(name)
    new = Walk(plan, sample, len(sample)).gradient(torch.arange(len(sample)))
    torch.testing.assert_close(new, full_gradient(plan, sample), rtol=1e-5, atol=1e-7)


def test_a_loss_of_which_nothing_is_known_is_its_own_target():
    assert target(parse_loss("siglip"))[0] == "siglip"
    assert target(parse_loss("gamma_decomp:decoupled=true"))[0] == "dcl"
    assert target(parse_loss("batch_corrected:negatives=7")) == ("batch_corrected", {"negatives": 7})


def test_biases_of_dcl_and_emc2_are_those_of_many_steps():
    """With respect to the features of each sample, in the setting of the tests of these losses."""
    losses = ["dcl", "emc2", "gamma_decomp:gamma=0.1,decoupled=true"]
    sample = near_pairs()
    rows = measured(losses, sample, [8], draws=200)
    bias = {name: row["batches"][0]["bias"] for name, row in rows.items()}
    walk, full = Walk(parse_loss("dcl"), sample, 8), full_gradient(parse_loss("dcl"), sample)
    halves = [torch.stack([walk.gradient(ids) for ids in draw_batches(sample, 8, 500, seed)]).mean(0) - full
              for seed in (1, 2)]  # fmt: skip
    many = (halves[0] @ halves[1]).sqrt() / full.norm()
    assert bias["dcl"]["value"] == pytest.approx(many.item(), abs=0.05)
    assert bias["dcl"]["interval"][0] < many < bias["dcl"]["interval"][1]
    assert bias["clip"]["interval"][0] > 2 * bias["dcl"]["interval"][1]
    assert bias["emc2"]["value"] < bias["dcl"]["value"] > bias[losses[2]]["interval"][1]


def test_recent_pairs_that_are_fresh_add_signal_and_take_bias():
    losses = ["batch_corrected", "batch_corrected:recent_batches=4"]
    rows = measured(losses, random_sample(500, width=32, dim=16, scale=20.0, dtype=torch.float32)[2], [16], draws=40)
    clip, alone, joined = (rows[name]["batches"][0] for name in ("clip", *losses))
    assert clip["signal"]["value"] < alone["signal"]["value"] < joined["signal"]["interval"][0]
    assert clip["bias"]["value"] > alone["bias"]["value"] > joined["bias"]["value"]
    assert 16 < alone["equivalent_batch"]["value"] < joined["equivalent_batch"]["interval"][0]


# The memory.


@pytest.mark.parametrize("size", [8, 32])
def test_chains_are_settled_from_the_start(size):
    """Their mean score stays what it is under the softmax over all negatives, pass after pass."""
    sample = near_pairs()
    negatives = scan_negatives(sample, 0)
    walk = Walk(parse_loss("emc2"), sample, size)
    assert settle(walk, negatives, size, 0) == {"passes": 0, "share": 1.0}
    image, text = (tower.features() for tower in sample.towers)
    scores = 10 * torch.stack([image @ text.T, text @ image.T])
    law = scores.masked_fill(torch.eye(128, dtype=torch.bool), -torch.inf).softmax(2)
    expected = (law * scores).sum(2).mean().item()
    generator = torch.Generator().manual_seed(1)
    levels = []
    for _ in range(20):
        levels.append(scores.gather(2, walk.loss.base.bank.ids.values[:, :, None]).mean().item())
        for ids in torch.randperm(128, generator=generator).split(size):
            walk.advance(ids)
    error = np.std(levels)
    assert levels[0] == pytest.approx(expected, abs=4 * error)
    assert np.mean(levels) == pytest.approx(expected, abs=3 * error)


def test_rates_keep_their_mean_and_their_spread():
    sample = near_pairs()
    negatives = scan_negatives(sample, 0)
    walk = Walk(parse_loss("sogclr:gamma=0.2"), sample, 8)
    memory = settle(walk, negatives, 8, 0)
    assert memory["passes"] == 11 and memory["share"] > 0.99
    rates, moments = walk.loss.base.rates, []
    generator = torch.Generator().manual_seed(1)
    for passes in range(40):
        if passes in (0, 39):
            error = (rates.values.exp() - negatives.log_mean.exp()) / negatives.log_mean.exp()
            moments.append((error.mean().item(), error.std().item()))
        for ids in torch.randperm(128, generator=generator).split(8):
            walk.advance(ids)
    (mean, spread), (later_mean, later_spread) = moments
    assert abs(mean) < 0.1 > abs(later_mean)
    assert spread == pytest.approx(later_spread, rel=0.25) and spread > 0.2


def test_negatives_are_described_as_a_loop_has_them():
    _, _, sample = random_sample(30)
    image, text = (tower.features() for tower in sample.towers)
    square, total, hardest = [], [], []
    for rows in oracles.ratios(image, text, sample.logit_scale):
        for row in rows:
            ratios = [q.exp().item() for _, q in row]
            square.append(np.var(ratios) / np.mean(ratios) ** 2)
            total.append(sum(ratios))
            hardest.append(np.float64(max(ratios) / sum(ratios)))
    negatives = scan_negatives(sample, 0)
    torch.testing.assert_close(negatives.square.flatten(), torch.tensor(square), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(negatives.hardest.flatten(), torch.tensor(hardest), rtol=1e-6, atol=1e-9)
    found = negatives.summary([2, 30])
    assert found["kz"] == pytest.approx(np.exp(np.quantile(np.log(total), [0.25, 0.5, 0.75])).tolist(), rel=1e-6)
    assert found["hardest_outside"] == pytest.approx({"2": 28 / 29, "30": 0})
    assert found["effective_negatives"] == pytest.approx(29 / (1 + found["cv2"]))


def test_negatives_are_drawn_by_their_share():
    _, _, sample = random_sample(4)
    drawn = torch.stack([scan_negatives(sample, seed).drawn for seed in range(300)])
    image, text = (tower.features() for tower in sample.towers)
    scores = 10 * torch.stack([image @ text.T, text @ image.T])
    law = scores.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf).softmax(2)
    shares = torch.stack([(drawn == column).double().mean(0) for column in range(4)], dim=2)
    torch.testing.assert_close(shares, law, rtol=0, atol=4 * 0.5 / math.sqrt(300))


# Batches that are worth as much.


def test_an_equivalent_batch_lies_between_those_with_less_and_more_signal():
    clip = {16: np.full(GROUPS, 0.2), 64: np.full(GROUPS, 0.5), 256: np.full(GROUPS, 0.8)}
    for size, signals in clip.items():
        found = equivalent_batch(signals, clip, 10_000)
        assert found["value"] == pytest.approx(size) and not found["extrapolated"]
    between = equivalent_batch(np.full(GROUPS, 0.6), clip, 10_000)
    assert 64 < between["value"] < 256 and between["interval"] == pytest.approx([between["value"]] * 2)


def test_beyond_the_sizes_measured_it_is_said():
    """There the square of the signal over that of the rest grows as the batch does."""
    clip = {16: np.full(GROUPS, 0.5), 64: np.full(GROUPS, 0.8)}
    power = 2 * 0.8**2 / (1 - 0.8**2)
    above = equivalent_batch(np.full(GROUPS, math.sqrt(power / (1 + power))), clip, 10_000)
    assert above["value"] == pytest.approx(128) and above["extrapolated"]
    assert equivalent_batch(np.full(GROUPS, 0.9999), clip, 100)["value"] == 100  # no more than there are
    below = equivalent_batch(np.full(GROUPS, 0.2), clip, 10_000)
    assert 1 <= below["value"] < 16 and below["extrapolated"]


def test_the_interval_of_an_equivalent_batch_is_that_of_signals_that_vary_apart():
    rng = np.random.default_rng(0)
    clip = {16: rng.normal(0.2, 0.01, GROUPS), 64: rng.normal(0.5, 0.01, GROUPS)}
    low, high = equivalent_batch(rng.normal(0.35, 0.03, GROUPS), clip, 1000)["interval"]
    assert 16 < low < high < 64 and 1.05 < high / low < 2


# What cannot be measured.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "--losses nope: no such loss"),
        ("dcl:gamma=1", "--losses dcl: gamma=1: loss dcl has no option 'gamma'"),
        ("sogclr:gamma", "--losses sogclr: gamma: expected key=value"),
        ("emc2:bank=index", "--losses emc2:bank=index: needs stored_features, which features alone do not give"),
    ],
)
def test_a_wrong_loss_is_one_line(text, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_loss(text)


def test_what_the_model_lacks_is_one_line():
    with pytest.raises(UserError, match="--losses siglip: needs a logit bias, which this model has not; drop it"):
        measured(["siglip"], random_sample(30)[2], [8])


def test_a_gradient_of_nothing_is_one_line():
    same = Tower(torch.ones(20, 3), torch.ones(20, 3))
    with pytest.raises(UserError, match="--losses clip: its gradient over all pairs is zero or not finite"):
        measured([], Sample(same, same, torch.tensor(10.0)), [8])
