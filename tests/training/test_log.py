"""What is said while a run trains, to a file, to a terminal and to what is none."""

import io
import re
import sys

import pytest

from openclip_ext.cli import main
from openclip_ext.errors import counted
from openclip_ext.report.run_files import read_run

LINE = re.compile(
    r"Train Epoch: (?P<epoch>\d+) \[\s*(?P<seen>\d+)/(?P<samples>\d+) \((?P<percent>\d+)%\)\] "
    r"Batch \(t\): [\d.]+, [\d.]+/s LR: (?P<lr>\S+) Logit Scale: (?P<scale>[\d.]+) (?P<losses>.*) ETA: \d+:\d\d:\d\d$"
)


def step_lines(text):
    return [found for line in text.splitlines() if (found := LINE.search(line))]


def test_every_so_many_steps_a_line_as_openclip_writes_it(train_flags, tmp_path, capsys):
    flags = ("--loss-term", "brownian_bridge=0.5", "--epochs", 2, "--log-every-n-steps", 3)
    assert main(train_flags(*flags)) == 0
    run = tmp_path / "logs" / "run"
    for text in ((run / "out.log").read_text(), capsys.readouterr().err):
        found = step_lines(text)
        seen = [(int(line["epoch"]), int(line["seen"]), int(line["percent"])) for line in found]
        assert seen == [(epoch, 32 * step, round(12.5 * step)) for epoch in (0, 1) for step in (1, 4, 7, 8)]
        assert all(line["samples"] == "256" for line in found)
    rows = read_run(str(run)).training
    for line, row in zip(found, rows, strict=True):
        assert float(line["lr"]) == pytest.approx(row["lr"], rel=1e-4)
        assert float(line["scale"]) == pytest.approx(row["logit_scale"], abs=1e-3)
        shown = dict(re.findall(r"(\w+): (\S+) \(", line["losses"]))
        assert shown.keys() == {"Contrastive_loss", "Brownian_bridge_loss", "Loss"}
        assert float(shown["Loss"]) == pytest.approx(row["loss"], rel=1e-4)


def test_in_brackets_stands_the_mean_since_the_epochs_start(train_flags, tmp_path):
    assert main(train_flags("--epochs", 2)) == 0
    found = step_lines((tmp_path / "logs" / "run" / "out.log").read_text())
    values = [re.search(r"Contrastive_loss: (\S+) \((\S+)\)", line["losses"]).groups() for line in found]
    for first in (0, 8):
        own, mean = zip(*((float(a), float(b)) for a, b in values[first : first + 8]), strict=True)
        assert mean[-1] == pytest.approx(sum(own) / 8, rel=1e-3)


def test_the_log_alone_tells_report_the_curve(train_flags, tmp_path):
    """Where metrics.jsonl is lost, as of a run of OpenCLIP's own."""
    assert main(train_flags("--epochs", 2)) == 0
    run = tmp_path / "logs" / "run"
    before = read_run(str(run)).training
    for name in ("metrics.jsonl", "params.json"):
        (run / name).unlink()
    after = read_run(str(run)).training
    assert [row["step"] for row in after] == [row["step"] for row in before] == list(range(16))
    assert [row["contrastive_loss"] for row in after] == pytest.approx(
        [row["contrastive_loss"] for row in before], rel=1e-3
    )


def test_a_terminal_gets_a_bar_and_the_file_the_lines(train_flags, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(train_flags()) == 0
    assert "epoch 1: 100%" in terminal.getvalue() and "256/256" in terminal.getvalue()
    assert (
        "Train Epoch" not in terminal.getvalue() and "8 steps of 32 pairs per epoch, 1 epoch\n" in terminal.getvalue()
    )
    assert len(step_lines((tmp_path / "logs" / "run" / "out.log").read_text())) == 8


def test_validation_is_no_row_of_training(train_flags, tmp_path, val_shards):
    assert main(train_flags("--val-data", val_shards, "--epochs", 2)) == 0
    found = read_run(str(tmp_path / "logs" / "run"))
    assert len(found.training) == 16 and all("contrastive_loss" in row for row in found.training)
    assert len(found.validation) == 2


def test_counts_have_their_plurals():
    assert [counted(1, "epoch"), counted(2000, "epoch"), counted(2, "process"), counted(0, "batch")] == [
        "1 epoch", "2,000 epochs", "2 processes", "0 batches"
    ]  # fmt: skip
