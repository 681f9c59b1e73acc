"""`--profile`: what the time of a step goes into."""

import gzip
import json
import re
import types

import pytest

from openclip_ext.cli import main
from openclip_ext.training.profile import PARTS, step_shares


@pytest.mark.parametrize("extra", [(), ("--accum-freq", 2, "--batch-size", 8)])
def test_some_steps_are_profiled_once_and_shares_of_parts_are_written(train_flags, tmp_path, capsys, extra):
    assert main(train_flags("--loss", "gamma_decomp", "--epochs", 2, "--profile", 3, *extra)) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "a step of" in line]
    folder = tmp_path / "logs" / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step.txt", "trace.json.gz"]
    text = (folder / "step.txt").read_text()
    assert "a step of" in text.splitlines()[0] and "aten::" in text
    shares = {name: int(share) for name, share in re.findall(r"(\w+) (\d+) %", line)}
    assert list(shares) == [*PARTS, "rest"] and 97 <= sum(shares.values()) <= 103
    assert shares["encoders"] > shares["loss"] > 0
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep") for event in events) == 3
    assert sum(event["name"] == "optimizer" for event in events) == 3


def test_a_run_that_is_too_short_says_so(train_flags, tmp_path, capsys):
    assert main(train_flags("--profile", 20)) == 0
    assert "--profile 20: the run ends before it has taken 25 steps" in capsys.readouterr().err
    assert not (tmp_path / "logs" / "run" / "profile").exists()


def test_shares_are_of_the_devices_time_where_there_is_a_device():
    def event(key, host, device, count=2):
        return types.SimpleNamespace(key=key, cpu_time_total=host, device_time_total=device, count=count)

    steps = [event("ProfilerStep#5", 10_000, 0, 1), event("ProfilerStep#6", 30_000, 0, 1)]
    parts = [event("data", 8000, 0), event("encoders", 4000, 20_000), event("loss", 4000, 10_000), event("mm", 1, 9)]
    assert step_shares(steps + parts) == (20.0, {"encoders": 0.5, "loss": 0.25, "idle": 0.25})


def test_what_means_nothing_is_one_line(train_flags, capsys):
    for flags, message in {
        ("--profile", -1): "--profile -1: must be a number of steps",
        ("--profile", 2, "--logs", "none"): "--profile 2: is written into the run's folder",
    }.items():
        assert main(train_flags(*flags)) == 2
        assert message in capsys.readouterr().err
