"""What `openclip_ext.testing` offers, and every loss of ours in it."""

import itertools

import pytest
import torch
from open_clip.loss import ClipLoss

import rank_jobs
from openclip_ext import Loss, LossSpec, promoted
from openclip_ext.testing import check_loss
from openclip_ext.testing.checks import check_ranks, two_steps
from ours import LOSSES, TERMS

#: Options that bring out more than the defaults do, of a loss and of a term; any other is checked with its defaults.
OPTIONS: dict[str, list[dict]] = {
    "sogclr": [{"gamma": 0.4}],
    "gamma_decomp": [
        {"gamma": 0.3, "gamma_decay": 0.0},
        {"gamma": 0.3, "gamma_decay": 0.0, "decoupled": True, "draws": 2},
    ],
    "emc2": [
        {},
        {"kernel": "mh", "burn_in": 0.25, "steps": 9},
        {"decoupled": False, "gamma": 0.4, "bank_dtype": "float32"},
    ],
}
TERM_OPTIONS: dict[str, list[dict]] = {
    "distill": [{"weight": 0.5}],
    "brownian_bridge": [{"weight": 0.25}, {"sample": True}],
    "geometric_consistency": [{"weight": 0.1}, {"weight": "0:0.3", "views": False}],
}
CASES = [(loss, options) for loss in LOSSES for options in OPTIONS.get(loss, [{}])] + [
    (loss, {"terms": {term: options}})
    for term in TERMS
    for options, loss in zip(TERM_OPTIONS.get(term, [{}]), itertools.cycle(["gamma_decomp", "clip"]), strict=False)
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_loss_passes_all_checks(ranks, name, options):
    # With draws, of weights or of states, the gradient is that of the value only on average.
    random = "draws" in options or options.get("kernel") == "mh"
    check_loss(name, ranks=ranks, gradcheck=not random, **options)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_rank_reports_the_value_of_the_global_batch(ranks, name, options):
    one, two = ranks.run(two_steps, 2, name, options, [4, 4])
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first["values"], second["values"])


@pytest.mark.parametrize("name", ["dcl", "gamma_decomp", "emc2"])
def test_ranks_with_batches_of_different_size_equal_one(ranks, name):
    check_ranks(ranks, name, {}, [4, 1, 3])


def test_the_pool_runs_as_many_ranks_as_asked(ranks):
    assert ranks.run(rank_jobs.world_size, 1) == [1]
    assert ranks.run(rank_jobs.world_size, 3) == [3, 3, 3]


def test_rows_are_gathered_in_rank_order_from_batches_of_any_size(ranks):
    for rows in ranks.run(rank_jobs.gathered, 3, [2, 0, 1]):
        assert rows[:, 0].tolist() == [0.0, 0.0, 2.0]


def test_a_failure_names_its_rank_and_ends_the_others(ranks):
    with pytest.raises(RuntimeError, match="rank 1:(.|\n)*rank one is unwell"):
        ranks.run(rank_jobs.fails_on_rank_one, 2)
    assert ranks.run(rank_jobs.world_size, 2) == [2, 2]


class Broken(Loss):
    """A loss with one fault of each kind on request."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls, self.hidden = fault, 0, 0.0
        self.register_buffer("steps", torch.zeros(()))

    def compute(self, image_features, text_features, logit_scale):
        self.calls += 1
        if self.fault != "precision":
            image_features, text_features, logit_scale = promoted(image_features, text_features, logit_scale)
        value = (image_features - text_features).square().sum(1).mean() * logit_scale
        if self.fault == "gradient":
            value = value + image_features.detach().pow(3).sum() * 5
        if self.fault == "single":
            value = value.float()
        if self.fault == "stages":
            self.steps += 1
        if self.fault == "repeat":
            value = value + self.calls
        if self.fault == "state":
            value = value + self.hidden
        return {"contrastive_loss": value}

    def commit(self):
        self.hidden += 1.0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gradient", "gradient: Jacobian mismatch"),
        ("single", "gradient: the value of float64 features is torch.float32"),
        ("stages", "stages: forward changed state before commit"),
        ("repeat", "stages: a second call in the same step differs"),
        ("state", "state: after load_state_dict the loss differs"),
        ("precision", "precision: the value under autocast is torch.bfloat16"),
        ("ranks", "ranks: step 0, rank 0: "),
    ],
)
def test_each_check_finds_its_fault(monkeypatch, ranks, fault, message):
    spec = LossSpec(name="broken", summary="", build=lambda options, context: Broken(fault))
    monkeypatch.setattr("openclip_ext.losses.plan.get_spec", lambda *args, **kwargs: spec)
    if fault == "ranks":  # the ranks look the name up themselves: a loss that gathers without gradient
        monkeypatch.undo()
        monkeypatch.setattr("openclip_ext.testing.checks.two_steps", two_steps_of_a_loss_without_gathered_gradient)
        with pytest.raises(AssertionError, match=message):
            check_loss("clip", ranks=ranks, num_ranks=(2,))
        return
    with pytest.raises(AssertionError, match=message):
        check_loss("broken", ranks=ranks, num_ranks=(), gradcheck=fault != "repeat")


def two_steps_of_a_loss_without_gathered_gradient(rank, num_ranks, name, options, sizes):
    from openclip_ext.testing import checks

    original = checks.create_loss

    def without_gradient(*args, **kwargs):
        loss = original(*args, **kwargs)
        loss.base = ClipLoss(local_loss=True, gather_with_grad=False, rank=rank, world_size=num_ranks)
        return loss

    checks.create_loss = without_gradient
    try:
        return checks.two_steps(rank, num_ranks, name, options, sizes)
    finally:
        checks.create_loss = original
