"""Wrong input of `openclip-ext train` that only the machine or a file tells: one line, and nothing left behind."""

import json
import os
import pathlib

import pytest
import torch

from openclip_ext.cli import main


@pytest.fixture
def refused(train_flags, capsys):
    """A function from flags to the one line that they are answered with."""

    def line(*flags):
        assert main(train_flags(*flags)) == 2
        (found,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
        return found

    return line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-5], "no JSON ("),
        (
            lambda text: text.replace('"layers"', '"laiers"', 1),
            "unknown key laiers in vision_cfg; did you mean layers",
        ),
        (lambda text: text.replace('"heads"', '"hats"'), "unknown key hats in text_cfg; did you mean heads?"),
        (lambda text: text.replace('"embed_dim"', '"zzz": 1, "embed_dim"'), "unknown key zzz; drop it"),
        (lambda text: text.replace("16", '"wide"', 1), "no model can be made of it ("),
    ],
)
def test_a_wrong_model_config_names_what_is_wrong(refused, tmp_path, model_config, change, message):
    path = tmp_path / "wrong.json"
    path.write_text(change(pathlib.Path(model_config).read_text()))
    assert f"--model-config {path}: {message}" in refused("--model-config", path, "--model", "wrong")
    assert not (tmp_path / "logs").exists()


def test_logs_that_cannot_be_written(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    line = refused("--logs", tmp_path / "file")
    assert f"--logs {tmp_path}/file: {tmp_path}/file is no folder; give a folder for runs, or none" in line
    line = refused("--logs", tmp_path / "file" / "below")
    assert f"--logs {tmp_path}/file/below: {tmp_path}/file is no folder" in line
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may be allowed everything
    assert f"{tmp_path} cannot be written to; give another folder" in refused("--logs", tmp_path / "locked")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "locked").exists()


def test_a_run_that_never_began_does_not_block_the_next(train_flags, refused, tmp_path):
    refused("--caption-key", "captionz")
    assert not (tmp_path / "logs" / "run").exists()
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "run" / "notes.txt").write_text("mine")
    refused("--caption-key", "captionz")
    assert os.listdir(tmp_path / "logs" / "run") == ["notes.txt"]
    assert main(train_flags()) == 0


def test_a_run_that_began_stays(train_flags, tmp_path, monkeypatch):
    from openclip_ext.training.loop import Trainer

    original, calls = Trainer._backward, []

    def interrupted(self, batches):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_backward", interrupted)
    assert main(train_flags()) == 130
    run = tmp_path / "logs" / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2 and (run / "params.json").exists()


def test_a_resumed_run_that_never_began_leaves_the_first_as_it_was(train_flags, refused, tmp_path):
    assert main(train_flags()) == 0
    refused("--resume", "latest", "--epochs", 2, "--caption-key", "captionz")
    run = tmp_path / "logs" / "run"
    assert (run / "checkpoints" / "epoch_1.pt").exists() and (run / "metrics.jsonl").exists()
    assert main(train_flags("--resume", "latest", "--epochs", 2)) == 0
    history = json.loads((run / "params.json").read_text())["history"]
    assert [entry["changed"] for entry in history] == [{"epochs": [1, 2]}]


def test_a_first_copy_that_fails_leaves_nothing(refused, tmp_path, monkeypatch):
    from open_clip_train import file_utils

    monkeypatch.setattr(file_utils, "remote_sync", lambda *_: False)
    assert "the first copy by s3 failed" in refused("--remote-sync", "s3://nowhere")
    assert not (tmp_path / "logs" / "run").exists()


def test_a_device_that_has_no_float64(refused):
    assert "--device mps: use cpu, or cuda for a GPU of NVIDIA or AMD" in refused("--device", "mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(refused, train_flags, device):
    assert f"--device {device}: PyTorch finds no GPU here; use --device cpu, or drop the flag" in refused(
        "--device", device
    )
    flags = train_flags()
    del flags[flags.index("--device") : flags.index("--device") + 2]
    assert main(flags) == 0  # OpenCLIP's default asks for nothing


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["train", "--los", "dcl"], "--los dcl; did you mean --loss?"),
        (["train", "--image-learning-rate=3", "--batchsize", "2"], "did you mean --batch-size?"),
        (["eval", "--imagnet-val", "x"], "--imagnet-val x; did you mean --imagenet-val?"),
        (["shards", "pack", "a", "b", "--shufle"], "--shufle; did you mean --shuffle?"),
        (["losses", "--qqq"], "unrecognized arguments: --qqq; see openclip-ext losses --help"),
    ],
)
def test_an_unknown_flag_gets_the_one_that_was_meant(capsys, command, meant):
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert meant in line
