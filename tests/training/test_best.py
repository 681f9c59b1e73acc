"""`--zero-shot` between epochs, and `--save-best`."""

import json
import shutil

import pytest
import torch

from launching import fork
from openclip_ext.cli import main
from openclip_ext.training.evaluator import metric_names
from openclip_ext.training.flags import parse_args
from pictures import cls_shards


def results(tmp_path, name="run"):
    text = (tmp_path / "logs" / name / "checkpoints" / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def best(tmp_path, name="run"):
    return torch.load(tmp_path / "logs" / name / "checkpoints" / "best.pt", weights_only=True)


@pytest.fixture
def imagenet_part(tmp_path, digit_folders):
    """Three of ImageNet's classes, with digits for pictures."""
    for number, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
        shutil.copytree(digit_folders / str(number), tmp_path / "part" / wnid)
    return tmp_path / "part"


def test_any_labelled_set_is_scored_as_eval_scores_it(train_flags, tmp_path, digit_folders):
    flags = ("--zero-shot", digit_folders, "--zeroshot-frequency", 2, "--epochs", 3, "--precision", "fp32")
    assert main(train_flags(*flags)) == 0
    rows, name = results(tmp_path), f"{digit_folders.name}-zeroshot-val"
    assert [row["epoch"] for row in rows] == [2, 3] and rows[0].keys() == {"epoch", f"{name}-top1", f"{name}-top5"}
    out = tmp_path / "eval.json"
    command = ["--pretrained", tmp_path / "logs" / "run", "--zero-shot", digit_folders, "--device", "cpu", "--out", out]
    assert main(["eval", "--workers", "0", *map(str, command)]) == 0
    scores = json.loads(out.read_text())["tasks"][digit_folders.name]["scores"]
    assert (rows[-1][f"{name}-top1"], rows[-1][f"{name}-top5"]) == (scores["top1"], scores["top5"])


def test_a_part_of_imagenet_needs_a_choice_of_classes(train_flags, tmp_path, imagenet_part, capsys):
    assert main(train_flags("--imagenet-val", imagenet_part)) == 2
    assert "or choose among those that are there with --classes present" in capsys.readouterr().err
    assert main(train_flags("--imagenet-val", imagenet_part, "--classes", "present")) == 0
    (row,) = results(tmp_path)
    assert row["imagenet-zeroshot-val-top5"] == 1  # of three classes


def test_the_names_known_beforehand_are_those_that_are_measured(
    train_flags, tmp_path, val_shards, digit_folders, imagenet_part
):
    flags = ("--val-data", val_shards, "--zero-shot", digit_folders, "--imagenet-v2", imagenet_part, "--classes",
             "present", "--probe-train", digit_folders, "--probe-val", digit_folders, "--ema", 0.9)  # fmt: skip
    assert main(train_flags(*flags)) == 0
    (row,) = results(tmp_path)
    names = metric_names(parse_args(train_flags(*flags)[1:]))
    assert len(set(names)) == len(names) and set(names) == row.keys() - {"epoch", "num_samples", "ema-num_samples"}


@pytest.mark.parametrize("metric", ["clip_val_loss", "image_to_text_R@5", "ema-text_to_image_mean_rank"])
def test_the_best_checkpoint_stays_and_says_what_and_when(train_flags, tmp_path, val_shards, capsys, metric):
    flags = ("--val-data", val_shards, "--ema", 0.5, "--lr", 0.05, "--epochs", 4)
    assert main(train_flags(*flags, "--save-best", metric)) == 0
    values = [row[metric] for row in results(tmp_path)]
    value = max(values) if "R@" in metric else min(values)
    epoch = values.index(value) + 1
    content = best(tmp_path)
    assert content["best"] == {"metric": metric, "value": value, "epoch": epoch} and content["epoch"] == epoch
    kept = torch.load(tmp_path / "logs" / "run" / "checkpoints" / f"epoch_{epoch}.pt")
    torch.testing.assert_close(content["state_dict"], kept["state_dict"], rtol=0, atol=0)
    assert f"best so far: {metric} {value:.4f} after epoch {epoch}, kept as best.pt" in capsys.readouterr().err


def test_the_best_survives_resuming(train_flags, tmp_path, val_shards, monkeypatch):
    from openclip_ext.evaluation.during_training import Evaluator

    values = iter([0.4, 0.6, 0.5, 0.7])
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: {"image_to_text_R@1": next(values)})
    flags = ("--val-data", val_shards, "--save-best", "image_to_text_R@1", "--save-frequency", 0)
    seen = []
    for epochs in (2, 3, 4):
        assert main(train_flags(*flags, "--epochs", epochs, *(("--resume", "latest") if seen else ()))) == 0
        seen.append(best(tmp_path)["best"])
    first, last = ({"metric": "image_to_text_R@1", "value": v, "epoch": e} for v, e in ((0.6, 2), (0.7, 4)))
    assert seen == [first, first, last]


def test_a_best_of_another_metric_or_run_does_not_count(train_flags, tmp_path, val_shards):
    flags, first = ("--val-data", val_shards, "--lr", 0), ("--save-best", "clip_val_loss")
    assert main(train_flags(*flags, *first)) == 0
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt"
    assert main(train_flags(*flags, *first, "--epochs", 2, "--resume", path, "--name", "b")) == 0
    assert best(tmp_path, "b")["best"]["epoch"] == 2
    other = ("--save-best", "text_to_image_R@1", "--epochs", 2, "--resume", "latest")
    assert main(train_flags(*flags, *other)) == 0
    assert best(tmp_path)["best"]["metric"] == "text_to_image_R@1"


def test_a_measurement_that_is_no_number_is_never_the_best(train_flags, tmp_path, val_shards, monkeypatch):
    from openclip_ext.evaluation.during_training import Evaluator

    values = iter([float("nan"), 0.2])
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: {"clip_val_loss": next(values)})
    assert main(train_flags("--val-data", val_shards, "--save-best", "clip_val_loss", "--epochs", 2)) == 0
    assert best(tmp_path)["best"]["epoch"] == 2


def test_two_processes_agree_on_the_best(train_flags, tmp_path, val_shards, digit_folders):
    flags = ("--val-data", val_shards, "--zero-shot", digit_folders, "--batch-size", 16, "--epochs", 2)
    result = fork("torchrun", train_flags(*flags, "--save-best", f"{digit_folders.name}-zeroshot-val-top1"))
    assert result.returncode == 0, result.stderr
    values = [row.get(f"{digit_folders.name}-zeroshot-val-top1") for row in results(tmp_path)]
    assert best(tmp_path)["best"]["value"] == max(value for value in values if value is not None)


def test_shards_of_classes_give_several_processes_the_scores_of_one(train_flags, tmp_path):
    data = cls_shards(tmp_path / "marks", 8)
    flags = ("--zero-shot", data, "--templates", "simple", "--lr", 0, "--batch-size", 16)
    assert main(train_flags(*flags, "--name", "one")) == 0
    assert fork("torchrun", train_flags(*flags, "--name", "two")).returncode == 0
    assert results(tmp_path, "two") == results(tmp_path, "one")
    assert results(tmp_path, "one")[0]["marks-zeroshot-val-top5"] > 0


BAD = [
    (["--save-best", "top1"], "--save-best top1: this run measures no such thing; add --val-data"),
    (
        ["--save-best", "imagenet", "--val-data", "VAL"],
        "--save-best imagenet: this run measures no such thing; there are",
    ),
    (["--save-best", "clip_val_loss", "--val-data", "VAL", "--val-frequency", "0"], "measures no such thing; add"),
    (
        ["--save-best", "clip_val_loss", "--val-data", "VAL", "--logs", "none"],
        "needs --train-data, and a folder in --logs",
    ),
    (["--class-names", "x"], "--class-names x: is for --zero-shot; add one, or drop the flag"),
    (["--zero-shot", "/nowhere"], "--zero-shot /nowhere: no such folder"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_what_cannot_be_measured_is_one_line(train_flags, val_shards, tmp_path, capsys, flags, message):
    assert main(train_flags(*(val_shards if flag == "VAL" else flag for flag in flags))) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
    assert message in line and not (tmp_path / "logs").exists()


def test_two_sets_of_one_name_are_refused(train_flags, tmp_path, digit_folders, capsys):
    for parent in ("a", "b"):
        shutil.copytree(digit_folders, tmp_path / parent / "pets")
    assert main(train_flags("--zero-shot", tmp_path / "a/pets", "--zero-shot", tmp_path / "b/pets")) == 2
    assert f"--zero-shot {tmp_path}/b/pets: another set is called pets-zeroshot-val too" in capsys.readouterr().err
