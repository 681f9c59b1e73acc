"""Two processes started as a user starts them, against one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from openclip_ext.cli import main
from openclip_ext.data.pack import pack


@pytest.fixture
def two_shards(tmp_path, pairs):
    """Two shards of 16: an epoch is one batch of 32, or one of 16 on each of two ranks."""
    pack(pairs[:32], str(tmp_path / "two"), samples_per_shard=16, progress=False)
    return str(tmp_path / "two")


LAUNCHERS = {
    # Without a GPU `--cpu --num_processes 2` starts one process; `--multi_gpu` gives two on CPU.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "openclip_ext"],
    "fsdp": ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2",
             "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
             str(pathlib.Path(__file__).parent.parent / "sharded_on_cpu.py")],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "-m", "--", "openclip_ext"],
}  # fmt: skip


def launch(launcher, flags, **variables):
    """`openclip-ext` in two processes; `variables` are added to their environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_"))}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""} | variables
    rendezvous = (
        ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"] if launcher == "torchrun" else ["--main_process_port=0"]
    )
    module, *rest = LAUNCHERS[launcher]
    command = [sys.executable, "-m", module, *rendezvous, *rest, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


TERMS = (
    "--lr 0.05 --loss-term brownian_bridge=0.25 --loss-term geometric_consistency=0.02 "
    "--loss-term feature_separation=0.5"
)


@pytest.mark.parametrize(
    ("launcher", "loss", "extra"),
    [
        ("accelerate", "gamma_decomp", ["--loss-arg", "draws=2", "--loss-arg", "gamma_decay=0", "--warm-start-pass"]),
        ("torchrun", "clip", ["--grad-clip-norm", "1"]),
        ("torchrun", "dcl", TERMS.split()),
    ],
)
def test_two_processes_equal_one_with_twice_the_batch(train_flags, tmp_path, two_shards, launcher, loss, extra):
    flags = ("--train-data", two_shards, "--loss", loss, "--epochs", 6, "--opt", "timm/sgd", *extra)
    flags += () if "--lr" in extra else ("--lr", 0.5)
    assert main(train_flags(*flags, "--batch-size", 32, "--name", "one")) == 0
    result = launch(launcher, train_flags(*flags, "--batch-size", 16, "--name", "two"))
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
    torch.testing.assert_close(weights, one["state_dict"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two.get("loss"), one.get("loss"), rtol=1e-4, atol=1e-5, equal_nan=True)
    # The state moves to another number of processes.
    assert (
        main(
            train_flags(*flags, "--name", "on", "--epochs", 7, "--resume", tmp_path / "logs/two/checkpoints/epoch_6.pt")
        )
        == 0
    )


def test_a_rank_without_enough_data_ends_all_with_one_line(train_flags, tmp_path, pairs):
    pack(pairs[:30], str(tmp_path / "uneven"), samples_per_shard=20, progress=False)
    flags = ("--train-data", tmp_path / "uneven", "--batch-size", 16)
    result = launch("torchrun", train_flags(*flags))
    assert result.returncode != 0
    assert result.stderr.count("finds only 10 usable samples in its share of 2 shards") == 1


def test_a_wrong_flag_is_said_once(train_flags):
    result = launch("torchrun", train_flags("--loss", "nope"))
    assert result.returncode != 0
    assert result.stderr.count("--loss nope: no such loss") == 1
