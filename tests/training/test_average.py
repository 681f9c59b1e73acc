"""The average of the weights that `--ema` keeps."""

import copy
import json

import pytest
import torch

from openclip_ext.cli import main
from openclip_ext.training.average import WeightAverage


def trained_steps(model, steps):
    """Weights after each of some steps of gradient descent."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        yield copy.deepcopy(model.state_dict())


def test_the_average_is_the_formulas_and_leaves_the_model_as_it_is():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    average = WeightAverage(model, 0.75)
    expected = copy.deepcopy(model.state_dict())
    for weights in trained_steps(model, 5):
        average.update()
        for name, value in weights.items():
            is_buffer = "running" in name or "num_batches" in name
            expected[name] = value if is_buffer else 0.75 * expected[name] + 0.25 * value
    with average.applied():
        torch.testing.assert_close(model.state_dict(), expected)
        assert torch.equal(model.state_dict()["0.weight"], weights["0.weight"])
        assert not torch.equal(model.state_dict()["2.weight"], weights["2.weight"])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_error_inside_does_not_leave_the_average_in_the_model():
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(model, 0.5)
    (weights,) = trained_steps(model, 1)
    with pytest.raises(RuntimeError, match="evaluation failed"), average.applied():
        raise RuntimeError("evaluation failed")
    assert torch.equal(model.weight, weights["weight"])


def results(tmp_path, name):
    lines = (tmp_path / f"logs/{name}/checkpoints/results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def checkpoint(tmp_path, name, epoch):
    return torch.load(tmp_path / f"logs/{name}/checkpoints/epoch_{epoch}.pt", weights_only=True)


FLAGS = ("--epochs", 2, "--lr-scheduler", "const", "--ema", 0.9)


def test_a_run_evaluates_keeps_and_resumes_its_average(train_flags, tmp_path, val_shards, capsys):
    flags = (*FLAGS, "--val-data", val_shards)
    assert main(train_flags(*flags, "--name", "whole")) == 0
    saved = checkpoint(tmp_path, "whole", 2)
    assert saved.keys() == {"epoch", "name", "state_dict", "optimizer", "state_dict_ema", "loss_name", "clock"}
    assert saved["state_dict_ema"].keys() == saved["state_dict"].keys()
    row = results(tmp_path, "whole")[-1]
    assert row["ema-clip_val_loss"] != row["clip_val_loss"]
    # What was measured is what was saved.
    command = train_flags("--val-data", val_shards, "--resume", tmp_path / "logs/whole/checkpoints/epoch_2.pt")
    position = command.index("--train-data")
    del command[position : position + 2]
    for extra, prefixes in (["--ema", "0.9"], ("", "ema-")), ([], ("",)):
        capsys.readouterr()
        assert main([*command, *extra]) == 0
        said = capsys.readouterr().err
        assert said.count("clip_val_loss") == len(prefixes)
        assert all(f" {prefix}clip_val_loss {row[prefix + 'clip_val_loss']:.4f}" in said for prefix in prefixes)
    assert "its average of weights is left behind: give --ema to go on with it" in said
    first = tmp_path / "logs/whole/checkpoints/epoch_1.pt"
    assert main(train_flags(*flags, "--name", "rest", "--resume", first)) == 0
    again = checkpoint(tmp_path, "rest", 2)
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(value, saved[key][name]) for name, value in again[key].items())
    assert results(tmp_path, "rest")[-1] == row


def test_training_is_the_same_with_an_average_and_without(train_flags, tmp_path, val_shards, capsys):
    assert main(train_flags(*FLAGS, "--val-data", val_shards, "--name", "with")) == 0
    assert main(train_flags(*FLAGS[:-2], "--val-data", val_shards, "--name", "without")) == 0
    ours, plain = checkpoint(tmp_path, "with", 2), checkpoint(tmp_path, "without", 2)
    assert all(torch.equal(value, plain["state_dict"][name]) for name, value in ours["state_dict"].items())
    capsys.readouterr()
    resume = ("--resume", tmp_path / "logs/without/checkpoints/epoch_1.pt", "--name", "later")
    assert main(train_flags(*FLAGS, *resume)) == 0
    assert "it holds no average of weights: that starts as a copy of them" in capsys.readouterr().err
    resume = ("--resume", tmp_path / "logs/with/checkpoints/epoch_1.pt", "--name", "dropped")
    assert main(train_flags(*FLAGS[:-2], *resume)) == 0
    assert "its average of weights is left behind: give --ema to go on with it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ema", "1"], "--ema 1.0: must be in [0, 1), such as 0.999"),
        (
            ["--ema", "0.9", "--precision", "pure_bf16"],
            "--precision pure_bf16: an average of weights in half",
        ),
    ],
)
def test_an_average_that_cannot_be_is_one_line(train_flags, tmp_path, capsys, flags, message):
    assert main(train_flags(*flags)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not (tmp_path / "logs").exists()
