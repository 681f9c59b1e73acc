"""`openclip-ext eval`: zero-shot classification against OpenCLIP's and clip_benchmark's own code, and wrong inputs."""

import argparse
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import types
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from openclip_ext import upstream
from openclip_ext.cli import main
from openclip_ext.data import digits
from openclip_ext.evaluation.datasets.imagenet import wnids
from openclip_ext.evaluation.loading import load_model, weights_sha256
from openclip_ext.evaluation.ranks import ALONE
from openclip_ext.evaluation.tasks import add_task_arguments, tasks_from
from openclip_ext.evaluation.tasks.base import run_tasks
from pictures import write_shard


@pytest.fixture
def evaluate(tmp_path, digit_run):
    """A function from flags to the exit code and the report of `openclip-ext eval`, of the run unless told."""

    def run(*flags):
        flags = [str(part) for part in flags]
        fixed = {"--pretrained": str(digit_run), "--out": str(tmp_path / "eval.json"), "--workers": "0",
                 "--device": "cpu"}  # fmt: skip
        kept = [part for key, value in fixed.items() if key not in flags for part in (key, value)]
        code = main(["eval", *kept, *flags])
        return code, json.loads((tmp_path / "eval.json").read_text()) if code == 0 else None

    return run


@pytest.fixture
def refused(evaluate, capsys):
    """A function from flags to the one line that `openclip-ext eval` ends with."""

    def run(*flags):
        capsys.readouterr()
        assert evaluate(*flags) == (2, None)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
        return line

    return run


def pictures(root, label, images):
    """A class folder of pictures."""
    folder = root / str(label)
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        (folder / f"{len(list(folder.iterdir())):04}.png").write_bytes(image)


def by_hand(run, folder, names, templates):
    """OpenCLIP's classifier on the pictures of class folders 0 to 9: (logits, labels)."""
    model, _, transform = open_clip.create_model_and_transforms(
        "tiny-test", pretrained=str(run / "checkpoints" / "epoch_6.pt")
    )
    model.eval()
    files = sorted(folder.glob("*/*.png"))
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer("tiny-test"), names, templates)
        images = torch.stack([transform(Image.open(file)) for file in files])
        logits = 100 * model.encode_image(images, normalize=True) @ classifier
    return logits, torch.tensor([int(file.parent.name) for file in files])


def test_one_report_says_what_was_measured_of_what(evaluate, digit_run, digit_folders, capsys):
    code, report = evaluate("--zero-shot", digit_folders)
    file = digit_run / "checkpoints" / "epoch_6.pt"
    assert code == 0
    assert report.keys() == {
        "created", "versions", "model", "checkpoint", "precision", "device", "processes", "tasks"
    }  # fmt: skip
    assert report["versions"]["open_clip_torch"] == open_clip.__version__
    assert report["model"] == "tiny-test"  # the run knows
    assert report["checkpoint"] == {
        "source": str(digit_run), "path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()
    }  # fmt: skip
    (entry,) = report["tasks"].values()
    assert entry.keys() == {"dataset", "num_samples", "num_classes", "num_templates", "data", "scores", "seconds"}
    assert (entry["dataset"], entry["num_samples"]) == (str(digit_folders), 80)
    assert (entry["num_classes"], entry["num_templates"]) == (10, len(digits.TEMPLATES)) and entry["seconds"] > 0
    logits, labels = by_hand(digit_run, digit_folders, digits.CLASS_NAMES, digits.TEMPLATES)
    order = logits.argsort(dim=1, descending=True)
    right = (order[:, :5] == labels[:, None]).double()
    scores = entry["scores"]
    assert [scores[f"top{top}"] for top in (1, 3, 5)] == [right[:, :top].sum().item() / 80 for top in (1, 3, 5)]
    assert scores["mean_per_class"] == pytest.approx(np.mean([right[labels == c, 0].mean() for c in range(10)]))
    assert 0.2 < scores["top1"] < 1  # it has learnt something: chance is 0.1
    assert f"80  {scores['top1']:.4f}" in capsys.readouterr().out


def test_class_names_and_templates_can_be_given(evaluate, digit_run, digit_folders, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(digit_folders, bare, ignore=shutil.ignore_patterns("*.txt"))
    names = [f"number {name}" for name in digits.CLASS_NAMES]
    (tmp_path / "names").write_text("\n".join(names))
    (tmp_path / "templates").write_text("a {c}.\nink: {}\n")
    for flags, classes, templates in (
        (["--class-names", tmp_path / "names", "--templates", tmp_path / "templates"], names, ["a {}.", "ink: {}"]),
        (["--templates", "simple"], [str(n) for n in range(10)], open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        _, report = evaluate("--zero-shot", bare, *flags)
        logits, labels = by_hand(digit_run, bare, classes, templates)
        assert report["tasks"]["bare"]["scores"]["top1"] == (logits.argmax(1) == labels).double().mean().item()


def wds(folder, digit_folders):
    """The digits as clip_benchmark keeps sets: two shards in `test`, with the text files beside."""
    samples = [{"png": file.read_bytes(), "cls": file.parent.name.encode()}
               for file in sorted(digit_folders.glob("*/*.png"))]  # fmt: skip
    for number, part in enumerate((samples[:50], samples[50:])):
        write_shard(folder / "test" / f"{number}.tar", part)
    (folder / "test" / "nshards.txt").write_text("2")
    for file in digit_folders.glob("*.txt"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_score_as_their_folder(evaluate, digit_folders, tmp_path, workers):
    folder = wds(tmp_path / "wds", digit_folders)
    code, report = evaluate("--zero-shot", digit_folders, "--zero-shot", folder, "--workers", workers)
    first, second = report["tasks"].values()
    assert code == 0 and second["num_samples"] == 80
    assert second["scores"] == first["scores"]


def test_braces_name_several_folders_of_shards(evaluate, digit_folders, tmp_path):
    samples = [{"png": file.read_bytes(), "cls": file.parent.name.encode()}
               for file in sorted(digit_folders.glob("*/*.png"))]  # fmt: skip
    write_shard(tmp_path / "parts" / "a" / "0.tar", samples[:50])
    write_shard(tmp_path / "parts" / "b" / "0.tar", samples[50:])
    flags = "--class-names", digit_folders / "classnames.txt"
    code, report = evaluate("--zero-shot", tmp_path / "parts" / "{a,b}", *flags)
    assert code == 0 and report["tasks"]["parts"]["num_samples"] == 80
    _, part = evaluate("--zero-shot", tmp_path / "parts" / "a", *flags)
    assert part["tasks"]["a"]["num_samples"] == 50


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its own
def test_clip_benchmark_has_the_same_numbers(evaluate, digit_run, digit_folders, tmp_path, monkeypatch):
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    from clip_benchmark.metrics import zeroshot_classification

    def accuracy(output, target, topk):  # as there, without the conversion that numpy 2.4 refuses
        best = output.topk(max(topk), 1).indices
        return [(best[:, :k] == target[:, None]).any(1).double().mean().item() for k in topk]

    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)
    folder = wds(tmp_path / "wds", digit_folders)
    model = load_model(str(digit_run), device="cpu")
    dataset = builder.build_dataset("wds/wds", root=str(folder), transform=model.transform)
    theirs = zeroshot_classification.evaluate(
        model.model, torch.utils.data.DataLoader(dataset.batched(64), batch_size=None), model.tokenizer,
        dataset.classes, dataset.templates, "cpu", amp=False,
    )  # fmt: skip
    _, report = evaluate("--zero-shot", folder)
    ours = report["tasks"]["wds"]["scores"]
    assert (ours["top1"], ours["top5"]) == (theirs["acc1"], theirs["acc5"])
    assert ours["mean_per_class"] == pytest.approx(theirs["mean_per_class_recall"])


TEMPLATES = [lambda name: f"a {name}.", lambda name: f"many {name}s."]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory, digit_run, pairs):
    """1,000 class folders of real pictures, about half of them where the run's model puts them; (folder, labels)."""
    root = tmp_path_factory.mktemp("imagenet")
    model = load_model(str(digit_run), device="cpu")
    images = [image for image, _ in pairs[:1100]]
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(
            model.model, model.tokenizer, open_clip.IMAGENET_CLASSNAMES, TEMPLATES
        )
        batch = torch.stack([model.transform(Image.open(io.BytesIO(image))) for image in images])
        guesses = (model.encode_images(batch) @ classifier).argmax(1).tolist()
    labels = guesses[:1000] if len(set(guesses)) == 1000 else [*range(1000), *guesses[1000:]]
    for wnid, index in wnids().items():
        pictures(root, wnid, [image for image, label in zip(images, labels, strict=True) if label == index])
    return root


@pytest.fixture
def two_templates(monkeypatch):
    """OpenCLIP's 80 templates for 1,000 classes take their time."""
    from open_clip_train import zero_shot

    for module in (open_clip, zero_shot):
        monkeypatch.setattr(module, "OPENAI_IMAGENET_TEMPLATES", TEMPLATES)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])  # the second makes many equal logits
def test_imagenet_equals_openclips_own_evaluation(evaluate, digit_run, imagenet, two_templates, monkeypatch, precision):
    from open_clip_train import zero_shot
    from open_clip_train.data import get_imagenet

    def accuracy(output, target, topk):  # as there, without the conversion that numpy 2.4 refuses
        best = output.topk(max(topk), 1, True, True)[1].t()
        correct = best.eq(target.view(1, -1).expand_as(best))
        return [correct[:k].float().sum().item() for k in topk]

    monkeypatch.setattr(zero_shot, "accuracy", accuracy)
    model = load_model(str(digit_run), device="cpu", precision=precision)
    args = types.SimpleNamespace(
        imagenet_val=str(imagenet), batch_size=64, workers=0, device="cpu", precision=precision, zeroshot_frequency=1,
        epochs=1, distributed=False, horovod=False, model="tiny-test",
    )  # fmt: skip
    data = {"imagenet-val": get_imagenet(args, (model.transform, model.transform), "val")}
    theirs = zero_shot.zero_shot_eval(model.model, data, 1, args, tokenizer=model.tokenizer)
    code, report = evaluate("--imagenet-val", imagenet, "--precision", precision)
    ours = report["tasks"]["imagenet-val"]
    assert code == 0 and ours["num_classes"] == 1000 and "note" not in ours
    assert ours["scores"]["top1"] == theirs["imagenet-zeroshot-val-top1"] > 0.05
    assert ours["scores"]["top5"] == theirs["imagenet-zeroshot-val-top5"]


def test_sets_with_the_same_classes_share_a_classifier(evaluate, digit_run, digit_folders, tmp_path, monkeypatch):
    """And another model makes its own."""
    made = []
    make = upstream.zero_shot_weights
    monkeypatch.setattr(upstream, "zero_shot_weights", lambda *args, **flags: made.append(1) or make(*args, **flags))
    shutil.copytree(digit_folders, tmp_path / "again")
    _, report = evaluate("--zero-shot", digit_folders, "--zero-shot", tmp_path / "again")
    first, second = report["tasks"].values()
    assert len(made) == 1 and first["scores"] == second["scores"]
    parser = argparse.ArgumentParser()
    add_task_arguments(parser)
    tasks = tasks_from(parser.parse_args(["--zero-shot", str(digit_folders), "--workers", "0"]))
    model = load_model(str(digit_run), device="cpu")
    assert run_tasks(model, tasks, ALONE)[tasks[0].name]["scores"] == first["scores"]
    model.model.text_projection.neg_()
    other = dataclasses.replace(model, sha256=weights_sha256(model.model))
    assert run_tasks(other, tasks, ALONE)[tasks[0].name]["scores"]["top1"] < first["scores"]["top1"]


def test_a_part_of_imagenets_classes(evaluate, digit_run, two_templates, tmp_path, pairs, capsys):
    """Against the columns of OpenCLIP's classifier, chosen by hand."""
    known = {"n02085620": 151, "n01440764": 0, "n15075141": 999}  # Chihuahua, tench, toilet tissue
    for wnid in known:
        pictures(tmp_path / "part", wnid, [image for image, _ in pairs[: 10 + known[wnid] % 7]])
    logits = {}
    model = load_model(str(digit_run), device="cpu")
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(
            model.model, model.tokenizer, open_clip.IMAGENET_CLASSNAMES, TEMPLATES
        )
        for wnid, index in known.items():
            files = sorted((tmp_path / "part" / wnid).iterdir())
            batch = torch.stack([model.transform(Image.open(file)) for file in files])
            logits[index] = model.encode_images(batch) @ classifier
    for flag, classes in (("--imagenet-a", None), ("--imagenet-r", "all"), ("--imagenet-val", "present")):
        code, report = evaluate(flag, tmp_path / "part", *(("--classes", classes) if classes else ()))
        entry = report["tasks"][flag.removeprefix("--")]
        chosen = list(range(1000)) if classes == "all" else sorted(known.values())
        hits = torch.cat([logits[index][:, chosen].argmax(1) == chosen.index(index) for index in logits])
        assert code == 0 and entry["num_classes"] == len(chosen)
        assert entry["scores"]["top1"] == hits.double().mean().item()
        said = (
            f"images of 3 of ImageNet's classes, each taken for one of {'all 1,000' if classes == 'all' else 'those'}"
        )
        assert entry["note"].startswith(said) and said in capsys.readouterr().out


@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_is_read_from_torchvisions_files(evaluate, digit_run, tmp_path, monkeypatch, num_classes):
    """The files' layout with other pictures in it, for whose checksums the published ones are exchanged."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {10: CIFAR10, 100: CIFAR100}[num_classes]
    names = [*digits.CLASS_NAMES, *(f"thing_{n}" for n in range(10, num_classes))]
    rows = digits.digit_splits()["test"][:40]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image, _, _ in rows])
    key = "labels" if num_classes == 10 else "fine_labels"
    content = {"data": pixels.transpose(0, 3, 1, 2).reshape(40, -1), key: [label for _, _, label in rows]}
    folder = tmp_path / "data" / kind.base_folder
    folder.mkdir(parents=True)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    monkeypatch.setattr(kind, "train_list", [])
    monkeypatch.setattr(kind, "test_list", [write("test", content)])
    file, checksum = write("meta", {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", kind.meta | {"filename": file, "md5": checksum})
    for given in (tmp_path / "data", folder):
        code, report = evaluate(f"--cifar{num_classes}", given)
        entry = report["tasks"][f"cifar{num_classes}"]
        assert code == 0 and (entry["num_samples"], entry["num_classes"], entry["num_templates"]) == (
            40, num_classes, 18
        )  # fmt: skip
    if importlib.util.find_spec("clip_benchmark"):  # which has the same templates, and for CIFAR-10 the same names
        _, same = evaluate("--clip-benchmark", f"cifar{num_classes}={tmp_path / 'data'}")
        same = same["tasks"][f"cifar{num_classes}"]
        assert same["num_templates"] == 18 and (num_classes > 10 or same["scores"] == entry["scores"])
    (folder / "test").write_bytes(b"rot")
    assert main(["eval", "--pretrained", str(digit_run), f"--cifar{num_classes}", str(folder)]) == 2


# What can be loaded.


@pytest.fixture
def weights(digit_run):
    return torch.load(digit_run / "checkpoints" / "epoch_6.pt")["state_dict"]


def test_every_kind_of_checkpoint_gives_the_same_scores(evaluate, digit_run, digit_folders, weights, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    save_file(weights, local / "open_clip_model.safetensors")
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.bin")
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "w.pt")
    config = open_clip.get_model_config("tiny-test")
    (local / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    _, expected = evaluate("--zero-shot", digit_folders)
    (entry,) = expected["tasks"].values()
    named = ["--model", "tiny-test", "--pretrained"]
    for flags, file in (
        ([*named, tmp_path / "w.safetensors"], tmp_path / "w.safetensors"),
        ([*named, tmp_path / "w.bin"], tmp_path / "w.bin"),
        ([*named, tmp_path / "w.pt"], tmp_path / "w.pt"),
        (["--pretrained", f"local-dir:{local}"], local / "open_clip_model.safetensors"),
        (["--pretrained", digit_run / "checkpoints" / "epoch_6.pt"], digit_run / "checkpoints" / "epoch_6.pt"),
    ):
        code, report = evaluate(*flags, "--zero-shot", digit_folders)
        assert code == 0 and report["checkpoint"]["path"] == str(file)
        (same,) = report["tasks"].values()
        assert same["scores"] == entry["scores"]


def test_a_run_is_evaluated_as_it_was_trained(train_flags, tmp_path):
    """At its image size, and with the bias that SigLIP learns."""
    assert main(train_flags("--force-image-size", 48, "--siglip", "--image-resize-mode", "squash")) == 0
    model = load_model(str(tmp_path / "logs" / "run"), device="cpu")
    assert model.model.visual.image_size == (48, 48) and model.model.logit_bias is not None
    assert model.transform(Image.new("RGB", (100, 30))).shape == (3, 48, 48)
    trained = torch.load(tmp_path / "logs/run/checkpoints/epoch_1.pt")["state_dict"]
    torch.testing.assert_close(dict(model.model.state_dict()), dict(trained))


def test_a_run_keeps_how_its_model_sees_images(train_flags, weights, tmp_path, monkeypatch):
    """As the tag said that it began with, which its checkpoints do not know."""
    start = {"hf_hub": "", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "interpolation": "bilinear",
             "resize_mode": "squash"}  # fmt: skip
    torch.save(weights, tmp_path / "start.pt")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-test", {"mine": start})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(tmp_path / "start.pt"))
    assert main(train_flags("--pretrained", "mine")) == 0
    transform = load_model(str(tmp_path / "logs" / "run"), device="cpu").transform
    expected = open_clip.create_model_and_transforms("tiny-test", "mine")[2]
    picture = Image.fromarray(np.arange(90 * 40 * 3, dtype=np.uint8).reshape(90, 40, 3))
    torch.testing.assert_close(transform(picture), expected(picture))


def test_a_report_that_cannot_be_written_is_said_first(digit_run, digit_folders, tmp_path, capsys):
    (tmp_path / "eval.json.partial").mkdir()
    flags = ["--zero-shot", str(digit_folders), "--out", str(tmp_path / "eval.json")]
    assert main(["eval", "--pretrained", str(digit_run), *flags]) == 2
    assert "eval.json: cannot be written" in capsys.readouterr().err.splitlines()[-1]


def test_weights_have_a_checksum_of_their_own(weights):
    model, other = (open_clip.create_model("tiny-test") for _ in range(2))
    model.load_state_dict(weights)
    other.load_state_dict(weights)
    assert weights_sha256(model) == weights_sha256(other)
    other.logit_scale.data += 1e-6
    assert weights_sha256(model) != weights_sha256(other)


class Code:
    """Would run if it were unpickled."""

    def __reduce__(self):
        return os.mkdir, ("was_run",)


@pytest.fixture
def bad(tmp_path, monkeypatch, digit_folders, weights, pairs):
    """A folder of wrong inputs, which is the current one."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": weights, "extra": Code()}, "code.pt")
    config = open_clip.get_model_config("tiny-test")
    os.mkdir("local")
    torch.save({"state_dict": weights, "extra": Code()}, "local/open_clip_pytorch_model.bin")
    (tmp_path / "local/open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    os.mkdir("nothing")
    os.makedirs("weightless/x")
    (tmp_path / "weightless/open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(weights, "w.pt")
    torch.save(weights | {"text_projection": weights["text_projection"] * float("nan")}, "diverged.pt")
    for name in ("empty", "rot"):
        shutil.copytree(digit_folders, name)
    os.mkdir("empty/7.b")
    (tmp_path / "rot/3/0.png").write_bytes(b"rot")
    pictures(tmp_path / "wnid", "n01440764", [image for image, _ in pairs[:2]])
    pictures(tmp_path / "not_wnid", "cat", [image for image, _ in pairs[:2]])
    good = {"png": pairs[0][0], "cls": b"0"}
    (tmp_path / "names").write_text("a\nb\n")
    (tmp_path / "blank").write_text("\n")
    (tmp_path / "fixed").write_text("a {}\na photo\n")
    for name, sample in {"above": {**good, "cls": b"2"}, "words": {**good, "cls": b"cat"}, "no_cls": {"png": b""},
                         "broken": {**good, "png": b"rot"}, "textual": {"cls": b"1"}}.items():  # fmt: skip
        write_shard(tmp_path / name / "0.tar", [good, sample])
    write_shard(tmp_path / "cut" / "0.tar", [good] * 3)
    (tmp_path / "cut/0.tar").write_bytes((tmp_path / "cut/0.tar").read_bytes()[:5000])
    return tmp_path


DIGITS = ["--zero-shot", "DIGITS"]
NAMED = [*DIGITS, "--model", "tiny-test", "--pretrained"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # The model.
        ([*DIGITS, "--pretrained", "nope.pt"], "--pretrained nope.pt: no such file"),
        ([*DIGITS, "--pretrained", "nothing"], "--pretrained nothing: no checkpoints/epoch_N.pt in this folder"),
        ([*DIGITS, "--pretrained", "w.pt"], "--pretrained w.pt: give the architecture with --model"),
        ([*NAMED, "code.pt"], "--pretrained code.pt: not a checkpoint of tensors and plain values"),
        ([*DIGITS, "--model", "local-dir:local", "--pretrained", "local-dir:local"],
         "local/open_clip_pytorch_model.bin: not a checkpoint of tensors and plain values"),
        ([*DIGITS, "--pretrained", "local-dir:nowhere"], "local-dir:nowhere: no such folder"),
        ([*DIGITS, "--pretrained", "local-dir:nothing"], "holds no open_clip_config.json"),
        ([*DIGITS, "--pretrained", "local-dir:weightless"], "weights"),
        ([*DIGITS, "--model", "RN50", "--pretrained", "w.pt"], "w.pt: its weights do not fit --model RN50"),
        ([*DIGITS, "--model", "tiny-tset", "--pretrained", "w.pt"], "--model tiny-tset: no such model"),
        ([*DIGITS, "--model", "ViT-B-32", "--pretrained", "laion"],
         "--pretrained laion: neither a file nor a tag of --model ViT-B-32; its tags: openai"),
        ([*DIGITS, "--model", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k"],
         "--pretrained laion2b_s34b_b79k: could not be downloaded"),
        ([*DIGITS, "--pretrained", "hf-hub:timm/none"], "--model hf-hub:timm/none: could not be downloaded"),
        ([*NAMED, "diverged.pt"], "diverged.pt: its features are not finite"),
        ([*NAMED, "w.pt", "--precision", "pure_fp16"], "--precision pure_fp16: needs a GPU"),
        ([*NAMED, "w.pt", "--model-config", "no.json"], "--model-config no.json: no such file"),
        # The tasks.
        ([], "nothing to evaluate"),
        (["--imagenet-val", "nowhere"], "--imagenet-val nowhere: no such folder"),
        (["--imagenet-val", "nothing"], "--imagenet-val nothing: holds no class folders"),
        (["--imagenet-val", "wnid"],
         "--imagenet-val wnid: holds 1 of ImageNet's 1000 class folders; give the folder that has them all, or choose "
         "among those that are there with --classes present"),
        (["--imagenet-a", "not_wnid"], "--imagenet-a not_wnid: its folder cat is neither a wnid"),
        (["--imagenet-a", "rot", "--classes", "some"], "argument --classes: invalid choice: 'some'"),
        (["--zero-shot", "nowhere"], "--zero-shot nowhere: no such folder"),
        ([*DIGITS, "--classes", "all"], "--classes all: is for --imagenet-val or --imagenet-v2 or"),
        ([*DIGITS, "--caption-key", "c"], "--caption-key c: is for --retrieval; add it, or drop the flag"),
        ([*DIGITS, "--probes", "few-shot"], "--probes few-shot: is for --probe-train; add it"),
        ([*DIGITS, "--shots", "3", "4"], "--shots 3 4: is for --probes few-shot; add it"),
        ([*DIGITS, "--seeds", "9"], "--seeds 9: is for --probes few-shot; add it"),
        ([*DIGITS, "--rerank", "7"], "--rerank 7: is for --fusion; add it"),
        ([*DIGITS, "--task-images", "nowhere"], "--task-images nowhere: is for --vqa or --nlvr2 or --snli-ve; add one"),
        (["--zero-shot", "x{1"], "--zero-shot x{1: braces that do not pair"),
        (["--zero-shot", "empty"], "--zero-shot empty: no picture in class folder 7.b"),
        (["--zero-shot", "rot"], "rot/3/0.png: cannot be opened as a picture"),
        (["--zero-shot", "rot", "--workers", "1"], "rot/3/0.png: cannot be opened as a picture"),
        ([*DIGITS, *DIGITS], "rename one"),
        ([*DIGITS, "--class-names", "names"], "--class-names names: has 2 names, and --zero-shot"),
        ([*DIGITS, "--class-names", "blank"], "--class-names blank: holds no class name"),
        ([*DIGITS, "--class-names", "w.pt"], "--class-names w.pt: not a text file"),
        ([*DIGITS, "--templates", "fixed"], "--templates fixed: template 2 has no {} for the class: a photo"),
        ([*DIGITS, "--templates", "blank"], "--templates blank: holds no template"),
        ([*DIGITS, "--templates", "clever"], "--templates clever: no such file"),
        (["--imagenet-a", "wnid", "--class-names", "names"], "--class-names names: is for --zero-shot"),
        ([*DIGITS, "--zero-shot", "rot", "--class-names", "names"], "--class-names names: is for one --zero-shot"),
        (["--zero-shot", "above"], "--zero-shot above: shards hold class indices only"),
        (["--zero-shot", "above", "--class-names", "names"],
         "above/0.tar: sample 0001: needs a .cls file with a class from 0 to 1, and has '2'"),
        (["--zero-shot", "words", "--class-names", "names"], "class from 0 to 1, and has 'cat'"),
        (["--zero-shot", "no_cls", "--class-names", "names"], "class from 0 to 1, and has none"),
        (["--zero-shot", "broken", "--class-names", "names"], "broken/0.tar: sample 0001: corrupt image"),
        (["--zero-shot", "textual", "--class-names", "names"], "textual/0.tar: sample 0001: missing image"),
        (["--zero-shot", "cut", "--class-names", "names"], "cut/0.tar: truncated shard"),
        (["--cifar10", "nothing"], "--cifar10 nothing: does not hold torchvision's cifar-10-batches-py"),
        ([*DIGITS, "--clip-benchmark", "pets"], "--clip-benchmark pets: give the set and its folder"),
        ([*DIGITS, "--clip-benchmark", "no-such-set=x"], "--clip-benchmark no-such-set"),
        ([*DIGITS, "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        ([*DIGITS, "--workers", "-1"], "--workers -1: must be at least 0"),
        ([*DIGITS, "--out", "w.pt/x.json"], "--out w.pt/x.json: its folder cannot be made"),
        ([*DIGITS, "--out", "nothing"], "--out nothing: is a folder"),
    ],
    ids=lambda part: " ".join(part).replace("--", "").replace("/", ":") if isinstance(part, list) else "",
)  # fmt: skip
def test_a_wrong_input_is_one_line(refused, bad, digit_folders, monkeypatch, flags, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as without a network, and at once
    line = refused(*(str(digit_folders) if flag == "DIGITS" else flag for flag in flags))
    assert line.startswith("openclip-ext: ") and message in line
    assert not os.path.exists("was_run") and not os.path.exists("eval.json")


def test_a_model_config_with_an_unknown_key_is_one_line(by_hand, model_config, tmp_path, val_shards, capsys):
    config = tmp_path / "wrong.json"
    config.write_text(Path(model_config).read_text().replace('"layers"', '"laiers"', 1))
    command = ["eval", "--pretrained", str(by_hand / "checkpoints" / "epoch_1.pt"), "--retrieval", val_shards]
    assert main([*command, "--model", "wrong", "--model-config", str(config)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("openclip-ext: the config of --model wrong: unknown key laiers in vision_cfg; did you mean")
