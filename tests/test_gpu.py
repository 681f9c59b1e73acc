"""What only a CUDA device can show. Deselected by default: run with `pytest -m gpu`."""

import json
import subprocess
import sys

import pytest
import torch

from openclip_ext import create_loss
from openclip_ext.cli import main
from openclip_ext.testing.checks import WIDTH, ToyModel, evaluate_loss, toy_steps
from ours import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def results(name, device):
    """Values, gradients and state after two steps on a device, brought to the CPU."""
    options = {"draws": 2} if name == "gamma_decomp" else {}
    loss = create_loss(name, num_samples=30, embed_dim=WIDTH, device=device, **options)
    model = ToyModel(loss.needs).to(device)
    found = []
    for batch in toy_steps():
        model.zero_grad()
        outputs = evaluate_loss(loss, model, *(tensor.to(device) for tensor in batch))
        outputs["contrastive_loss"].backward()
        loss.commit()
        gradients = {key: parameter.grad.cpu() for key, parameter in model.named_parameters()}
        state = {key: value.cpu().clone() for key, value in loss.state_dict().items()}
        found.append((outputs["contrastive_loss"].detach().cpu(), gradients, state))
    return found


def steps(run):
    """Rows of training, without those of validation."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "kind" not in row]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_gives_on_the_gpu_what_it_gives_on_the_cpu(name):
    torch.testing.assert_close(results(name, "cuda"), results(name, "cpu"), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"emc2"}))  # its i-SIR waits to gather draws
def test_the_host_does_not_wait_for_a_loss(name):
    loss = create_loss(name, num_samples=30, embed_dim=WIDTH, device="cuda")
    model = ToyModel(loss.needs).cuda()
    for number, batch in enumerate([[tensor.cuda() for tensor in batch] for batch in 2 * toy_steps()]):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")  # libraries are loaded by the first steps
        try:
            evaluate_loss(loss, model, *batch)["contrastive_loss"].backward()
            loss.commit()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["amp", "amp_bf16", "fp32", "pure_bf16"])
@pytest.mark.parametrize("accum_freq", [1, 2])
def test_every_precision_trains(train_flags, tmp_path, precision, accum_freq):
    flags = ("--device", "cuda", "--precision", precision, "--loss", "gamma_decomp", "--epochs", 3, "--lr", "3e-3")
    assert main(train_flags(*flags, "--accum-freq", accum_freq, "--grad-clip-norm", 1.0, "--workers", 2)) == 0
    rows = steps(tmp_path / "logs" / "run")
    curve = [row["loss"] for row in rows if row["loss"] is not None]
    assert sum(curve[-4:]) < sum(curve[:4])
    checkpoint = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_3.pt")
    assert ("scaler" in checkpoint) == (precision == "amp")


@pytest.mark.parametrize("precision", ["amp", "amp_bf16", "fp32", "pure_bf16"])
@pytest.mark.parametrize("accum_freq", [1, 2])
def test_every_precision_trains_sharded(train_flags, tmp_path, precision, accum_freq, val_shards):
    """On all GPUs there are. With one, FSDP runs too, with nothing to share."""
    flags = ("--device", "cuda", "--precision", precision, "--epochs", 3, "--lr", "3e-3", "--batch-size", 16,
             "--accum-freq", accum_freq, "--grad-clip-norm", 1.0, "--val-data", val_shards)  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2",
               "--num_processes", str(torch.cuda.device_count()), "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0", "-m", "openclip_ext"]  # fmt: skip
    result = subprocess.run([*command, *train_flags(*flags)], capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "logs" / "run"
    assert "are sharded (FSDP)" in (run / "out.log").read_text()
    curve = [row["contrastive_loss"] for row in steps(run)]
    assert curve[-1] < curve[0]
    checkpoint = torch.load(run / "checkpoints" / "epoch_3.pt")
    assert ("scaler" in checkpoint) == (precision == "amp")
    assert all(type(value) is torch.Tensor for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize("precision", ["amp", "amp_bf16"])
def test_fine_tuning_goes_on_as_if_it_had_not_stopped(train_flags, tmp_path, precision, val_shards):
    flags = ("--device", "cuda", "--precision", precision, "--loss", "emc2", "--lora", "r=4", "--ema", 0.9,
             "--layer-decay", 0.7, "--warm-start-pass", "--val-data", val_shards, "--lr-scheduler", "const",
             "--epochs", 2)  # fmt: skip
    assert main(train_flags(*flags, "--name", "whole")) == 0
    resume = tmp_path / "logs/whole/checkpoints/epoch_1.pt"
    assert main(train_flags(*flags, "--name", "rest", "--resume", resume)) == 0
    whole, rest = (steps(tmp_path / "logs" / name) for name in ("whole", "rest"))
    assert whole[0]["age_max"] == 0 and whole[0]["stored_weight"] > 0
    assert [row["loss"] for row in rest] == pytest.approx([row["loss"] for row in whole[8:]], rel=1e-2)
    ends = [torch.load(tmp_path / f"logs/{name}/checkpoints/epoch_2.pt") for name in ("whole", "rest")]
    for key in ("state_dict", "state_dict_ema"):
        torch.testing.assert_close(ends[1][key], ends[0][key], rtol=1e-2, atol=1e-3, check_device=False)
