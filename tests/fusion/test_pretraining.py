"""`openclip-ext train --fusion`, end to end on real images."""

import json

import open_clip
import pytest
import torch

from fusion_models import CONFIG, outputs, pretraining
from launching import fork
from openclip_ext.cli import main
from openclip_ext.losses import Objective
from openclip_ext.losses.base import total_loss
from ours import LOSSES

PARTS = ("contrastive_loss", "matching_loss", "words_loss")
TERMS = ("--loss-term", "feature_separation=0.5", "--loss-term", "brownian_bridge=0.25", "--loss-term",
         "geometric_consistency=0.1", "--loss-term", "distill=0.4")  # fmt: skip


@pytest.fixture
def fusion_config(tmp_path):
    path = tmp_path / "fusion.json"
    path.write_text(json.dumps(CONFIG | {"layers": 1, "dropout": 0.0}))
    return path


@pytest.fixture
def fusion_flags(train_flags, fusion_config):
    return lambda *extra: train_flags("--fusion", fusion_config, *extra)


def rows(tmp_path, name="run"):
    return [json.loads(line) for line in (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()]


def curves(tmp_path, name="run"):
    return [[row[part] for part in PARTS] for row in rows(tmp_path, name)]


def checkpoint(tmp_path, epoch, name="run"):
    return torch.load(tmp_path / "logs" / name / "checkpoints" / f"epoch_{epoch}.pt")


@pytest.mark.parametrize("keys", ["momentum", "online"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_a_contrast_with_momentum_keys(loss, keys):
    """With the three terms, for which second views are momentum features."""
    terms = {"feature_separation": {}, "brownian_bridge": {}, "geometric_consistency": {}, "distill": {}}
    model, objective, batch = pretraining(4, loss=loss, terms=terms, keys=keys, dropout=0.0)
    for step in range(2):
        objective.begin_step(step=step, total_steps=2)
        found = outputs(model, objective, batch)
        total_loss(found).backward()
        objective.commit()
        assert {"contrastive_loss", *(f"{term}_loss" for term in terms)} <= found.keys()
        assert all(value.isfinite() for value in found.values())


def test_a_run_learns_every_part_and_its_towers_are_openclips(fusion_flags, tmp_path, model_config, val_shards):
    assert main(fusion_flags("--epochs", 3, "--lr", "3e-3", "--val-data", val_shards, *TERMS)) == 0
    first, *_, last = [row for row in rows(tmp_path) if "kind" not in row]
    assert all(last[part] < first[part] for part in PARTS)
    open_clip.add_model_config(model_config)
    path = tmp_path / "logs" / "run" / "checkpoints" / "epoch_3.pt"
    model = open_clip.create_model("tiny-test", pretrained=str(path))
    saved = torch.load(path)
    torch.testing.assert_close(model.state_dict(), saved["state_dict"])
    assert saved["fusion"]["layers"] == 1 and any(name.startswith("encoder.") for name in saved["loss"])
    average = saved["momentum_encoder"]["average.visual.proj"]
    assert not torch.equal(average, saved["state_dict"]["visual.proj"])


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(fusion_flags, tmp_path, fusion_config):
    config = json.loads(fusion_config.read_text())
    fusion_config.write_text(json.dumps(config | {"dropout": 0.1}))
    flags = ("--loss", "gamma_decomp", *TERMS, "--epochs", 2, "--save-every-steps", 3, "--keep-last", 0)
    assert main(fusion_flags(*flags, "--name", "whole")) == 0
    halfway = min((tmp_path / "logs" / "whole" / "checkpoints").glob("epoch_1_step_*.pt"))
    step = torch.load(halfway)["clock"]["step"]
    assert main(fusion_flags(*flags, "--name", "half", "--resume", halfway)) == 0
    assert curves(tmp_path, "half") == curves(tmp_path, "whole")[step:]
    whole, half = checkpoint(tmp_path, 2, "whole"), checkpoint(tmp_path, 2, "half")
    for key in whole.keys() - {"name", "loss_name", "clock", "fusion", "task", "answers"}:
        torch.testing.assert_close(half[key], whole[key], rtol=0, atol=0, equal_nan=True)


def test_accumulated_batches_equal_one_large_batch(fusion_flags, tmp_path):
    common = (*TERMS, "--epochs", 2, "--train-num-samples", 256, "--opt", "timm/sgd", "--lr", "0.05")
    assert main(fusion_flags(*common, "--batch-size", 256, "--name", "large")) == 0
    assert main(fusion_flags(*common, "--batch-size", 128, "--accum-freq", 2, "--name", "parts")) == 0
    assert curves(tmp_path, "parts") == [pytest.approx(row, rel=1e-4) for row in curves(tmp_path, "large")]
    large, parts = checkpoint(tmp_path, 2, "large"), checkpoint(tmp_path, 2, "parts")
    for key in ("state_dict", "loss", "momentum_encoder"):
        torch.testing.assert_close(parts[key], large[key], rtol=1e-3, atol=1e-5, equal_nan=True)


def test_two_processes_equal_one_with_twice_the_batch(fusion_flags, tmp_path, pairs):
    from openclip_ext.data.pack import pack

    pack(pairs[:32], str(tmp_path / "two"), samples_per_shard=16, progress=False)
    common = ("--train-data", tmp_path / "two", *TERMS, "--loss", "gamma_decomp", "--recent-batches", 0, "--epochs", 4,
              "--opt", "timm/sgd", "--lr", 0.05)  # fmt: skip
    assert main(fusion_flags(*common, "--batch-size", 32, "--name", "one")) == 0
    result = fork("torchrun", fusion_flags(*common, "--batch-size", 16, "--name", "two"))
    assert result.returncode == 0, result.stderr
    curve = curves(tmp_path, "one")
    assert len(curve) == 4 and curve[0] != curve[-1]
    assert curves(tmp_path, "two") == [pytest.approx(row, rel=1e-5) for row in curve]
    one, two = checkpoint(tmp_path, 4, "one"), checkpoint(tmp_path, 4, "two")
    two["state_dict"] = {key.removeprefix("module."): value for key, value in two["state_dict"].items()}
    for key in ("state_dict", "loss", "momentum_encoder"):
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_recent_pairs_are_a_queue_of_momentum_keys(fusion_flags, tmp_path):
    flags = ("--loss", "dcl", "--recent-batches", 2, "--recent-check", 3, "--recent-limit", 100, "--lr", "1e-4")
    flags += ("--loss-arg", "recent_enough=inf")
    assert main(fusion_flags(*flags, "--epochs", 1)) == 0
    assert rows(tmp_path)[-1]["recent_batches_used"] > 0


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        (("keep", "keep"), "keep"), (("encode", "forget"), "encode"), (("forget", "encode"), "encode"),
        (("forget", "forget"), "forget"), ((None, "encode"), "encode"), ((None, "forget"), None),
        ((None, None), None),
    ],
)  # fmt: skip
def test_what_either_way_asks_for_is_asked_of_the_loop(monkeypatch, ways, expected):
    _, objective, _ = pretraining(3)
    answers = iter(ways)
    monkeypatch.setattr(Objective, "probe", property(lambda self: next(answers)))
    assert objective.probe == expected


BAD = [
    (["--task", "vqa"], "--task vqa: is for fusion models; add --fusion"),
    (["--answers", "x.json"], "--answers x.json: is for fusion models; add --task"),
    (["--fusion", "nowhere.json"], "--fusion nowhere.json: cannot be read"),
    (["--fusion", "nowhere"], "--fusion nowhere: no such file; give a fusion config in JSON"),
    (["--fusion", "CONFIG", "--pairs", "views"], "needs captions, and --pairs views has none"),
    (["--fusion", "CONFIG", "--task", "ve", "--loss", "dcl"], "--task ve: is trained by answers alone; drop --loss"),
    (["--fusion", "CONFIG", "--model", "coca_ViT-B-32"], "a CoCa model makes captions itself"),
    (["--fusion", "CONFIG", "--precision", "pure_bf16"], "an average of weights in half precision stands still"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_wrong_input_is_one_line_with_exit_code_2_and_no_run(
    train_flags, fusion_config, tmp_path, capsys, flags, message
):
    assert main(train_flags(*[str(fusion_config) if flag == "CONFIG" else flag for flag in flags])) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("openclip-ext:")]
    assert len(error) == 1 and message in error[0]
    assert not list(tmp_path.glob("logs/run/checkpoints/*"))
