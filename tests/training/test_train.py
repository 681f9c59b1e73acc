"""`openclip-ext train` from the command line, on real images."""

import json
import pathlib

import open_clip
import pytest
import torch

from openclip_ext.cli import main
from openclip_ext.data.pack import pack
from ours import LOSSES


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(tmp_path, name="run"):
    """Rows of training, without those of validation."""
    return [row for row in lines(tmp_path / "logs" / name / "metrics.jsonl") if "kind" not in row]


def losses(tmp_path, name="run"):
    return [row["contrastive_loss"] for row in steps(tmp_path, name)]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_and_falls(train_flags, tmp_path, loss):
    assert main(train_flags("--loss", loss, "--epochs", 3, "--lr", "3e-3")) == 0
    curve = losses(tmp_path)
    assert len(curve) == 24
    assert sum(curve[-6:]) < sum(curve[:6])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_command_twice_gives_the_same_losses(train_flags, tmp_path, workers):
    for name in ("one", "two"):
        assert main(train_flags("--loss", "gamma_decomp", "--workers", workers, "--name", name)) == 0
    assert losses(tmp_path, "one") == losses(tmp_path, "two")


def test_a_run_writes_what_it_promises(train_flags, tmp_path, val_shards, capsys):
    assert main(train_flags("--loss", "gamma_decomp", "--epochs", 2, "--val-data", val_shards)) == 0
    run = tmp_path / "logs" / "run"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"epoch_1.pt", "epoch_2.pt", "results.jsonl"}
    row = steps(tmp_path)[-1]
    assert {"step", "epoch", "loss", "contrastive_loss", "gamma", "first_visits", "lr", "logit_scale",
            "samples_per_second"} <= row.keys()  # fmt: skip
    assert row["step"] == 15 and row["first_visits"] == 0 and row["loss"] == row["contrastive_loss"]
    results = lines(run / "checkpoints" / "results.jsonl")
    assert [result["epoch"] for result in results] == [1, 2] and results[0]["num_samples"] == 50
    assert "loss: gamma_decomp" in (run / "params.txt").read_text()
    validation = [row for row in lines(run / "metrics.jsonl") if "kind" in row]
    assert validation == [{"kind": "validation", "step": 8 * row["epoch"], **row} for row in results]
    assert "after epoch 2" in (run / "out.log").read_text() and "after epoch 2" in capsys.readouterr().err


@pytest.mark.parametrize(("warmup", "said"), [(7, False), (100, True)])
def test_a_warmup_that_outlasts_the_run_is_said(train_flags, capsys, warmup, said):
    assert main(train_flags("--warmup", warmup, "--lr", 1e-3)) == 0
    remark = "--warmup 100: the run has 8 steps, so its learning rate rises to 8e-05 and no further; for --lr 0.001 "
    assert (remark + "give fewer, such as --warmup 1" in capsys.readouterr().err) is said


@pytest.mark.parametrize("loss", ["clip", "gamma_decomp", "emc2"])
@pytest.mark.parametrize("how", ["latest", "path"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(train_flags, tmp_path, loss, how):
    flags = ["--loss", loss, "--epochs", 4] + (["--loss-arg", "draws=1"] if loss == "gamma_decomp" else [])
    assert main(train_flags(*flags, "--name", "whole")) == 0
    assert main(train_flags(*flags, "--name", "halves", "--save-most-recent")) == 0
    checkpoints = tmp_path / "logs" / "halves" / "checkpoints"
    for name in ("epoch_3.pt", "epoch_4.pt"):
        (checkpoints / name).unlink()
    (checkpoints / "epoch_2.pt").rename(checkpoints / "epoch_latest.pt")
    target = "latest" if how == "latest" else checkpoints / "epoch_latest.pt"
    assert main(train_flags(*flags, "--name", "halves", "--save-most-recent", "--resume", target)) == 0
    assert losses(tmp_path, "halves") == losses(tmp_path, "whole")
    whole, halves = (
        torch.load(tmp_path / "logs" / name / "checkpoints" / "epoch_4.pt") for name in ("whole", "halves")
    )
    for key in ("state_dict", "optimizer", "loss"):
        if key in whole:
            torch.testing.assert_close(halves[key], whole[key], rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_loads_in_openclip(train_flags, tmp_path, model_config):
    assert main(train_flags("--loss", "gamma_decomp")) == 0
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.keys() == {"epoch", "name", "state_dict", "optimizer", "loss", "loss_name", "clock"}
    assert len(checkpoint["optimizer"]["param_groups"]) == 2
    model = open_clip.create_model("tiny-test", pretrained=str(path))
    torch.testing.assert_close(model.state_dict(), checkpoint["state_dict"])


def test_saving_follows_openclips_flags(train_flags, tmp_path):
    flags = ("--epochs", 5, "--save-frequency", 2, "--delete-previous-checkpoint", "--save-most-recent")
    assert main(train_flags(*flags)) == 0
    assert {p.name for p in (tmp_path / "logs" / "run" / "checkpoints").iterdir()} == {
        "epoch_5.pt", "epoch_latest.pt"
    }  # fmt: skip
    assert main(train_flags("--logs", "none")) == 0


@pytest.mark.parametrize("loss", ["clip", "gamma_decomp"])
def test_accumulated_batches_equal_one_large_batch(train_flags, tmp_path, loss):
    # One batch holds all samples, or two do, so both see the same global batch.
    common = ("--loss", loss, "--epochs", 3, "--train-num-samples", 256, "--opt", "timm/sgd", "--lr", "0.1")
    assert main(train_flags(*common, "--batch-size", 256, "--name", "large")) == 0
    assert main(train_flags(*common, "--batch-size", 128, "--accum-freq", 2, "--name", "parts")) == 0
    assert losses(tmp_path, "parts") == pytest.approx(losses(tmp_path, "large"), rel=1e-5)
    large, parts = (torch.load(tmp_path / "logs" / name / "checkpoints" / "epoch_3.pt") for name in ("large", "parts"))
    assert (large["state_dict"]["logit_scale"] - 2.6593).abs() > 1e-4  # it moved
    torch.testing.assert_close(parts["state_dict"], large["state_dict"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.get("loss"), large.get("loss"), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_faults_are_reported_with_the_shards_name_at_the_end_of_the_epoch(train_flags, tmp_path, shards, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in pathlib.Path(shards).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    cut = broken / "00003.tar"
    cut.write_bytes(cut.read_bytes()[:40_000])
    assert main(train_flags("--train-data", broken, "--loss", "gamma_decomp")) == 0
    assert "x truncated shard in" in capsys.readouterr().err
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert "truncated shard in" in log and "00003.tar" in log


def test_check_shards_refuses_sizes_that_are_wrong(train_flags, tmp_path, shards, capsys):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for path in pathlib.Path(shards).glob("*.tar"):
        (wrong / path.name).symlink_to(path)
    (wrong / "sizes.json").write_text('{"00000.tar": 64, "00001.tar": 65, "00002.tar": 64, "00003.tar": 64}')
    assert main(train_flags("--train-data", wrong, "--check-shards")) == 2
    assert "00001.tar holds 64 samples, sizes.json says 65" in capsys.readouterr().err
    assert main(train_flags("--train-data", shards, "--check-shards")) == 0


def test_a_step_that_is_not_finite_changes_nothing(train_flags, tmp_path, monkeypatch):
    from openclip_ext.losses.objective import Objective

    original = Objective.forward
    calls = []

    def poisoned(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        calls.append(len(calls))
        if len(calls) == 3:
            outputs["contrastive_loss"] = outputs["contrastive_loss"] * float("nan")
        return outputs

    monkeypatch.setattr(Objective, "forward", poisoned)
    assert main(train_flags("--loss", "gamma_decomp")) == 0
    rows = lines(tmp_path / "logs" / "run" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 0] and rows[2]["loss"] is None
    checkpoint = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt")
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert checkpoint["loss"]["base.steps_taken"] == 7
    assert checkpoint["loss"]["base.rates.values"].isnan().sum() == 2 * 32


@pytest.mark.parametrize("flags", [[], ["--grad-clip-norm", 1]])
def test_a_gradient_that_is_not_finite_changes_nothing(train_flags, tmp_path, monkeypatch, flags):
    from openclip_ext.training.loop import Trainer

    original, calls = Trainer._backward, []

    def poisoned(self, batches):
        outputs = original(self, batches)
        calls.append(1)
        if len(calls) == 2:
            self.module.logit_scale.grad.fill_(float("nan"))
        return outputs

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    assert main(train_flags("--loss", "gamma_decomp", *flags)) == 0
    rows = lines(tmp_path / "logs" / "run" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows[:4]] == [0, 1, 0, 0]
    checkpoint = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt")
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert checkpoint["loss"]["base.steps_taken"] == 7


def test_hashed_ids_leave_the_objective_as_it_is(train_flags, tmp_path):
    for mode in ("index", "hash"):
        assert main(train_flags("--loss", "gamma_decomp", "--sample-id", mode, "--name", mode)) == 0
    # Augmentation is seeded by the id, so losses are not equal; a target of four times the negatives would add log 4.
    assert losses(tmp_path, "hash") == pytest.approx(losses(tmp_path, "index"), abs=0.2)


def test_validation_data_without_the_captions_key_is_named_before_training(
    train_flags, tmp_path, pairs, val_shards, capsys
):
    pack([(image, [caption, "again"]) for image, caption in pairs[:64]], str(tmp_path / "listed"), progress=False)
    flags = ("--train-data", tmp_path / "listed", "--val-data", val_shards)
    assert main(train_flags(*flags, "--caption-key", "captions", "--name", "wrong")) == 2
    assert f"--caption-key captions: none of the first 50 samples, from {val_shards}" in capsys.readouterr().err
    # Where no key is given, each set has its own.
    assert main(train_flags(*flags)) == 0


def test_a_run_with_hashed_ids_resumes_with_the_ids_it_had(train_flags, tmp_path, capsys):
    flags = ("--loss", "gamma_decomp", "--lr-scheduler", "const", "--sample-id")
    assert main(train_flags(*flags, "hash", "--epochs", 2, "--name", "whole")) == 0
    assert main(train_flags(*flags, "hash", "--epochs", 1, "--name", "half")) == 0
    assert main(train_flags(*flags, "hash", "--epochs", 2, "--name", "half", "--resume", "latest")) == 0
    assert losses(tmp_path, "half") == losses(tmp_path, "whole")
    path = tmp_path / "logs" / "whole" / "checkpoints" / "epoch_2.pt"
    content = torch.load(path)
    assert content["loss"]["base.rates.values"].shape == (2, 256) and len(content["sample_hashes"].unique()) == 256
    assert main(train_flags(*flags, "index", "--epochs", 3, "--name", "other", "--resume", path)) == 2
    assert "its loss does not know samples by --sample-id index" in capsys.readouterr().err
    del content["sample_hashes"]
    torch.save(content, tmp_path / "indexed.pt")
    assert main(train_flags(*flags, "hash", "--epochs", 3, "--name", "other", "--resume", tmp_path / "indexed.pt")) == 2
    assert "its loss does not know samples by --sample-id hash" in capsys.readouterr().err


def test_samples_beyond_the_room_for_ids_are_told(train_flags, capsys):
    assert main(train_flags("--loss", "gamma_decomp", "--sample-id", "hash", "--sample-id-table", 200)) == 0
    assert "56 visits so far of samples beyond the 200 that there is room for" in capsys.readouterr().err


def test_resuming_repeats_no_random_draws_of_the_model(train_flags, tmp_path, model_config):
    config = json.loads(pathlib.Path(model_config).read_text())
    config["vision_cfg"] |= {"patch_dropout": 0.5}
    path = tmp_path / "dropout.json"
    path.write_text(json.dumps(config))
    flags = ("--model", "dropout", "--model-config", path)
    assert main(train_flags(*flags, "--epochs", 2, "--name", "whole", "--lr-scheduler", "const")) == 0
    assert main(train_flags(*flags, "--epochs", 1, "--name", "half", "--lr-scheduler", "const")) == 0
    resume = ("--resume", "latest", "--lr-scheduler", "const")
    assert main(train_flags(*flags, "--epochs", 2, "--name", "half", *resume)) == 0
    assert losses(tmp_path, "half") == losses(tmp_path, "whole")


def test_resume_latest_without_a_checkpoint_says_so(train_flags, capsys):
    assert main(train_flags("--resume", "latest")) == 0
    assert "no checkpoint of this run yet" in capsys.readouterr().err
    flags = train_flags("--resume", "latest")
    del flags[flags.index("--name") : flags.index("--name") + 2]
    assert main(flags) == 2
    assert "--resume latest: name the run with --name" in capsys.readouterr().err


def test_faulty_validation_pairs_are_reported(train_flags, tmp_path, val_shards, capsys):
    cut = tmp_path / "val.tar"
    cut.write_bytes((pathlib.Path(val_shards) / "00000.tar").read_bytes()[:30_000])
    assert main(train_flags("--val-data", cut)) == 0
    assert "validation: 1 x truncated shard in" in capsys.readouterr().err


def test_hashed_ids_need_no_index(train_flags, tmp_path, shards):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in pathlib.Path(shards).glob("*.tar"):
        (bare / path.name).symlink_to(path)
    flags = ("--loss", "gamma_decomp", "--train-data", bare, "--train-num-samples", 256)
    assert main(train_flags(*flags, "--sample-id", "hash", "--sample-id-table", 5000)) == 0
    state = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt")["loss"]
    assert state["base.rates.values"].shape == (2, 5000)
    filled = (~state["base.rates.values"][0].isnan()).sum()
    assert 240 <= filled <= 256


BAD = [
    (["--loss", "nope"], "--loss nope: no such loss; registered: "),
    (["--loss", "gamma_decomp", "--loss-arg", "gama=1"], "--loss-arg gama=1: loss gamma_decomp has no option 'gama'"),
    (
        ["--loss", "gamma_decomp", "--loss-arg", "gamma=x"],
        "--loss-arg gamma=x: gamma of loss gamma_decomp must be float",
    ),
    (["--loss-arg", "gamma"], "--loss-arg gamma: expected key=value"),
    (["--loss-term", "nope=1"], "--loss-term nope: no such loss term"),
    (["--loss-term", "nope"], "--loss-term nope: expected NAME=WEIGHT"),
    (["--loss-term", "caption=x"], "--loss-term caption=x: the weight must be a number >= 0"),
    (["--loss-term", "caption=-1"], "--loss-term caption=-1: the weight must be a number >= 0"),
    (
        ["--loss-term", "brownian_bridge=1,tau=2"],
        "--loss-term brownian_bridge tau=2: tau of loss term brownian_bridge must",
    ),
    (["--caption-separator", ""], "--caption-separator: must not be empty"),
    (["--loss-term", "a=1", "--loss-term", "a=2"], "a is given twice"),
    (["--train-data", "/nowhere/{0..3}.tar"], "--train-data /nowhere/{0..3}.tar: no shard matches"),
    (["--workers", "9"], "--workers 9: takes at least 9 shards for 1 process, and there are 4; use --workers 4"),
    (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
    (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    (["--lr", "-1"], "--lr -1.0: must be at least 0"),
    (["--wd", "nan"], "--wd nan: must be at least 0"),
    (["--warmup", "-5"], "--warmup -5: must be at least 0"),
    (["--workers", "-1"], "--workers -1: must be at least 0"),
    (["--beta1", "2"], "--beta1 2.0: must be in [0, 1), such as 0.9"),
    (["--batch-size", "99999999999"], "--batch-size 99999999999: the loss of 99,999,999,999 pairs a step takes "),
    (["--batch-size", "64", "--loss-tile", "0"], "--loss-tile 0: must be a whole number of at least 1"),
    (["--batch-size", "500"], "--batch-size 500: a data worker of rank 0 finds only 256 usable samples"),
    (["--accum-freq", "99"], "--accum-freq 99: an epoch has only 8 batches"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--ddp-static-graph", "--accum-freq", "2"], "--ddp-static-graph: cannot be combined with --accum-freq"),
    (["--loss-term", "caption=1"], "--loss-term caption: --model tiny-test makes no captions"),
    (["--horovod"], "--horovod: start several processes with accelerate launch"),
    (["--precision", "fp16"], "--precision fp16: needs a GPU"),
    (["--resume", "/nowhere.pt"], "--resume /nowhere.pt: no such file"),
    (["--model", "ViT-B-33"], "--model ViT-B-33: no such model; near it: ViT-B-32"),
    (["--model-config", "/nowhere.json"], "--model-config /nowhere.json: no such file"),
    (["--pretrained", "nope"], "nope"),
    (["--opt", "sgdd"], "--opt sgdd: no such optimizer"),
    (["--opt", "timm/nope"], "--opt timm/nope: "),
    (["--lr-scheduler", "step"], "--lr-scheduler step: use cosine, const, or const-cooldown"),
    (["--lr-scheduler", "const-cooldown"], "give the number of cool-down epochs with --epochs-cooldown"),
    (
        ["--lock-text"],
        "--lock-text: OpenCLIP cannot leave the LayerNorms of --model tiny-test unlocked; add --lock-text-",
    ),
    (["--siglip", "--loss", "dcl"], "--siglip --loss dcl: these exclude each other"),
    (["--loss", "sogclr", "--sample-id", "hash", "--sample-id-table", "0"], "--sample-id-table 0: must be at least 1"),
    (["--sample-id-table", "5"], "--sample-id-table 5: is for --sample-id hash; add it, or drop the flag"),
    (["--classes", "all"], "--classes all: is for --imagenet-val or --imagenet-v2; add one, or drop the flag"),
    (["--view-aug", "auto"], "--view-aug auto: is for second views of images; add --pairs views or a --loss-term"),
    (["--caption-key", "captionz"], "--caption-key captionz: none of the first 256 samples"),
    (["--imagenet-val", "/nowhere"], "--imagenet-val /nowhere: no such folder"),
    (["--val-data", "/nowhere.tar"], "--val-data /nowhere.tar: no shard matches"),
    (["--train-data-upsampling-factors", "2"], "--train-data-upsampling-factors: needs --dataset-resampled"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_wrong_input_is_one_line_with_exit_code_2_and_no_run(train_flags, tmp_path, capsys, flags, message):
    assert main(train_flags(*flags)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
    assert len(error) == 1 and message in error[0]
    assert not list(tmp_path.glob("logs/run/checkpoints/*"))


def test_an_unknown_number_of_samples_is_an_error_that_says_how_to_count(train_flags, tmp_path, shards, capsys):
    for path in pathlib.Path(shards).glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    assert main(train_flags("--train-data", tmp_path)) == 2
    assert f"write sizes.json with: openclip-ext shards index {tmp_path}" in capsys.readouterr().err
    assert main(train_flags("--train-data", tmp_path, "--train-num-samples", 256, "--loss", "gamma_decomp")) == 2
    assert "--loss gamma_decomp: needs sample ids" in capsys.readouterr().err
    assert main(train_flags("--train-data", tmp_path, "--train-num-samples", 256)) == 0


def test_a_checkpoint_of_something_else_is_refused_by_name(train_flags, tmp_path, shards, val_shards, capsys):
    assert main(train_flags("--loss", "gamma_decomp")) == 0
    checkpoint = tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt"
    flags = ("--resume", checkpoint, "--epochs", 2, "--name", "second")
    assert main(train_flags(*flags, "--loss", "gamma_decomp", "--model", "ViT-B-32")) == 2
    assert "not a checkpoint of --model ViT-B-32" in capsys.readouterr().err
    content = torch.load(checkpoint)
    torch.save({key: value for key, value in content.items() if key != "loss_name"}, tmp_path / "nameless.pt")
    assert main(train_flags("--resume", tmp_path / "nameless.pt", "--name", "second", "--loss", "sogclr")) == 2
    assert "its loss state does not fit --loss and the data" in capsys.readouterr().err
    assert main(train_flags(*flags, "--loss", "gamma_decomp", "--train-data", f"{shards}::{val_shards}")) == 2
    assert "(2, 256) in the checkpoint, (2, 306) now" in capsys.readouterr().err
    assert main(train_flags("--pretrained", checkpoint, "--model", "ViT-B-32", "--name", "second")) == 2
    assert "its weights do not fit --model ViT-B-32" in capsys.readouterr().err
    (tmp_path / "text.pt").write_text("hello")
    assert main(train_flags("--resume", tmp_path / "text.pt", "--name", "second")) == 2
    assert "not a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "logs" / "second").exists()
    assert main(train_flags(*flags, "--loss", "clip", "--resume-other-loss")) == 0


def test_a_name_in_use_is_refused(train_flags, capsys):
    assert main(train_flags()) == 0
    assert main(train_flags()) == 2
    assert "--name run: " in capsys.readouterr().err


def test_without_training_data_the_model_is_scored(train_flags, tmp_path, val_shards, capsys):
    assert main(train_flags()) == 0
    flags = train_flags("--val-data", val_shards, "--resume", tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt")
    position = flags.index("--train-data")
    del flags[position : position + 2]
    assert main(flags) == 0
    assert "after epoch 1: image_to_text_R@1" in capsys.readouterr().err
