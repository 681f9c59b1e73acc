"""OpenCLIP 3.3: local weights looked at before it loads them, and what to say of those that cannot be had."""

import argparse
import os
from pathlib import Path

from openclip_ext.errors import UserError
from openclip_ext.files import load_tensors

#: What a model's name starts with where it brings its own config and weights.
SCHEMES = ("hf-hub:", "local-dir:")


def check_weights(args: argparse.Namespace) -> None:
    """Look at the weights that `--pretrained` or `--model` name, as far as they are on this machine.

    Raises:
        UserError: files that cannot be read or hold more than tensors, or a choice that OpenCLIP would pass over.
    """
    pretrained = args.pretrained or ""
    if pretrained.startswith(SCHEMES):
        raise UserError(f"--pretrained {pretrained}: brings its own architecture; use --model {pretrained} instead")
    if pretrained and args.model.startswith(SCHEMES):
        raise UserError(f"--pretrained {pretrained}: --model {args.model} brings its own weights; drop one of the two")
    if os.path.isfile(pretrained):
        check_file(pretrained, "--pretrained")
    if args.model.startswith("local-dir:"):
        _check_folder(args.model)


def check_file(path: str, flag: str) -> None:
    """Raises UserError: the file is no checkpoint of tensors, or an empty one. Reads no values."""
    if path.endswith((".npz", ".npy")):  # big_vision's, which numpy reads without running anything
        return
    content = load_tensors(path, flag, mapped=True)
    if not content.get("state_dict", content):
        raise UserError(f"{flag} {path}: holds no weights")


def _check_folder(model: str) -> None:
    from open_clip.factory import _find_checkpoint_in_dir

    folder = Path(model.removeprefix("local-dir:"))
    if not folder.is_dir():
        raise UserError(f"--model {model}: no such folder")
    if not (folder / "open_clip_config.json").is_file():
        raise UserError(f"--model {model}: holds no open_clip_config.json; for bare weights use --pretrained FILE")
    if path := _find_checkpoint_in_dir(folder):
        check_file(path, f"--model {model}:")


def brings_weights(args: argparse.Namespace) -> bool:
    """Whether OpenCLIP must find weights by the model's name: without them it would start from random ones."""
    return args.model.startswith(SCHEMES) and args.resume in (None, "latest")


def weights_error(args: argparse.Namespace, error: Exception) -> str | None:
    """What to say of an error of OpenCLIP's about where weights are; None: it is about something else."""
    text = str(error)
    source = f"--pretrained {args.pretrained}" if args.pretrained else f"--model {args.model}"
    if "Failed to download" in text or "from HF Hub" in text:
        return (
            f"{source}: could not be downloaded, and the cache does not hold it ({_innermost(error)}); connect to the "
            "network, fill the cache (--cache-dir) where there is one, or give a local file with --pretrained FILE"
        )
    if "Required pretrained weights" in text:
        what = "its weights could not be downloaded" if args.model.startswith("hf-hub:") else "holds no weights"
        return f"{source}: {what}; to start from random ones, give the architecture by name or with --model-config"
    if "not a known tag" in text:
        from open_clip import list_pretrained_tags_by_model

        tags = ", ".join(list_pretrained_tags_by_model(args.model)) or "none"
        return f"{source}: neither a file nor a tag of --model {args.model}; its tags: {tags}"
    return None


def _innermost(error: BaseException) -> str:
    """The kind of error that began it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return type(error).__name__
