"""The latent-structure terms against slow oracles, their exact limits, and numerical differentiation."""

import itertools

import pytest
import torch
from torch.nn.functional import normalize

import oracles
from openclip_ext import UserError, create_loss
from openclip_ext.ops.gram import sum_of_squared_cross_gaps, sum_of_squared_gaps

B, D, TRUNK = 6, 5, (7, 4)
SCALE = torch.tensor(7.0, dtype=torch.float64)


def loss_with(term, **options):
    torch.manual_seed(1)
    widths = {"embed_dim": D, "image_trunk_dim": TRUNK[0], "text_trunk_dim": TRUNK[1]}
    return create_loss("clip", terms={term: options}, **widths).double()


def features(seed=0):
    """Everything the terms may be given, by argument name, as float64 leaves."""
    image, text, image_aug, text_aug = oracles.unit(4, B, D, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    given = {"image_features": image, "text_features": text, "logit_scale": SCALE.clone()}
    given |= {"image_features_aug": normalize(image + 0.5 * image_aug, dim=-1)}
    given |= {"text_features_aug": normalize(text + 0.5 * text_aug, dim=-1)}
    for suffix, (modality, width) in itertools.product(("", "_aug"), zip(("image", "text"), TRUNK, strict=True)):
        given[f"{modality}_trunk_features{suffix}"] = torch.randn(B, width, generator=generator, dtype=torch.float64)
    return {name: value.requires_grad_() for name, value in given.items()}


def as_oracle_sees(term, options, loss, given):
    image, text = given["image_features"], given["text_features"]
    if term == "brownian_bridge":
        return oracles.brownian_bridge(image, text, given["image_features_aug"], options.get("tau", 0.25))
    if term == "geometric_consistency":
        views = (given["image_features_aug"], given["text_features_aug"]) if options.get("views", True) else ()
        return oracles.geometric_consistency(image, text, *views)
    heads = loss.terms["feature_separation"].heads
    private, private_aug = (
        [
            [oracles.norm(row) for row in heads[modality](given[f"{modality}_trunk_features{suffix}"])]
            for modality in ("image", "text")
        ]
        for suffix in ("", "_aug")
    )
    return oracles.feature_separation((image, text), private, private_aug, given["logit_scale"])


CASES = [
    ("brownian_bridge", {}),
    ("brownian_bridge", {"tau": 0.75}),
    ("geometric_consistency", {}),
    ("geometric_consistency", {"views": False}),
    ("feature_separation", {}),
]


@pytest.mark.parametrize(("term", "options"), CASES)
def test_value_and_all_gradients_equal_the_oracle(term, options):
    loss, given = loss_with(term, weight=0.5, **options), features()
    value = loss(**given)[f"{term}_loss"]
    reference = 0.5 * as_oracle_sees(term, options, loss, given)
    torch.testing.assert_close(value, reference)
    leaves = [*given.values(), *loss.parameters()]
    ours, theirs = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (value, reference))
    for mine, other in zip(ours, theirs, strict=True):
        zero = torch.zeros(())
        assert (mine is None) or mine.isfinite().all()
        torch.testing.assert_close(
            zero if mine is None else mine, zero if other is None else other, rtol=1e-9, atol=1e-10, check_dtype=False
        )


@pytest.mark.parametrize(("term", "options"), [*CASES, ("brownian_bridge", {"sample": True})])
def test_gradcheck(term, options):
    loss, given = loss_with(term, **options), features()
    names = list(given)
    assert torch.autograd.gradcheck(
        lambda *values: loss(**dict(zip(names, values, strict=True)))[f"{term}_loss"], tuple(given.values())
    )


@pytest.mark.parametrize("spread", [1.0, 0.3])  # a mean cosine of 0.5, and 0.9
@pytest.mark.parametrize("rows", [24, 200])
def test_sums_over_pairs_equal_their_matrix_form(rows, spread):
    """In float32, also for features in a narrow cone, as those of CLIP models are; on both sides of the switch."""
    x, y = (normalize(part, dim=-1).requires_grad_() for part in 1 + spread * torch.randn(2, rows, 24))
    slow = [part.detach().double().requires_grad_() for part in (x, y)]
    gaps = slow[0] @ slow[0].T - slow[1] @ slow[1].T
    cross = slow[0] @ slow[1].T - slow[1] @ slow[0].T
    within = gaps.square().sum()
    for ours, reference in (
        (sum_of_squared_gaps(x, y), within),
        (sum_of_squared_cross_gaps(x, y), within + cross.square().sum()),
    ):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=0)
        mine, theirs = torch.autograd.grad(ours, (x, y)), torch.autograd.grad(reference, slow, retain_graph=True)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_the_large_batch_form_holds_no_matrix_of_pairs():
    rows, width = 4096, 16
    x, y = (normalize(part, dim=-1).requires_grad_() for part in torch.randn(2, rows, width))
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(part))
            return result

    with Sizes():
        (sum_of_squared_gaps(x, y) + sum_of_squared_cross_gaps(x, y)).backward()
    assert max(sizes) == rows * width


def test_the_closed_form_of_the_bridge():
    """2 - 2 [tau <v, v^a> + (1 - tau) <t, v^a>] / sqrt(tau^2 + (1 - tau)^2 + 2 tau (1 - tau) <v, t>)."""
    given, tau = features(), 0.25
    v, t, a = (given[key] for key in ("image_features", "text_features", "image_features_aug"))
    length = (tau**2 + (1 - tau) ** 2 + 2 * tau * (1 - tau) * (v * t).sum(1)).sqrt()
    closed = (2 - 2 * (tau * (v * a).sum(1) + (1 - tau) * (t * a).sum(1)) / length).mean()
    torch.testing.assert_close(loss_with("brownian_bridge")(**given)["brownian_bridge_loss"], closed)


def test_identical_features_have_no_structure_to_correct():
    given = features()
    given["text_features"] = given["image_features_aug"] = given["text_features_aug"] = given["image_features"]
    for term in ("brownian_bridge", "geometric_consistency"):
        assert loss_with(term)(**given)[f"{term}_loss"].item() == pytest.approx(0, abs=1e-12)


def test_sampled_bridges_differ_between_steps_and_not_within_one():
    loss, given = loss_with("brownian_bridge", sample=True), features()
    first, again = (loss(**given)["brownian_bridge_loss"].item() for _ in range(2))
    loss.commit()
    assert first == again != loss(**given)["brownian_bridge_loss"].item()


def test_private_features_become_orthogonal_and_spread():
    """The term does what it is for: the heads learn features that overlap less and are told apart."""
    loss, given = loss_with("feature_separation"), features()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    reports = []
    for _ in range(60):
        outputs = loss(**{name: value.detach() for name, value in given.items()})
        reports.append({name: value.item() for name, value in outputs.items()})
        optimizer.zero_grad()
        outputs["feature_separation_loss"].backward()
        optimizer.step()
    for part in ("orthogonality", "private_contrastive", "uniformity", "feature_separation_loss"):
        assert reports[-1][part] < reports[0][part]


def test_weight_schedules_follow_their_line():
    loss, given = loss_with("brownian_bridge", weight="0:0.5@0.5"), features()
    full = loss_with("brownian_bridge")(**given)["brownian_bridge_loss"].item()
    for step, weight in ((0, 0.0), (25, 0.25), (50, 0.5), (99, 0.5)):
        loss.begin_step(step=step, total_steps=100)
        outputs = loss(**given)
        assert outputs["brownian_bridge_weight"].item() == pytest.approx(weight)
        assert outputs["brownian_bridge_loss"].item() == pytest.approx(weight * full)


def test_without_a_step_a_scheduled_weight_is_its_last():
    given = features()
    scheduled, constant = (loss_with("brownian_bridge", weight=weight)(**given) for weight in ("1:0.25", 0.25))
    assert scheduled["brownian_bridge_loss"] == constant["brownian_bridge_loss"]
    assert "brownian_bridge_weight" not in constant


@pytest.mark.parametrize("weight", ["-1", "x", "nan", "inf", "0:", ":1", "1@0.5", "0:1@0", "0:1@2", "0:-1", ""])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(UserError, match=r"--loss-term brownian_bridge=.*the weight must be a number >= 0, or a line"):
        loss_with("brownian_bridge", weight=weight)


def test_a_term_without_its_view_or_widths_says_what_it_needs():
    given = features()
    with pytest.raises(UserError, match="loss term brownian_bridge needs image_features_aug=…, features of second"):
        loss_with("brownian_bridge")(given["image_features"], given["text_features"], SCALE)
    with pytest.raises(UserError, match="feature_separation needs .*: give create_loss.…, image_trunk_dim=…, text_"):
        create_loss("clip", terms={"feature_separation": {}}, embed_dim=4)
