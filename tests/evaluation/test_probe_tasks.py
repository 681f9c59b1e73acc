"""`openclip-ext eval --probe-train` on handwritten digits, against the probes on features computed beside it."""

import json
import os

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from openclip_ext.cli import main
from openclip_ext.evaluation.metrics.probes import class_scores, few_shot_accuracies, knn_hits, linear_probe
from openclip_ext.report.intervals import half_width
from pictures import class_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`train` (which has few of the digit 8), `val` and `select`."""
    root = tmp_path_factory.mktemp("digits")
    found = {
        "train": class_folders(root / "train", "train", 120),
        "val": class_folders(root / "val", "val", 60),
        "select": class_folders(root / "select", "test", 60),
    }
    for path in sorted((found["train"] / "8").iterdir())[3:]:
        path.unlink()
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory, model_config):
    open_clip.add_model_config(model_config)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(open_clip.create_model("tiny-test").state_dict(), path)
    return path


@pytest.fixture
def evaluate(weights, folders, model_config, tmp_path):
    """A function from flags to the exit code and the report's tasks."""

    def run(*flags):
        out = tmp_path / "eval.json"
        out.unlink(missing_ok=True)
        fixed = {
            "--pretrained": weights, "--model": "tiny-test", "--model-config": model_config, "--device": "cpu",
            "--workers": 0, "--batch-size": 200, "--feature-cache": tmp_path / "features", "--out": out,
            "--probe-train": folders["train"], "--probe-val": folders["val"],
        }  # fmt: skip
        kept = [str(part) for pair in fixed.items() for part in pair if pair[0] not in flags]
        code = main(["eval", *kept, *(str(flag) for flag in flags if flag is not None)])
        return code, json.loads(out.read_text())["tasks"] if out.exists() else None

    return run


@pytest.fixture(scope="module")
def features(folders, weights):
    """By set: features and labels, encoded at once."""
    model, _, transform = open_clip.create_model_and_transforms("tiny-test", pretrained=str(weights))
    model.eval()
    found = {}
    for name, folder in folders.items():
        paths = sorted(folder.glob("*/*.png"))
        with torch.no_grad():
            images = model.encode_image(torch.stack([transform(Image.open(path)) for path in paths]))
        found[name] = images, torch.tensor([int(path.parent.name) for path in paths])
    return found


def test_probes_are_those_of_the_functions(evaluate, features, capsys):
    code, tasks = evaluate("--probes", "linear", "knn", "few-shot", "--shots", 4, 1, "--seeds", 2)
    assert code == 0 and list(tasks) == ["knn", "linear-probe", "few-shot"]
    assert all((task["num_samples"], task["num_train"], task["num_classes"]) == (60, len(features["train"][1]), 10)
               for task in tasks.values())  # fmt: skip
    hits = knn_hits(*features["train"], *features["val"])
    assert tasks["knn"]["scores"] == pytest.approx(class_scores(hits, features["val"][1]))
    found, strength = linear_probe(*features["train"], features["val"][0])
    assert tasks["linear-probe"]["scores"] == pytest.approx(
        class_scores(found == features["val"][1], features["val"][1])
    )
    assert tasks["linear-probe"]["scores"]["top1"] > 0.5 and tasks["linear-probe"]["C"] == strength
    expected = few_shot_accuracies(*features["train"], *features["val"], shots=[1, 4], seeds=2, progress=False)
    few = tasks["few-shot"]
    for k, values in expected.items():
        assert few["by_seed"][f"{k}-shot"] == pytest.approx(values)
        assert few["scores"][f"{k}-shot"] == pytest.approx(np.mean(few["by_seed"][f"{k}-shot"]))
        assert few["half_width"][f"{k}-shot"] == pytest.approx(half_width(few["by_seed"][f"{k}-shot"]))
    printed = capsys.readouterr().out
    assert "class 8 has 3 images, which is all it gives where more are asked for" in printed
    assert "4-shot ±" in printed and "95 % interval of the mean of 2 draws" in printed


def test_the_penalty_may_be_chosen_on_images_of_their_own(evaluate, features, folders):
    _, tasks = evaluate(
        "--probes", "linear", "few-shot", "--shots", 2, "--seeds", 1, "--probe-select", folders["select"]
    )
    _, strength = linear_probe(*features["train"], features["val"][0], features["select"])
    (data, same) = (task["data"] for task in tasks.values())
    assert data == same and data["images"] == 60
    _, others = evaluate("--probes", "knn")
    assert others["knn"]["data"]["checksum"] != data["checksum"]  # scores depend on --probe-select
    assert tasks["linear-probe"]["C"] == strength
    expected = few_shot_accuracies(
        *features["train"], *features["val"], features["select"], shots=[2], seeds=1, progress=False
    )
    assert tasks["few-shot"]["by_seed"]["2-shot"] == pytest.approx(expected[2])
    assert tasks["few-shot"]["half_width"] == {"2-shot": None} and "note" not in tasks["few-shot"]


def test_features_are_computed_once_and_kept(evaluate, folders, tmp_path):
    runs = [evaluate("--probes", "knn")[1]["knn"] for _ in range(2)]
    assert [run["cached"] for run in runs] == [False, True] and runs[0]["scores"] == runs[1]["scores"]
    assert len(list((tmp_path / "features").iterdir())) == 2  # one for each folder
    picture = next((folders["val"] / "3").iterdir())
    os.utime(picture, ns=(0, 0))  # as if it were another
    assert not evaluate("--probes", "knn")[1]["knn"]["cached"]
    assert len(list((tmp_path / "features").iterdir())) == 3


def test_a_wrong_input_is_one_line(evaluate, folders, capsys, tmp_path):
    def refused(message, *flags):
        code, tasks = evaluate(*flags)
        error = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and not tasks and message in error and error.startswith("openclip-ext: "), error

    refused("--probe-train /nowhere: no such folder", "--probe-train", "/nowhere")
    refused("--probe-select /nowhere: no such folder", "--probe-select", "/nowhere")
    refused("--shots 0: must be at least 1", "--shots", 4, 0)
    refused("--seeds 0: must be at least 1", "--seeds", 0)
    refused("invalid choice: 'svm'", "--probes", "svm")
    (tmp_path / "fit" / "a").mkdir(parents=True)
    refused("no picture in class folder a", "--probe-train", tmp_path / "fit")
    for name in "ab":
        (tmp_path / "fit" / name).mkdir(exist_ok=True)
        (tmp_path / "fit" / name / "x.png").write_text("no picture")
    refused("its class folder 0 is not in --probe-train", "--probe-train", tmp_path / "fit")
    refused(
        "x.png: cannot be opened as a picture",
        "--probe-train", tmp_path / "fit", "--probe-val", tmp_path / "fit", "--workers", 2,
    )  # fmt: skip


def test_a_folder_without_its_counterpart_is_an_error(weights, folders, model_config, capsys):
    flags = ["eval", "--pretrained", str(weights), "--model", "tiny-test", "--model-config", model_config]
    assert main([*flags, "--probe-train", str(folders["train"])]) == 2
    assert "--probe-train, --probe-val: give both or neither" in capsys.readouterr().err
    assert main([*flags, "--probe-select", str(folders["select"])]) == 2
    assert "give them too" in capsys.readouterr().err
