"""Steps that cannot be taken and samples that cannot be used are named, and end a run where there are too many."""

import json
import os
import re
import tarfile

import pytest
import torch
from accelerate import Accelerator

import rank_jobs
from openclip_ext.cli import main
from openclip_ext.data.table import Table
from openclip_ext.training import run
from openclip_ext.training.faults import Faults
from openclip_ext.training.loop import Trainer


@pytest.fixture
def poisoned(monkeypatch):
    """A function that makes one picture of some batches infinite; returns the batches, as they are read."""

    def poison(*numbers, row=3):
        original, seen = Trainer.batches, []

        def batches(self, read):
            for number, batch in enumerate(original(self, read)):
                seen.append(batch)
                if number in numbers:
                    batch["image"][row] = float("inf")
                yield batch

        monkeypatch.setattr(Trainer, "batches", batches)
        return seen

    return poison


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "logs" / "run" / "skipped.jsonl").read_text().splitlines()]


def told(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "is not taken" in line]


@pytest.mark.parametrize(
    "flags", [("--loss", "gamma_decomp"), ("--accum-freq", 2), ("--sample-id", "hash", "--loss", "sogclr")]
)
def test_a_sample_whose_features_are_not_finite_is_named(train_flags, tmp_path, shards, capsys, poisoned, flags):
    batches = poisoned(3)
    assert main(train_flags(*flags)) == 0
    shard, ordinal = batches[3]["origins"][3].tolist()
    url = f"{shards}/0000{shard}.tar"
    sample = int(batches[3]["sample_ids"][3]) if "--sample-id" in flags else 64 * shard + ordinal
    step, of = (1, 64) if "--accum-freq" in flags else (3, 32)
    (line,) = told(capsys)
    assert line == (
        f"step {step} is not taken: contrastive_loss, grad_norm not finite; rank 0, features of 1 of its {of} samples: "
        f"{os.path.relpath(url)} {ordinal} (id {sample})"
    )
    ((row),) = rows(tmp_path)
    assert (row["step"], row["epoch"], len(row["ranks"][0]["samples"])) == (step, 0, of)
    (number,) = row["ranks"][0]["not_finite"]
    assert row["ranks"][0]["samples"][number] == {"id": sample, "shard": url, "ordinal": ordinal}


def test_the_batch_of_a_gradient_that_is_not_finite_is_named(train_flags, tmp_path, capsys, poisoned, monkeypatch):
    original, batches = Trainer._average_gradients, poisoned()

    def average(self):
        original(self)
        if self.clock.step == 2:
            self.module.logit_scale.grad.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_average_gradients", average)
    assert main(train_flags()) == 0
    (line,) = told(capsys)
    assert line.startswith("step 2 is not taken: grad_norm not finite; rank 0, its batch: ")
    assert line.endswith(" and 28 more") and len(re.findall(r"\(id \d+\)", line)) == 4
    ((row),) = rows(tmp_path)
    assert [sample["ordinal"] for sample in row["ranks"][0]["samples"]] == batches[2]["origins"][:, 1].tolist()


def test_too_many_steps_in_a_row_end_the_run(train_flags, tmp_path, capsys, poisoned):
    poisoned(1, 3, 4, 6, 7)
    assert main(train_flags("--max-skipped", 2)) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        "openclip-ext: --max-skipped 2: the loss or its gradient was not finite for 2 steps in a row"
    )
    assert "(step 4 is not taken: " in line and ".tar" in line
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 4]


def test_a_step_is_passed_over_where_gradients_are_scaled(train_flags, tmp_path, capsys, poisoned, monkeypatch):
    """As with `--precision amp` on a GPU; here the scaler is the CPU's, and what it scales is float32."""
    poisoned(3)
    original = run.make_accelerator

    def make_accelerator(config):
        accelerator = original(config)
        monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        accelerator.native_amp = True
        return accelerator

    monkeypatch.setattr(run, "make_accelerator", make_accelerator)
    assert main(train_flags()) == 0
    assert len(told(capsys)) == 1 and [row["step"] for row in rows(tmp_path)] == [3]
    content = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert content["scaler"]["scale"] == 2.0


def test_the_rank_is_named_on_all_ranks(ranks, shards):
    results = ranks.run(rank_jobs.a_step_that_is_not_taken, 2, shards, 1)
    for finite, (first, second), errors in results:
        assert not finite and first == second
        (rank,) = first["ranks"]
        assert rank["rank"] == 1 and rank["not_finite"] == [1]
        assert rank["samples"][1] == {"id": 64 + 6, "shard": f"{shards}/00001.tar", "ordinal": 6}
        assert first["not_finite"] == ["contrastive_loss"]
        too_many, too_bad = errors
        assert "--max-skipped 2" in too_many and "rank 1, features of 1 of its 3 samples" in too_many
        assert "--max-bad 0.1: 28 of the 256 samples" in too_bad
        assert "14 x corrupt image in 0.tar, 14 x corrupt image in 1.tar" in too_bad


def test_rows_of_a_table_are_named_by_their_number(tmp_path):
    written = []
    faults = Faults(Table("pairs.csv", [("a.png", "a")] * 9), 0, 1, 9, 5, None, written.append)
    batch = {"origins": torch.tensor([[0, 7], [0, 2]])}
    faults.skip_step(
        0, 0, 1, {"clip_loss": torch.tensor(float("inf"))}, [batch], [torch.tensor([[1.0], [float("nan")]])]
    )
    assert written[0]["ranks"][0]["samples"][1] == {"id": 2, "shard": "pairs.csv", "ordinal": 2}


@pytest.fixture
def faulty(tmp_path, shards):
    """Four shards of 64, in one of which every fourth picture is broken, and one of which is no tar."""
    folder = tmp_path / "faulty"
    folder.mkdir()
    for number in range(4):
        with (
            tarfile.open(f"{shards}/0000{number}.tar") as source,
            tarfile.open(folder / f"{number}.tar", "w") as target,
        ):
            for member in source.getmembers():
                content = source.extractfile(member)
                if number == 1 and member.name.endswith("0.png"):
                    member.size = 20
                target.addfile(member, content)
    (folder / "3.tar").write_bytes(b"no tar" * 2000)
    (folder / "sizes.json").write_text(json.dumps({f"{number}.tar": 64 for number in range(4)}))
    return folder


def test_too_many_unusable_samples_end_the_run(train_flags, tmp_path, capsys, faulty):
    flags = ("--train-data", faulty, "--epochs", 2)
    assert main(train_flags(*flags, "--max-bad", 0.1)) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    number = int(re.match(r"openclip-ext: --max-bad 0.1: (\d+) of the 256 samples of an epoch cannot be used", line)[1])
    assert 26 <= number <= 72 and f"64 x fewer samples than sizes.json says in {faulty / '3.tar'}" in line
    assert f"unreadable shard in {faulty / '3.tar'}" in line
    assert main(train_flags(*flags, "--max-bad", 0.4, "--name", "more")) == 0  # counted anew in each epoch


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--max-skipped", 0, "must be at least 1"), ("--max-bad", 1.5, "must be a share between 0 and 1"),
     ("--rank-timeout", -1, "must be a number of seconds"), ("--rank-timeout", "nan", "must be a number of seconds")],
)  # fmt: skip
def test_limits_that_mean_nothing_are_refused(train_flags, capsys, flag, value, message):
    assert main(train_flags(flag, value)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"openclip-ext: {flag} ") and message in line
