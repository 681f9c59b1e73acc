"""OpenCLIP's models: their configs, weights, inputs and preprocessing."""

import argparse
import contextlib
import difflib
import inspect
import os
import re
from pathlib import Path
from typing import Any

from openclip_ext.errors import UserError
from openclip_ext.files import read_json
from openclip_ext.upstream.remote_code import without_remote_code
from openclip_ext.upstream.weights import check_file


@without_remote_code()
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


@contextlib.contextmanager
def in_evaluation(model):
    """The model in evaluation mode within the block, and in the mode it was in after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def freeze_text(model):
    """Leave a gradient to nothing but the image tower, the logit scale and its bias; returns the image tower."""
    for name, parameter in model.named_parameters():
        if not name.startswith(("visual.", "logit_")):
            parameter.requires_grad_(False)
    return model.visual


def embedding_width(model: Any) -> int:
    """D, the width of the features that both towers give; 0: the model does not tell."""
    return getattr(getattr(model, "visual", None), "output_dim", None) or 0


def register_model_config(path: str) -> str:
    """Make a model config file known; returns its model name, the file's stem.

    Raises:
        UserError: there is no such file, or it is no model config.
    """
    import open_clip

    if not Path(path).is_file():
        raise UserError(f"--model-config {path}: no such file; give an OpenCLIP model config in JSON")
    try:
        read_json(path)
    except ValueError as error:
        raise UserError(f"--model-config {path}: no JSON ({error}); give an OpenCLIP model config") from error
    open_clip.add_model_config(path)
    name = Path(path).stem
    if name not in open_clip.list_models():
        raise UserError(f"--model-config {path}: not an OpenCLIP model config (needs embed_dim, vision_cfg, text_cfg)")
    return name


def config_error(args: argparse.Namespace, error: TypeError) -> str:
    """What to say of a config that no model can be made of."""
    import open_clip

    path = getattr(args, "model_config", None)
    source = f"--model-config {path}" if path else f"the config of --model {args.model}"
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found:
        return f"{source}: no model can be made of it ({str(error).splitlines()[0]})"
    parts = {"CLIPVisionCfg": " in vision_cfg", "CLIPTextCfg": " in text_cfg", "MultimodalCfg": " in multimodal_cfg"}
    kind = getattr(open_clip, found[1], None)
    near = difflib.get_close_matches(found[2], inspect.signature(kind).parameters if kind else (), n=1)
    meant = f"; did you mean {near[0]}?" if near else "; drop it"
    return f"{source}: unknown key {found[2]}{parts.get(found[1], '')}{meant}"


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
