"""Pairs of recent steps in the batch: gradient against loops, freshness, bounds, ranks, and state."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import oracles
import rank_jobs
from openclip_ext import UserError, create_loss
from openclip_ext.losses import LossContext, ObjectivePlan, Widths
from openclip_ext.losses.two_ways import TwoWays
from openclip_ext.testing import check_loss

B, D, N = 5, 4, 40
SCALE = torch.tensor(6.0, dtype=torch.float64)
#: Checked as often as can be, and never left out for being of no need.
RECENT = {"recent_check": 1, "recent_enough": math.inf}
FORMS = {
    "clip": {},
    "dcl": {},
    "batch_corrected": {"num_samples": N},
    "sogclr": {"num_samples": N, "gamma": 1},
    "gamma_decomp": {"num_samples": N, "gamma": 1},
}


def recent_loss(name, steps=3, **options):
    return create_loss(name, **FORMS[name], **(RECENT | {"recent_batches": steps} | options))


def batch(step, size=B):
    image, text = oracles.unit(2, size, D, seed=step)
    return image, text, torch.arange(size) + 3 * step  # neighbours share samples


def take_step(loss, fresh, kept, moved=0.0, scale=SCALE):
    """One step of a loop that keeps and encodes again as asked; `moved` is added to features encoded again."""
    image, text, ids = fresh
    again = {}
    if loss.probe == "keep":
        kept[:] = [fresh]
    elif loss.probe == "encode" and kept:
        again = {f"{name}_features_again": x + moved for name, x in zip(("image", "text"), kept[0][:2], strict=True)}
    outputs = loss(image, text, scale, sample_ids=ids, **again)
    loss.commit()
    return outputs


def filled(name, steps=3, **options):
    """A loss whose recent pairs were found fresh, with the batches it has seen."""
    loss, kept, seen = recent_loss(name, steps, **options), [], []
    while not seen or loss.base.recent.usable < steps:
        seen.append(batch(len(seen)))
        take_step(loss, seen[-1], kept)
    return loss, seen


@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_is_that_of_loops_over_all_pairs(name):
    loss, seen = filled(name)
    recent = loss.base.recent.joining()
    assert sorted(recent.ids.tolist()) == sorted(torch.cat([ids for *_, ids in seen[-3:]]).tolist())
    image, text, ids = batch(len(seen))
    leaves = [x.clone().requires_grad_() for x in (image, text, SCALE)]
    value = loss(*leaves, sample_ids=ids)["contrastive_loss"]
    found = torch.autograd.grad(value, leaves)
    expected = [x.clone().requires_grad_() for x in (image, text, SCALE)]
    stored = (recent.image, recent.text, recent.ids, recent.log_sum, recent.count)
    total = oracles.with_recent_pairs(name, (*expected[:2], ids), stored, expected[2], N - 1)
    for ours, theirs in zip(found, torch.autograd.grad(total, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for direction, anchors, columns in ((0, image, text), (1, text, image)):  # what the youngest anchors had
        others = [SCALE * anchors[0] @ columns[j] for j in range(1, B)]
        old = recent.text if direction == 0 else recent.image
        others += [SCALE * anchors[0] @ old[c] for c in range(len(recent.ids)) if recent.ids[c] != ids[0]]
        loss.commit() if direction == 0 else None
        newest = loss.base.recent.joining()
        torch.testing.assert_close(newest.log_sum[direction, 0], torch.stack(others).logsumexp(0))
        assert newest.count[0] == len(others) and newest.ids[0] == ids[0]


def test_fresh_pairs_cost_no_signal_where_features_lie_in_a_cone():
    """The noise of what all features have in common is no larger than in the batch alone."""
    pairs, size, steps = 400, 20, 6
    latent = torch.randn(pairs, 8, dtype=torch.float64) + 3 * torch.randn(8, dtype=torch.float64)
    inputs = [latent + 0.5 * torch.randn_like(latent) for _ in range(2)]

    def gradient(loss, ids, again=()):
        maps = [torch.eye(8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        features = [normalize(x[ids] @ weight, dim=1) for x, weight in zip(inputs, maps, strict=True)]
        probe = (
            {
                f"{name}_features_again": normalize(x[again], dim=1)
                for name, x in zip(("image", "text"), inputs, strict=True)
            }
            if len(again)
            else {}
        )
        value = loss(*features, SCALE, sample_ids=ids, **probe)["contrastive_loss"]
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, maps)])

    whole = gradient(create_loss("dcl"), torch.arange(pairs))
    signals = {}
    for recent_batches in (0, steps):
        loss, generator, kept, found = (
            create_loss("dcl", recent_batches=recent_batches, **RECENT),
            torch.Generator().manual_seed(0),
            [],
            [],
        )
        for _ in range(80):
            ids = torch.randperm(pairs, generator=generator)[:size]
            kept = ids if loss.probe == "keep" else kept
            step = gradient(loss, ids, kept if loss.probe == "encode" else ())
            found.append(torch.cosine_similarity(step, whole, dim=0))
            loss.commit()
        signals[recent_batches] = torch.stack(found[30:]).mean()
    assert loss.base.recent.usable == steps
    assert signals[steps] > signals[0] - 0.02 > 0.5


def recall_after_training(recent_batches, seed):
    """Of two small towers that are trained in batches of 12 pairs, whose recent pairs join however old they are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    latent = normal(256, 8)
    inputs = [(latent @ normal(8, 16)).tanh() + 0.2 * normal(256, 16) for _ in range(2)]
    torch.manual_seed(seed)
    towers = [nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2)]
    optimizer = torch.optim.Adam([p for tower in towers for p in tower.parameters()], lr=3e-3)
    loss, kept = create_loss("dcl", recent_batches=recent_batches, recent_limit=1e9, **RECENT), None

    def features(ids, suffix=""):
        encoded = [normalize(tower(x[ids]), dim=1) for tower, x in zip(towers, inputs, strict=True)]
        return {f"{name}_features{suffix}": part for name, part in zip(("image", "text"), encoded, strict=True)}

    for _ in range(150):
        ids = torch.randperm(256, generator=generator)[:12]
        kept = ids if loss.probe == "keep" else kept
        with torch.no_grad():
            again = features(kept, "_again") if loss.probe == "encode" else {}
        outputs = loss(**features(ids), **again, logit_scale=torch.tensor(20.0), sample_ids=ids)
        optimizer.zero_grad()
        outputs["contrastive_loss"].backward()
        optimizer.step()
        loss.commit()
    with torch.no_grad():
        image, text = features(torch.arange(256)).values()
    return ((image @ text.T).argmax(1) == torch.arange(256)).double().mean()


def test_pairs_that_a_fast_model_has_left_behind_do_not_drive_it():
    """Stored anchors push with the weight that stored columns take, no more: else this loses a fifth of its recall."""
    without, with_them = (torch.stack([recall_after_training(k, seed) for seed in range(3)]).mean() for k in (0, 8))
    assert with_them > 0.9 * without > 0.4


@pytest.mark.parametrize("name", FORMS)
def test_without_features_encoded_again_no_stored_pair_joins(name):
    with_them, without = recent_loss(name), create_loss(name, **FORMS[name])
    for step in range(8):
        image, text, ids = batch(step)
        values = []
        for loss in (with_them, without):
            leaves = [x.clone().requires_grad_() for x in (image, text, SCALE)]
            value = loss(*leaves, sample_ids=ids)["contrastive_loss"]
            values.append((value.detach(), *torch.autograd.grad(value, leaves)))
            loss.commit()
        torch.testing.assert_close(*values)
    assert with_them.base.recent.joining() is None


def test_stored_anchors_weigh_no_more_than_in_the_batch_alone():
    """However wrong a stored log sum is, an anchor of `dcl` pushes with a weight of at most one in all."""
    loss, seen = filled("dcl")
    loss.base.recent.log_sum.fill_(-1e4)
    image, text, ids = batch(len(seen))
    leaves = [x.clone().requires_grad_() for x in (image, text)]
    gradients = torch.autograd.grad(loss(*leaves, 100 * SCALE, sample_ids=ids)["contrastive_loss"], leaves)
    stored = 3 * B
    for gradient in gradients:  # two directions of fresh anchors with their positives, and stored ones, all of norm one
        assert gradient.norm(dim=1).sum() <= 100 * SCALE * (4 * B + stored) / (2 * B) + 1e-6


def test_an_age_whose_scores_have_moved_stays_out():
    loss, kept, used = recent_loss("dcl", steps=8), [], []
    for step in range(30):
        age = step - loss.base.recent.began
        outputs = take_step(loss, batch(step), kept, moved=0.02 * age if step else 0.0)
        used.append(int(outputs["recent_batches_used"]))
    # Moved by .02 in each of 4 components, a column's score moves by about .02 age for anchors of unit norm, and scores
    # of random directions spread by 1/2, both times the logit scale.
    assert used[0] == 0 and 0 < used[-1] < 8
    recent = loss.base.recent
    passed = [age for age, error in recent.errors.items() if error <= recent.limit]
    failed = [age for age, error in recent.errors.items() if error > recent.limit]
    assert passed and failed and used[-1] == min(failed) - 1 >= max(passed)


@pytest.mark.parametrize("scale", [SCALE, SCALE / 60])
def test_the_error_is_the_root_mean_square_of_scores_over_their_spread(scale):
    loss, kept = recent_loss("dcl", steps=1), []
    first, second = batch(0), batch(1)
    take_step(loss, first, kept)
    image_again, text_again = oracles.unit(2, B, D, seed=9)
    outputs = loss(*second[:2], scale, sample_ids=second[2], image_features_again=image_again,
                   text_features_again=text_again)  # fmt: skip
    loss.commit()
    errors = []
    for anchors, stored, again in ((second[0], first[1], text_again), (second[1], first[0], image_again)):
        pairs = [(anchor, old, new) for anchor in anchors for old, new in zip(stored, again, strict=True)]
        error = math.sqrt(sum((scale * anchor @ (old - new)) ** 2 for anchor, old, new in pairs) / B**2)
        spread = math.sqrt(sum((scale * anchor @ (new - again.mean(0))) ** 2 for anchor, _, new in pairs) / B**2)
        errors.append(error / spread)
    expected = max(errors)
    assert loss.base.recent.report()["recent_error_1"] == pytest.approx(expected)
    assert outputs["recent_batches_used"] == 0


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_equal_one(ranks, num_ranks):
    (single,) = ranks.run(rank_jobs.recent_steps, 1, "batch_corrected", 6)
    assert single["used"] == 2
    for found in ranks.run(rank_jobs.recent_steps, num_ranks, "batch_corrected", 6):
        torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "dcl", "gamma_decomp"])
def test_every_check_holds(ranks, name):
    check_loss(name, ranks=ranks, num_ranks=(2,), recent_batches=2, **RECENT)


def test_a_state_goes_on_bit_for_bit_and_with_another_number_of_steps():
    loss, seen = filled("gamma_decomp", steps=4)
    fresh = batch(len(seen))

    def gradient(loss):
        leaves = [x.clone().requires_grad_() for x in fresh[:2]]
        outputs = loss(*leaves, SCALE, sample_ids=fresh[2])
        return torch.autograd.grad(outputs["contrastive_loss"], leaves)

    copy = recent_loss("gamma_decomp", steps=4)
    copy.load_state_dict(loss.state_dict())
    assert all(map(torch.equal, gradient(copy), gradient(loss)))
    for steps in (2, 6):
        other = recent_loss("gamma_decomp", steps=steps)
        other.load_state_dict(loss.state_dict())
        kept = other.base.recent.joining().ids.tolist()
        assert kept == [i for *_, ids in reversed(seen[-min(steps, 4) :]) for i in ids.tolist()]
        assert len(other.state_dict()["base.recent.image"]) == steps


@pytest.mark.parametrize("odd", range(12, 18))
def test_a_step_of_another_size_starts_anew_whatever_is_under_way(odd):
    """Nothing moves, so no check may find an error: none goes on with inputs of a step that is not held any more."""
    loss, kept, used = recent_loss("dcl"), [], []
    for step in range(40):
        outputs = take_step(loss, batch(step, size=3 if step == odd else B), kept)
        used.append(int(outputs["recent_batches_used"]))
        assert set(loss.base.recent.errors.values()) <= {0.0}
        if step == odd:
            assert loss.base.recent.joining() is None
    assert used[odd - 1] == 3 and used[odd + 1] == 0 and used[-1] == 3


def test_of_two_ways_one_stays_fresh_where_the_other_does_not():
    class Both(TwoWays):
        def pairs(self, features):
            return [[features[f"{side}_features{way}"] for side in ("image", "text")] for way in ("", "_swapped")]

    plan = ObjectivePlan("dcl", {"recent_batches": "4", "recent_check": "1", "recent_enough": "inf"})
    loss, kept = Both(plan, LossContext(num_samples=N, widths=Widths(embed=D))), None
    image, text = oracles.unit(2, N, D, seed=0)

    def features(ids, ending=""):  # those of the first way are new in each step
        moving = normalize(torch.randn(len(ids), D, dtype=image.dtype), dim=1)
        names = ("image_features", "text_features", "image_features_swapped", "text_features_swapped")
        return dict(zip((name + ending for name in names), (moving, text[ids], image[ids], text[ids]), strict=True))

    for step in range(20):
        ids = torch.arange(B) + B * step % (N - B)
        kept = {"keep": ids, "forget": None}.get(loss.probe, kept)
        again = features(kept, "_again") if loss.probe == "encode" and kept is not None else {}
        loss(**features(ids), logit_scale=SCALE, sample_ids=ids, **again)
        loss.commit()
    assert [way.base.recent.usable for way in loss.objectives] == [0, 4]


@pytest.mark.parametrize(("scale", "joined"), [(1.0, 0), (60.0, 3)])
def test_they_stay_out_where_a_batch_holds_enough_of_the_negatives_that_count(scale, joined):
    """All count where scores are about the same, and hardly any where few outweigh the others."""
    scale, kept, seen = torch.tensor(scale, dtype=torch.float64), [], []
    loss = recent_loss("dcl", recent_enough=1.0)
    for step in range(20):
        seen.append(batch(3 * step))
        outputs = take_step(loss, seen[-1], kept, scale=scale)
    assert outputs["recent_batches_used"] == joined and loss.base.recent.usable == 3
    while loss.probe != "encode":
        take_step(loss, seen[-1], kept, scale=scale)
    (image, text, ids), memory, sums = batch(1), loss.base.recent, []
    everything = [torch.cat([own, *stored]) for own, stored in ((image, memory.image), (text, memory.text))]
    all_ids = torch.cat([ids, *memory.ids])
    for anchors, columns in ((image, everything[1]), (text, everything[0])):
        for i in range(B):
            r = [math.exp(scale * anchors[i] @ c) for c, other in zip(columns, all_ids, strict=True) if other != ids[i]]
            sums.append(B * sum(r) ** 2 / (len(r) * sum(x * x for x in r)))
    take_step(loss, (image, text, ids), kept, scale=scale)
    assert memory.counting == pytest.approx(sum(sums) / len(sums), rel=1e-6) and (memory.counting < 1) is (joined > 0)


def test_a_loss_without_use_for_them_refuses_them():
    with pytest.raises(UserError, match="loss siglip has no option 'recent_batches'"):
        create_loss("siglip", recent_batches=2)
    with pytest.raises(UserError, match="recent_batches=-1: .* must be int >= 0"):
        create_loss("dcl", recent_batches=-1)


def test_chains_move_to_columns_of_recent_steps():
    """`emc2` with all pairs of the data among batch and recent steps: its gradient is that of the exact softmax."""
    size, steps = 4, 3
    image, text = oracles.unit(2, size * (steps + 1), D, seed=5)
    ids = torch.arange(len(image))
    loss, kept = create_loss("emc2", num_samples=len(image), embed_dim=D, bank_dtype="float32", recent_batches=steps,
                             **RECENT), []  # fmt: skip
    own = [slice(size * (step % (steps + 1)), size * (step % (steps + 1) + 1)) for step in range(4 * (steps + 1) + 1)]
    for part in own[:-1]:
        take_step(loss, (image[part], text[part], ids[part]), kept)
    # The waiting state is a sample that the batch or a recent step holds too, and counts once.
    leaves = [x[own[-1]].clone().requires_grad_() for x in (image, text)]
    outputs = loss(*leaves, SCALE, sample_ids=ids[own[-1]])
    assert outputs["recent_batches_used"] == steps
    found = torch.autograd.grad(outputs["contrastive_loss"], leaves)
    everything = [x.clone().requires_grad_() for x in (image, text)]
    # Of columns of recent steps the anchor's side alone: take the columns as constants there.
    total = 0.0
    for anchors, columns in (everything, everything[::-1]):
        for i in range(*own[-1].indices(len(image))):
            in_batch = range(*own[-1].indices(len(image)))
            scores = torch.stack(
                [SCALE * anchors[i] @ (columns[j] if j in in_batch else columns[j].detach())
                 for j in range(len(image)) if j != i]
            )  # fmt: skip
            total = total + scores.logsumexp(0) - SCALE * anchors[i] @ columns[i]
    expected = torch.autograd.grad(total / (2 * size), everything)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs[own[-1]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["isir", "mh"])
def test_every_check_holds_for_chains(ranks, kernel):
    check_loss("emc2", ranks=ranks, num_ranks=(2,), gradcheck=kernel == "isir", recent_batches=2, kernel=kernel)
