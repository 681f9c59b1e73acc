"""Two processes started as a user starts them, against one."""

import json

import pytest
import torch

from launching import TERMS, fork, launch
from openclip_ext.cli import main
from openclip_ext.data.pack import pack


@pytest.fixture
def two_shards(tmp_path, pairs):
    """Two shards of 16: an epoch is one batch of 32, or one of 16 on each of two ranks."""
    pack(pairs[:32], str(tmp_path / "two"), samples_per_shard=16, progress=False)
    return str(tmp_path / "two")


@pytest.mark.parametrize(
    ("start", "launcher", "loss", "extra"),
    [
        (
            launch,
            "accelerate",
            "gamma_decomp",
            ["--loss-arg", "draws=2", "--loss-arg", "gamma_decay=0", "--warm-start-pass", "--recent-batches", "0"],
        ),
        (fork, "torchrun", "clip", ["--grad-clip-norm", "1"]),
        (fork, "torchrun", "gamma_decomp", ["--recent-batches", "0", "--loss-comm", "ring", "--loss-tile", "3"]),
        (fork, "torchrun", "dcl", TERMS.split()),
    ],
)
def test_two_processes_equal_one_with_twice_the_batch(train_flags, tmp_path, two_shards, start, launcher, loss, extra):
    flags = ("--train-data", two_shards, "--loss", loss, "--epochs", 6, "--opt", "timm/sgd", *extra)
    flags += () if "--lr" in extra else ("--lr", 0.5)
    assert main(train_flags(*flags, "--batch-size", 32, "--name", "one")) == 0
    result = start(launcher, train_flags(*flags, "--batch-size", 16, "--name", "two"))
    assert result.returncode == 0, result.stderr
    assert "2 processes on cpu" in (tmp_path / "logs" / "two" / "out.log").read_text()
    curves = []
    for name in ("one", "two"):
        rows = (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(row)["contrastive_loss"] for row in rows])
    assert len(curves[0]) == 6 and curves[0][0] != curves[0][-1]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    one, two = (torch.load(tmp_path / "logs" / name / "checkpoints" / "epoch_6.pt") for name in ("one", "two"))
    assert all(key.startswith("module.") for key in two["state_dict"])  # as OpenCLIP writes on several ranks
    weights = {key.removeprefix("module."): value for key, value in two["state_dict"].items()}
    torch.testing.assert_close(weights, one["state_dict"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.get("loss"), one.get("loss"), rtol=1e-4, atol=1e-5, equal_nan=True)
    # The state moves to another number of processes.
    assert (
        main(
            train_flags(*flags, "--name", "on", "--epochs", 7, "--resume", tmp_path / "logs/two/checkpoints/epoch_6.pt")
        )
        == 0
    )


def test_two_processes_agree_on_ids_that_are_given_on_the_way(train_flags, tmp_path, two_shards):
    flags = ("--train-data", two_shards, "--loss", "gamma_decomp", "--loss-arg", "gamma_decay=0", "--sample-id", "hash",
             "--epochs", 4, "--opt", "timm/sgd", "--lr", 0.5)  # fmt: skip
    assert main(train_flags(*flags, "--batch-size", 32, "--name", "one")) == 0
    result = fork("torchrun", train_flags(*flags, "--batch-size", 16, "--name", "two"))
    assert result.returncode == 0, result.stderr
    by_sample = []
    for name in ("one", "two"):
        content = torch.load(tmp_path / "logs" / name / "checkpoints" / "epoch_4.pt")
        hashes, order = content["sample_hashes"].sort()
        by_sample.append((hashes, content["loss"]["base.rates.values"][:, order]))
    assert torch.equal(by_sample[0][0], by_sample[1][0]) and len(by_sample[0][0].unique()) == 32
    torch.testing.assert_close(by_sample[1][1], by_sample[0][1], rtol=1e-4, atol=1e-5)


def test_a_rank_without_enough_data_ends_all_with_one_line(train_flags, tmp_path, pairs):
    pack(pairs[:30], str(tmp_path / "uneven"), samples_per_shard=20, progress=False)
    flags = ("--train-data", tmp_path / "uneven", "--batch-size", 16)
    result = launch("torchrun", train_flags(*flags))
    assert result.returncode != 0
    assert result.stderr.count("finds only 10 usable samples in its share of 2 shards") == 1


def test_a_wrong_flag_is_said_once(train_flags):
    result = fork("torchrun", train_flags("--loss", "nope"))
    assert result.returncode != 0
    assert result.stderr.count("--loss nope: no such loss") == 1
