"""`openclip-ext report`: numbers against hand-made files, then the command on runs that were trained here."""

import hashlib
import json
import math
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from launching import fork
from openclip_ext.cli import main
from openclip_ext.report.compare import compare, group
from openclip_ext.report.intervals import half_width, half_width_of_difference
from openclip_ext.report.run_files import read_run

STOCK_LOG = """\
2026-01-01,00:00:00 | INFO | Start epoch 0
2026-01-01,00:00:01 | INFO | Train Epoch: 0 [ 64/256 (25%)] Data (t): 0.1 Batch (t): 0.5, 128/s, 128/s/gpu \
LR: 0.000100 Logit Scale: 14.286 Contrastive_loss: 4.1589 (4.1600) Loss: 4.1589 (4.1600)
2026-01-01,00:00:09 | INFO | Train Epoch: 1 [256/256 (100%)] Data (t): 0.1 Batch (t): 0.5, 128/s, 128/s/gpu \
LR: 0.000400 Logit Scale: 14.300 Contrastive_loss: 3.1000 (3.6000) Loss: 3.1000 (3.6000)
"""


def groups_of(*folders):
    return compare(group([read_run(str(folder)) for folder in folders]))["groups"]


# Numbers.


def test_intervals_are_students_and_welchs():
    values, others = [0.31, 0.35, 0.32, 0.37], [0.22, 0.29, 0.18]
    assert half_width(others) == pytest.approx(4.302653 * np.std(others, ddof=1) / math.sqrt(3))
    shares = [np.var(values, ddof=1) / 4, np.var(others, ddof=1) / 3]
    degrees = sum(shares) ** 2 / (shares[0] ** 2 / 3 + shares[1] ** 2 / 2)
    expected = stats.t.ppf(0.975, degrees) * math.sqrt(sum(shares))
    assert half_width_of_difference(values, others) == pytest.approx(expected)
    assert half_width([1.0]) is None and half_width_of_difference([1.0], others) is None
    assert half_width([0.1, 0.1]) == 0 and half_width_of_difference([1.0, 1.0], [2.0, 2.0]) == 0
    assert math.isnan(half_width([1.0, math.nan]))


def test_runs_that_differ_only_in_their_seed_are_one_row(make_run):
    scores = {"clip": (0.1, 0.2, 0.3), "dcl": (0.2, 0.25, 0.42)}
    folders = [
        make_run(f"{loss}-{seed}", recall=(0.0, value), loss=loss, seed=seed)
        for loss, values in scores.items()
        for seed, value in enumerate(values)
    ]
    clip, dcl = groups_of(*folders)
    assert [clip["label"], dcl["label"]] == ["clip", "dcl"]
    assert dcl["settings"] == {"loss": "dcl"}
    assert [run["seed"] for run in dcl["runs"]] == [0, 1, 2]
    cell = clip["scores"]["text_to_image_R@1"]
    assert cell["mean"] == pytest.approx(0.2) and cell["std"] == pytest.approx(0.1) and cell["n"] == 3
    assert cell["interval"] == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    differences = np.subtract(scores["dcl"], scores["clip"])
    assert clip["differences"] == {}
    assert dcl["differences"]["text_to_image_R@1"] == {
        "mean": pytest.approx(differences.mean()), "interval": pytest.approx(half_width(differences)), "paired": True,
        "n": 3, "values": pytest.approx(list(differences)),
    }  # fmt: skip


def test_without_shared_seeds_means_are_compared(make_run):
    first = [make_run(f"a-{seed}", recall=(value,), seed=seed, lr=1) for seed, value in ((0, 0.1), (1, 0.2))]
    other = [make_run(f"b-{seed}", recall=(value,), seed=seed, lr=2) for seed, value in ((2, 0.3), (3, 0.5))]
    difference = groups_of(*first, *other)[1]["differences"]["text_to_image_R@1"]
    assert difference["paired"] is False and difference["mean"] == pytest.approx(0.25)
    assert difference["interval"] == pytest.approx(half_width_of_difference([0.3, 0.5], [0.1, 0.2]))


def test_a_resumed_run_counts_its_last_word_and_a_torn_line_does_not(make_run):
    folder = make_run("run", recall=(0.1, 0.2), losses=(3.0, 2.0, 1.0))
    with open(folder / "metrics.jsonl", "a") as file:  # back to step 1, with a loss that was not finite
        file.write('{"step": 1, "epoch": 0, "loss": null, "lr": 0.2}\n{"step": 2, "epoch": 1, "lo')
    with open(folder / "checkpoints" / "results.jsonl", "a") as file:
        file.write('{"epoch": 2, "text_to_image_R@1": 0.7}\n')
    run = read_run(str(folder))
    assert [row["step"] for row in run.training] == [0, 1, 2]
    assert math.isnan(run.training[1]["loss"]) and run.training[1]["lr"] == 0.2 and run.training[2]["loss"] == 1.0
    assert run.scores == {"text_to_image_R@1": 0.7}


def test_what_eval_found_of_an_earlier_epoch_is_no_score_of_the_end(make_run, show, capsys):
    folder = make_run("run", recall=(0.1, 0.2))
    for epoch in (1, 2):
        (folder / "checkpoints" / f"epoch_{epoch}.pt").touch()
        checkpoint = {"source": str(folder), "path": f"elsewhere/run/checkpoints/epoch_{epoch}.pt"}
        tasks = {f"pets-{epoch}": {"scores": {"top1": epoch / 10}}}
        report = {"created": str(epoch), "checkpoint": checkpoint, "tasks": tasks}
        (folder / f"eval-{epoch}.json").write_text(json.dumps(report))
    (folder / "notes.json").write_text("none of ours")
    assert read_run(str(folder)).scores == {"text_to_image_R@1": 0.2, "pets-2/top1": 0.2}
    assert show(folder)[0] == 0
    assert "eval found of epoch_1.pt is left out: epoch_2.pt came later" in capsys.readouterr().out


def test_what_eval_found_of_a_file_that_was_written_anew_is_no_score_of_it(make_run, show, capsys):
    folder = make_run("run", recall=(0.1, 0.2))
    path = folder / "checkpoints" / "epoch_2.pt"
    for number, weights in enumerate((b"before", b"resumed")):
        checkpoint = {"path": "elsewhere/epoch_2.pt", "sha256": hashlib.sha256(weights).hexdigest()}
        tasks = {f"pets-{number}": {"scores": {"top1": 0.5}}}
        report = {"created": f"2026-01-0{number + 1}T12:00:00", "checkpoint": checkpoint, "tasks": tasks}
        (folder / f"eval-{number}.json").write_text(json.dumps(report))
        path.write_bytes(weights)
    assert read_run(str(folder)).scores.keys() == {"text_to_image_R@1", "pets-1/top1"}
    assert show(folder)[0] == 0
    assert "eval found of epoch_2.pt is left out: that file was written anew since" in capsys.readouterr().out


def test_a_file_that_is_older_than_what_eval_found_of_it_is_not_read(make_run, monkeypatch):
    folder = make_run("run", recall=(0.1, 0.2))
    path = folder / "checkpoints" / "epoch_2.pt"
    path.touch()
    os.utime(path, (0, 0))
    checkpoint = {"path": str(path), "sha256": "0" * 64}
    report = {"created": "2026-01-01T12:00:00", "checkpoint": checkpoint, "tasks": {"pets": {"scores": {"top1": 0.5}}}}
    (folder / "eval.json").write_text(json.dumps(report))
    monkeypatch.setattr("openclip_ext.report.run_files.file_sha256", None)  # what takes long for a large file
    assert "pets/top1" in read_run(str(folder)).scores


def test_a_value_of_params_may_break_lines(make_run):
    folder = make_run("run", recall=(0.1,), caption_separator="\n", lr=3)
    assert read_run(str(folder)).params.flags["caption_separator"] == "\n"
    assert read_run(str(folder)).params.flags["lr"] == 3


def test_what_a_curve_is_of_is_told_with_all_that_it_depends_on(make_run):
    terms, arg = {"loss_term": ["caption=1"], "batch_size": 32, "accum_freq": 2}, ["tau=0.1"]
    alone, plain, recent, same, checked = groups_of(
        make_run("alone", losses=(1,), loss="dcl", batch_size=64),
        make_run("plain", losses=(1,), loss="dcl", loss_arg=arg, recent_batches=None, **terms),
        make_run("recent", losses=(1,), loss="dcl", loss_arg=arg, recent_batches=4, **terms),
        make_run("same", losses=(1,), loss="dcl", loss_arg=[*arg, "recent_batches=4"], **terms),
        make_run("checked", losses=(1,), loss="dcl", recent_batches=4, recent_check=8, recent_limit=0.5, **terms),
    )
    assert alone["targets"] == {"contrastive_loss": "dcl, batch 64", "loss": "dcl, batch 64"}
    assert plain["targets"]["loss"] == "dcl tau=0.1 + caption=1, batch 64"
    assert recent["targets"]["contrastive_loss"] == "dcl tau=0.1, recent_batches=4, batch 64"
    assert recent["targets"] == same["targets"]
    said = "dcl recent_batches=4, recent_check=8, recent_limit=0.5"
    assert checked["targets"]["loss"] == f"{said} + caption=1, batch 64"


def test_what_was_changed_on_the_way_is_part_of_what_a_curve_is_of(make_run):
    run = make_run("run", losses=(1, 2, 3))
    history = [{"epoch": 1, "step": 2, "changed": {"recent_batches": [4, None]}}]
    flags = {"loss": "dcl", "batch_size": 8, "recent_batches": None}
    (run / "params.json").write_text(json.dumps({"versions": {}, "flags": flags, "history": history}))
    (row,) = groups_of(run)
    assert row["targets"]["loss"] == "dcl recent_batches=4 until epoch 1 (step 2), then None, batch 8"


def test_a_long_training_curve_is_averaged_within_windows(make_run):
    losses = np.arange(2000.0)
    (row,) = groups_of(make_run("run", losses=losses, seed=0))
    training = row["runs"][0]["training"]
    assert len(training["loss"]) == 500
    assert training["loss"] == pytest.approx(losses.reshape(500, 4).mean(1))
    assert training["step"] == training["loss"]


def test_a_run_of_stock_openclip_is_read_from_its_log(make_run):
    folder = make_run("stock", recall=(0.1, 0.2), batch_size=32, accum_freq=2, world_size=1, seed=0)
    (folder / "metrics.jsonl").unlink()
    (folder / "out.log").write_text(STOCK_LOG)
    first, last = read_run(str(folder)).training
    assert first == {
        "step": 0, "epoch": 0, "lr": 1e-4, "logit_scale": 14.286, "contrastive_loss": 4.1589, "loss": 4.1589
    }  # fmt: skip
    assert last["step"] == 7 and last["lr"] == 4e-4


# The command.


def test_trained_runs_are_compared_drawn_and_told_apart(train_flags, val_shards, show, tmp_path, capsys):
    for name, extra in {"a-0": (), "a-1": ("--seed", 1), "b": ("--loss-term", "brownian_bridge=0.1")}.items():
        flags = train_flags("--name", name, "--val-data", val_shards, "--epochs", 2, "--val-frequency", 1, *extra)
        assert main(flags) == 0
    capsys.readouterr()
    code, report = show(tmp_path / "logs")
    assert code == 0
    a, b = report["groups"]
    assert [a["label"], b["label"]] == ["a", "b"] and len(a["runs"]) == 2
    assert b["settings"] == {"loss_term": "brownian_bridge=0.1"}
    assert report["metrics"] == ["image_to_text_R@1", "text_to_image_R@1", "clip_val_loss"]
    assert a["runs"][0]["epochs"] == 2 and a["runs"][0]["training"]["step"] == list(range(16))
    assert a["runs"][0]["scores"]["clip_val_loss"] == a["runs"][0]["validation"]["clip_val_loss"][-1]
    assert a["scores"]["clip_val_loss"]["std"] > 0 and b["scores"]["clip_val_loss"]["std"] is None
    assert "brownian_bridge_loss" in b["runs"][0]["training"]
    printed = capsys.readouterr().out
    assert "clip_val_loss" in printed and "Difference to a" in printed
    text = (tmp_path / "report" / "report.md").read_text()
    assert printed.partition("What the runs differ in")[0] in text and "![curves and scores](report.png)" in text
    with Image.open(tmp_path / "report" / "report.png") as picture:
        assert picture.width > 1000 and picture.height > 900


def test_runs_in_another_number_of_processes_are_no_seeds(train_flags, show, tmp_path):
    assert main(train_flags("--name", "one", "--seed", 0)) == 0
    finished = fork("torchrun", train_flags("--name", "two", "--seed", 1))
    assert finished.returncode == 0, finished.stderr
    one, two = show(tmp_path / "logs")[1]["groups"]
    assert (one["settings"], two["settings"]) == ({"world_size": "1"}, {"world_size": "2"})
    assert [row["targets"]["contrastive_loss"] for row in (one, two)] == ["clip, batch 32", "clip, batch 64"]
    assert main(train_flags("--name", "two", "--seed", 1, "--epochs", 2, "--resume", "latest")) == 0
    assert "latest: world_size was 2, is 1" in (tmp_path / "logs" / "two" / "out.log").read_text()
    (remark,) = show(tmp_path / "logs")[1]["remarks"]
    assert "world_size 2 until epoch 1 (step 4), then 1" in remark


def test_runs_that_did_not_record_their_processes_go_on_and_are_compared(train_flags, show, tmp_path):
    for name in ("old-0", "old-1"):
        assert main(train_flags("--name", name, "--seed", name[-1])) == 0
        path = tmp_path / "logs" / name / "params.json"
        record = json.loads(path.read_text())
        del record["flags"]["world_size"]
        path.write_text(json.dumps(record))
    (group,) = show(tmp_path / "logs")[1]["groups"]
    assert len(group["runs"]) == 2 and group["targets"]["contrastive_loss"] == "clip, batch 32"
    assert main(train_flags("--name", "old-0", "--seed", 0, "--save-frequency", 2, "--resume", "latest")) == 0
    record = json.loads((tmp_path / "logs" / "old-0" / "params.json").read_text())
    assert record["history"] == [] and record["flags"]["world_size"] == 1


def test_what_eval_wrote_into_the_folder_is_shown_and_goes_on_the_model_card(digit_run, digit_folders, show, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digit_run, run)
    (run / "notes.json").write_text('{"mine": 1}')
    flags = ["--zero-shot", str(digit_folders), "--device", "cpu", "--workers", "0"]
    assert main(["eval", "--pretrained", str(run), *flags]) == 0
    (written,) = run.glob("eval-*.json")
    (result,) = json.loads(written.read_text())["tasks"].items()
    code, report = show(run)
    assert code == 0
    name = f"{result[0]}/top1"
    assert report["metrics"] == [name]
    assert report["groups"][0]["scores"][name]["mean"] == result[1]["scores"]["top1"] > 0.15
    before = tmp_path / "before.json"  # of a model that no run has trained
    written.rename(before)
    code, report = show(before, run)
    assert code == 0 and [row["label"] for row in report["groups"]] == ["before", "run"]
    assert report["groups"][0]["scores"][name]["mean"] == result[1]["scores"]["top1"]
    before.rename(written)
    assert main(["export", str(run), "--to", "hf"]) == 0
    assert f"{name} " in (run / "export" / "README.md").read_text()


@pytest.mark.parametrize("count", [1, 20])
def test_one_run_and_twenty_can_be_drawn(make_run, show, count):
    for index in range(count):
        make_run(f"run-{index}", recall=(0.1, 0.1 * index), losses=(3, 2, 1, index), lr=index, seed=0)
    code, report = show(make_run("z", recall=(0.1,)).parent)
    assert code == 0
    assert [row["label"] for row in report["groups"]] == [*(f"run-{index}" for index in range(count)), "z"]


def test_a_run_that_diverged_hides_nothing(make_run, show, tmp_path, capsys):
    for seed, (fine, broken) in enumerate([(0.1, 0.2), (0.2, None), (0.3, 0.4)]):
        make_run(f"a-{seed}", recall=(fine,), seed=seed, lr=1)
        make_run(f"b-{seed}", recall=(broken,), losses=(3, None, None), seed=seed + 5, lr=2)
    code, report = show(tmp_path / "logs")
    assert code == 0
    assert report["groups"][1]["scores"]["text_to_image_R@1"]["mean"] is None
    assert report["groups"][1]["differences"]["text_to_image_R@1"]["interval"] is None
    assert "nan ± nan" in capsys.readouterr().out
    make_run("a-0b", recall=(None,), seed=9, lr=3)
    assert show(tmp_path / "logs" / "a-0b", tmp_path / "logs" / "b-1")[0] == 0  # no number at all


def test_results_alone_are_enough(make_run, show, capsys):
    folder = make_run("old", recall=(0.123,))
    code, report = show(folder, "--metric", "*R@1")
    assert code == 0 and report["metrics"] == ["text_to_image_R@1"]
    assert report["groups"][0]["runs"][0]["training"] == {}
    assert "12.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prepare", "arguments", "expected"),
    [
        (None, ["nowhere"], "nowhere: no such folder"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), ["{run}"], "has reported neither a step nor an"),
        (lambda folder: (folder / "params.txt").rename(folder / "other.txt"), ["{run}"], "not the folder of a run"),
        (None, ["{run}/params.txt"], "is no JSON"),
        (lambda folder: (folder / "x.json").write_text("[]"), ["{run}/x.json"], "not a report of openclip-ext eval"),
        (None, ["{run}", "{run}"], "is named twice"),
        (None, ["{run}", "--metric", "nope"], "--metric nope: there is no such metric; there are: text_to_image_R@1"),
        (lambda folder: (folder / "metrics.jsonl").write_text("[1]\n"), ["{run}"], "line 1 is no JSON object"),
        (lambda folder: (folder / "params.txt").write_bytes(b"\xff\xfe"), ["{run}"], "cannot be read as text"),
        (lambda folder: (folder.parent.parent / "report").write_text(""), ["{run}"], "cannot be made a folder"),
    ],
)
def test_a_wrong_input_is_one_line(make_run, show, capsys, prepare, arguments, expected):
    folder = make_run("run", recall=(0.1,), seed=0)
    if "not the folder" in expected:
        shutil.rmtree(folder / "checkpoints")
        (folder / "metrics.jsonl").unlink()
    if prepare:
        prepare(folder)
    code, _ = show(*(argument.format(run=folder) for argument in arguments))
    error = capsys.readouterr().err
    assert code == 2 and expected in error and error.count("\n") == 1
