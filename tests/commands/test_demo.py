import json

import pytest
from PIL import Image

from openclip_ext.cli import main
from openclip_ext.commands.demo import body
from openclip_ext.data import digits


def test_the_demo_writes_a_report_and_a_picture(tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ["demo", "--out", str(out), "--losses", "siglip,clip+brownian_bridge=0.25", "--seeds", "2", "--epochs", "1"]
    assert main([*flags, "--batch-size", "256"]) == 0
    report = json.loads((out / "report.json").read_text())
    siglip, clip = report["groups"]
    assert [siglip["label"], clip["label"]] == ["siglip", "clip+brownian_bridge=0.25"]
    assert [run["seed"] for run in clip["runs"]] == [0, 1]
    assert report["data"] == {"train": 1257, "val": 180, "test": 360}
    assert report["metrics"][:1] == ["test/top1"] and "text_to_image_R@10" in report["metrics"]
    values = [run["scores"]["test/top1"] for run in siglip["runs"]]
    assert siglip["scores"]["test/top1"]["mean"] == sum(values) / 2
    assert clip["differences"]["test/top1"]["paired"]
    with Image.open(out / "report.png") as picture:
        assert picture.width > 800
    assert report["chance"]["test/top1"] == 0.1 and report["chance"]["test/text_to_image_R@1"] == 1 / 360
    *_, last = printed = capsys.readouterr().out.splitlines()
    assert last == report["verdict"] and "differences to siglip" in last
    progress = [line for line in printed if line.startswith("[")]
    assert len(progress) == 4 and progress[3].startswith("[4/4] ") and ": top-1 " in progress[3]


@pytest.mark.slow
def test_a_run_that_fails_ends_the_demo_with_its_reason(tmp_path, capsys):
    flags = ["demo", "--out", str(tmp_path / "demo"), "--losses", "clip", "--seeds", "1", "--epochs", "1"]
    assert main([*flags, "--batch-size", "100000"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error


def test_what_is_compared_by_default_is_little_and_with_full_everything(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(body, "run_demo", lambda out, **what: asked.append((what["losses"], what["seeds"])))
    for flags in ([], ["--full"], ["--full", "--seeds", "2"], ["--losses", "clip,dcl"]):
        assert main(["demo", *flags]) == 0
    (few, many), (everything, three), (_, two), (given, _) = asked
    assert set(few) < set(everything) and many > three == 3 and two == 2 and given == ["clip", "dcl"]


def test_what_has_no_meaning_for_a_fusion_model_is_refused(capsys):
    for flags in (["--losses", "clip"], ["--full"], ["--seeds", "2"], ["--epochs", "3"], ["--batch-size", "8"]):
        assert main(["demo", "--fusion", *flags]) == 2
        assert capsys.readouterr().err.count(f"{flags[0]}: does not go with --fusion") == 1


def test_the_splits_are_fixed_disjoint_and_complete():
    splits = digits.digit_splits()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1257, "val": 180, "test": 360}
    assert splits == digits.digit_splits()
    captions = {caption for rows in splits.values() for _, caption, _ in rows}
    assert len(captions) > 300
    for _, caption, label in splits["test"]:
        assert digits.CLASS_NAMES[label] in caption
