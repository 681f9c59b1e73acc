"""Every script of `scripts/` runs, on tiny input: scripts/README.md quotes what they print."""

import contextlib
import difflib
import gc
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys

import pytest

import launching
import stock
from openclip_ext.evaluation.metrics.structure import TITLES

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"

# webdataset 0.2 leaves it to the garbage collector to close shards.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def _collected():
    yield
    gc.collect()


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a script with arguments, and returns the lines it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *(str(argument) for argument in arguments)])
        with stock.logging_kept():
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def bench_data(run, shards, tmp_path):
    flags = ("--image-size", 8, "--batch-size", 16, "--repeats", 1, "--workers", 0)
    (line,) = run("bench_data.py", "--shards", shards, *flags)
    assert line.startswith("workers 0: ours / bare ")
    (line,) = run("bench_data.py", "--shards", shards, *flags, "--resume-at", 0.5)
    assert line.startswith("after 128 samples, made in ") and line.endswith(" times as fast")


def bench_eval(run, shards, tmp_path):
    lines = run("bench_eval.py", "retrieval", "--images", 40, "--captions", 2, "--width", 8, "--repeats", 1)
    assert [line.split()[0] for line in lines][:2] == ["images", "texts"]
    lines = run("bench_eval.py", "probe", "--images", 200, "--classes", 4, "--width", 8)
    assert lines[-1].startswith("imagenet_minutes ")
    flags = ("--model", "ViT-S-32-alt", "--batch-size", 1, "--batches", 2, "--repeats", 1)
    assert "pictures               2" in run("bench_eval.py", "zero-shot", *flags)


def bench_loss(run, shards, tmp_path):
    """A loss, one with a memory, and a term, beside OpenCLIP's."""
    names = ("--losses", "clip", "emc2+kernel=mh", "geometric_consistency")
    files = ("--json", tmp_path / "loss.json", "--picture", tmp_path / "loss.png")
    lines = run("bench_loss.py", *names, "--batches", 300, "--widths", 8, "--repeats", 1, *files)
    rows = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert [line.split()[0] for line in lines[1:]] == ["open_clip.ClipLoss", *names[1:]]
    assert [row["batch"] for row in rows] == 4 * [300]
    assert all(row["seconds"] > 0 and row["stock_seconds"] > 0 and row["bytes"] >= 0 for row in rows)
    assert rows[0]["bytes"] > 300 * 300 * 4  # ClipLoss forms scores of all pairs
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    header, row = run("bench_loss.py", "--losses", "dcl", "--batches", 32, "--widths", 8, "--repeats", 0, "--alone")
    assert row.split()[0] == "dcl"


def bench_recent(run, shards, tmp_path):
    flags = ("--model", "ViT-S-32-alt", "--batch-size", 2, "--recent-batches", 2, "--recent-check", 4, "--repeats", 1)
    *_, line = run("bench_recent.py", *flags, "--device", "cpu")
    ratios = re.search(r": ([.\d]+) times one without, ([.\d]+) with 2 forward passes in 4 steps", line)
    assert float(ratios[2]) > float(ratios[1]) > 0


def bench_state(run, shards, tmp_path):
    flags = ("--batch", 8, "--width", 4, "--samples", 100, "--steps", 2, "--json", tmp_path / "state.json")
    run("bench_state.py", *flags, "--processes", 1, 2)
    rows = json.loads((tmp_path / "state.json").read_text())["rows"]
    assert [row["state"] / row["state_whole"] for row in rows] == [1.0, 0.5] * 2
    assert all(row["cpu_ratio"] > 0 and row["wall_ratio"] > 0 for row in rows)


def simulate_scale(run, shards, tmp_path):
    """Its formulas of bytes, calls and memory are those that are counted."""
    files = ("--constants", tmp_path / "measured.json", "--picture", tmp_path / "scale.png")
    tiny = (
        "--fit-batches",
        4,
        8,
        16,
        "--check-batch",
        8,
        "--measured-width",
        4,
        "--measured-samples",
        90,
        "--steps",
        1,
    )
    lines = run("simulate_scale.py", "--measure", *tiny, "--check-processes", 2, 3, *files)
    assert any(line.startswith("| `emc2+bank_shard=true`") for line in lines)
    checks = json.loads((tmp_path / "measured.json").read_text())["checks"]
    assert len(checks) == 20
    for check in checks:
        for key in ("bytes", "calls", "state"):
            assert check[key][0] == pytest.approx(check[key][1], abs=3), (check["method"], key)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert run("simulate_scale.py", "--constants", ROOT / "scripts" / "scale" / "measured.json")


def bench_mh(run, shards, tmp_path):
    flags = ("--batch", 32, "--width", 8, "--bank-batch", 4, "--bank-samples", 50, 5000, "--bank-steps", 3)
    lines = run("bench_mh.py", *flags, "--repeats", 1, "--folder", tmp_path)
    assert lines[2].startswith("5,000 in a file: a first visit takes ")


def bench_train(run, shards, tmp_path):
    flags = ("--batch-size", 16, "--epochs", 2, "--repeats", 1, "--workers", 0, "--device", "cpu", "--profile", 2)
    line, *steps = run("bench_train.py", "--shards", f"{shards}/00000.tar", *flags)
    assert line.startswith("workers 0: ours / stock ")
    for step, loss in zip(steps, ("clip", "gamma_decomp"), strict=True):
        shares = re.fullmatch(rf"workers 0: a step with {loss}: (.* %)", step)
        parts = dict(part.removesuffix(" %").split() for part in shares[1].split(", "))
        assert list(parts) == ["data", "encoders", "loss", "optimizer", "rest"]
        assert sum(map(float, parts.values())) == pytest.approx(100, abs=1)


def bench_quality(run, shards, tmp_path):
    """Its help; what it measures has tests of its own."""
    with pytest.raises(SystemExit) as ended:
        run("bench_quality.py", "--help")
    assert ended.value.code == 0


def soak(run, shards, tmp_path):
    """Its help; it starts processes again and again, for minutes."""
    with pytest.raises(SystemExit) as ended:
        run("soak.py", "--help")
    assert ended.value.code == 0


def reproduce_emc2(run, shards, tmp_path):
    """Of what is done; how it is done has tests of its own."""
    record = {"method": "clip", "folder": "", "images": 8, "batch_size": 4, "scale": 5.0, "lr": 0.1, "epochs": 1,
              "every": 1, "seed": 0}  # fmt: skip
    found = {"iterations": [0, 1], "squared_norm": [4.0, 2.0], "loss": [3.0, 2.5], "seconds": 1.0}
    row = run("reproduce_emc2.py", *_done(tmp_path, record, found))[-1]
    assert row == "| `clip` | 2.00 | 1.00 | 2.500 | 1 |"


def reproduce_gradient_bias(run, shards, tmp_path):
    record = {"method": "dcl", "batch_size": 4, "noise": 1.0, "starts": 2, "steps": 9}
    found = {"metric": [0.95, 0.5], "shares": [[0.4, 0.3, 0.3], [1.0, 0.0, 0.0]]}
    row = run("reproduce_gradient_bias.py", *_done(tmp_path, record, found))[-1]
    assert row == "| `dcl` | 1 of 2; 0.72 |"


def reproduce_structures(run, shards, tmp_path):
    source = {"pairs": "", "captions": "title", "classes": "", "model_config": "", "weights": "", "frozen": False}
    base = {"source": source, "loss": "clip", "lr": 0.1, "epochs": 1, "batch_size": 32}
    chosen = base | {"terms": [], "seed": 1000, "split": "val"}
    scores = {"recall": 20.0, "zero_shot": 60.0, "linear_probe": 80.0}
    recalls = {f"{way}_R@{k}": 20.0 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    measured = dict.fromkeys(TITLES, 0.5)
    _done(tmp_path, chosen, {"recall": 10.0, "seconds": 1.0})
    found = scores | recalls | {"seconds": 1.0, "structure": measured}
    row = run("reproduce_structures.py", *_done(tmp_path, chosen | {"seed": 0, "split": "test"}, found))[-1]
    assert row.startswith("| digits | clip | lr 0.1 | 60.0 | 80.0 | 20.0 | 0.5000 |")


def _done(folder, record, found):
    """Flags that show a run that is done."""
    with open(folder / "runs.jsonl", "a") as file:
        file.write(json.dumps({"run": record, "found": found}) + "\n")
    return "--out", folder, "--table"


def reproduce_fusion(run, shards, tmp_path):
    flags = ("--scenes", 12, "--epochs", 0.01, "--seeds", 1, "--rows", "base", "--out", tmp_path / "fusion")
    head, _, row, *_ = run("reproduce_fusion.py", *flags)
    assert "seeds" in head and "vqa" in head and [cell.strip() for cell in row.split("|")[1:3]] == ["base", "1"]


def installed(run, shards, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run("installed.py")
    assert ended.value.code in (0, 1)  # tests may run from a folder that is not the one installed


def make_patch(run, shards, tmp_path):
    """Of the installed OpenCLIP, patched and not, it writes the patch that was applied."""
    original, changed = stock.copy_installed(tmp_path / "original"), stock.patched_copy(tmp_path / "changed")
    patch = (ROOT / "patches" / "open_clip_torch-3.3.0.patch").read_text()
    written = run("make_patch.py", "3.3.0", original, changed)
    assert list(difflib.unified_diff(patch.splitlines(), written)) == []


JOBS = {job.__name__: job for job in
        (bench_data, bench_eval, bench_loss, bench_mh, bench_quality, bench_recent, bench_state, bench_train,
         installed, make_patch, reproduce_emc2, reproduce_fusion, reproduce_gradient_bias, reproduce_structures,
         simulate_scale, soak)}  # fmt: skip


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_the_script_runs(run, shards, tmp_path, script, monkeypatch, ranks):
    monkeypatch.setattr("openclip_ext.testing.RankPool", lambda: contextlib.nullcontext(ranks))
    JOBS[script](run, shards, tmp_path)


@pytest.mark.slow
def test_a_job_of_slurm_ends_with_a_checkpoint_asks_for_another_turn_and_goes_on(train_flags, tmp_path):
    """With stand-ins for Slurm's commands, which start two processes here and hand on the signal as srun does."""
    asked, commands = tmp_path / "asked", tmp_path / "bin"
    commands.mkdir()
    start = 'SLURM_PROCID=$rank SLURM_LOCALID=$rank "${@:2}" & processes+=($!)'
    stand_ins = {
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {asked}',
        "srun": f"""trap 'kill -USR1 "${{processes[@]}}"' USR1
            processes=(); for rank in 0 1; do {start}; done
            for process in "${{processes[@]}}"; do while kill -0 $process 2>/dev/null; do wait $process; done; done""",
        "openclip-ext": f'exec {sys.executable} -m openclip_ext "$@"',
    }
    for name, text in stand_ins.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    slurm |= {"PATH": f"{commands}:{os.environ['PATH']}", "MASTER_PORT": str(launching.free_port())}
    environment = os.environ | slurm | {"CUDA_VISIBLE_DEVICES": ""}
    flags = train_flags("--batch-size", 16, "--epochs", 1000, "--log-every-n-steps", 1)[1:]

    def job(*more):
        command = ["bash", str(SCRIPTS / "slurm.sh"), *map(str, flags), *more]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    with job() as first:
        for line in first.stderr:
            if "Train Epoch: 1 " in line:
                first.send_signal(signal.SIGUSR1)
                break
        rest = first.stderr.read()
    assert first.returncode == 0, rest
    assert "stopped by SIGUSR1" in rest and asked.read_text() == "requeue 7\n"
    with job("--max-minutes", "1e-9") as second:
        said = second.stderr.read()
    assert second.returncode == 0 and "resumed from" in said and asked.read_text() == "requeue 7\n"
