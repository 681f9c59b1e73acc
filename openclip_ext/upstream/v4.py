"""OpenCLIP 4: what it does otherwise than 3.3. The towers' trunks are where they were (`trunks`)."""

import argparse

from openclip_ext.errors import UserError
from openclip_ext.upstream import v3
from openclip_ext.upstream.flags import Role, role_of

BLOCKS = v3.BLOCKS | {"ModernTextBlock"}
optimizer_defaults = v3.optimizer_defaults


def build_parser() -> argparse.ArgumentParser:
    """As for version 3; flags that are gone have their defaults still."""
    parser = v3.build_parser()
    parser.set_defaults(horovod=False, trace=False, torchscript=False)
    return parser


def require_supported(args: argparse.Namespace) -> None:
    """As for version 3. Raises UserError: a new flag too that only OpenCLIP's own loop understands."""
    v3.require_supported(args)
    for action in v3.build_parser()._actions:
        if role_of(action.dest) is Role.FOREIGN and getattr(args, action.dest) != action.default:
            raise UserError(
                f"{action.option_strings[0]}: is for OpenCLIP's own loop; drop it, or train there with --loss after: "
                "openclip-ext patch apply"
            )


def create_model(args: argparse.Namespace, device, *, logit_bias: bool, require_weights: bool = False):
    """As for version 3. CoCa models return, as there, logits of next tokens only, and those tokens as `labels`."""
    from open_clip import CoCa

    model, *others = v3.create_model(args, device, logit_bias=logit_bias, require_weights=require_weights)
    if isinstance(model, CoCa):
        model.register_forward_hook(_with_labels, with_kwargs=True)
    return model, *others


def _with_labels(model, inputs, named_inputs, out: dict) -> dict:
    if "logits" not in out:
        return out
    text = named_inputs["text"] if "text" in named_inputs else inputs[1]
    return out | {"logits": out["logits"][:, :-1], "labels": text[:, 1:]}


def checkpoint_from_state(state: dict, distributed: bool) -> dict:
    """A model's `state_dict` as OpenCLIP writes it: never with DDP's prefix."""
    return dict(state)


def create_optimizer(args: argparse.Namespace, model):
    """OpenCLIP's optimizer for the model, without its layer decay: that of this package is for all versions.

    Raises:
        UserError: unknown optimizer, or options that it does not take.
    """
    from open_clip_train.optim import OptimizerCfg
    from open_clip_train.optim import create_optimizer as create

    config = OptimizerCfg(
        opt=args.opt,
        lr=args.lr,
        weight_decay=args.wd,
        beta1=args.beta1,
        beta2=args.beta2,
        eps=args.eps,
        momentum=args.momentum,
        opt_kwargs=args.opt_kwargs or {},
        wd_exclude_patterns=args.wd_exclude_patterns,
        fallback_list=args.opt_fallback_list,
    )
    try:
        return create(model, config)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"--opt {args.opt}: {error}") from error
