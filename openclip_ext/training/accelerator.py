"""Device, processes and precision, as OpenCLIP's flags or Accelerate's configuration say."""

import datetime
import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    ProjectConfiguration,
    is_tensorboard_available,
    is_wandb_available,
)

from openclip_ext.errors import UserError, counted
from openclip_ext.fusion.config import ANSWERING
from openclip_ext.redact import redacted_values
from openclip_ext.training import sharding
from openclip_ext.training.config import RunConfig

_MIXED = {"amp": "fp16", "amp_bf16": "bf16", "amp_bfloat16": "bf16"}


def choose_precision(config: RunConfig) -> str:
    """`--precision`, or what `accelerate launch` is configured for. Without a GPU fp16 autocast becomes fp32.

    Raises:
        UserError: both are given and differ, or the precision needs a GPU.
    """
    precision = config.precision
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if configured in ("fp16", "bf16"):
        if "precision" in config.given and _MIXED.get(precision) != configured:
            raise UserError(
                f"--precision {precision}: Accelerate is configured for {configured}; drop the flag, or launch with "
                "accelerate launch --mixed_precision no"
            )
        precision = "amp" if configured == "fp16" else "amp_bf16"
    if not _on_cpu(config):
        return precision
    if precision in ("fp16", "pure_fp16"):
        raise UserError(f"--precision {precision}: needs a GPU; use fp32 or amp_bf16 on CPU")
    return "fp32" if precision == "amp" else precision


def _on_cpu(config: RunConfig) -> bool:
    """Raises UserError: what is asked for is not there, or no use. OpenCLIP's default, `cuda`, asks for nothing.

    Apple's GPUs are none: sums over pairs are added up in float64, which they do not have.
    """
    if not config.device.startswith(("cpu", "cuda")):
        raise UserError(f"--device {config.device}: use cpu, or cuda for a GPU of NVIDIA or AMD")
    if config.device.startswith("cuda") and "device" in config.given and not torch.cuda.is_available():
        raise UserError(f"--device {config.device}: PyTorch finds no GPU here; use --device cpu, or drop the flag")
    return config.device.startswith("cpu") or not torch.cuda.is_available()


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate on the device, processes and precision that are chosen.

    Raises:
        UserError: its configuration and the flags disagree, or it is to split the model in a way that this loop does
            not support.
    """
    _take_over_accumulation(config)
    cpu = _on_cpu(config)
    if torch.cuda.is_available() and not cpu:
        torch.backends.cuda.matmul.allow_tf32 = True  # as OpenCLIP does
        torch.backends.cudnn.benchmark = True
        _choose_gpu(config.device)
    mixed = _MIXED.get(config.precision, "no")
    plugin = sharding.fsdp_plugin(mixed)
    # The first rank fits probes and writes checkpoints while the others wait.
    group = {"backend": config.dist_backend, "init_method": config.dist_url, "timeout": datetime.timedelta(hours=6)}
    handlers = [
        # Answers to a question leave the towers' projections unused.
        DistributedDataParallelKwargs(
            static_graph=config.ddp_static_graph, find_unused_parameters=config.task in ANSWERING
        ),
        InitProcessGroupKwargs(**{key: value for key, value in group.items() if value is not None}),
    ]
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        # Nothing here is divided by accumulation steps: the loop accumulates inside one backward call.
        gradient_accumulation_steps=1,
        kwargs_handlers=handlers,
        fsdp_plugin=plugin,
        log_with=_trackers(config.report_to) or None,
        project_config=ProjectConfiguration(logging_dir=config.logs),  # of trackers; the run's folder once it is known
    )
    for flag in ["--pairs views"] * (config.pairs == "views") + [f"--fusion {config.fusion}"] * bool(config.fusion):
        if plugin:
            raise UserError(f"{flag}: does not go with FSDP; launch without it: accelerate launch --multi_gpu")
    if plugin and not accelerator.is_fsdp2:
        raise UserError(
            "Accelerate is configured for FSDP, which it has for GPUs only; launch without it: accelerate launch "
            "--multi_gpu"
        )
    return accelerator


def _choose_gpu(device: str) -> None:
    """`--device cuda:N` for a single process; several are placed by their local rank. Raises UserError: no such GPU."""
    _, _, index = device.partition(":")
    if not index or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    if not index.isdigit() or int(index) >= torch.cuda.device_count():
        there = counted(torch.cuda.device_count(), "GPU")
        raise UserError(f"--device {device}: this machine has {there}, counted from cuda:0")
    torch.cuda.set_device(int(index))


def _trackers(report_to: str) -> list[str]:
    """What `--report-to` names. Raises UserError: one of them is not installed."""
    available = {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    wanted = [name for name in available if name in report_to or "all" in report_to]
    for name in wanted:
        if not available[name]:
            raise UserError(f"--report-to {report_to}: {name} is not installed; pip install {name}")
    return wanted


def start_trackers(config: RunConfig, accelerator: Accelerator, folder: str, step: int) -> None:
    """TensorBoard below the run's folder, Weights & Biases under OpenCLIP's names; they are told from `step` on."""
    accelerator.project_configuration.logging_dir = folder
    resume = "auto" if config.resume == "latest" else None
    wandb = {"name": config.name, "id": config.name, "notes": config.wandb_notes, "resume": resume}
    known = redacted_values(vars(config.flags))
    flags = {name: value for name, value in known.items() if isinstance(value, int | float | str | bool)}
    accelerator.init_trackers(
        "tensorboard" if config.report_to == "tensorboard" else config.wandb_project_name,
        flags,
        {"wandb": redacted_values(wandb), "tensorboard": {"purge_step": step or None}},
    )


def _take_over_accumulation(config: RunConfig) -> None:
    """Raises UserError: Accelerate is configured for another number of accumulation steps."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto", str(config.accum_freq)):
        raise UserError(
            f"--accum-freq {config.accum_freq}: Accelerate is configured for {steps} gradient accumulation steps; give "
            f"--accum-freq {steps}, or launch with accelerate launch --gradient_accumulation_steps 1"
        )
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"  # else Accelerate divides gradients by it
