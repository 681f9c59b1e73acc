"""Going on from within an epoch: as if the run had not stopped, bit for bit."""

import json
import shutil

import open_clip
import pytest
import torch

from openclip_ext.cli import main
from openclip_ext.data import passes

#: What a resumed run measures anew.
_TIMES = {"samples_per_second"}


def checkpoint(tmp_path, name, file):
    return torch.load(tmp_path / "logs" / name / "checkpoints" / f"{file}.pt", weights_only=True)


def rows(tmp_path, name):
    lines = (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _TIMES} for line in lines]


def stopped_copy(tmp_path, file, name="again"):
    """A copy of the run `whole` as a kill after this checkpoint leaves it; its log may have gone on."""
    logs = tmp_path / "logs"
    shutil.rmtree(logs / name, ignore_errors=True)
    shutil.copytree(logs / "whole", logs / name)
    time = (logs / "whole" / "checkpoints" / f"{file}.pt").stat().st_mtime_ns
    for path in (logs / name / "checkpoints").glob("*.pt"):
        if path.stat().st_mtime_ns > time:
            path.unlink()


def differing(found, expected, path=""):
    """Where two checkpoints differ, if only in a bit."""
    if isinstance(expected, dict) and found.keys() == expected.keys():
        return [where for key in expected for where in differing(found[key], expected[key], f"{path}/{key}")]
    if isinstance(expected, list | tuple) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [where for number, pair in pairs for where in differing(*pair, f"{path}/{number}")]
    if isinstance(expected, torch.Tensor):
        same = found.dtype == expected.dtype and torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
        return [] if same and torch.equal(found.isnan(), expected.isnan()) else [path]
    return [] if found == expected else [path]


def assert_equal(tmp_path, name, file):
    """The run's checkpoint and its metrics equal those of `whole`."""
    found, expected = (checkpoint(tmp_path, run, file) for run in (name, "whole"))
    assert differing(found, expected | {"name": name}) == []
    assert rows(tmp_path, name) == rows(tmp_path, "whole")


def check_resumes(train_flags, tmp_path, flags, steps, epochs=2, per_epoch=16):
    """Train once, and again from each of `steps`."""
    flags = ("--batch-size", 16, "--epochs", epochs, *flags)
    saving = ("--save-every-steps", 1, "--keep-last", 0)
    assert main(train_flags(*flags, *saving, "--name", "whole")) == 0
    for step in steps:
        stopped_copy(tmp_path, f"epoch_{(step - 1) // per_epoch}_step_{step}")
        assert main(train_flags(*flags, "--name", "again", "--resume", "latest")) == 0
        assert_equal(tmp_path, "again", f"epoch_{epochs}")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_goes_on_with_and_without_data_workers(train_flags, tmp_path, workers, val_shards, monkeypatch):
    monkeypatch.setattr(passes, "SAMPLE_BUFFER", (40, 20))
    flags = ("--loss", "gamma_decomp", "--workers", workers, "--aug-cfg", "scale=(0.5,1.0)", "--val-data", val_shards)
    check_resumes(train_flags, tmp_path, flags, [3, 16, 22])


def test_a_checkpoint_from_within_an_epoch_loads_in_openclip(train_flags, tmp_path):
    assert main(train_flags("--epochs", 2, "--save-every-steps", 11)) == 0
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_1_step_11.pt"
    content = torch.load(path, weights_only=True)
    assert content["epoch"] == 1 and content["clock"]["step"] == 11
    model = open_clip.create_model("tiny-test", pretrained=str(path))
    torch.testing.assert_close(model.state_dict(), content["state_dict"])
