"""emc2: the law of its chains, its bias, and its bank."""

import json
import os

import pytest
import torch

import oracles
from openclip_ext import UserError, create_loss
from openclip_ext.cli import main
from openclip_ext.state.table import Placement, SampleTable

N, D, B = 128, 8, 8
SCALE = 10.0
BOTH_KERNELS = pytest.mark.parametrize("options", [{"kernel": "isir"}, {"kernel": "mh"}], ids=["isir", "mh"])


@pytest.fixture(scope="module")
def features():
    return oracles.near_pairs(N, D)


def batches(epochs, size=B, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(N, generator=generator).split(size)


def emc2(**options):
    return create_loss("emc2", num_samples=N, embed_dim=D, **({"bank_dtype": "float32"} | options))


def laws(features):
    """Exact softmax over all negatives, (2, N, N)."""
    image, text = features
    scores = torch.stack([SCALE * image @ text.T, SCALE * text @ image.T])
    return scores.masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf).softmax(2)


@BOTH_KERNELS
def test_states_follow_the_softmax_over_all_negatives(features, options):
    """100,000 visits at fixed embeddings. A state's randomised place in its law's distribution function is uniform."""
    loss, exact, size = emc2(**options), laws(features).double(), 32
    order = exact.argsort(2, descending=True)
    places = []
    for visit, ids in enumerate(batches(epochs=400, size=size)):
        loss(*(part[ids] for part in features), torch.tensor(SCALE), sample_ids=ids)
        loss.commit()
        if visit >= 80 and visit % 40 == 0:  # ten visits of each chain apart, as good as independent
            state = loss.base.stored_ids(torch.arange(N))
            mass = exact.gather(2, state[..., None]).squeeze(2)
            before = exact.gather(2, order).cumsum(2).gather(2, order.argsort(2).gather(2, state[..., None])).squeeze(2)
            places.append(before - mass * torch.rand(mass.shape, dtype=torch.float64))
    counts = torch.histc(torch.cat([place.flatten() for place in places]), bins=20, min=0, max=1)
    expected = counts.sum() / 20
    # 99.9 % of a chi-square variable with 19 degrees of freedom is below 43.8.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def scale_gradient(loss, features, ids, **extra):
    scale = torch.tensor(SCALE, requires_grad=True)
    value = loss(*(part[ids] for part in features), scale, sample_ids=ids, **extra)["contrastive_loss"]
    return torch.autograd.grad(value, scale)[0]


def scale_bias(loss, features, full, epochs=80, warm_up=30):
    """Relative error of the mean gradient with respect to the logit scale."""
    gradients = []
    for ids in batches(epochs):
        gradients.append(scale_gradient(loss, features, ids))
        loss.commit()
    return ((torch.stack(gradients[warm_up * N // B :]).mean() - full) / full).abs().item()


@pytest.mark.parametrize(
    "options", [{"kernel": "isir"}, pytest.param({"kernel": "mh"}, marks=pytest.mark.slow)], ids=["isir", "mh"]
)
def test_the_bias_is_below_a_quarter_of_openclips_and_dropping_stored_states_above_it(monkeypatch, features, options):
    everything = torch.arange(N)
    full = scale_gradient(create_loss("batch_corrected", num_samples=N, negatives=10**9), features, everything)
    clip = create_loss("clip", num_samples=N)
    openclip = scale_bias(clip, features, scale_gradient(clip, features, everything))
    assert scale_bias(emc2(**options), features, full) < openclip / 4

    # As published: the positive's part stays, the stored negative's is dropped.
    from openclip_ext.losses.emc2.chain import Chain

    complete = Chain.__init__

    def without_stored_states(chain, pairs, direction, stored_ids, stored):
        complete(chain, pairs, direction, stored_ids, stored)
        chain.stored = torch.zeros_like(stored)

    monkeypatch.setattr(Chain, "__init__", without_stored_states)
    assert scale_bias(emc2(**options), features, full) > openclip


def feature_bias(loss, leaves, full, epochs=120, warm_up=30, size=16):
    """Relative error of the mean gradient with respect to all features; stored samples are encoded again."""
    total, used = torch.zeros_like(full), 0
    for step, ids in enumerate(batches(epochs, size)):
        extra = {}
        if "stored_features" in loss.needs:
            stored_ids = loss.base.stored_ids(ids).clamp_min(0)
            extra["stored_features"] = torch.stack([leaves[1][stored_ids[0]], leaves[0][stored_ids[1]]])
        outputs = loss(*(part[ids] for part in leaves), torch.tensor(SCALE), sample_ids=ids, **extra)
        loss.commit()
        if step >= warm_up * N // size:
            total += torch.cat(torch.autograd.grad(outputs["contrastive_loss"], leaves))
            used += 1
    return ((total / used - full).norm() / full.norm()).item()


@pytest.mark.slow
def test_with_stored_samples_encoded_again_gradients_of_both_sides_lose_bias(features):
    leaves = [part.clone().requires_grad_() for part in features]
    dcl = create_loss("dcl", num_samples=N)
    full = torch.cat(torch.autograd.grad(dcl(*leaves, torch.tensor(SCALE))["contrastive_loss"], leaves))
    assert feature_bias(emc2(bank="index"), leaves, full) < 0.7 * feature_bias(dcl, leaves, full)


def test_weights_of_a_visit_are_shares_of_kept_steps_times_scores_of_now(features):
    """One visit, by hand: the gradient with respect to an anchor is sum_j w_j s grad - positive."""
    ids, later = torch.arange(B), torch.arange(B) + B
    loss = emc2(kernel="isir")
    first, second = ([part[chosen] for part in features] for chosen in (ids, later))
    loss(*first, torch.tensor(SCALE), sample_ids=ids)
    loss.commit()
    state = loss.base.stored_ids(ids)
    assert (state >= 0).all() and (state != ids).all()
    # The same samples among other texts: their stored states are not in the batch.
    image, text = first[0].clone().requires_grad_(), second[1]
    outputs = loss(image, text, torch.tensor(SCALE), sample_ids=torch.cat([ids[:1], later[1:]]))
    gradient = torch.autograd.grad(outputs["contrastive_loss"], image)[0][0]
    stored = features[1][state[0, 0]]
    candidates = torch.cat([text[1:], stored[None]])
    weights = (SCALE * candidates @ image[0]).softmax(0)
    # As anchor of direction 0, and as the column of the other anchors in direction 1.
    others = (SCALE * image.detach() @ text[1:].T).masked_fill(torch.eye(B, dtype=torch.bool)[:, 1:], -torch.inf)
    as_anchor = SCALE * ((weights[:, None] * candidates).sum(0) - text[0])
    as_column = SCALE * ((others.softmax(0)[0][:, None] * text[1:]).sum(0) - text[0])
    torch.testing.assert_close(gradient, (as_anchor + as_column) / (2 * B), rtol=1e-4, atol=1e-5)


def test_reports_say_how_chains_do(features):
    loss = emc2()
    reports = []
    for ids in batches(epochs=3, size=32):
        reports.append(loss(*(part[ids] for part in features), torch.tensor(SCALE), sample_ids=ids))
        loss.commit()
    first, last = reports[0], reports[-1]
    assert first["stored_weight"] == 0 and first["age_mean"] == 0 and first["acceptance"] == 1
    assert 0 < last["stored_weight"] < 1 and 0 < last["acceptance"] < 1
    assert 0 < last["age_mean"] <= last["age_max"] < len(reports)
    assert 1 < last["effective_samples"] < 32


def test_a_sample_that_comes_twice_is_no_negative_of_itself_and_its_last_visit_counts(features):
    ids = torch.tensor([3, 5, 3, 9])
    states = []
    for _ in range(2):
        loss = emc2()
        for _ in range(6):
            loss(*(part[ids] for part in features), torch.tensor(SCALE), sample_ids=ids)
            loss.commit()
        states.append(loss.base.stored_ids(torch.arange(N)))
    assert torch.equal(*states)
    assert set(states[0][:, 3].tolist()) <= {5, 9} and (states[0][:, 4] == -1).all()


def test_a_batch_of_one_sample_twice_has_no_negatives_and_no_gradient(features):
    image = features[0][:2].clone().requires_grad_()
    ids = torch.tensor([4, 4])
    for kernel in ("isir", "mh"):
        loss = emc2(kernel=kernel)
        value = loss(image, features[1][:2], torch.tensor(SCALE), sample_ids=ids)["contrastive_loss"]
        loss.commit()
        assert value == 0 and not torch.autograd.grad(value, image)[0].any()
        assert (loss.base.stored_ids(ids) == -1).all()


def test_coupled_is_decoupled_times_the_negatives_share(features):
    ids = torch.arange(B)

    def gradient(**options):
        image = features[0][ids].clone().requires_grad_()
        loss = emc2(**options)
        value = loss(image, features[1][ids], torch.tensor(SCALE), sample_ids=ids)["contrastive_loss"]
        return value, torch.autograd.grad(value, image)[0]

    reference = create_loss("batch_corrected", num_samples=N)
    image = features[0][ids].clone().requires_grad_()
    value = reference(image, features[1][ids], torch.tensor(SCALE), sample_ids=ids)["contrastive_loss"]
    coupled = gradient(decoupled=False)
    torch.testing.assert_close(coupled[0], value)
    torch.testing.assert_close(coupled[1], torch.autograd.grad(value, image)[0])
    assert coupled[1].norm() < gradient()[1].norm()


def test_ids_beyond_the_bank_are_an_error(features):
    with pytest.raises(IndexError, match="sample id 128 is outside of the negative bank of 128 samples"):
        emc2()(*(part[:2] for part in features), torch.tensor(SCALE), sample_ids=torch.tensor([0, N]))


# Placement.


@pytest.mark.parametrize("kind", ["cpu", "mmap"])
def test_a_bank_elsewhere_gives_the_same(features, tmp_path, kind):
    here, there = emc2(), emc2(bank_device=kind, bank_path=str(tmp_path / "bank"))
    for ids in batches(epochs=3):
        outputs = [
            loss(*(part[ids] for part in features), torch.tensor(SCALE), sample_ids=ids) for loss in (here, there)
        ]
        torch.testing.assert_close(*outputs)
        for loss in (here, there):
            loss.commit()
    assert torch.equal(here.base.bank.embedding.values, there.base.bank.embedding.values)
    assert ("base.bank.embedding.values" in there.state_dict()) == (kind == "cpu")
    there.double()
    assert there.base.bank.embedding.values.dtype == torch.float32


def test_a_file_is_sparse_and_outlives_the_run(tmp_path):
    path = str(tmp_path / "bank")
    placement = Placement("mmap", path)
    table = SampleTable((2, 200_000, 64), torch.float16, 0, "bank", placement, in_state=False)
    assert os.path.getsize(path) == 2 * 200_000 * 64 * 2 + 8 and os.stat(path).st_blocks * 512 < 1e6
    rows = torch.randn(3, 64).half()
    table.write(1, torch.tensor([7, 199_999, 0]), rows)
    again = SampleTable((2, 200_000, 64), torch.float16, 0, "bank", placement, in_state=False)
    assert torch.equal(again.read(torch.tensor([199_999, 7]))[1], rows[[1, 0]])
    assert not again.read(torch.tensor([5])).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bank_device": "mmap"},
            "--loss-arg bank_device=mmap: name the file with --loss-arg bank_path=FILE",
        ),
        ({"bank_device": "mmap", "bank_path": "/nowhere/bank"}, "/nowhere is no folder"),
    ],
)
def test_a_file_without_a_place_is_an_error(options, message):
    with pytest.raises(UserError, match=message):
        emc2(**options)


def test_a_file_of_before_it_had_a_stamp_is_taken_up(tmp_path):
    loss = emc2(bank_device="mmap", bank_path=str(tmp_path / "bank"))
    size = loss.base.bank.embedding.values.numel() * 4
    os.truncate(tmp_path / "bank", size)
    again = emc2(bank_device="mmap", bank_path=str(tmp_path / "bank"))
    assert again.base.bank.embedding.stamp == 0 and os.path.getsize(tmp_path / "bank") == size + 8
    again.base.bank.embedding.stamp = 2**40
    assert again.base.bank.embedding.stamp == 2**40 and not again.base.bank.embedding.values.any()


def test_a_file_of_another_size_is_an_error(tmp_path):
    path = str(tmp_path / "bank")
    emc2(bank_device="mmap", bank_path=path)
    with pytest.raises(UserError, match="holds 8200 bytes, and the negative bank of .* takes 4096"):
        emc2(bank_device="mmap", bank_path=path, bank_dtype="float16")


@pytest.mark.parametrize("kind", ["device", "mmap"])
def test_a_bank_without_room_is_refused_before_it_is_made(tmp_path, kind):
    options = {"bank_device": kind, "bank_path": str(tmp_path / "bank")}
    with pytest.raises(UserError, match=r"takes .* GB and .* GB are free on .*; use --loss-arg bank_device=cpu"):
        create_loss("emc2", num_samples=10**12, embed_dim=10**6, **options)
    assert not (tmp_path / "bank").exists()


def test_chains_of_another_kernel_are_refused():
    with pytest.raises(UserError, match="kernel=mh: the checkpoint's chains were made by kernel=isir"):
        emc2(kernel="mh").load_state_dict(emc2(kernel="isir").state_dict())


# Training.


def test_a_bank_in_a_file_trains_and_resumes(train_flags, tmp_path, capsys):
    flags = ("--loss", "emc2", "--loss-arg", "bank_device=mmap", "--loss-arg", f"bank_path={tmp_path / 'bank'}")
    assert main(train_flags(*flags)) == 0
    assert (tmp_path / "bank").stat().st_size == 2 * 256 * 16 * 2 + 8
    row = json.loads((tmp_path / "logs/run/metrics.jsonl").read_text().splitlines()[-1])
    assert {"acceptance", "stored_weight", "age_mean", "age_max", "effective_samples"} <= row.keys()
    assert main(train_flags(*flags, "--epochs", 2, "--resume", "latest")) == 0
    assert main(train_flags(*flags, "--epochs", 3, "--resume", "latest", "--loss-arg", "kernel=mh")) == 2
    assert "kernel=mh: the checkpoint's chains were made by kernel=isir" in capsys.readouterr().err


def test_what_a_file_has_beyond_the_checkpoint_is_said(train_flags, tmp_path, capsys):
    bank = tmp_path / "bank"
    flags = ("--loss", "emc2", "--loss-arg", "bank_device=mmap", "--loss-arg", f"bank_path={bank}")
    assert main(train_flags(*flags, "--save-every-steps", 5)) == 0
    checkpoints = tmp_path / "logs" / "run" / "checkpoints"
    capsys.readouterr()
    remark = f"--loss-arg bank_path={bank}: "
    assert main(train_flags(*flags, "--epochs", 2, "--resume", "latest", "--name", "run")) == 0
    assert remark not in capsys.readouterr().err
    older = ("--epochs", 1, "--resume", checkpoints / "epoch_0_step_5.pt", "--name", "older")
    assert main(train_flags(*flags, *older)) == 0
    newer = (
        "was written to until step 16, and the checkpoint is of step 5: stored embeddings of samples that came since"
    )
    assert f"{remark}{newer} differ" in capsys.readouterr().err
    bank.unlink()
    assert main(train_flags(*flags, *older[:-1], "lost")) == 0
    assert f"{remark}holds nothing of that, and the checkpoint is of step 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["bank=index"], "--loss-arg bank=index: is for callers that encode stored samples again"),
        (["bank_device=mmap"], "--loss-arg bank_device=mmap: name the file"),
        (["burn_in=1"], "--loss-arg burn_in=1: burn_in of loss emc2 must be float in [0, 1)"),
        (["kernel=gibbs"], "--loss-arg kernel=gibbs: kernel of loss emc2 must be one of mh, isir"),
    ],
)
def test_wrong_options_are_one_line(train_flags, capsys, options, message):
    assert main(train_flags("--loss", "emc2", *(part for option in options for part in ("--loss-arg", option)))) == 2
    assert message in capsys.readouterr().err
