"""Going on from within an epoch: as if the run had not stopped, bit for bit."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys

import open_clip
import psutil
import pytest
import torch
from soak import differing

from launching import fork
from openclip_ext.cli import main
from openclip_ext.data import passes
from openclip_ext.files import keep_rows
from openclip_ext.training.loop import Trainer
from openclip_ext.training.stopping import SIGNALS
from ours import FRESH, LOSSES

#: What a resumed run measures anew.
_TIMES = {"samples_per_second"}


def checkpoint(tmp_path, name, file):
    return torch.load(tmp_path / "logs" / name / "checkpoints" / f"{file}.pt", weights_only=True)


def rows(tmp_path, name):
    lines = (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _TIMES} for line in lines]


def stopped_copy(tmp_path, file, name="again"):
    """A copy of the run `whole` as a kill after this checkpoint leaves it; its log may have gone on."""
    logs = tmp_path / "logs"
    shutil.rmtree(logs / name, ignore_errors=True)
    shutil.copytree(logs / "whole", logs / name)
    time = (logs / "whole" / "checkpoints" / f"{file}.pt").stat().st_mtime_ns
    for path in (logs / name / "checkpoints").glob("*.pt"):
        if path.stat().st_mtime_ns > time:
            path.unlink()


def assert_equal(tmp_path, name, file):
    """The run's checkpoint and its metrics equal those of `whole`."""
    found, expected = (checkpoint(tmp_path, run, file) for run in (name, "whole"))
    assert differing(found, expected | {"name": name}) == []
    assert rows(tmp_path, name) == rows(tmp_path, "whole")


def check_resumes(train_flags, tmp_path, flags, steps, epochs=1, per_epoch=8):
    """Train once, and again from each of `steps`."""
    flags = ("--epochs", epochs, *flags)
    saving = ("--save-every-steps", math.gcd(*steps), "--keep-last", 0)
    assert main(train_flags(*flags, *saving, "--name", "whole")) == 0
    for step in steps:
        stopped_copy(tmp_path, f"epoch_{(step - 1) // per_epoch}_step_{step}")
        assert main(train_flags(*flags, "--name", "again", "--resume", "latest")) == 0
        assert_equal(tmp_path, "again", f"epoch_{epochs}")


RECENT = ("--recent-batches", 4, *FRESH)
TERMS = ("feature_separation=0.5", "brownian_bridge=0:0.25", "geometric_consistency=0.02", "caption_words=0.1")
RUNS = {
    "clip": ("--ema", 0.9, "--force-patch-dropout", 0.5, "--accum-freq", 2, "--batch-size", 16, "--grad-clip-norm", 1),
    "siglip": ("--lora", "r=2,dropout=0.5", "--dataset-resampled"),
    "dcl": ("--pairs", "views", "--momentum-encoder", 0.9, *RECENT),
    "batch_corrected": (*RECENT, "--accum-freq", 2, "--batch-size", 16),
    "sogclr": ("--sample-id", "hash"),
    "gamma_decomp": (
        *RECENT,
        "--loss-arg",
        "draws=2",
        "--view-aug",
        "auto",
        *(word for term in TERMS for word in ("--loss-term", term)),
    ),
    "emc2": (*RECENT, "--loss-arg", "kernel=mh"),
}


def test_every_loss_is_here():
    assert sorted(RUNS) == LOSSES


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_goes_on_with_all_that_it_and_the_model_remember(train_flags, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(passes, "SAMPLE_BUFFER", (40, 20))
    check_resumes(train_flags, tmp_path, ("--loss", loss, "--aug-cfg", "scale=(0.5,1.0)", *RUNS[loss]), [3])
    if "--recent-batches" in RUNS[loss]:
        assert checkpoint(tmp_path, "whole", "epoch_0_step_3")["clock"]["ranks"][0]["kept_inputs"]
        assert rows(tmp_path, "whole")[-1]["recent_batches_used"] == 4


def test_a_table_goes_on(train_flags, tmp_path, pairs):
    lines = ["filepath,title"]
    for number, (image, caption) in enumerate(pairs[:100]):
        (tmp_path / f"{number}.png").write_bytes(image)
        lines.append(f"{number}.png,{caption}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    data = ("--train-data", tmp_path / "pairs.csv", "--batch-size", 16, "--csv-img-key", "filepath")
    check_resumes(train_flags, tmp_path, ("--loss", "gamma_decomp", *data), [4, 9], epochs=2, per_epoch=6)


def test_two_processes_go_on(train_flags, tmp_path):
    flags = ("--loss", "dcl", "--workers", 1, "--batch-size", 16, "--precision", "fp32", *RECENT)
    saving = ("--save-every-steps", 5, "--keep-last", 0)
    for extra in ((*saving, "--name", "whole"), ("--name", "again", "--resume", "latest")):
        finished = fork("torchrun", train_flags(*flags, *extra))
        assert finished.returncode == 0, finished.stderr
        if "whole" in extra:
            stopped_copy(tmp_path, "epoch_0_step_5")
    assert_equal(tmp_path, "again", "epoch_1")
    kept = [
        rank["kept_inputs"][0]["image"] for rank in checkpoint(tmp_path, "whole", "epoch_0_step_5")["clock"]["ranks"]
    ]
    assert len(kept) == 2 and not torch.equal(*kept)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_goes_on_with_and_without_data_workers(train_flags, tmp_path, workers, val_shards, monkeypatch):
    monkeypatch.setattr(passes, "SAMPLE_BUFFER", (40, 20))
    flags = ("--loss", "gamma_decomp", "--workers", workers, "--aug-cfg", "scale=(0.5,1.0)", "--val-data", val_shards)
    check_resumes(train_flags, tmp_path, flags, [3, 8, 11], epochs=2)


def test_a_checkpoint_from_within_an_epoch_loads_in_openclip(train_flags, tmp_path):
    assert main(train_flags("--epochs", 2, "--save-every-steps", 11)) == 0
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_1_step_11.pt"
    content = torch.load(path, weights_only=True)
    assert content["epoch"] == 1 and content["clock"]["step"] == 11
    model = open_clip.create_model("tiny-test", pretrained=str(path))
    torch.testing.assert_close(model.state_dict(), content["state_dict"])


def test_a_run_goes_on_with_another_batch_size_and_number_of_workers(train_flags, tmp_path):
    """From the same number of samples on, each of which comes once in an epoch."""
    flags = ("--loss", "gamma_decomp", "--loss-arg", "gamma=0.5", "--epochs", 2)
    assert main(train_flags(*flags, "--batch-size", 16, "--workers", 2, "--save-every-steps", 6, "--epochs", 1)) == 0
    (tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt").unlink()
    (tmp_path / "logs" / "run" / "checkpoints" / "epoch_0_step_12.pt").unlink()
    assert main(train_flags(*flags, "--batch-size", 32, "--resume", "latest")) == 0
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert (
        "--resume latest: epoch 1 was begun by 1 process x 2 workers x batch 16, and goes on with 1 process x 1 worker "
        "x batch 32: of 160 samples left, 0 do not come, and 0 come again"
    ) in log
    assert "epoch_0_step_6.pt after epoch 0 and 3 steps" in log
    found = rows(tmp_path, "run")
    assert [row["step"] for row in found] == list(range(6 + 5 + 8))  # of 16, 32, and 32 pairs
    # Each sample was visited once in the first epoch, before or after the stop.
    assert all(row["first_visits"] == 1 for row in found[:11]) and all(row["first_visits"] == 0 for row in found[11:])


def test_larger_steps_never_replace_what_smaller_ones_have_kept(train_flags, tmp_path):
    """Neither rows of an epoch that is over, nor checkpoints: what is written last is what is gone on from."""
    saving = ("--save-every-steps", 11, "--keep-last", 1)
    assert main(train_flags("--batch-size", 16, *saving)) == 0
    (tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt").unlink()
    for minutes, step in ((1e-9, 12), (1e-9, 13), (9, None)):
        flags = ("--epochs", 2, "--batch-size", 32, *saving, "--max-minutes", minutes)
        assert main(train_flags(*flags, "--resume", "latest")) == 0
        names = [path.name for path in (tmp_path / "logs" / "run" / "checkpoints").glob("*.pt")]
        if step:
            assert names == [f"epoch_0_step_{step}.pt"]
    assert [row["step"] for row in rows(tmp_path, "run")] == list(range(22))
    content = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_2.pt", weights_only=True)
    assert content["clock"]["step"] == 22


@pytest.fixture
def signalled(monkeypatch):
    """A function that lets a signal come in the optimizer step of a run that ends next, and maybe others with it."""

    def at(step, *numbers):
        update, others = Trainer._update, set(psutil.Process().children())

        def updated(self, *given):
            if self.clock.step == step:
                for number in numbers:
                    for process in (*set(psutil.Process().children()) - others, psutil.Process()):  # as a scheduler
                        process.send_signal(number)
            update(self, *given)

        monkeypatch.setattr(Trainer, "_update", updated)

    return at


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_steps_ends_as_one_that_was_not(
    train_flags, tmp_path, monkeypatch, signalled, kills
):
    monkeypatch.setattr(passes, "SAMPLE_BUFFER", (40, 20))
    epochs = 1 + kills // 2
    flags = ("--loss", "gamma_decomp", *RECENT, "--epochs", epochs, "--save-every-steps", 3, "--ema", 0.9)
    assert main(train_flags(*flags, "--name", "whole")) == 0
    steps = sorted(random.sample(range(1, 8 * epochs), kills))
    for step in steps:
        child = os.fork()
        if child == 0:
            signalled(step, signal.SIGKILL)
            os._exit(main(train_flags(*flags, "--name", "again", "--resume", "latest")))
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, (steps, step)
    assert main(train_flags(*flags, "--name", "again", "--resume", "latest")) == 0
    assert_equal(tmp_path, "again", f"epoch_{epochs}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on(train_flags, tmp_path, capsys, signalled, number, code):
    flags = ("--epochs", 2, "--batch-size", 64)
    assert main(train_flags(*flags, "--name", "whole")) == 0
    before = [signal.getsignal(one) for one in SIGNALS]
    signalled(5, number, number)
    assert main(train_flags(*flags, "--name", "again")) == code
    path = tmp_path / "logs" / "again" / "checkpoints" / "epoch_1_step_6.pt"
    line = f"stopped by {number.name} after step 6 of 8; kept as {path}; to go on, give the same command with"
    assert line in capsys.readouterr().err and len(rows(tmp_path, "again")) == 6
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert main(train_flags(*flags, "--name", "again", "--resume", "latest")) == 0
    assert_equal(tmp_path, "again", "epoch_2")


@pytest.mark.parametrize(("loss", "table"), [("emc2", "bank"), ("gamma_decomp", "rate")])
def test_a_memory_in_files_goes_on_where_a_signal_ended_the_run(train_flags, tmp_path, signalled, loss, table):
    files = {}
    for name in ("whole", "again"):
        files[name] = tmp_path / f"{table}_{name}"
        flags = ("--loss", loss, "--loss-arg", f"{table}_device=mmap", "--loss-arg", f"{table}_path={files[name]}")
        if name == "again":
            signalled(4, signal.SIGUSR1)
        assert main(train_flags(*flags, "--name", name)) == 0
    assert main(train_flags(*flags, "--name", "again", "--resume", "latest")) == 0
    assert_equal(tmp_path, "again", "epoch_1")
    assert files["again"].read_bytes() == files["whole"].read_bytes()


def test_data_workers_outlive_a_signal_to_all_processes_of_a_run(train_flags, tmp_path, signalled):
    flags = ("--workers", 2, "--batch-size", 8)
    assert main(train_flags(*flags, "--name", "whole")) == 0
    signalled(12, signal.SIGTERM)
    assert main(train_flags(*flags, "--name", "again")) == 0
    assert (tmp_path / "logs" / "again" / "checkpoints" / "epoch_0_step_13.pt").exists()
    assert main(train_flags(*flags, "--name", "again", "--resume", "latest")) == 0
    assert_equal(tmp_path, "again", "epoch_1")


def test_minutes_that_are_over_end_a_run_as_often_as_they_are(train_flags, tmp_path, val_shards):
    flags = ("--epochs", 2, "--batch-size", 128, "--val-data", val_shards)
    assert main(train_flags(*flags, "--name", "whole")) == 0
    for _ in range(4):
        assert main(train_flags(*flags, "--name", "again", "--max-minutes", 1e-9, "--resume", "latest")) == 0
        assert not (tmp_path / "logs" / "again" / "checkpoints" / "epoch_2.pt").exists()
    assert main(train_flags(*flags, "--name", "again", "--resume", "latest")) == 0
    assert_equal(tmp_path, "again", "epoch_2")
    assert len(list((tmp_path / "logs" / "again" / "checkpoints").glob("*_step_*"))) == 2  # as --keep-last has it


def test_a_later_signal_ends_a_process_at_once():
    code = (
        "import os, signal; from openclip_ext.training import stopping\n"
        "with stopping.Stop(None) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    stopping._SAME = -1\n"
        "    print(stop.reason, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    print('not reached')\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == -signal.SIGUSR1 and finished.stdout == f"{signal.SIGTERM}\n"
    assert finished.stderr == "SIGTERM: stops after this step; a second signal ends at once\n"


def test_what_means_nothing_is_one_line(train_flags, capsys):
    for flags, message in {
        ("--save-every-steps", 0): "--save-every-steps 0: must be at least 1",
        ("--keep-last", -1): "--keep-last -1: must be at least 0",
        ("--max-minutes", 0): "--max-minutes 0.0: must be above 0",
    }.items():
        assert main(train_flags(*flags)) == 2
        assert message in capsys.readouterr().err


def test_rows_that_a_crash_has_damaged_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n\0\0\0\n[3]\n{"step": 4}\n{"step": 5')
    keep_rows(path, lambda row: row["step"] != 2)
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'
    keep_rows(tmp_path / "none", lambda row: True)
    assert not (tmp_path / "none").exists()
