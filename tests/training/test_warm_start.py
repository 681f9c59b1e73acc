"""A pass over the data that fills the memory of a loss before the first step."""

import json
import math

import pytest
import torch

from openclip_ext import create_loss
from openclip_ext.cli import main
from openclip_ext.testing.checks import ToyModel, evaluate_loss, toy_loss, toy_steps


@pytest.mark.parametrize(
    ("name", "options"), [("sogclr", {}), ("gamma_decomp", {}), ("gamma_decomp", {"decoupled": True, "negatives": 5})]
)
def test_rates_are_those_of_first_visits(name, options):
    warm, visited = toy_loss(name, options), toy_loss(name, options)
    model, batch = ToyModel(warm.needs), toy_steps()[0]
    assert evaluate_loss(warm.warm_start, model, *batch) is None
    evaluate_loss(visited, model, *batch)
    visited.commit()
    assert torch.equal(warm.base.rates.values.nan_to_num(), visited.base.rates.values.nan_to_num())
    assert int(warm.base.rates.values[0].isfinite().sum()) == len(batch[2])


def test_a_warm_rate_is_blended_at_the_first_step():
    """With gamma = 0.25: R = 0.75 (the rate of the warm start's batch) + 0.25 (that of the step's)."""
    loss = create_loss("sogclr", num_samples=30, gamma=0.25)
    model, (first, second) = ToyModel(loss.needs), toy_steps()
    rates = []
    for image, text, ids in (first, second):
        features = model(image, text)
        logits = features["logit_scale"] * features["image_features"] @ features["text_features"].T
        ratios = [[math.exp(row[j] - row[i]) for j in range(8) if j != i] for i, row in enumerate(logits.tolist())]
        rates.append(dict(zip(ids.tolist(), (sum(row) / 7 for row in ratios), strict=True)))
    evaluate_loss(loss.warm_start, model, *first)
    evaluate_loss(loss, model, *second)
    loss.commit()
    for sample, rate in rates[1].items():
        expected = 0.75 * rates[0][sample] + 0.25 * rate
        assert loss.base.rates.values[0, sample].exp().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kernel", ["isir", "mh"])
def test_chains_start_at_another_sample_of_the_batch_and_are_new_at_the_first_step(kernel):
    loss = toy_loss("emc2", {"kernel": kernel, "decoupled": False, "gamma": 0.5})
    model, (image, text, ids) = ToyModel(loss.needs), toy_steps()[0]
    evaluate_loss(loss.warm_start, model, image, text, ids)
    bank = loss.base.bank
    states = bank.ids.read(ids)
    assert all(state in ids and state != own for row in states for state, own in zip(row, ids, strict=True))
    assert loss.base.steps_taken == 0 and loss.base.rates.values[:, ids].isfinite().all()
    features = model(image, text)
    for direction, side in enumerate(("text_features", "image_features")):
        rows = [ids.tolist().index(state) for state in states[direction]]
        torch.testing.assert_close(bank.embedding.read(ids)[direction], features[side][rows].half())
    # At the first step four of the samples meet; states of others wait, as old as the parameters: no step.
    outputs = evaluate_loss(loss, model, image[:4], text[:4], ids[:4])
    assert outputs["age_max"] == 0 and outputs["stored_weight"] > 0


def test_chains_are_drawn_from_the_softmax_of_the_batch():
    """10,000 images alike: their chains' shares of the other texts are the softmax of their scores."""
    loss = create_loss("emc2", num_samples=10_000, embed_dim=3)
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(4, 3, generator=generator), dim=-1)
    which = torch.arange(10_000) % 4
    image = text[:1].expand(10_000, 3)
    shares = torch.zeros(4)
    for start in range(0, 10_000, 100):
        own = slice(start, start + 100)
        loss.warm_start(image[own], text[which[own]], torch.tensor(2.0), sample_ids=torch.arange(start, start + 100))
    states = loss.base.bank.ids.values[0]
    shares = torch.bincount(which[states], minlength=4) / 10_000
    expected = (2 * text @ text[0]).softmax(0)
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def run(tmp_path, name="run"):
    return [json.loads(line) for line in (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("extra", [("--workers", 2), ("--accum-freq", 2)], ids=lambda flags: flags[0])
def test_after_the_pass_every_sample_is_known_and_nothing_else_is_changed(train_flags, tmp_path, extra):
    flags = ("--loss", "gamma_decomp", "--loss-arg", "gamma_decay=0", "--loss-arg", "gamma=0.2", *extra)
    assert main(train_flags(*flags, "--name", "warm", "--warm-start-pass")) == 0
    assert main(train_flags(*flags, "--name", "cold")) == 0
    warm, cold = run(tmp_path, "warm"), run(tmp_path, "cold")
    assert [row["first_visits"] for row in cold] == [1] * len(cold)
    assert [row["first_visits"] for row in warm] == [0] * len(warm)
    assert warm[0]["contrastive_loss"] != cold[0]["contrastive_loss"]
    states = [torch.load(tmp_path / f"logs/{name}/checkpoints/epoch_1.pt")["loss"] for name in ("warm", "cold")]
    assert states[0]["base.steps_taken"] == states[1]["base.steps_taken"] == len(cold)


def test_where_the_memory_does_not_count_the_run_is_the_one_without_the_pass(train_flags, tmp_path):
    flags = ("--loss", "gamma_decomp", "--loss-arg", "gamma=1", "--force-patch-dropout", 0.5)
    assert main(train_flags(*flags, "--name", "warm", "--warm-start-pass")) == 0
    assert main(train_flags(*flags, "--name", "cold")) == 0
    assert [row["loss"] for row in run(tmp_path, "warm")] == [row["loss"] for row in run(tmp_path, "cold")]


@pytest.mark.parametrize("loss", ["gamma_decomp", "emc2"])
def test_the_pass_is_not_repeated_on_resume(train_flags, tmp_path, loss, capsys):
    flags = ("--loss", loss, "--warm-start-pass", "--lr-scheduler", "const", "--epochs", 2)
    assert main(train_flags(*flags, "--name", "whole")) == 0
    assert "warm start: 100%" in capsys.readouterr().err
    (tmp_path / "logs/whole/checkpoints/epoch_2.pt").unlink()
    resume = tmp_path / "logs/whole/checkpoints/epoch_1.pt"
    assert main(train_flags(*flags, "--name", "rest", "--resume", resume)) == 0
    assert "warm start" not in capsys.readouterr().err
    assert [row["loss"] for row in run(tmp_path, "rest")] == [row["loss"] for row in run(tmp_path, "whole")[8:]]
    state = torch.load(resume)
    del state["loss"]
    torch.save(state, resume)
    assert main(train_flags(*flags, "--name", "anew", "--resume", resume)) == 0
    assert "warm start: 100%" in capsys.readouterr().err


def test_running_statistics_are_put_back_and_both_ways_round_are_filled(train_flags, tmp_path):
    config = tmp_path / "resnet-test.json"
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    flags = ("--model", "resnet-test", "--model-config", config, "--pairs", "views", "--loss", "sogclr",
             "--momentum-encoder", 0.9, "--loss-arg", "gamma=1", "--lr", 0, "--wd", 0)  # fmt: skip
    for name, extra in (("warm", ["--warm-start-pass"]), ("cold", [])):
        assert main(train_flags(*flags, "--name", name, *extra)) == 0
    warm, cold = (torch.load(tmp_path / f"logs/{name}/checkpoints/epoch_1.pt") for name in ("warm", "cold"))
    for key in ("state_dict", "momentum_encoder"):
        assert any(name.endswith("running_mean") for name in warm[key])
        torch.testing.assert_close(warm[key], cold[key], rtol=0, atol=0)
    assert warm["loss"]["objectives.1.base.rates.values"].isfinite().all()


def test_a_loss_without_memory_says_that_there_is_nothing_to_fill(train_flags, capsys):
    assert main(train_flags("--warm-start-pass")) == 0
    assert "--warm-start-pass: loss clip keeps no memory of samples" in capsys.readouterr().err
