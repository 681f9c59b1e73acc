"""Where the weights to start from may be, and what is said of those that cannot be had."""

import json
import os

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from openclip_ext.cli import main
from openclip_ext.training.flags import parse_args
from towers import TINY_MODEL


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def weights(model_config):
    open_clip.add_model_config(model_config)
    torch.manual_seed(5)
    return open_clip.create_model("tiny-test").state_dict()


def folder(path, weights=None, config=True):
    """A `local-dir:` with what is asked for in it."""
    path.mkdir()
    if config:
        (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_MODEL, "preprocess_cfg": {}}))
    if weights is not None:
        save_file(weights, path / "open_clip_model.safetensors")
    return path


@pytest.mark.parametrize("form", ["pt", "bin", "safetensors", "checkpoint", "old", "local-dir"])
def test_a_run_starts_from_local_weights(train_flags, tmp_path, weights, form):
    path = tmp_path / {"checkpoint": "epoch_3.pt", "old": "old.pt"}.get(form, f"weights.{form}")
    if form == "safetensors":
        save_file(weights, path)
    elif form == "checkpoint":  # of several ranks
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)
    elif form == "local-dir":
        folder(path, weights)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form != "old")
    flags = ["--model", f"local-dir:{path}"] if form == "local-dir" else ["--pretrained", path]
    assert main(train_flags(*flags, "--lr", 0, "--wd", 0)) == 0
    found = torch.load(tmp_path / "logs/run/checkpoints/epoch_1.pt")["state_dict"]
    torch.testing.assert_close(found, weights, rtol=0, atol=0)


def refused(capsys, flags):
    """The one line that refuses a command."""
    assert main(flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
    return line


@pytest.mark.parametrize("form", ["pt", "bin", "old", "local-dir", "teacher"])
def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(train_flags, tmp_path, weights, capsys, form):
    path, made = tmp_path / f"weights.{form}", tmp_path / "made"
    content = {"state_dict": weights, "extra": Evil(made)}
    if form == "local-dir":
        torch.save(content, folder(path) / "open_clip_pytorch_model.bin")
        flags = ["--model", f"local-dir:{path}"]
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
        flags = ["--distill-model", "tiny-test", "--distill-pretrained", path] if form == "teacher" else []
        flags = flags or ["--pretrained", path]
    line = refused(capsys, train_flags(*flags))
    assert "not a checkpoint of tensors and plain values: it asks for io.open, and is not read" in line
    assert not made.exists() and not list(tmp_path.glob("logs/run/checkpoints/*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"hello", "not a checkpoint of tensors and plain values ("),
        ("a.pt", b"", "not a checkpoint of tensors and plain values (EOFError"),
        ("a.bin", b"PK\x03\x04 not a zip", "not a checkpoint of tensors and plain values ("),
        ("a.safetensors", b"hello" * 9, "not a checkpoint of tensors and plain values (SafetensorError"),
        ("a.pt", [torch.ones(2)], "not a checkpoint (holds a list)"),
        ("a.pt", {}, "holds no weights"),
        ("a.pt", {"state_dict": {}}, "holds no weights"),
        ("a.pt", {"visual.proj": torch.ones(2)}, "its weights do not fit --model tiny-test"),
        ("a.pt", None, "neither a file nor a tag of --model tiny-test; its tags: none"),
    ],
)
def test_a_file_without_usable_weights_is_one_line(train_flags, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    line = refused(capsys, train_flags("--pretrained", path))
    assert f"--pretrained {path}: " in line and message in line


def test_a_torchscript_archive_is_refused(train_flags, tmp_path, capsys):
    path = tmp_path / "script.pt"
    with pytest.warns(match="deprecated"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "a TorchScript archive, which is code" in refused(capsys, train_flags("--pretrained", path))


def test_a_folder_must_hold_what_it_is_named_for(train_flags, tmp_path, weights, capsys):
    bare, empty = folder(tmp_path / "bare"), folder(tmp_path / "empty", config=False)
    whole = folder(tmp_path / "whole", weights)
    for flags, message in (
        (["--model", f"local-dir:{tmp_path}/none"], f"--model local-dir:{tmp_path}/none: no such folder"),
        (["--model", f"local-dir:{empty}"], f"--model local-dir:{empty}: holds no open_clip_config.json; for bare"),
        (["--model", f"local-dir:{bare}"], f"--model local-dir:{bare}: holds no weights; to start from random ones"),
        (["--model", f"local-dir:{whole}", "--pretrained", "x"], "--pretrained x: --model local-dir:"),
        (["--pretrained", f"local-dir:{whole}"], f"brings its own architecture; use --model local-dir:{whole} instead"),
        (["--pretrained", "hf-hub:laion/x"], "brings its own architecture; use --model hf-hub:laion/x instead"),
    ):
        assert message in refused(capsys, train_flags(*flags))


def test_another_architecture_is_one_line(train_flags, tmp_path, weights, capsys, deep):
    torch.save(weights, tmp_path / "weights.pt")
    line = refused(capsys, train_flags(*deep, "--pretrained", tmp_path / "weights.pt"))
    assert "its weights do not fit --model deep-test (Error(s) in loading state_dict for CLIP: Missing key(s)" in line


@pytest.mark.parametrize("flags", [["--model", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k"],
                                   ["--model", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]])  # fmt: skip
def test_a_tag_without_network_is_one_line(monkeypatch, train_flags, tmp_path, capsys, flags):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused(capsys, train_flags(*flags, "--cache-dir", tmp_path / "cache"))
    assert f"{flags[-2]} {flags[-1]}: could not be downloaded, and the cache does not hold it" in line
    assert not os.path.exists(tmp_path / "logs")


def test_weights_that_bring_their_architecture_need_no_model():
    config = parse_args(["--pretrained", "local-dir:some", "--train-data", "shards"])
    assert config.model == "local-dir:some" and not config.flags.pretrained
    config = parse_args(["--pretrained", "local-dir:some", "--model=RN50", "--train-data", "shards"])
    assert config.model == "RN50" and config.flags.pretrained == "local-dir:some"  # refused when the model is made


def test_a_model_config_alone_names_the_model():
    assert parse_args(["--model-config", "mine/small.json", "--train-data", "shards"]).model == "small"
    assert parse_args(["--model-config", "small.json", "--model", "RN50", "--train-data", "shards"]).model == "RN50"
