"""Disks that are full, files that are damaged, processes that are killed while they write."""

import contextlib
import json
import os
import random
import resource
import subprocess
import sys

import pytest
import torch

from openclip_ext.cli import main
from openclip_ext.files import Rows, damage, remove_partial, save_tensors
from openclip_ext.training import run
from openclip_ext.training.keep import Keeper


@contextlib.contextmanager
def full_disk(size=10_000):
    """No file can become larger than `size` bytes, which the operating system sees to."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def whole(tmp_path):
    """A checkpoint of some tensors."""
    path = tmp_path / "whole.pt"
    save_tensors({"epoch": 1, "state_dict": {"a": torch.randn(500, 20), "b": torch.arange(9)}}, path)
    return path


@pytest.fixture
def disk_full_at(monkeypatch):
    """A function that lets the disk be full while the checkpoints of given epochs are written."""

    def full_at(*epochs):
        write = Keeper._write

        def write_on_a_full_disk(self, name, epoch):
            with full_disk() if epoch in epochs else contextlib.nullcontext():
                write(self, name, epoch)

        monkeypatch.setattr(Keeper, "_write", write_on_a_full_disk)

    return full_at


def test_a_write_that_fails_leaves_the_old_file_and_no_other(whole):
    before = whole.read_bytes()
    for content in ({"a": torch.zeros(10_000)}, {f"{n}": torch.zeros(50) for n in range(200)}):
        with full_disk(), pytest.raises(OSError, match="File too large"):
            save_tensors(content, whole)
    assert whole.read_bytes() == before and os.listdir(whole.parent) == [whole.name]


def test_a_full_disk_costs_one_checkpoint(train_flags, tmp_path, capsys, disk_full_at):
    disk_full_at(2)
    assert main(train_flags("--epochs", 3, "--delete-previous-checkpoint")) == 0
    folder = tmp_path / "logs" / "run" / "checkpoints"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "could not be written" in line]
    assert line == (
        f"{folder / 'epoch_2.pt'}: could not be written (File too large); epoch_1.pt is kept, and training goes on to "
        "the next checkpoint"
    )
    assert sorted(os.listdir(folder)) == ["epoch_1.pt", "epoch_3.pt"]  # the one before the third was never there
    assert damage(str(folder / "epoch_3.pt")) is None


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(train_flags, tmp_path, capsys, disk_full_at):
    disk_full_at(2)
    assert main(train_flags("--epochs", 2)) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_2.pt"
    assert line == (
        f"openclip-ext: the run's last checkpoint, {path}, could not be written (File too large); make room, and go on "
        "with --resume latest"
    )
    assert main(train_flags("--epochs", 1, "--resume", "latest")) == 0
    assert f"resumed from {path.with_name('epoch_1.pt')} after epoch 1" in capsys.readouterr().err


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_that_a_full_disk_does_not_take_are_written_later(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    assert rows.append({"step": 0, "loss": float("nan")}) is None
    with full_disk(40):
        errors = [rows.append({"step": step, "loss": 1.0}) for step in range(1, 4)]
    assert all(isinstance(error, OSError) for error in errors)
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 0, "loss": null}\n'
    assert rows.append({"step": 4, "loss": 1.0}) is None
    assert steps_in(tmp_path / "rows.jsonl") == [0, 1, 2, 3, 4]


def test_a_run_goes_on_while_its_logs_cannot_be_written(train_flags, tmp_path, capsys, monkeypatch):
    real = run.Trainer.steps

    def on_a_full_disk(self, log):
        with full_disk(500) if self.clock.epoch == 1 else contextlib.nullcontext():
            yield from real(self, log)

    monkeypatch.setattr(run.Trainer, "steps", on_a_full_disk)
    assert main(train_flags("--epochs", 3, "--report-to", "tensorboard")) == 0
    errors = capsys.readouterr().err
    assert errors.count("--report-to tensorboard: cannot be written (File too large); the run goes on without") == 1
    assert errors.count("metrics.jsonl: cannot be written (File too large); its rows wait in memory") == 1
    assert "Traceback" not in errors and "Logging error" not in errors
    assert steps_in(tmp_path / "logs" / "run" / "metrics.jsonl") == list(range(24))


def test_a_folder_that_cannot_be_written_to_is_one_line(train_flags, tmp_path, capsys, monkeypatch):
    real = run.make_run_folder

    def on_a_full_disk(*args):
        with full_disk(10):
            real(*args)

    monkeypatch.setattr(run, "make_run_folder", on_a_full_disk)
    assert main(train_flags()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"openclip-ext: --logs: {tmp_path / 'logs' / 'run'} cannot be written to (File too large)")
    assert not (tmp_path / "logs" / "run").exists()  # so that the same command can be given again


def damaged_bytes(data, kind):
    middle = len(data) // 2
    return {
        "a bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "cut": data[: -len(data) // 3],
        "zeros": bytes(len(data)),
        "a page of zeros": data[: middle - 2048] + bytes(4096) + data[middle + 2048 :],
        "empty": b"",
    }[kind]


@pytest.mark.parametrize("kind", ["a bit", "cut", "zeros", "a page of zeros", "empty"])
def test_damage_is_seen(whole, kind):
    assert damage(str(whole)) is None
    whole.write_bytes(damaged_bytes(whole.read_bytes(), kind))
    assert damage(str(whole))


def test_any_flipped_bit_is_seen_or_changes_nothing(whole):
    data, content = whole.read_bytes(), torch.load(whole)
    rng = random.Random(0)
    for _ in range(200):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        whole.write_bytes(flipped)
        if damage(str(whole)) is None:
            torch.testing.assert_close(torch.load(whole), content, rtol=0, atol=0)


def test_resuming_takes_the_newest_whole_checkpoint_and_says_so(train_flags, tmp_path, capsys):
    assert main(train_flags("--epochs", 3)) == 0
    folder = tmp_path / "logs" / "run" / "checkpoints"
    straight = torch.load(folder / "epoch_3.pt")["state_dict"]
    for name, kind in (("epoch_3.pt", "a bit"), ("epoch_2.pt", "cut")):
        (folder / name).write_bytes(damaged_bytes((folder / name).read_bytes(), kind))
    capsys.readouterr()
    assert main(train_flags("--epochs", 3, "--resume", "latest")) == 0
    lines = capsys.readouterr().err.splitlines()
    passed_over = [line for line in lines if line.endswith("; passed over")]
    assert [line.partition(" is damaged (")[0] for line in passed_over] == [
        f"--resume latest: {folder / name}" for name in ("epoch_3.pt", "epoch_2.pt")
    ]
    assert f"resumed from {folder / 'epoch_1.pt'} after epoch 1" in lines
    torch.testing.assert_close(torch.load(folder / "epoch_3.pt")["state_dict"], straight, rtol=0, atol=0)


def test_nothing_is_resumed_where_no_checkpoint_is_whole(train_flags, tmp_path, capsys, whole):
    folder = tmp_path / "logs" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "epoch_1.pt").write_bytes(damaged_bytes(whole.read_bytes(), "a bit"))
    assert main(train_flags("--resume", "latest")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "epoch_1.pt is damaged (data/0 in it does not fit its checksum)" in line
    assert "none of 1 checkpoint is whole" in line
    assert main(train_flags("--resume", folder / "epoch_1.pt", "--name", "other")) == 2
    assert "epoch_1.pt: is damaged (data/0 in it" in capsys.readouterr().err


def test_files_without_checksums_count_as_whole(tmp_path):
    for name, options in (("old.pt", {"_use_new_zipfile_serialization": False}), ("new.pt", {})):
        with torch.utils.serialization.config.patch("save.compute_crc32", False):
            torch.save({"a": torch.ones(50)}, tmp_path / name, **options)
        assert damage(str(tmp_path / name)) is None


KILLED_WHILE_WRITING = """
import sys, os, signal, torch
from openclip_ext import files
fsync = os.fsync
def killed(descriptor): os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
files.save_tensors({"epoch": 2, "state_dict": {"a": torch.ones(9)}}, sys.argv[1])
"""


def test_a_process_killed_while_it_writes_leaves_the_old_file(whole):
    before = whole.read_bytes()
    assert subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(whole)]).returncode == -9
    assert whole.read_bytes() == before and len(os.listdir(whole.parent)) == 2
    remove_partial(str(whole.parent))
    assert os.listdir(whole.parent) == [whole.name]
