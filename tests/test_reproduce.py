"""The scripts that repeat the papers' experiments: what they rest on holds."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from reproduce.emc2.train import Run as EMC2Run
from reproduce.emc2.train import build, encode_stored, exact
from reproduce.emc2.train import train as train_emc2
from reproduce.emc2.views import stored_views
from reproduce.fusion import summary as fusion_summary
from reproduce.fusion.train import Run as FusionRun
from reproduce.gradient_bias.data import NUISANCE, SCALE, Noise, global_loss, optimum, shares, simulate
from reproduce.gradient_bias.train import PAIRS, Run, Trainer, is_decoupled, train
from reproduce.structures.data import Source, load
from reproduce.structures.rows import TERMS, Row, rows
from reproduce.structures.train import Run as StructuresRun
from reproduce.structures.train import read_run
from runs.marks import put_between_marks
from runs.methods import parse_method
from runs.pool import finish
from runs.rows import Single
from runs.store import Store
from torch import nn
from torch.nn.functional import normalize

from openclip_ext import UserError, create_loss


def test_runs_are_done_once_and_reported(tmp_path):
    path = str(tmp_path / "runs.jsonl")
    first, second = (Run(method=name, batch_size=4, noise=1.0, starts=2, steps=2) for name in ("clip", "dcl"))
    store = Store(path, lambda record: Run(**record))
    store.add(first, {"metric": "as it was"})  # done before: it is not done again
    reports = []
    finish([Single(first), Single(second)], store, train, 1, lambda: reports.append(len(store.runs())))
    again = Store(path, lambda record: Run(**record))
    assert again.require(first) == {"metric": "as it was"} and len(again.require(second)["metric"]) == 2
    assert reports[-1] == 2 and Single(second).left(again) == 0


def test_a_table_goes_between_its_marks(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<a>\nold\n</a>\nafter\n")
    put_between_marks("new", str(path), ("<a>", "</a>"))
    assert path.read_text() == "before\n<a>\nnew\n</a>\nafter\n"
    with pytest.raises(UserError, match="must hold the lines <b> and </b>"):
        put_between_marks("new", str(path), ("<b>", "</b>"))


def test_targets_of_methods():
    assert parse_method("emc2+bank=index+recent=2") == ("emc2", {"bank": "index", "recent_batches": "2"})
    decoupled = ("dcl", "emc2", "gamma_decomp+decoupled=true")
    assert all(map(is_decoupled, decoupled))
    assert not any(map(is_decoupled, ("clip", "batch_corrected", "gamma_decomp", "emc2+decoupled=false")))


def test_the_noise_multiplies_ratios_by_one_on_average_and_keeps_clean_scores():
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(2, 8, generator=generator), dim=1) for _ in range(2))
    noise = Noise(1.0)
    ratios = []
    for _ in range(40):
        rows_of = [part.repeat_interleave(500, 0) for part in (image, text)]
        noisy_image, noisy_text, scale = noise.add(*rows_of, SCALE, generator)
        assert torch.allclose(noisy_image.norm(dim=1), torch.ones(1000), atol=1e-5)
        own = scale * (noisy_image[:500] * noisy_text[:500]).sum(1)
        other = scale * (noisy_image[:500] * noisy_text[500:]).sum(1)
        ratios.append((other - own).exp().mean())
    clean = (SCALE * (image[0] @ text[1] - image[0] @ text[0])).exp()
    spread = math.exp(1.0) - 1  # about the relative variance of one ratio
    assert torch.stack(ratios).mean() / clean == pytest.approx(1, abs=4 * math.sqrt(spread / 2e4))
    assert Noise(0.0).add(image, text, SCALE, generator)[2] == SCALE and NUISANCE > 1


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_optimum_is_one(decoupled):
    """No weights near it have a lower loss, and its shares are those of both towers' weights."""
    pairs, best = simulate(), optimum(decoupled).float()
    generator = torch.Generator().manual_seed(0)

    def loss(weights):
        return global_loss(*pairs.encode(weights), SCALE, decoupled)

    weights = best.sqrt().repeat(2, 1)
    torch.testing.assert_close(shares(weights), best / best.sum())
    least = loss(weights)
    assert best.sum() == pytest.approx(1, abs=2e-2)  # both towers nearly agree
    assert all(loss(weights + 0.1 * torch.randn(2, 3, generator=generator)) > least - 1e-3 for _ in range(20))


@pytest.mark.parametrize("method", ["clip", "dcl", "batch_corrected", "gamma_decomp+gamma=0.5+recent=0"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_initial_values_that_train_together_train_as_if_alone(method, noise):
    """The first step's gradient is that of the loss on the own pairs alone, and no other's pairs count."""
    trainer = Trainer(Run(method=method, batch_size=4, noise=noise, starts=3, steps=10))
    before, encode, expected = trainer.weights.detach().clone(), trainer._encode, []
    name, options = parse_method(method)

    def spied(start, pairs):
        state = trainer.generator.get_state()
        image, text, scale = encode(start, pairs)
        own = slice(4, 8)
        alone = create_loss(name, num_samples=PAIRS, embed_dim=image.shape[1], **options)
        alone.begin_step(step=0, total_steps=10)
        value = alone(image[own], text[own], torch.tensor(scale), sample_ids=pairs[own])["contrastive_loss"]
        (gradient,) = torch.autograd.grad(value, trainer.weights)
        expected.append(normalize(before - 0.02 * gradient, dim=2)[1])
        trainer.generator.set_state(state)
        return encode(start, pairs)

    trainer._encode = spied
    trainer.step(0)
    torch.testing.assert_close(trainer.weights.detach()[1], expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0], before[1], atol=1e-4)


def test_states_that_are_kept_as_ids_are_encoded_by_the_current_model():
    views = stored_views("", 12)
    model = nn.Linear(views.shape[2], 64)
    loss = build("emc2+bank=index", 12)
    assert encode_stored(model, build("dcl", 12), views, torch.arange(4)) is None
    with torch.no_grad():
        loss.base.bank.ids.write(0, torch.tensor([0, 1]), torch.tensor([7, 8]))
        loss.base.bank.ids.write(1, torch.tensor([0, 1]), torch.tensor([5, 6]))
    stored = encode_stored(model, loss, views, torch.tensor([0, 1]))
    expected = torch.stack([model(views[1, [7, 8]]), model(views[0, [5, 6]])])
    torch.testing.assert_close(stored, normalize(expected, dim=2))
    assert stored.requires_grad


def test_the_exact_gradient_equals_that_of_a_loop_over_pairs():
    views = stored_views("", 10)
    model = nn.Linear(views.shape[2], 4).double()
    views = views.double()
    first, second = (normalize(model(view), dim=1) for view in views)
    total = 0.0
    for anchors, others in ((first, second), (second, first)):
        for i in range(10):
            ratios = [torch.exp(5.0 * anchors[i] @ (others[j] - others[i])) for j in range(10) if j != i]
            total = total + torch.stack(ratios).sum().log() / 20
    gradient = torch.autograd.grad(total, list(model.parameters()))
    squared = sum(float(part.square().sum()) for part in gradient)
    assert exact(model, views, 5.0) == pytest.approx((squared, total.item()))


def test_training_on_stored_views_lowers_the_loss_over_all_images():
    run = EMC2Run(method="emc2+bank=index", folder="", images=40, batch_size=4, scale=5.0, lr=1e-2, epochs=2, every=10,
                  seed=0)  # fmt: skip
    found = train_emc2(run)
    assert found["iterations"] == [0, 10, 20] and len(found["squared_norm"]) == 3
    assert found["loss"][-1] < found["loss"][0]


def test_images_that_are_missing_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder: 0 images, and --count 5 are needed"):
        stored_views(str(tmp_path / "none"), 5)


def structures_run(**changes):
    return dataclasses.replace(
        StructuresRun(source=Source(), loss="clip", terms=(), lr=1e-3, epochs=1, batch_size=32, seed=0, split=""),
        **changes,
    )


def test_all_rows_have_as_many_candidates_and_the_best_on_validation_is_scored(tmp_path):
    table = rows(structures_run(), (0.5, 1.0), seeds=2)
    assert [row.title for row in table] == ["clip", "clip + Sep", "clip + Br", "clip + GC", "clip + all"]
    assert {len(row.candidates) for row in table} == {2}
    assert [run.lr for run in table[0].candidates] == [5e-4, 1e-3]
    assert dict(table[-1].candidates[1].terms) == TERMS
    row = table[1]
    store = Store(str(tmp_path / "runs.jsonl"), read_run)
    assert row.wanted(store) == list(row.candidates) and row.left(store) == 4
    for run, recall in zip(row.candidates, (30.0, 20.0), strict=True):
        store.add(run, {"recall": recall})
    chosen = Row.chosen(row, store)
    assert chosen.terms == (("feature_separation", 0.25),)
    assert row.wanted(store) == [dataclasses.replace(chosen, split="test", seed=seed) for seed in range(2)]
    assert {run.seed for run in row.candidates}.isdisjoint({0, 1})


def test_pictures_of_a_csv_have_classes_and_disjoint_splits(tmp_path, pairs):
    lines = ["filepath,title,kind"]
    for number, (image, caption) in enumerate(pairs[:20]):
        (tmp_path / f"{number}.png").write_bytes(image)
        lines.append(f"{number}.png,{caption},{'even' if number % 2 == 0 else 'odd'}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    splits = load(Source(pairs=str(tmp_path / "pairs.csv"), classes="kind"))
    assert splits.class_names == ("even", "odd")
    assert {name: len(rows) for name, rows in splits.examples.items()} == {"test": 4, "val": 2, "train": 14}
    assert len({example.image for rows in splits.examples.values() for example in rows}) == 20
    assert np.asarray(splits.examples["train"][0].picture()).shape == (32, 32, 3)
    with pytest.raises(UserError, match="--classes nothing: .* has the columns filepath, title, kind"):
        load(Source(pairs=str(tmp_path / "pairs.csv"), classes="nothing"))


def test_rows_of_fusion_models_are_held_against_the_base_seed_by_seed(tmp_path):
    store = Store(str(tmp_path / "runs.jsonl"), lambda record: FusionRun(**record))
    scores = {("GC", 0): 0.5, ("GC", 1): 0.3, ("base", 0): 0.4, ("base", 1): 0.1, ("base", 2): 0.0}
    for (row, seed), value in scores.items():
        run = FusionRun(row=row, loss="clip", scenes=9, epochs=1.0, seed=seed)
        found = dict.fromkeys(fusion_summary.SCORES, value)
        store.add(run, {"scores": found, "words_alone": {"vqa": 0.25}, "seconds": 1.0})
    store.add(FusionRun(row="Sep", loss="dcl", scenes=9, epochs=1.0, seed=0), store.require(run))  # another base loss
    base, gc, alone = fusion_summary.summarise(store)
    assert [record["row"] for record in (base, gc, alone)] == ["base", "GC", "Sep"]
    mean, width = gc["difference"]["vqa"]
    assert mean == pytest.approx(15) and width == pytest.approx(12.706 * 5 * math.sqrt(2) / math.sqrt(2), rel=1e-3)
    assert "difference" not in base and "difference" not in alone
    assert "| GC " in fusion_summary.markdown([base, gc]) and "25.0" in fusion_summary.markdown([base, gc])
