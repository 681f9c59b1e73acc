"""OpenCLIP's flags, each in a run on real images."""

import json
import pathlib

import pytest
import torch

from openclip_ext.cli import main
from stock import stock_losses, without_ours
from towers import coca_flags


def curve(tmp_path, name="run", key="loss"):
    rows = map(json.loads, (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in rows if "kind" not in row]


@pytest.mark.parametrize(
    "flags",
    [
        ["--lock-image"], ["--lock-image", "--lock-image-unlocked-groups", 1], ["--grad-checkpointing"],
        ["--precision", "amp_bf16"], ["--precision", "pure_bf16"], ["--precision", "bf16"], ["--precision", "amp"],
        ["--skip-scheduler"], ["--opt", "timm/lamb"], ["--grad-clip-norm", 1.0],
        ["--dataset-resampled"], ["--aug-cfg", "scale=(0.5,1.0)"], ["--force-image-size", 48],
        ["--force-context-length", 10], ["--image-mean", 0.5, 0.5, 0.5], ["--force-patch-dropout", 0.2],
        ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", 1], ["--accum-freq", 2],
        ["--local-loss", "--gather-with-grad"], ["--debug"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)  # fmt: skip
def test_a_run_with_the_flag_trains(train_flags, tmp_path, flags):
    assert main(train_flags("--loss", "gamma_decomp", *flags)) == 0
    losses = curve(tmp_path)
    assert len(losses) == (4 if "--accum-freq" in flags else 8) and all(loss is not None for loss in losses)


def test_a_locked_tower_does_not_move(train_flags, tmp_path):
    assert main(train_flags("--lock-image", "--epochs", 2)) == 0
    first, second = (torch.load(tmp_path / "logs/run/checkpoints" / f"epoch_{n}.pt")["state_dict"] for n in (1, 2))
    assert torch.equal(first["visual.proj"], second["visual.proj"])
    assert not torch.equal(first["text_projection"], second["text_projection"])


def test_log_local_writes_one_log_per_machine(train_flags, tmp_path):
    assert main(train_flags("--log-local")) == 0
    assert "loss clip over 256 samples" in (tmp_path / "logs" / "run" / "out-0.log").read_text()
    assert not (tmp_path / "logs" / "run" / "out.log").exists()


@pytest.fixture
def csv(tmp_path, pairs):
    """A tab-separated file of 70 digits, one of whose images is broken."""
    rows = ["filepath\ttitle"]
    for number, (image, caption) in enumerate(pairs[:70]):
        (tmp_path / f"{number}.png").write_bytes(image if number != 9 else b"rot")
        rows.append(f"{number}.png\t{caption}")
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_csv_trains_with_row_numbers_as_ids(train_flags, tmp_path, csv, workers, capsys):
    flags = ("--train-data", csv, "--val-data", csv, "--loss", "gamma_decomp", "--epochs", 3, "--workers", workers)
    assert main(train_flags(*flags)) == 0
    assert len(curve(tmp_path)) == 3 * 2  # 70 // 32
    state = torch.load(tmp_path / "logs/run/checkpoints/epoch_3.pt")["loss"]["base.rates.values"]
    assert state.shape == (2, 70) and (~state[0].isnan()).sum() > 60 and state[0, 9].isnan()
    assert "corrupt image in" in capsys.readouterr().err
    assert main(train_flags(*flags, "--name", "again")) == 0
    assert curve(tmp_path, "again") == curve(tmp_path)


def test_a_csv_trains_whatever_separates_its_columns(train_flags, tmp_path, csv, capsys):
    rows = csv.read_text()
    for name, separator in (("tabs", "\t"), ("commas", ","), ("semicolons", ";")):
        csv.with_suffix(".csv").write_text(rows.replace("\t", separator))
        assert main(train_flags("--train-data", csv.with_suffix(".csv"), "--name", name)) == 0
        assert curve(tmp_path, name) == curve(tmp_path, "tabs")
    flags = ("--train-data", csv.with_suffix(".csv"), "--name", "wrong", "--csv-separator", "\t")
    assert main(train_flags(*flags)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
    assert "splits at ';'; drop the flag" in error


def test_synthetic_data_needs_only_a_number(train_flags, tmp_path, capsys):
    flags = train_flags("--dataset-type", "synthetic", "--train-num-samples", 64)
    del flags[flags.index("--train-data") : flags.index("--train-data") + 2]
    assert main(flags) == 0 and len(curve(tmp_path)) == 2
    flags = train_flags("--dataset-type", "synthetic", "--name", "second")
    assert main(flags) == 2
    assert "give the number of samples with --train-num-samples" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["clip", "gamma_decomp"])
def test_distillation_adds_a_term_to_any_loss(monkeypatch, train_flags, tmp_path, loss):
    assert main(train_flags("--name", "teacher")) == 0
    teacher = tmp_path / "logs/teacher/checkpoints/epoch_1.pt"
    flags = ("--distill-model", "tiny-test", "--distill-pretrained", teacher, "--loss", loss, "--name", "pupil")
    assert main(train_flags(*flags)) == 0
    distill = curve(tmp_path, "pupil", "distill_loss")
    assert distill[-1] < distill[0]
    if loss == "clip":
        flags = without_ours(
            train_flags(*[flag for flag in flags if flag not in ("--loss", "clip")], "--logs", tmp_path / "s")
        )
        reference = stock_losses(monkeypatch, flags)
        assert curve(tmp_path, "pupil", "contrastive_loss") == pytest.approx(reference, rel=1e-5)


def test_distillation_in_parts_equals_one_batch(train_flags, tmp_path):
    assert main(train_flags("--name", "teacher")) == 0
    teacher = tmp_path / "logs/teacher/checkpoints/epoch_1.pt"
    flags = (
        "--distill-model",
        "tiny-test",
        "--distill-pretrained",
        teacher,
        "--epochs",
        3,
        "--opt",
        "timm/sgd",
        "--lr",
        0.1,
    )
    assert main(train_flags(*flags, "--batch-size", 256, "--name", "large")) == 0
    assert main(train_flags(*flags, "--batch-size", 128, "--accum-freq", 2, "--name", "parts")) == 0
    assert curve(tmp_path, "parts") == pytest.approx(curve(tmp_path, "large"), rel=1e-5)


@pytest.mark.slow
def test_a_coca_model_trains_as_in_stock(monkeypatch, train_flags, tmp_path):
    flags = coca_flags(tmp_path)
    assert main(train_flags(*flags, "--name", "ours")) == 0
    reference = stock_losses(monkeypatch, without_ours(train_flags(*flags, "--name", "stock")))
    assert curve(tmp_path, "ours", "contrastive_loss") == pytest.approx(reference, rel=1e-5)
    assert main(train_flags(*flags, "--loss", "gamma_decomp", "--accum-freq", 2, "--name", "parts")) == 0
    assert curve(tmp_path, "parts", "caption_loss")[-1] < curve(tmp_path, "parts", "caption_loss")[0]


def test_copies_go_where_they_are_asked_to(train_flags, tmp_path):
    remote = tmp_path / "remote"
    assert main(train_flags("--copy-codebase", "--remote-sync", remote, "--remote-sync-protocol", "fsspec")) == 0
    run = tmp_path / "logs" / "run"
    assert (run / "code" / "openclip_ext" / "cli.py").read_text() == pathlib.Path("openclip_ext/cli.py").read_text()
    for name in ("metrics.jsonl", "checkpoints/epoch_1.pt"):
        assert (remote / "run" / name).read_bytes() == (run / name).read_bytes()


def test_tensorboard_gets_every_scalar(train_flags, tmp_path, val_shards):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main(train_flags("--loss", "gamma_decomp", "--report-to", "tensorboard", "--val-data", val_shards)) == 0
    accumulator = events.EventAccumulator(str(tmp_path / "logs" / "run" / "tensorboard"))
    accumulator.Reload()
    scalars = accumulator.Tags()["scalars"]
    assert {"train/contrastive_loss", "train/gamma", "train/lr", "val/image_to_text_R@1"} <= set(scalars)
    assert [event.value for event in accumulator.Scalars("train/contrastive_loss")] == pytest.approx(
        curve(tmp_path, key="contrastive_loss")
    )


@pytest.mark.parametrize(
    ("variable", "value", "flags", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", ["--precision", "fp32"],
         "--precision fp32: Accelerate is configured for bf16; drop the flag"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", [],
         "--accum-freq 1: Accelerate is configured for 4 gradient accumulation steps; give --accum-freq 4"),
    ],
)  # fmt: skip
def test_flags_and_accelerates_configuration_must_agree(
    monkeypatch, train_flags, capsys, variable, value, flags, message
):
    monkeypatch.setenv(variable, value)
    assert main(train_flags(*flags)) == 2
    assert message in capsys.readouterr().err


def test_accelerates_precision_is_taken_where_no_flag_gives_one(monkeypatch, train_flags, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    flags = train_flags()
    del flags[flags.index("--precision") : flags.index("--precision") + 2]
    assert main(flags) == 0
    assert "precision: amp_bf16" in (tmp_path / "logs" / "run" / "params.txt").read_text()


@pytest.mark.slow
def test_a_compiled_model_trains_and_saves_plain_names(train_flags, tmp_path):
    assert main(train_flags("--torchcompile", "--epochs", 2)) == 0
    assert main(train_flags("--epochs", 2, "--name", "eager")) == 0
    assert curve(tmp_path) == pytest.approx(curve(tmp_path, "eager"), rel=1e-4)
    state = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_2.pt")["state_dict"]
    assert "visual.proj" in state
