import json

from PIL import Image

from openclip_ext.cli import main
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
    assert "clip+brownian_bridge=0.25" in capsys.readouterr().out


def test_the_splits_are_fixed_disjoint_and_complete():
    splits = digits.digit_splits()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1257, "val": 180, "test": 360}
    assert splits == digits.digit_splits()
    captions = {caption for rows in splits.values() for _, caption, _ in rows}
    assert len(captions) > 300
    for _, caption, label in splits["test"]:
        assert digits.CLASS_NAMES[label] in caption
