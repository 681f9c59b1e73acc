"""Any OpenCLIP checkpoint, by tag, name, file or run, as a model ready to encode."""

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.files import file_sha256, last_checkpoint, load_tensors
from openclip_ext.report.params import read_params

#: What a name that ends so must be.
FILE_EXTENSIONS = (".pt", ".pth", ".bin", ".safetensors")
RUN_FLAGS = upstream.flags_with(upstream.Role.MODEL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel(Encoder):
    """A model with its weights, and where they are from.

    Attributes:
        transform: the model's, for evaluation: picture to (3, H, W).
        name: as OpenCLIP knows the architecture.
        source: what was asked for.
        path: the file the weights are from; None: OpenCLIP found them by a tag or on the hub.
        sha256: of that file as `sha256sum` prints it; of the weights (`weights_sha256`) where there is no `path`.
        precision: OpenCLIP's name of what is computed in.
        flags: those of `RUN_FLAGS` that the model was made with.
        epoch: completed ones of training; None: it is from within one, or the file does not tell.
    """

    transform: Callable[[Any], Tensor]
    name: str
    source: str
    path: str | None
    sha256: str
    precision: str
    flags: dict[str, Any]
    epoch: int | None = None


def load_model(
    source: str | None,
    *,
    name: str | None = None,
    model_config: str | None = None,
    device: str = "auto",
    precision: str | None = None,
    cache_dir: str | None = None,
    run: str | None = None,
    flag: str = "--pretrained",
) -> LoadedModel:
    """Load weights into their architecture, in evaluation mode.

    Args:
        source: a file (.pt, .bin, .safetensors), a run's folder for its last epoch, one of OpenCLIP's tags, or a name
            that brings its weights, `hf-hub:…` or `local-dir:…`; None: `name` is such a name.
        name: the architecture; None: a run knows it, and so do the names that bring their weights.
        model_config: an OpenCLIP model config in JSON, for an architecture that is not built in.
        device: `auto`: a GPU if there is one; else PyTorch's name for it.
        precision: OpenCLIP's `--precision`; None: `amp` on a GPU, else `fp32`.
        cache_dir: where OpenCLIP keeps what it downloads.
        run: folder of the run that knows the architecture; None: the one that the file lies in.
        flag: how `source` was named, for messages.

    Raises:
        UserError: nothing there, not weights, not of this architecture, a file that holds more than tensors and plain
            values, or a download that failed.
    """
    place = choose_device(device)
    precision = _precision(precision, place)
    origin = _origin(source, name, model_config, run, flag)
    content = load_tensors(origin.path, flag) if origin.path else {}
    weights = _require_weights(content, origin.path, flag) if origin.path else {}
    model, transform, tokenizer = _create(origin, weights, place, precision, cache_dir, flag)
    model.eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        transform=transform,
        device=place,
        autocast=upstream.autocast(precision, place),
        dtype=upstream.input_dtype(precision),
        name=origin.name,
        source=source or origin.name,
        path=origin.path,
        sha256=file_sha256(origin.path) if origin.path else weights_sha256(model),
        precision=precision,
        flags=origin.run_flags,
        epoch=_epoch(content),
    )


def _epoch(content: dict) -> int | None:
    """Completed ones; None where some of the next one has been trained, or the file does not tell."""
    position = content.get("clock", {}).get("position", {})
    return None if position.get("batches") or position.get("before") else content.get("epoch")


def _create(origin: "_Origin", weights: dict, device: torch.device, precision: str, cache_dir: str | None, flag: str):
    """(model, evaluation transform, tokenizer). `weights`: what the file of `origin` holds, empty without a file."""
    brought = origin.name.startswith(upstream.SCHEMES)
    flags = upstream.default_flags().replace(
        **origin.run_flags,
        model=origin.name,
        pretrained=None if brought else origin.pretrained,
        precision=precision,
        cache_dir=cache_dir,
    )
    # The bias of a model trained as SigLIP is in no model config: its weights alone tell.
    bias = any(str(key).endswith("logit_bias") for key in weights)
    try:
        with _quiet():
            model, _, transform, tokenizer = upstream.create_model(flags, device, logit_bias=bias, require_weights=True)
        if weights and origin.pretrained and brought:  # it took those that the name brings
            upstream.load_model_weights(model, weights, origin.pretrained, origin.name)
    except UserError as error:  # it knows the weights by flags of training
        raise UserError(str(error).replace("--pretrained", flag).replace("--resume", flag)) from error
    return model, transform, tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of OpenCLIP, which tells what its errors tell, and of the hub's attempts."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What OpenCLIP is to load.

    Attributes:
        name: its `--model`.
        pretrained: its `--pretrained`; None: the name brings the weights.
        path: the file that holds them; None: on the hub.
        run_flags: those of `RUN_FLAGS` that the weights were trained with.
    """

    name: str
    pretrained: str | None
    path: str | None
    run_flags: dict[str, Any]


def _origin(source: str | None, name: str | None, model_config: str | None, run: str | None, flag: str) -> _Origin:
    if source and source.startswith(upstream.SCHEMES):
        if name not in (None, source):
            raise UserError(f"{flag} {source} --model {name}: {source} brings its own architecture; drop --model")
        source, name = None, source
    if source is None:
        if name is None or not name.startswith(upstream.SCHEMES):
            raise UserError(f"{flag}: give the weights: a file, a run's folder, or one of OpenCLIP's tags")
        return _Origin(name, None, local_file(name, flag), {})
    path = local_file(source, flag)
    run = run or (os.path.dirname(os.path.dirname(os.path.abspath(path))) if path else None)
    flags = read_params(Path(run)).flags if run else {}
    if name not in (None, flags.get("model")):
        flags = {}  # its other flags were for another model
    name = name or flags.get("model") or (model_config and Path(model_config).stem)
    if name is None:
        raise UserError(f"{flag} {source}: give the architecture with --model, such as --model ViT-B-32")
    if config := model_config or flags.get("model_config"):
        upstream.register_model_config(config)
    return _Origin(name, path or source, path, {key: flags[key] for key in RUN_FLAGS if key in flags})


def local_file(source: str, flag: str) -> str | None:
    """The file that a source of weights means; None: OpenCLIP finds them by a tag or on the hub.

    Raises:
        UserError: no such file or folder, or no checkpoint in it.
    """
    if source.startswith(upstream.SCHEMES):
        return upstream.local_weights(source)
    is_file = os.path.exists(source) or source.endswith(FILE_EXTENSIONS) or os.sep in source
    return checkpoint_file(source, flag) if is_file else None


def checkpoint_file(path: str, flag: str) -> str:
    """The file itself, or of a run's folder the checkpoint of its last epoch.

    Raises:
        UserError: neither.
    """
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise UserError(f"{flag} {path}: no such file; give a checkpoint, or the folder of a run")
    latest = last_checkpoint(path)
    if latest is None:
        raise UserError(f"{flag} {path}: no checkpoints/epoch_N.pt in this folder; give the folder of a run")
    return latest


def _require_weights(content: dict, path: str, flag: str) -> dict:
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{flag} {path}: holds no weights; give a file that OpenCLIP's --pretrained takes")
    return weights


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one. Raises UserError: `cuda` where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def _precision(given: str | None, device: torch.device) -> str:
    """As in training: `amp` unless another is given, which on a CPU is `fp32`."""
    if device.type == "cpu" and given in ("fp16", "pure_fp16"):
        raise UserError(f"--precision {given}: needs a GPU; use fp32 or amp_bf16 on CPU")
    return "fp32" if device.type == "cpu" and given in (None, "amp") else given or "amp"


def weights_sha256(model: torch.nn.Module) -> str:
    """`tensors_sha256` of all weights."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
