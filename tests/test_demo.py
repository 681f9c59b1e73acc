import json

from PIL import Image

from openclip_ext.cli import main
from openclip_ext.data import digits


def test_the_demo_writes_a_report_and_a_picture(tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ["demo", "--out", str(out), "--losses", "siglip,clip+brownian_bridge=0.25", "--seeds", "2", "--epochs", "1"]
    assert main([*flags, "--batch-size", "256"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert [(run["loss"], run["seed"]) for run in report["runs"]] == [
        ("siglip", 0), ("clip+brownian_bridge=0.25", 0), ("siglip", 1), ("clip+brownian_bridge=0.25", 1)
    ]  # fmt: skip
    cell = report["summary"]["siglip"]["zero_shot_top1"]
    values = [run["zero_shot_top1"] for run in report["runs"] if run["loss"] == "siglip"]
    assert cell["mean"] == sum(values) / 2 and cell["interval"] >= 0
    assert len(report["runs"][0]["validation_curve"]) == 1
    with Image.open(out / "report.png") as picture:
        assert picture.width > 800
    assert "clip+brownian_bridge=0.25" in capsys.readouterr().out


def test_the_splits_are_fixed_disjoint_and_complete():
    splits = digits.digit_splits()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1257, "val": 180, "test": 360}
    assert splits == digits.digit_splits()
    captions = {caption for rows in splits.values() for _, caption, _ in rows}
    assert len(captions) > 300
    for _, caption, label in splits["test"]:
        assert digits.CLASS_NAMES[label] in caption
