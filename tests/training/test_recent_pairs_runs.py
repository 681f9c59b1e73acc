"""`--recent-batches` from the command line: resuming, accumulation, image-only training, and what is refused."""

import json
import re

import pytest
import torch

from openclip_ext.cli import main
from ours import FRESH

RECENT = ("--recent-batches", 3, *FRESH)


def rows(tmp_path, name="run"):
    lines = (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "kind" not in row]


def checkpoint(tmp_path, name, epoch):
    return torch.load(tmp_path / "logs" / name / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)


@pytest.mark.parametrize("loss", ["dcl", "gamma_decomp"])
def test_a_resumed_run_equals_one_that_had_not_stopped_bit_for_bit(train_flags, tmp_path, loss):
    flags = ("--loss", loss, *RECENT)
    assert main(train_flags(*flags, "--epochs", 4, "--name", "whole")) == 0
    assert main(train_flags(*flags, "--epochs", 4, "--name", "halves")) == 0
    for epoch in (3, 4):
        (tmp_path / "logs" / "halves" / "checkpoints" / f"epoch_{epoch}.pt").unlink()
    assert main(train_flags(*flags, "--epochs", 4, "--name", "halves", "--resume", "latest")) == 0
    whole, halves = (checkpoint(tmp_path, name, 4) for name in ("whole", "halves"))
    for key in ("state_dict", "loss"):
        torch.testing.assert_close(halves[key], whole[key], rtol=0, atol=0, equal_nan=True)
    used = [row["recent_batches_used"] for row in rows(tmp_path, "whole")]
    assert used[0] == 0 and used[-1] == 3


def test_accumulated_batches_equal_one_large_batch(train_flags, tmp_path):
    flags = ("--loss", "batch_corrected", *RECENT, "--epochs", 2, "--opt", "timm/sgd")
    assert main(train_flags(*flags, "--batch-size", 32, "--name", "whole")) == 0
    assert main(train_flags(*flags, "--batch-size", 8, "--accum-freq", 4, "--name", "parts")) == 0
    whole, parts = (rows(tmp_path, name) for name in ("whole", "parts"))
    assert whole[-1]["recent_batches_used"] == 3
    for name in ("contrastive_loss", "recent_batches_used", "recent_error_1"):
        found = [[row[name] for row in run if name in row] for run in (parts, whole)]
        assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6) and found[0]


@pytest.mark.parametrize("extra", [(), ("--momentum-encoder", 0.9)])
def test_images_alone_train_with_recent_pairs(train_flags, tmp_path, extra):
    assert main(train_flags("--loss", "dcl", *RECENT, "--pairs", "views", "--epochs", 2, *extra)) == 0
    assert rows(tmp_path)[-1]["recent_batches_used"] == 3


def test_recent_pairs_join_only_once_a_model_moves_slowly(train_flags, tmp_path):
    assert main(train_flags("--loss", "dcl", *RECENT[:4], "--lr", 0.1, "--epochs", 2)) == 0
    error = 0.0
    for row in rows(tmp_path):
        error = row.get("recent_error_1", error)
        assert error < 0.1 or row["recent_batches_used"] == 0
    assert max(row.get("recent_error_1", 0) for row in rows(tmp_path)) > 1
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    said = re.findall(r"recent pairs: those of 0 of 3 steps join now; scores err by (.*) of their spread after 1 ", log)
    assert [float(error) for error in said] == pytest.approx([8, 0.7], rel=0.9)  # once after each epoch


def test_a_run_goes_on_with_another_number_of_steps_and_says_so(train_flags, tmp_path):
    flags = ("--loss", "dcl", *RECENT[2:6])
    assert main(train_flags(*flags, "--recent-batches", 3)) == 0
    assert main(train_flags(*flags, "--recent-batches", 2, "--epochs", 2, "--resume", "latest")) == 0
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert "of its pairs of 3 recent steps, those of the last 2 are kept" in log
    assert "recent_batches was 3, is 2" in log
    assert main(train_flags("--loss", "dcl", "--epochs", 3, "--resume", "latest")) == 0
    assert "its pairs of 2 recent steps are left behind" in (tmp_path / "logs" / "run" / "out.log").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--loss", "siglip", "--recent-batches", 4), "--recent-batches 4: loss siglip has no use for recent pairs"),
        (("--loss", "dcl", "--recent-batches", -1), "--recent-batches -1: must be at least 0"),
        (("--loss", "dcl", "--recent-batches", 4, "--loss-arg", "recent_batches=2"), "is given too; keep one"),
    ],
)
def test_what_cannot_be_is_one_line(train_flags, capsys, flags, message):
    assert main(train_flags(*flags)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
