"""Going on with other settings: what is said, what is kept, and what is refused."""

import json

import pytest
import torch

from openclip_ext.cli import main
from openclip_ext.training.record import Record, read_record


def history(tmp_path, name="run"):
    return json.loads((tmp_path / "logs" / name / "params.json").read_text())["history"]


def test_each_setting_that_changed_is_said_and_kept(train_flags, tmp_path, capsys):
    assert main(train_flags("--loss", "gamma_decomp")) == 0
    flags = ("--loss", "gamma_decomp", "--epochs", 2, "--resume", "latest", "--lr", "1e-4", "--grad-clip-norm", 1)
    assert main(train_flags(*flags, "--log-every-n-steps", 3, "--save-frequency", 0)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--resume latest: ")]
    assert lines == [
        "--resume latest: epochs was 1, is 2",
        "--resume latest: lr was 0.001, is 0.0001",
        "--resume latest: grad_clip_norm was not given, is 1.0",
    ]
    changed = {"epochs": [1, 2], "lr": [0.001, 0.0001], "grad_clip_norm": [None, 1.0]}
    assert history(tmp_path) == [{"epoch": 1, "step": 8, "changed": changed}]
    assert "lr was 0.001, is 0.0001" in (tmp_path / "logs" / "run" / "out.log").read_text()


def test_the_same_settings_are_nothing_to_say(train_flags, tmp_path, capsys):
    flags = ("--epochs", 2, "--aug-cfg", "scale=(0.5,1.0)")
    assert main(train_flags(*flags)) == 0
    (tmp_path / "logs" / "run" / "checkpoints" / "epoch_2.pt").unlink()
    assert main(train_flags(*flags, "--resume", "latest", "--debug")) == 0
    assert "--resume" not in capsys.readouterr().err and history(tmp_path) == []


def test_a_run_elsewhere_hands_on_its_history(train_flags, tmp_path, capsys):
    assert main(train_flags()) == 0
    assert main(train_flags("--epochs", 2, "--resume", "latest")) == 0
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_2.pt"
    assert main(train_flags("--epochs", 2, "--wd", 0.5, "--resume", path, "--name", "second")) == 0
    assert f"--resume {path}: wd was 0.2, is 0.5" in capsys.readouterr().err
    assert [entry["changed"] for entry in history(tmp_path, "second")] == [{"epochs": [1, 2]}, {"wd": [0.2, 0.5]}]


def test_what_was_done_after_the_checkpoint_is_compared_with_as_undone():
    record = Record(
        {"lr": 3, "wd": 0, "seed": 1, "new": 5},
        [
            {"epoch": 1, "step": 8, "changed": {"lr": [1, 2]}},
            {"epoch": 2, "step": 16, "changed": {"lr": [2, 3], "seed": [0, 1]}},
        ],
    )
    assert record.as_of(3) == record
    assert record.as_of(2) == Record({"lr": 2, "wd": 0, "seed": 0, "new": 5}, record.history[:1])
    assert record.as_of(1) == Record({"lr": 1, "wd": 0, "seed": 0, "new": 5})
    assert record.as_of(1).changes({"lr": 1, "wd": 0.5, "seed": 0, "later": 1}) == {"wd": [0, 0.5]}


def test_bookkeeping_is_no_change_and_tuples_are_lists():
    record = Record({"name": "a", "logs": "x", "save_frequency": 1, "size": [1, 2]})
    assert record.changes({"name": "b", "logs": "y", "save_frequency": 2, "size": (1, 2)}) == {}


def test_a_damaged_record_is_one_line(train_flags, tmp_path, capsys):
    assert main(train_flags()) == 0
    (tmp_path / "logs" / "run" / "params.json").write_text("{")
    assert main(train_flags("--epochs", 2, "--resume", "latest")) == 2
    assert "params.json: cannot be read as the record of a run" in capsys.readouterr().err
    assert read_record(str(tmp_path)) is None


@pytest.mark.parametrize("told_by", ["checkpoint", "params.json"])
def test_another_loss_is_refused_unless_it_is_asked_for(train_flags, tmp_path, capsys, told_by):
    assert main(train_flags("--loss", "gamma_decomp")) == 0
    run = tmp_path / "logs" / "run"
    path = run / "checkpoints" / "epoch_1.pt"
    content = torch.load(path)
    assert content["loss_name"] == "gamma_decomp"
    state = content["loss"]
    if told_by == "params.json":
        del content["loss_name"]
        torch.save(content, path)
    else:
        (run / "params.json").unlink()
    for other in ("dcl", "sogclr"):
        assert main(train_flags("--loss", other, "--epochs", 2, "--resume", "latest")) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
        assert f"--resume latest --loss {other}: the checkpoint's loss is gamma_decomp; use that, or add" in line
    flags = ("--epochs", 2, "--resume", "latest", "--resume-other-loss")
    assert main(train_flags("--loss", "sogclr", *flags)) == 0
    assert "it holds no loss state: the loss starts anew" in capsys.readouterr().err
    content = torch.load(run / "checkpoints" / "epoch_2.pt")
    assert content["loss_name"] == "sogclr" and content["loss"].keys() != state.keys()


def test_a_loss_with_parameters_gives_way_and_takes_over(train_flags, tmp_path):
    """Its group in the optimizer comes and goes with it."""
    assert main(train_flags("--loss", "clip", "--loss-term", "feature_separation=0.5")) == 0
    flags = ("--resume", "latest", "--resume-other-loss")
    assert main(train_flags("--loss", "dcl", "--epochs", 2, *flags)) == 0
    content = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_2.pt")
    assert "loss_optimizer" not in content and content["loss_name"] == "dcl"
    again = ("--loss", "clip", "--loss-term", "feature_separation=0.5", "--epochs", 3)
    assert main(train_flags(*again, *flags)) == 0
    assert "loss_optimizer" in torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_3.pt")
