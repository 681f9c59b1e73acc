"""OpenCLIP 3.3, where 4 differs: its flags, models, optimizer groups, and names in checkpoints."""

import argparse
import difflib
import math
import types
from pickle import UnpicklingError
from unittest import mock

from openclip_ext.errors import UserError
from openclip_ext.upstream.models import config_error
from openclip_ext.upstream.remote_code import without_remote_code
from openclip_ext.upstream.tokenizers import create_tokenizer
from openclip_ext.upstream.weights import brings_weights, check_weights, weights_error

#: Class names of the blocks that the towers of its models repeat, timm's and Hugging Face's included.
BLOCKS = frozenset(
    {"ResidualAttentionBlock", "CustomResidualAttentionBlock", "Block", "EvaBlock", "ConvNeXtBlock",
     "SwinTransformerBlock", "RobertaLayer", "XLMRobertaLayer"}
)  # fmt: skip


#: Flags that our loop does not take, and what to do instead.
REFUSED = {
    "horovod": "start several processes with accelerate launch or torchrun",
    "trace": "it is for inference; trace the exported checkpoint",
    "torchscript": "use --torchcompile, or script the exported checkpoint",
    "use_bnb_linear": "train without it",
}


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


def require_supported(args: argparse.Namespace) -> None:
    """Raises UserError: a flag that this version's own loop understands and ours does not."""
    for name, remedy in REFUSED.items():
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: {remedy}")


def optimizer_defaults(args: argparse.Namespace) -> dict[str, float]:
    """lr, betas and eps where they were not given, as OpenCLIP has them: by the model's name, for AdamW only."""
    from open_clip_train.params import get_default_params

    if "timm" in args.opt:
        return {}
    return {name: value for name, value in get_default_params(args.model).items() if getattr(args, name) is None}


@without_remote_code()
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
        tokenizer = create_tokenizer(args)
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError, AttributeError, UnpicklingError) as error:
        raise UserError(_model_error(args, error)) from error
    except TypeError as error:
        raise UserError(config_error(args, error)) from error
    if args.lock_image:
        model.lock_image_tower(
            unlocked_groups=args.lock_image_unlocked_groups, freeze_bn_stats=args.lock_image_freeze_bn_stats
        )
    if args.lock_text:
        _lock_text(args, model)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model, preprocess_train, preprocess_val, tokenizer


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
