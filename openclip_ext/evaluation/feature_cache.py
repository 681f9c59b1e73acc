"""Features on disk: computed once for a model and a data set, whatever is then measured of them.

A file is named by the SHA-256 of all that its features depend on. It says so inside too, next to a SHA-256 of its
tensors; both are checked on reading.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openclip_ext.data.listing import is_local
from openclip_ext.errors import UserError
from openclip_ext.evaluation.loading import LoadedModel, tensors_sha256, weights_sha256
from openclip_ext.evaluation.ranks import ALONE, Ranks
from openclip_ext.files import atomic

FORMAT = 2  # to be raised when other features are kept, or they are computed in another way
EXAMPLE = "Two dogs, 12 cats & a café: “ünïcode”!"  # tokenizers that differ differ here


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """A folder of features; without one, they are computed each time."""

    folder: str | None

    def get(
        self, identity: dict[str, Any] | None, compute: Callable[[], dict[str, Tensor]], ranks: Ranks = ALONE
    ) -> tuple[dict[str, Tensor], bool]:
        """The tensors that `compute` returned, or would return, for `identity`, and whether they were on disk.

        A file that is taken is named. One that cannot be read, or holds anything else, is said and computed anew. Files
        are written whole or not at all; where that fails, it is said.

        Args:
            identity: all that the tensors depend on, as JSON takes it; None: not known, so nothing is kept.
            compute: makes the tensors, on the CPU.
            ranks: which compute together; the first has the tensors, the others nothing.
        """
        if self.folder is None or identity is None:
            return compute(), False
        described = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
        path = os.path.join(self.folder, f"{hashlib.sha256(described.encode()).hexdigest()}.safetensors")
        kept = _kept(path, described) if ranks.first else None
        if ranks.on_all(kept is not None)[0]:
            return kept or {}, True
        tensors = compute()
        if ranks.first:
            try:
                _write(path, described, tensors)
            except (SafetensorError, OSError) as error:
                _say(f"{path}: cannot be written ({error}); these features are not kept")
        return tensors, False


def default_folder() -> str:
    """`openclip-ext/features` where the system keeps caches: in `$XDG_CACHE_HOME`, or `~/.cache`, on Linux."""
    return os.path.join(platformdirs.user_cache_dir("openclip-ext", appauthor=False), "features")


def open_cache(folder: str | None, disabled: bool = False) -> FeatureCache:
    """`--feature-cache` and `--no-feature-cache`; the folder is made.

    Raises:
        UserError: it cannot be made.
    """
    if disabled:
        return FeatureCache(None)
    folder = folder or default_folder()
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--feature-cache {folder}: cannot be made a folder ({error.strerror}); give another, or --no-feature-cache"
        ) from error
    return FeatureCache(folder)


def model_identity(model: LoadedModel) -> dict[str, Any]:
    """What features depend on but data: weights, architecture, precision, and how it sees pictures and texts."""
    architecture = [(name, _settings(module)) for name, module in model.model.named_modules()]
    return {
        "model": model.name,
        "weights": weights_sha256(model.model),  # not of the file: whoever changes weights in memory is to be noticed
        "architecture": _sha256(architecture),
        "precision": model.precision,
        "device": model.device.type,
        "transform": _plain(model.transform),
        "tokenizer": _sha256(model.tokenizer([EXAMPLE]).tolist()),
    }


def files_identity(paths: Iterable[str]) -> str | None:
    """SHA-256 over paths, sizes and times of change, in their order; None where one is not on this machine."""
    described = []
    for path in paths:
        if not is_local(path):
            return None
        status = os.stat(path)
        described.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
    return _sha256(described)


def require_finite(features: dict[str, Tensor], model: LoadedModel, flag: str = "--pretrained") -> dict[str, Tensor]:
    """The features. Raises UserError: one is not finite; `flag` is how the model was named."""
    if not all(tensor.isfinite().all() for tensor in features.values()):
        raise UserError(
            f"{flag} {model.source}: its features are not finite in {model.precision}; try --precision fp32, or "
            "take a checkpoint from before it diverged"
        )
    return features


def _kept(path: str, described: str) -> dict[str, Tensor] | None:
    """What is in a file, said; None: there is none, or it is damaged."""
    if not os.path.exists(path):
        return None
    try:
        tensors = _read(path, described)
    except (SafetensorError, OSError, ValueError) as error:
        _say(f"{path}: damaged ({error}); its features are computed anew")
        return None
    _say(f"features taken from {path}")
    return tensors


def _read(path: str, described: str) -> dict[str, Tensor]:
    """Raises ValueError: the file holds something else than it should."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("identity") != described:
        raise ValueError("of another model or data set")
    if metadata.get("sha256") != tensors_sha256(tensors):
        raise ValueError("its tensors are not what was written")
    return tensors


def _write(path: str, described: str, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic(path) as partial:
        save_file(tensors, partial, metadata={"identity": described, "sha256": tensors_sha256(tensors)})


def _settings(module: torch.nn.Module) -> dict[str, str]:
    """A module's kind, and its numbers, names and switches: weights do not tell how many heads attention has."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, str | int | float | tuple)}
    return {"kind": type(module).__name__} | {key: _plain(value) for key, value in plain.items()}


def _plain(value: Any) -> str:
    """Its `repr` without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _say(message: str) -> None:
    print(f"openclip-ext: {message}", file=sys.stderr)
