"""`openclip-ext interpolate`: mixtures against the formula, then the command on two trained checkpoints."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from openclip_ext import UserError
from openclip_ext.cli import main
from openclip_ext.commands.interpolate.mixing import interpolate, parse_alphas, require_same_architecture
from openclip_ext.data import digits
from openclip_ext.evaluation.datasets.imagenet import wnids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("0:1:0.4", [0, 0.4, 0.8]),
        ("0.2:0.2:0.1", [0.2]),
        ("1:0:-0.5", [1, 0.5, 0]),
        ("0.5", [0.5]),
        ("0,0.25,1", [0, 0.25, 1]),
    ],
)
def test_shares_are_read(text, expected):
    assert parse_alphas(text) == expected


@pytest.mark.parametrize("text", ["", "a", "0:1", "0:1:0", "0:1:1e-9", "0:1:-0.1", "0:2:1", "-0.1", "nan", "0:nan:1"])
def test_other_shares_are_refused(text):
    with pytest.raises(UserError, match="--alpha"):
        parse_alphas(text)


def test_a_mixture_is_computed_in_float32_and_its_ends_are_exact():
    first = {"w": torch.randn(50).half(), "steps": torch.tensor(3)}
    second = {"w": torch.randn(50).half(), "steps": torch.tensor(8)}
    for alpha, end in ((0.0, first), (1.0, second)):
        assert torch.equal(interpolate(first, second, alpha, "w"), end["w"].float())
        assert interpolate(first, second, alpha, "steps") == end["steps"]
    expected = [0.7 * float(a) + 0.3 * float(b) for a, b in zip(first["w"], second["w"], strict=True)]
    mixed = interpolate(first, second, 0.3, "w")
    assert mixed.dtype == torch.float32 and mixed.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"w": torch.zeros(3)}, "only A has ids"),
        ({"w": torch.zeros(4), "ids": torch.arange(2)}, r"w is \(3,\) in A, \(4,\) in B"),
        ({"w": torch.zeros(3), "ids": torch.arange(2) + 1}, "the integers in ids differ"),
    ],
)
def test_different_architectures_have_nothing_between_them(other, expected):
    with pytest.raises(UserError, match=expected):
        require_same_architecture({"w": torch.zeros(3), "ids": torch.arange(2)}, other)


# The command.


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    """Two folders of handwritten digits, named as if they were some of ImageNet's classes."""
    root = tmp_path_factory.mktemp("sets")
    for number, (image, _, label) in enumerate(digits.digit_splits()["test"][:60]):
        folder = root / "ar"[number % 2] / list(wnids())[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(image)
    return root


@pytest.fixture
def trained(train_flags, tmp_path):
    """The folder of a run of two epochs."""
    assert main(train_flags("--epochs", 2, "--lr", "3e-3")) == 0
    return tmp_path / "logs" / "run"


@pytest.fixture
def mix(class_folders, tmp_path):
    """A function from arguments to the exit code and the report of `openclip-ext interpolate` on both folders."""

    def run(*arguments, sets="ar"):
        data = [part for name in sets for part in (f"--imagenet-{name}", str(class_folders / name))]
        out = tmp_path / "mix"
        flags = ["--out", str(out), "--device", "cpu", "--workers", "0", *data]
        code = main(["interpolate", *flags, *(str(part) for part in arguments)])
        path = out / "interpolation.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    return run


def test_every_mixture_is_scored_as_the_checkpoint_that_holds_it(trained, mix, tmp_path, class_folders, capsys):
    first, second = (trained / "checkpoints" / f"epoch_{epoch}.pt" for epoch in (1, 2))
    saved = tmp_path / "mixed.pt"
    code, report = mix(first, trained, "--alpha", "0:1:0.5", "--save", "0.5", saved)
    assert code == 0
    assert [mixture["alpha"] for mixture in report["mixtures"]] == [0, 0.5, 1]
    assert report["a"]["path"] == str(first) and report["b"]["path"] == str(second)
    assert report["metrics"] == ["imagenet-a/top1", "imagenet-r/top1"]
    assert len({mixture["sha256"] for mixture in report["mixtures"]}) == 3
    printed = capsys.readouterr().out
    assert "imagenet-a/top1, %" in printed and "interpolation.png" in printed
    with Image.open(tmp_path / "mix" / "interpolation.png") as picture:
        assert picture.width > 1000
    for mixture, path in zip(report["mixtures"], (first, saved, second), strict=True):
        out = tmp_path / "eval.json"
        flags = ["--pretrained", str(path), "--model", "tiny-test", "--device", "cpu", "--workers", "0"]
        flags += ["--imagenet-a", str(class_folders / "a"), "--imagenet-r", str(class_folders / "r")]
        assert main(["eval", *flags, "--out", str(out)]) == 0
        expected = json.loads(out.read_text())["tasks"]
        for name, task in mixture["tasks"].items():
            assert task["scores"] == expected[name]["scores"]
            assert task["num_samples"] == expected[name]["num_samples"] == 30


def test_what_is_saved_is_the_mixture_and_stock_openclip_takes_it(trained, tmp_path):
    first, second = (trained / "checkpoints" / f"epoch_{epoch}.pt" for epoch in (1, 2))
    saved = tmp_path / "mixed.pt"
    assert main(["interpolate", str(first), str(second), "--save", "0.25", str(saved)]) == 0  # and nothing is scored
    model = open_clip.create_model("tiny-test", str(saved)).state_dict()
    a, b = (torch.load(path, weights_only=True)["state_dict"] for path in (first, second))
    for name, value in model.items():
        torch.testing.assert_close(value, 0.75 * a[name] + 0.25 * b[name], rtol=0, atol=1e-7)


def test_one_task_and_one_mixture_can_be_drawn(trained, mix):
    code, report = mix(trained, trained, "--alpha", "0.5", "--metric", "*top5", sets="a")
    assert code == 0 and report["metrics"] == ["imagenet-a/top5"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}", "nowhere"], "B nowhere"),
        (["{run}", "nowhere.pt"], "B nowhere.pt: no such file"),
        (["{run}/params.txt", "{run}"], "not a checkpoint"),
        (["{run}", "{run}", "--alpha", "0:2:1"], "--alpha 0:2:1: 2 is outside of [0, 1]"),
        (["{run}", "{run}", "--save", "half", "x.pt"], "--save half x.pt: give the share"),
        (["{run}", "{run}", "--save", "1.5", "x.pt"], "1.5 is outside of [0, 1]"),
        (["{run}", "{run}", "--save", "0.5", "x.bin"], "must end in .pt"),
        (["{run}", "{run}", "--save", "0.5", "{run}/checkpoints/epoch_1.pt"], "exists already"),
        (["{run}", "{run}", "--save", "0.5", "{run}/nowhere/x.pt"], "no such folder"),
        (["{run}", "{run}", "--out", "{run}/params.txt"], "cannot be made a folder"),
        (["{biased}", "{run}"], "only A has logit_bias"),
        (["{pickled}", "{run}"], "not a checkpoint of tensors and plain values"),
    ],
)
def test_a_wrong_input_is_one_line(by_hand, mix, tmp_path, capsys, arguments, expected):
    content = torch.load(by_hand / "checkpoints" / "epoch_1.pt", weights_only=True)
    biased, pickled = tmp_path / "biased.pt", tmp_path / "pickled.pt"
    torch.save({"state_dict": content["state_dict"] | {"logit_bias": torch.tensor(0.0)}}, biased)
    torch.save(content | {"code": Path("x")}, pickled)
    names = {"run": by_hand, "biased": biased, "pickled": pickled}
    code, report = mix(*(part.format(**names) for part in arguments))
    error = capsys.readouterr().err.splitlines()
    assert code == 2 and report is None
    assert [expected in line for line in error if line.startswith("openclip-ext: ")] == [True]


def test_a_wrong_metric_is_said_and_loses_nothing(by_hand, mix, capsys):
    """What metrics there are is known after the first mixture."""
    code, report = mix(by_hand, by_hand, "--metric", "nope")
    assert code == 2 and "--metric nope: there is no such metric" in capsys.readouterr().err
    assert len(report["mixtures"]) == 1


def test_without_data_or_save_there_is_nothing_to_do(by_hand, mix, capsys):
    code, _ = mix(by_hand, by_hand, sets="")
    assert code == 2 and "nothing to evaluate" in capsys.readouterr().err
