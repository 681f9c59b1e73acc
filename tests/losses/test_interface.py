"""How a loss is called and written: wrong arguments, missing calls, misspelt hooks, and modules that are no `Loss`."""

import warnings

import open_clip
import pytest
import torch

import openclip_ext
import oracles
from openclip_ext import Loss, LossSpec, UserError, create_loss
from openclip_ext.losses import LossContext, ObjectivePlan

B, D = 4, 5


def call(name="dcl", **changes):
    image, text = oracles.unit(2, B, D, dtype=torch.float32)
    given = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(7.0)}
    options = {"num_samples": 9} if name in ("sogclr", "gamma_decomp") else {}
    return create_loss(name, **options)(**given | changes)


IDS = torch.arange(B)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("siglip", {}, "loss siglip needs logit_bias=…, the model's logit_bias"),
        ("sogclr", {}, "loss sogclr needs sample_ids=…, the ids of the samples"),
        ("sogclr", {"sample_ids": IDS.tolist()}, r"sample_ids=\[0, 1, 2, 3\]: must be a tensor of whole numbers"),
        ("sogclr", {"sample_ids": IDS.float()}, "must be a tensor of whole numbers"),
        ("sogclr", {"sample_ids": IDS[:3]}, r"sample_ids \(3,\): must be one id per pair, \(4,\)"),
        ("dcl", {"logit_scale": 7.0}, "logit_scale=7.0: must be a tensor, such as model.logit_scale.exp"),
        ("dcl", {"text_features": torch.ones(3, D)}, r"\(4, 5\) and text_features \(3, 5\): must hold as many rows"),
        ("dcl", {"text_features": torch.ones(B, 6)}, r"\(4, 5\) and text_features \(4, 6\) must both be"),
    ],
)
def test_a_wrong_argument_is_named(name, changes, message):
    with pytest.raises(ValueError, match=message) as found:
        call(name, **changes)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sogclr", {}, "loss sogclr needs the pairs in the training set: give create_loss.…, num_samples=N"),
        ("batch_corrected", {}, "loss batch_corrected needs the pairs in the training set"),
        ("sogclr", {"num_samples": 0}, "num_samples=0: must be a whole number of at least 2"),
        ("sogclr", {"num_samples": 1e4}, "num_samples=10000.0: must be a whole number"),
        ("emc2", {"num_samples": 9}, "loss emc2 needs the widths .*: give create_loss.…, embed_dim=…"),
    ],
)
def test_what_is_missing_to_build_a_loss_is_named(name, options, message):
    with pytest.raises(UserError, match=message):
        create_loss(name, **options)


@pytest.mark.parametrize("name", ["clip", "siglip", "dcl", "emc2"])
def test_the_number_of_samples_is_asked_for_only_where_it_is_needed(name):
    options = {"embed_dim": D, "num_samples": 9} if name == "emc2" else {}
    assert isinstance(create_loss(name, **options), Loss)
    assert isinstance(create_loss("batch_corrected", negatives=8), Loss)


def train_steps(loss, steps, *, told_time, committed):
    for step in range(steps):
        if told_time:
            loss.begin_step(step=step, total_steps=steps)
        image, text = (x.requires_grad_() for x in oracles.unit(2, B, D, seed=step, dtype=torch.float32))
        loss(image, text, torch.tensor(7.0), sample_ids=IDS)
        if committed:
            loss.commit()


def said(loss, **calls):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train_steps(loss, 50, **calls)
    return [str(warning.message) for warning in found]


def test_a_forgotten_begin_step_or_commit_is_said_once():
    def gamma(**options):
        return create_loss("gamma_decomp", num_samples=9, recent_batches=0, **options)

    assert said(gamma(), told_time=True, committed=True) == []
    (time,) = said(gamma(), told_time=False, committed=True)
    assert "loss gamma_decomp has a schedule: call loss.begin_step(step=…, total_steps=…)" in time
    (commit,) = said(gamma(), told_time=True, committed=False)
    assert "keeps a state, which only loss.commit() writes" in commit
    assert said(gamma(gamma=1), told_time=False, committed=True) == []
    assert said(create_loss("dcl"), told_time=False, committed=False) == []
    (time,) = said(create_loss("dcl", terms={"geometric_consistency": {"views": False, "weight": "0:1"}}),
                   told_time=False, committed=False)  # fmt: skip
    assert "has a schedule" in time


def test_recent_pairs_that_nobody_encodes_again_are_said_once():
    (unused,) = said(create_loss("dcl", recent_batches=2), told_time=False, committed=True)
    assert "loss dcl has no use of recent pairs" in unused and "help(openclip_ext.KeptInputs)" in unused


def test_a_misspelt_hook_is_an_error_when_the_class_is_defined():
    with pytest.raises(TypeError, match="Wrong.comit: no hook of a loss; did you mean commit?"):
        type("Wrong", (Loss,), {"comit": lambda self: None})
    with pytest.raises(TypeError, match="did you mean begin_step?"):
        type("Wrong", (Loss,), {"beginstep": lambda self, **time: None})
    fine = type("Fine", (Loss,), {"commit": lambda self: None, "encode": lambda self: None, "_comit": None})
    assert fine().has_state and not fine().wants_warm_start


def plan_of(monkeypatch, part):
    spec = LossSpec(name="theirs", summary="", build=lambda options, context: part)
    monkeypatch.setattr("openclip_ext.losses.plan.get_spec", lambda *args, **kwargs: spec)
    return ObjectivePlan("theirs", {})


def test_a_module_that_is_no_loss_is_called_as_openclip_calls_its_own(monkeypatch):
    loss = plan_of(monkeypatch, open_clip.ClipLoss()).build(LossContext())
    image, text = oracles.unit(2, B, D, dtype=torch.float32)
    scale = torch.tensor(7.0)
    torch.testing.assert_close(
        loss(image, text, scale)["contrastive_loss"], create_loss("clip")(image, text, scale)["contrastive_loss"]
    )
    loss.begin_step(step=0, total_steps=1)
    loss.commit()


def test_hooks_that_nobody_would_call_are_refused(monkeypatch):
    module = torch.nn.Module()
    module.commit = lambda: None
    with pytest.raises(UserError, match=r"commit\(\), which nobody would call: derive it from openclip_ext.Loss"):
        plan_of(monkeypatch, module).build(LossContext())


def test_the_public_names_are_found():
    assert set(openclip_ext.__all__) <= set(dir(openclip_ext))
    assert "create_loss" in openclip_ext.__all__ and openclip_ext.create_loss is create_loss
