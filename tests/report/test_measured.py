"""Scores of different data stand in separate columns; of the same data in one, whatever its folder is called."""

import json

import pytest

from openclip_ext.report.measured import Data, chances
from openclip_ext.report.run_files import read_run


@pytest.fixture
def make_eval(tmp_path):
    """A function that writes what `openclip-ext eval --retrieval` leaves, and returns the file's path."""

    def make(name, dataset, recall, *, images=180, texts=180, checksum=None, task="retrieval-val", **more):
        result = {"dataset": dataset, "num_samples": images, "scores": {"text_to_image_R@1": recall}, **more}
        if checksum:
            result["data"] = {"images": images, "texts": texts, "checksum": checksum}
        report = {"created": name, "checkpoint": {"source": name, "path": f"{name}.pt"}, "tasks": {task: result}}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report))
        return path

    return make


def test_one_task_name_with_two_data_is_two_columns_without_a_difference(make_eval, show, capsys):
    files = [
        make_eval("before", "wds/val", 0.31, texts=900, checksum="sha256:aa"),
        make_eval("after", "shards/val", 0.41, checksum="sha256:bb"),
    ]
    code, report = show(*files)
    assert code == 0
    columns = ["retrieval-val (wds)/text_to_image_R@1", "retrieval-val (shards)/text_to_image_R@1"]
    assert report["metrics"] == columns
    before, after = report["groups"]
    assert list(before["scores"]) == columns[:1] and list(after["scores"]) == columns[1:]
    assert after["differences"] == {}
    (remark,) = report["remarks"]
    assert "(wds) wds/val, 180 images, 900 texts; (shards) shards/val, 180 images, 180 texts" in remark
    printed = " ".join(capsys.readouterr().out.split())
    assert remark in printed and "+10.0" not in printed


def test_the_same_content_elsewhere_is_compared(make_eval, show):
    files = [
        make_eval("before", "shards/val", 0.31, checksum="sha256:aa"),
        make_eval("after", "/data/shards/val/", 0.41, checksum="sha256:aa"),
    ]
    _, report = show(*files)
    assert report["remarks"] == [] and report["metrics"] == ["retrieval-val/text_to_image_R@1"]
    assert report["groups"][1]["differences"]["retrieval-val/text_to_image_R@1"]["mean"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ({"dataset": "shards/val"}, {"dataset": "shards/val/"}, None),
        ({"dataset": "a/val"}, {"dataset": "b/val"}, ["a", "b"]),
        ({"dataset": "old/shards/val"}, {"dataset": "shards/val"}, ["old/shards/val", "shards/val"]),
        ({"dataset": "val", "images": 1800}, {"dataset": "val", "images": 20}, ["1,800 images", "20 images"]),
        (
            {"dataset": "val", "num_templates": 80},
            {"dataset": "val", "num_templates": 1},
            ["80 templates", "1 template"],
        ),
        (
            {"dataset": "val", "candidates": 16},
            {"dataset": "val", "candidates": 128},
            ["16 candidates", "128 candidates"],
        ),
        ({"dataset": "val", "num_templates": 80}, {"dataset": "val", "num_templates": 80}, None),
        ({"dataset": "val", "checksum": "1" * 64}, {"dataset": "val"}, None),  # of an older version
        ({"dataset": "val", "checksum": "1" * 64}, {"dataset": "val", "checksum": "2" * 64}, ["1" * 11, "2" * 11]),
    ],
)
def test_data_are_told_apart_by_the_little_that_tells_them_apart(make_eval, show, first, second, names):
    _, report = show(*(make_eval(name, recall=0.1, **data) for name, data in (("a", first), ("b", second))))
    task = "retrieval-val{}/text_to_image_R@1"
    assert report["metrics"] == ([task.format(f" ({name})") for name in names] if names else [task.format("")])
    assert bool(report["groups"][1]["differences"]) == (names is None)


def test_what_may_be_either_of_two_data_is_neither():
    one, two = (Data(path="val", images=9, checksum=checksum) for checksum in "12")
    assert Data(path="val", images=9).same(one) and Data(path="val", images=9).same(two) and not one.same(two)
    assert not Data(path="val", images=9, classes=10).same(Data(path="val", images=9, classes=1000))


def test_a_run_scored_on_two_data_keeps_both(make_run, make_eval, show):
    run = make_run("run", losses=(3, 2))
    for name in ("wds", "shards"):
        make_eval(name, f"{name}/val", len(name) / 10).rename(run / f"eval-{name}.json")
    _, report = show(run)
    scores = {name: score["mean"] for name, score in report["groups"][0]["scores"].items()}
    assert scores == {
        "retrieval-val (wds)/text_to_image_R@1": 0.3, "retrieval-val (shards)/text_to_image_R@1": 0.6
    }  # fmt: skip


def test_validation_on_different_data_is_not_compared(make_run, show):
    a = make_run("a", recall=(0.1, 0.2), val_data="wds/val", lr=1)
    b = make_run("b", recall=(0.3, 0.4), val_data="shards/val", lr=2)
    _, report = show(a, b, "--metric", "text_to_image_R@1")
    assert report["metrics"] == ["val-data (wds)/text_to_image_R@1", "val-data (shards)/text_to_image_R@1"]
    assert report["groups"][1]["differences"] == {}
    validation = report["groups"][1]["runs"][0]["validation"]
    assert validation == {"epoch": [1, 2], "num_samples": [9, 9], "val-data (shards)/text_to_image_R@1": [0.3, 0.4]}


def test_validation_on_as_many_pairs_of_the_same_path_is_compared(make_run, show):
    a = make_run("a", recall=(0.1, 0.2), val_data="val", lr=1)
    b = make_run("b", recall=(0.3, 0.4), val_data="val", lr=2)
    assert show(a, b)[1]["groups"][1]["differences"]["text_to_image_R@1"]["mean"] == pytest.approx(0.2)
    results = b / "checkpoints" / "results.jsonl"
    results.write_text(results.read_text().replace('"num_samples": 9', '"num_samples": 8'))
    _, report = show(a, b)
    assert report["metrics"] == [f"val-data ({n} images)/text_to_image_R@1" for n in (9, 8)]
    assert report["groups"][1]["differences"] == {}


@pytest.mark.parametrize(
    ("metric", "first", "second", "names"),
    [
        ("clip_val_loss", {"val_data": "val", "batch_size": 32}, {"val_data": "val", "batch_size": 64},
         ["val-loss (batch-size 32)", "val-loss (batch-size 64)"]),
        ("text_to_image_R@1", {"val_data": "val", "batch_size": 32}, {"val_data": "val", "batch_size": 64}, None),
        ("imagenet-zeroshot-val-top1", {"imagenet_val": "val", "classes": "present"}, {"imagenet_val": "val"},
         ["imagenet-val (classes present)", "imagenet-val (classes all)"]),
        ("imagenet-zeroshot-val-top1", {"imagenet_val": "val", "classes": "all"}, {"imagenet_val": "val"}, None),
        ("ema-imagenetv2-zeroshot-val-top5", {"imagenet_v2": "v2", "classes": "all"},
         {"imagenet_v2": "v2", "classes": "present"}, ["imagenet-v2 (classes all)", "imagenet-v2 (classes present)"]),
        ("pets-zeroshot-val-top1", {"zero_shot": ["pets"], "templates": "simple", "class_names": "names.txt"},
         {"zero_shot": ["pets"], "class_names": "names.txt"},
         ["zero-shot (templates simple)", "zero-shot (templates by default)"]),
        ("pets-zeroshot-val-top1", {"zero_shot": ["pets"]}, {"zero_shot": ["pets"], "class_names": "names.txt"},
         ["zero-shot (class-names by default)", "zero-shot (class-names names.txt)"]),
    ],
)  # fmt: skip
def test_validation_in_another_way_is_not_compared(make_run, show, metric, first, second, names):
    for name, params in (("a", first), ("b", second)):
        results = make_run(name, **params) / "checkpoints" / "results.jsonl"
        results.write_text(json.dumps({"epoch": 1, metric: 0.2}) + "\n")
    _, report = show(results.parent.parent.parent, "--metric", metric)
    assert report["metrics"] == ([f"{name}/{metric}" for name in names] if names else [metric])
    assert bool(report["groups"][1]["differences"]) == (names is None)


def test_other_data_of_one_kind_leave_the_other_kinds_compared(make_run, show):
    for name, value, probe in (("a", 0.1, "pets"), ("b", 0.3, "cars")):
        run = make_run(name, val_data="val", probe_train=f"{probe}/train", probe_val=f"{probe}/val")
        with open(run / "checkpoints" / "results.jsonl", "w") as file:
            json.dump({"epoch": 1, "text_to_image_R@1": value, "knn-top1": value, "num_samples": 9}, file)
            file.write("\n")
    _, report = show(run.parent)
    assert list(report["groups"][1]["differences"]) == ["text_to_image_R@1"]
    assert {"probe-val (pets)/knn-top1", "probe-val (cars)/knn-top1"} < set(report["metrics"])


def test_chance_is_known_where_the_candidates_are(make_run, tmp_path):
    run = make_run("run", recall=(0.1,))
    tasks = {
        "pets": {"num_samples": 90, "num_classes": 20, "scores": {"top1": 0.5, "top5": 0.8, "mean_per_class": 0.4}},
        "coco": {
            "num_samples": 50, "data": {"images": 50, "texts": 250, "checksum": "1"},
            "scores": {"text_to_image_R@5": 0.5, "image_to_text_R@5": 0.5},
        },
    }  # fmt: skip
    report = {"created": "1", "checkpoint": {"path": "x"}, "tasks": tasks}
    (run / "eval.json").write_text(json.dumps(report))
    expected = {"text_to_image_R@1": 1 / 9, "pets/top1": 0.05, "pets/top5": 0.25, "coco/text_to_image_R@5": 0.1}
    assert chances([read_run(str(run))]) == pytest.approx(expected)
