"""FSDP: a sharded run is the run without, and its checkpoints are the same files."""

import json
import os
import types

import open_clip
import pytest
import torch

import rank_jobs
from launching import TERMS, fork
from openclip_ext import UserError
from openclip_ext.cli import main
from openclip_ext.data.pack import pack
from openclip_ext.training import sharding
from stock import moving, stock_losses, without_ours

LEARNED = """
import dataclasses, torch, openclip_ext
from open_clip.loss import ClipLoss

@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    pass

class Learned(openclip_ext.Loss):
    def __init__(self, options, context):
        super().__init__(options, context)
        world = {"rank": context.rank, "world_size": context.world_size}
        self.clip = ClipLoss(local_loss=True, gather_with_grad=True, **world)
        self.weights = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("steps", torch.zeros(()))

    def commit(self):
        self.steps += 1

    def compute(self, image_features, text_features, logit_scale):
        loss = self.clip(image_features, text_features, logit_scale) * self.weights.prod()
        return {"contrastive_loss": loss + self.weights.square().sum()}

SPEC = openclip_ext.LossSpec(name="learned", summary="has parameters and state", options=Options, build=Learned)
"""


@pytest.fixture
def learned_loss(tmp_path):
    """A folder to put on the path, with the loss above installed in it."""
    folder = tmp_path / "learned"
    (folder / "learned-1.dist-info").mkdir(parents=True)
    (folder / "learned_loss.py").write_text(LEARNED)
    (folder / "learned-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: learned\nVersion: 1\n")
    entry = "[open_clip.losses]\nlearned = learned_loss:SPEC\n"
    (folder / "learned-1.dist-info" / "entry_points.txt").write_text(entry)
    return str(folder)


def rows(run, name="metrics.jsonl"):
    return [json.loads(row) for row in (run / name).read_text().splitlines()]


def column(run, key):
    return [row[key] for row in rows(run) if "kind" not in row]


ADAPTED = "--loss-arg draws=2 --lora r=2 --ema 0.8 --warm-start-pass"
TUNED = "--accum-freq 2 --grad-clip-norm 0.5 --layer-decay 0.5 --text-lr 2e-3 --ema 0.8"


@pytest.mark.parametrize(
    ("loss", "extra"),
    [
        ("gamma_decomp", [*ADAPTED.split(), *TERMS.split()]),
        pytest.param("learned", TUNED.split(), marks=pytest.mark.slow),
    ],
)
def test_a_sharded_run_equals_one_that_is_not(train_flags, tmp_path, val_shards, learned_loss, loss, extra):
    path = os.pathsep.join([learned_loss, os.environ.get("PYTHONPATH", "")])
    flags = ("--loss", loss, "--batch-size", 16, "--epochs", 2, "--val-data", val_shards, *extra)
    for launcher, name in (("accelerate", "ddp"), ("fsdp", "fsdp")):
        result = fork(launcher, train_flags(*flags, "--name", name), PYTHONPATH=path)
        assert result.returncode == 0, result.stderr
    ddp, fsdp = tmp_path / "logs" / "ddp", tmp_path / "logs" / "fsdp"
    assert ["are sharded (FSDP)" in (run / "out.log").read_text() for run in (ddp, fsdp)] == [False, True]
    for key in ("contrastive_loss", "grad_norm", "logit_scale"):
        assert column(fsdp, key) == pytest.approx(column(ddp, key), rel=1e-5)
    assert rows(fsdp, "checkpoints/results.jsonl") == [
        pytest.approx(row, rel=1e-4) for row in rows(ddp, "checkpoints/results.jsonl")
    ]
    for epoch in (1, 2):  # the first after an evaluation that other steps follow
        whole, gathered = (torch.load(run / "checkpoints" / f"epoch_{epoch}.pt") for run in (ddp, fsdp))
        assert list(gathered) == list(whole) and list(gathered["state_dict"]) == list(whole["state_dict"])
        torch.testing.assert_close(moving(gathered), moving(whole), rtol=1e-4, atol=1e-5)
        if "--ema" in extra:
            averages = [moving(checkpoint, "state_dict_ema") for checkpoint in (gathered, whole)]
            torch.testing.assert_close(*averages, rtol=1e-4, atol=1e-5)
        for key in ("optimizer", "loss", "loss_optimizer"):
            torch.testing.assert_close(gathered.get(key), whole.get(key), rtol=1e-4, atol=1e-6, equal_nan=True)


def test_runs_sharded_and_not_go_on_from_each_other(monkeypatch, train_flags, tmp_path, pairs, model_config):
    # An epoch is one step of all 32 pairs, on one process or two: so that all of these see the same batches.
    pack(pairs[:32], str(tmp_path / "two"), samples_per_shard=16, progress=False)
    logs = tmp_path / "logs"

    def flags(name, epochs, batch_size, resume=None):
        known = ("--train-data", tmp_path / "two", "--lr-scheduler", "const", "--warmup", 0, "--name", name)
        resume = ("--resume", logs / resume) if resume else ()
        return train_flags(*known, "--epochs", epochs, "--batch-size", batch_size, *resume)

    def sharded(*arguments):
        result = fork("fsdp", flags(*arguments))
        assert result.returncode == 0, result.stderr

    assert main(flags("reference", 6, 32)) == 0
    assert main(flags("begun", 2, 32)) == 0
    sharded("sharded", 4, 16, "begun/checkpoints/epoch_2.pt")
    middle = "sharded/checkpoints/epoch_4.pt"
    sharded("sharded_again", 6, 16, middle)
    assert main(flags("whole_again", 6, 32, middle)) == 0
    stock = stock_losses(monkeypatch, without_ours(flags("stock", 6, 32, middle)))

    reference = column(logs / "reference", "contrastive_loss")
    assert column(logs / "sharded", "contrastive_loss") == pytest.approx(reference[2:4], rel=1e-5)
    for name in ("sharded_again", "whole_again"):
        assert column(logs / name, "contrastive_loss") == pytest.approx(reference[4:], rel=1e-5)
    assert stock == pytest.approx(reference[4:], rel=1e-5)
    weights = torch.load(logs / middle)["state_dict"]
    model = open_clip.create_model("tiny-test", pretrained=str(logs / middle))
    torch.testing.assert_close({f"module.{key}": value for key, value in model.state_dict().items()}, weights)


def test_a_model_is_sharded_by_its_blocks_and_computes_the_same(ranks, model_config):
    results = ranks.run(rank_jobs.sharded_model, 2, model_config)
    for before, after, units, _, _ in results:
        torch.testing.assert_close(after, before)
        assert {"", "visual.transformer.resblocks.0", "transformer.resblocks.0"} <= set(units)
    *_, weights, gathered = results[0]
    torch.testing.assert_close(gathered, weights, rtol=0, atol=0)
    assert results[1][-1]["visual.proj"] is None  # gathered, and not kept


def test_state_and_norm_of_sharded_gradients_are_those_of_whole_ones(ranks):
    [(whole, _, norms)] = ranks.run(rank_jobs.sharded_state, 1)
    assert norms[0] > 2 and norms[1] == pytest.approx(2.0)
    for state, again, sharded_norms in ranks.run(rank_jobs.sharded_state, 2):
        torch.testing.assert_close(state, whole)
        torch.testing.assert_close(again, state, rtol=0, atol=0)
        torch.testing.assert_close(sharded_norms, norms)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DeepSpeed, which this loop does not support"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "configured for Megatron-LM, which this loop does not support"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "use_parallelism_config, which this loop does not support"),
        ({"ACCELERATE_USE_FSDP": "true"}, "add --fsdp_version 2"),
        (FSDP, "which it has for GPUs only"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "launch without them"),
        (FSDP | {"FSDP_IGNORED_MODULES": "visual"}, "launch without them"),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "Accelerate's configuration of FSDP: "),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(monkeypatch, train_flags, capsys, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(train_flags()) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_gradient_scaling_of_a_loss_with_parameters_is_refused():
    accelerator = types.SimpleNamespace(is_fsdp2=True, scaler=object())
    with pytest.raises(UserError, match="use amp_bf16"):
        sharding.prepare(accelerator, None, None, [torch.nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize(
    ("wrap", "dtype", "message"),
    [
        ("Linear,Nope", torch.float32, "--fsdp_transformer_layer_cls_to_wrap Linear,Nope: the model has no Nope"),
        ("Linear", torch.bfloat16, "use --precision amp_bf16, pure_bf16 or fp32"),
    ],
)
def test_a_model_that_cannot_be_sharded_so_is_refused(monkeypatch, wrap, dtype, message):
    for name, value in (FSDP | {"FSDP_TRANSFORMER_CLS_TO_WRAP": wrap}).items():
        monkeypatch.setenv(name, value)
    state = types.SimpleNamespace(fsdp_plugin=sharding.fsdp_plugin("no"))
    accelerator = types.SimpleNamespace(is_fsdp2=True, scaler=None, state=state)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to(dtype))
    with pytest.raises(UserError, match=message):
        sharding.prepare(accelerator, model, None, [])
