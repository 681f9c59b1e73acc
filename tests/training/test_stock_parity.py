"""Against stock `open_clip_train.main`: same batches, same losses; checkpoints go both ways."""

import json
import types

import pytest
import torch

from openclip_ext.cli import main
from stock import moving, stock_losses, without_ours

stock = pytest.importorskip("open_clip_train.main")


@pytest.mark.parametrize("extra", [[], ["--grad-clip-norm", "0.5", "--wd", "0.5"], ["--siglip"],
                                   ["--lr-scheduler", "const"]])  # fmt: skip
def test_losses_equal_stocks_over_24_steps(monkeypatch, train_flags, tmp_path, extra):
    assert main(train_flags("--epochs", 3, "--name", "ours", *extra)) == 0
    rows = (tmp_path / "logs" / "ours" / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(row)["contrastive_loss"] for row in rows]
    reference = stock_losses(monkeypatch, without_ours(train_flags("--epochs", 3, "--name", "stock", *extra)))
    assert len(reference) == 24
    assert ours == pytest.approx(reference, rel=1e-5)
    checkpoints = [torch.load(tmp_path / "logs" / name / "checkpoints" / "epoch_3.pt") for name in ("ours", "stock")]
    torch.testing.assert_close(moving(checkpoints[0]), moving(checkpoints[1]), rtol=1e-3, atol=1e-5)
    assert checkpoints[0].keys() - {"loss_name", "clock"} == checkpoints[1].keys()


@pytest.mark.parametrize("first", ["ours", "stock"])
def test_either_loop_resumes_the_others_checkpoint(monkeypatch, train_flags, tmp_path, first):
    def ours(*flags):
        assert main(train_flags(*flags)) == 0

    def theirs(*flags):
        stock_losses(monkeypatch, without_ours(train_flags(*flags)))

    begin, go_on = (ours, theirs) if first == "ours" else (theirs, ours)
    begin("--epochs", 2, "--name", "whole")
    begin("--epochs", 1, "--name", "begun", "--warmup", 0, "--lr-scheduler", "const")
    path = tmp_path / "logs" / "begun" / "checkpoints" / "epoch_1.pt"
    go_on("--epochs", 2, "--name", "resumed", "--resume", path, "--warmup", 0, "--lr-scheduler", "const")
    begin("--epochs", 2, "--name", "reference", "--warmup", 0, "--lr-scheduler", "const")
    resumed, reference = (
        torch.load(tmp_path / "logs" / name / "checkpoints" / "epoch_2.pt") for name in ("resumed", "reference")
    )
    torch.testing.assert_close(moving(resumed), moving(reference), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["epoch_1", "epoch_1_step_11"])
def test_a_checkpoint_with_loss_state_resumes_in_stock(monkeypatch, train_flags, tmp_path, name):
    """One from within an epoch begins that epoch anew there."""
    assert main(train_flags("--loss", "gamma_decomp", "--name", "ours", "--epochs", 2, "--save-every-steps", 11)) == 0
    path = tmp_path / "logs" / "ours" / "checkpoints" / f"{name}.pt"
    flags = without_ours(train_flags("--epochs", 2, "--name", "stock", "--resume", path))
    losses = stock_losses(monkeypatch, flags)
    assert len(losses) == 8 and all(map(torch.isfinite, map(torch.tensor, losses)))


def test_stocks_parser_agrees_on_a_long_command_line(train_flags, val_shards):
    from open_clip_train.params import parse_args as theirs

    from openclip_ext.training.flags import parse_args as ours

    flags = without_ours(
        train_flags("--val-data", val_shards, "--aug-cfg", "scale=(0.5,1.0)", "--force-image-size", 32)
    )
    mine, reference = vars(ours(flags).flags), vars(theirs(flags))
    # What separates columns is recognised where it is not given.
    assert {key: mine[key] for key in reference} == reference | {"csv_separator": None}
    assert isinstance(types.SimpleNamespace(**mine).lr, float)
