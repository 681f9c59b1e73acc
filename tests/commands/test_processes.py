"""`eval`, `interpolate` and `structure` in two processes, which share the pictures, against one."""

import json

import pytest

from launching import fork
from openclip_ext.cli import main
from openclip_ext.data.pack import pack
from pictures import cls_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory, pairs, digit_folders):
    """Flags that name data of all kinds: class folders, shards with classes, shards and a CSV of pairs."""
    folder = tmp_path_factory.mktemp("data")
    pack(pairs[300:371], str(folder / "shards"), samples_per_shard=30, progress=False)
    lines = ["filepath,title"]
    for number, (image, caption) in enumerate(pairs[400:437]):
        (folder / f"{number}.png").write_bytes(image)
        lines += [f"{number}.png,{caption}"] * (1 + number % 2)
    (folder / "pairs.csv").write_text("\n".join(lines))
    flags = [
        "--zero-shot",
        digit_folders,
        "--zero-shot",
        cls_shards(folder / "marks", 21, 9, 14),
        "--retrieval",
        folder / "shards",
        "--retrieval",
        folder / "pairs.csv",
    ]
    flags += ["--probe-train", digit_folders, "--probe-val", digit_folders, "--probes", "knn", "linear", "few-shot"]
    flags += ["--shots", 2, "--seeds", 2, "--batch-size", 8, "--device", "cpu"]
    return [str(flag) for flag in flags]


def tasks_in(path):
    """What a report says of its tasks, but for how long they took."""
    tasks = json.loads(path.read_text())["tasks"]
    return {name: {key: value for key, value in task.items() if key != "seconds"} for name, task in tasks.items()}


def test_two_processes_report_what_one_does_to_the_last_bit(data, digit_run, tmp_path):
    flags = ["eval", "--pretrained", str(digit_run), "--workers", "2", *data]
    assert main([*flags, "--out", str(tmp_path / "one.json"), "--no-feature-cache"]) == 0
    common = ["--feature-cache", str(tmp_path / "cache"), "--out"]
    for name in ("two", "cached"):
        finished = fork("torchrun", [*flags, *common, str(tmp_path / f"{name}.json")])
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("retrieval-shards") == 1
    one, two, cached = (tasks_in(tmp_path / f"{name}.json") for name in ("one", "two", "cached"))
    assert two == one and len(one) == 7
    assert json.loads((tmp_path / "two.json").read_text())["processes"] == 2
    assert cached == {name: task | ({"cached": True} if "cached" in task else {}) for name, task in one.items()}


def test_a_picture_that_one_process_cannot_open_ends_it_with_one_line(data, digit_run, tmp_path, pairs):
    (tmp_path / "rotten").mkdir()
    lines = ["filepath,title"]
    for number, (image, _) in enumerate(pairs[:12]):
        (tmp_path / "rotten" / f"{number}.png").write_bytes(b"rot" if number == 9 else image)
        lines.append(f"{number}.png,a digit")
    (tmp_path / "rotten" / "pairs.csv").write_text("\n".join(lines))
    flags = ["eval", "--pretrained", digit_run, "--retrieval", tmp_path / "rotten" / "pairs.csv", "--batch-size", 4]
    flags += ["--workers", 0, "--device", "cpu", "--no-feature-cache", "--out", tmp_path / "eval.json"]
    finished = fork("torchrun", flags)  # the first one's third batch
    assert finished.returncode != 0
    line = f"openclip-ext: {tmp_path / 'rotten' / '9.png'}: cannot be opened as a picture"
    assert finished.stderr.count(line) == 1


def test_mixtures_are_scored_by_two_processes_as_by_one(digit_run, digit_folders, tmp_path):
    first = next((digit_run / "checkpoints").glob("epoch_1.pt"), digit_run)
    flags = ["interpolate", first, digit_run, "--alpha", "0.5,1", "--zero-shot", digit_folders, "--device", "cpu"]
    flags = [*map(str, flags), "--batch-size", "8", "--workers", "0", "--out"]
    assert main([*flags, str(tmp_path / "one")]) == 0
    finished = fork("torchrun", [*flags, str(tmp_path / "two"), "--save", "0.5", str(tmp_path / "mixed.pt")])
    assert finished.returncode == 0, finished.stderr
    one, two = (json.loads((tmp_path / name / "interpolation.json").read_text()) for name in ("one", "two"))
    scores = [[list(mixture["tasks"].values())[0]["scores"] for mixture in found["mixtures"]] for found in (one, two)]
    assert scores[0] == scores[1] and len(scores[0]) == 2 and (tmp_path / "mixed.pt").exists()


def test_structure_is_measured_by_two_processes_as_by_one(digit_run, tmp_path, pairs):
    pack(pairs[300:371], str(tmp_path / "shards"), samples_per_shard=30, progress=False)
    flags = [
        "structure",
        "--checkpoint",
        digit_run,
        "--data",
        tmp_path / "shards",
        "--num-samples",
        53,
        "--device",
        "cpu",
    ]
    flags = [*map(str, flags), "--batch-size", "8", "--workers", "0", "--out"]
    assert main([*flags, str(tmp_path / "one")]) == 0
    finished = fork("torchrun", [*flags, str(tmp_path / "two")])
    assert finished.returncode == 0, finished.stderr
    one, two = (json.loads((tmp_path / name / "structure.json").read_text()) for name in ("one", "two"))
    assert two["checkpoints"] == one["checkpoints"] and two["num_pairs"] == 53
