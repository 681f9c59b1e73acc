"""OpenCLIP 3.3: its flags, models, optimizer groups, schedules, checkpoints, and losses."""

import argparse
import difflib
import math
import os
import types
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest import mock

from openclip_ext._host.v3_weights import brings_weights, check_file, check_weights, weights_error
from openclip_ext.errors import UserError

#: Class names of the blocks that the towers of its models repeat, timm's and Hugging Face's included.
BLOCKS = frozenset(
    {"ResidualAttentionBlock", "CustomResidualAttentionBlock", "Block", "EvaBlock", "ConvNeXtBlock",
     "SwinTransformerBlock", "RobertaLayer", "XLMRobertaLayer"}
)  # fmt: skip


class _ParserFound(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def build_parser() -> argparse.ArgumentParser:
    """OpenCLIP's own argument parser, so that each of its flags keeps its name, default and meaning.

    `open_clip_train.params.parse_args` builds the parser and uses it at once; this stops it in between.
    """
    from open_clip_train import params

    class Parser(argparse.ArgumentParser):
        def parse_args(self, *args, **kwargs):
            raise _ParserFound(self)

    stand_in = types.SimpleNamespace(**vars(argparse) | {"ArgumentParser": Parser})
    with mock.patch.object(params, "argparse", stand_in):
        try:
            params.parse_args([])
        except _ParserFound as found:
            actions = found.parser
    parser = argparse.ArgumentParser(parents=[actions], conflict_handler="resolve", allow_abbrev=False)
    return parser


def fill_optimizer_defaults(args: argparse.Namespace) -> None:
    """Set lr, betas and eps that were not given, as OpenCLIP does: by the model's name, for AdamW only."""
    from open_clip_train.params import get_default_params

    if "timm" not in args.opt:
        for name, value in get_default_params(args.model).items():
            if getattr(args, name) is None:
                setattr(args, name, value)


def clip_loss(**options: Any):
    """`open_clip.loss.ClipLoss`."""
    from open_clip.loss import ClipLoss

    return ClipLoss(**options)


def siglip_loss(**options: Any):
    """`open_clip.loss.SigLipLoss`."""
    from open_clip.loss import SigLipLoss

    return SigLipLoss(**options)


def distill_loss(**options: Any):
    """`open_clip.loss.DistillClipLoss`."""
    from open_clip.loss import DistillClipLoss

    return DistillClipLoss(**options)


def create_teacher(args: argparse.Namespace, device):
    """The model of `--distill-model` and `--distill-pretrained`, in evaluation mode.

    Raises:
        UserError: unknown model, or weights that cannot be had.
    """
    import open_clip

    if os.path.isfile(args.distill_pretrained):
        check_file(args.distill_pretrained, "--distill-pretrained")
    try:
        teacher = open_clip.create_model(
            args.distill_model, args.distill_pretrained, device=device, precision=args.precision, output_dict=True,
            cache_dir=args.cache_dir,
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--distill-model {args.distill_model} --distill-pretrained {args.distill_pretrained}: {reason}"
        ) from error
    return teacher.eval().requires_grad_(False)


def start_remote_sync(local: str, remote: str, protocol: str, seconds: int):
    """Copy a run's folder to a remote place now and every so often, with OpenCLIP's own code; returns what ends it.

    Raises:
        UserError: the first copy failed.
    """
    from open_clip_train.file_utils import remote_sync, start_sync_process

    if not remote_sync(local, remote, protocol):
        raise UserError(f"--remote-sync {remote}: the first copy by {protocol} failed; see the message above")
    process = start_sync_process(seconds, local, remote, protocol)
    process.start()

    def finish() -> None:
        process.terminate()
        process.join()
        remote_sync(local, remote, protocol)

    return finish


def input_dtype(precision: str):
    """The dtype of images under `--precision`; None: leave as they are."""
    from open_clip import get_input_dtype

    return get_input_dtype(precision)


def autocast(precision: str, device):
    """A function that returns the context to run a model in under `--precision`."""
    from open_clip_train.precision import get_autocast

    return get_autocast(precision, device_type=device.type)


def preprocessing(model) -> dict[str, Any]:
    """How the model is to see images, as OpenCLIP's `--image-…` flags say it: where none does, as its tag says."""
    config = getattr(model.visual, "preprocess_cfg", {})
    values = {f"image_{name}": config.get(name) for name in ("mean", "std", "interpolation", "resize_mode")}
    return {flag: list(value) if isinstance(value, tuple) else value for flag, value in values.items() if value}


def example_inputs(model, dtype):
    """One black picture and one empty caption as the model takes them. `dtype`: of images; None: float32."""
    import torch

    device, size = model.logit_scale.device, model.visual.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    text = torch.zeros(1, model.context_length, dtype=torch.int64, device=device)
    return torch.zeros(1, 3, height, width, dtype=dtype, device=device), text


def freeze_text(model):
    """Leave a gradient to nothing but the image tower, the logit scale and its bias; returns the image tower."""
    for name, parameter in model.named_parameters():
        if not name.startswith(("visual.", "logit_")):
            parameter.requires_grad_(False)
    return model.visual


def register_model_config(path: str) -> str:
    """Make a model config file known; returns its model name, the file's stem.

    Raises:
        UserError: there is no such file, or it is no model config.
    """
    import open_clip

    if not Path(path).is_file():
        raise UserError(f"--model-config {path}: no such file; give an OpenCLIP model config in JSON")
    open_clip.add_model_config(path)
    name = Path(path).stem
    if name not in open_clip.list_models():
        raise UserError(f"--model-config {path}: not an OpenCLIP model config (needs embed_dim, vision_cfg, text_cfg)")
    return name


def create_model(args: argparse.Namespace, device, *, logit_bias: bool, require_weights: bool = False):
    """(model, train transform, evaluation transform, tokenizer) as `--model`, `--pretrained` and their kin say.

    Args:
        args: OpenCLIP's flags.
        device: where to put it.
        logit_bias: give the model a bias, and start scale and bias as SigLIP does.
        require_weights: never leave the model at its initialization, which OpenCLIP does where a download fails.

    Raises:
        UserError: unknown model, weights that cannot be had, or that belong to another architecture.
    """
    import open_clip

    check_weights(args)
    # Values from OpenCLIP's main: log 10 and -10 are SigLIP's.
    extra = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if logit_bias else {}
    size = args.force_image_size
    try:
        model, preprocess_train, preprocess_val = open_clip.create_model_and_transforms(
            args.model,
            args.pretrained,
            precision=args.precision,
            device=device,
            force_quick_gelu=args.force_quick_gelu,
            force_custom_text=args.force_custom_text,
            force_patch_dropout=args.force_patch_dropout,
            force_image_size=size[0] if isinstance(size, list | tuple) and len(size) == 1 else size,
            force_context_length=args.force_context_length,
            image_mean=args.image_mean,
            image_std=args.image_std,
            image_interpolation=args.image_interpolation,
            image_resize_mode=args.image_resize_mode,
            aug_cfg=args.aug_cfg,
            pretrained_image=args.pretrained_image,
            output_dict=True,
            cache_dir=args.cache_dir,
            require_pretrained=require_weights or brings_weights(args),
            **extra,
        )
        tokenizer = open_clip.get_tokenizer(
            args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
        )
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError, AttributeError, UnpicklingError) as error:
        raise UserError(_model_error(args, error)) from error
    if args.lock_image:
        model.lock_image_tower(
            unlocked_groups=args.lock_image_unlocked_groups, freeze_bn_stats=args.lock_image_freeze_bn_stats
        )
    if args.lock_text:
        _lock_text(args, model)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model, preprocess_train, preprocess_val, tokenizer


def local_weights(name: str) -> str | None:
    """The file that OpenCLIP takes the weights of `--model local-dir:FOLDER` from; None: there is none.

    Raises:
        UserError: no such folder.
    """
    from open_clip.factory import _find_checkpoint_in_dir

    prefix, _, folder = name.partition(":")
    if prefix != "local-dir":
        return None
    if not Path(folder).is_dir():
        raise UserError(f"--model {name}: no such folder; give one that holds open_clip_config.json and weights")
    return _find_checkpoint_in_dir(Path(folder))


def _lock_text(args: argparse.Namespace, model) -> None:
    try:
        model.lock_text_tower(
            unlocked_layers=args.lock_text_unlocked_layers, freeze_layer_norm=args.lock_text_freeze_layer_norm
        )
    except AssertionError as error:
        raise UserError(
            f"--lock-text: OpenCLIP cannot leave the LayerNorms of --model {args.model} unlocked; add "
            "--lock-text-freeze-layer-norm"
        ) from error


def _model_error(args: argparse.Namespace, error: Exception) -> str:
    import open_clip

    known = open_clip.list_models()
    if ":" not in args.model and args.model not in known:
        near = difflib.get_close_matches(args.model, known, n=8, cutoff=0.4) or known[:8]
        return (
            f"--model {args.model}: no such model; near it: {', '.join(near)}. Your own: --model-config FILE.json, or "
            "--model local-dir:FOLDER"
        )
    if message := weights_error(args, error):
        return message
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, AttributeError):
        return f"--pretrained {args.pretrained}: its weights do not fit; if they have a logit bias, add --siglip"
    if "state_dict" in str(error) or isinstance(error, AssertionError):
        detail = " ".join(str(error).split())[:160]
        return f"--pretrained {args.pretrained}: its weights do not fit --model {args.model} ({detail}…)"
    return f"--model {args.model} --pretrained {args.pretrained or 'none'}: {first_line}"


def load_model_weights(model, state_dict: dict, source: str, model_name: str) -> None:
    """Load a training checkpoint's `state_dict`, with or without DDP's prefix.

    Raises:
        UserError: it belongs to another architecture.
    """
    plain = {key.removeprefix("module."): value for key, value in state_dict.items()}
    try:
        model.load_state_dict(plain)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:160]
        raise UserError(f"--resume {source}: not a checkpoint of --model {model_name} ({detail}…)") from error


def checkpoint_from_state(state_dict: dict, distributed: bool) -> dict:
    """A model's `state_dict` as OpenCLIP writes it: with DDP's prefix when trained on several ranks."""
    prefix = "module." if distributed else ""
    return {prefix + key: value for key, value in state_dict.items()}


def create_optimizer(args: argparse.Namespace, model):
    """OpenCLIP's optimizer for the model.

    Raises:
        UserError: unknown optimizer, or half a pair of betas.
    """
    import torch

    name = args.opt.lower()
    if name.startswith("timm/"):
        return _timm_optimizer(args, model, name.removeprefix("timm/"))
    if name == "adamw":
        named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
        no_decay = [p for key, p in named if _without_decay(key, p)]
        decay = [p for key, p in named if not _without_decay(key, p)]
        groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": args.wd}]
        # The fused kernel hides from Accelerate that a gradient scaler skipped its step.
        fused = args.precision != "amp"
        return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=fused)
    raise UserError(f"--opt {args.opt}: no such optimizer; use adamw, or timm/NAME for any of timm's")


def _without_decay(name: str, parameter) -> bool:
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def _timm_optimizer(args: argparse.Namespace, model, name: str):
    from timm.optim import create_optimizer_v2

    if (args.beta1 is None) != (args.beta2 is None):
        raise UserError("--beta1, --beta2: give both or neither with a timm optimizer")
    options = {"eps": args.eps, "momentum": args.momentum}
    options = {key: value for key, value in options.items() if value is not None}
    if args.beta1 is not None:
        options["betas"] = (args.beta1, args.beta2)
    try:
        return create_optimizer_v2(model, name, lr=args.lr, weight_decay=args.wd, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {error}") from error


def create_schedule(args: argparse.Namespace, optimizer, steps_per_epoch: int) -> Callable[[int], float]:
    """A function of the step that sets the learning rate of all groups.

    Raises:
        UserError: unknown schedule, or no cool-down length for one that needs it.
    """
    from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr

    total = steps_per_epoch * args.epochs
    if args.lr_scheduler == "cosine":
        return cosine_lr(optimizer, args.lr, args.warmup, total)
    if args.lr_scheduler == "const":
        return const_lr(optimizer, args.lr, args.warmup, total)
    if args.lr_scheduler == "const-cooldown":
        if args.epochs_cooldown is None:
            raise UserError("--lr-scheduler const-cooldown: give the number of cool-down epochs with --epochs-cooldown")
        cooldown = steps_per_epoch * args.epochs_cooldown
        power, end = args.lr_cooldown_power, args.lr_cooldown_end
        return const_lr_cooldown(optimizer, args.lr, args.warmup, total, cooldown, power, end)
    raise UserError(f"--lr-scheduler {args.lr_scheduler}: use cosine, const, or const-cooldown")
