"""Tensors that are spread over ranks, kept in a folder beside a checkpoint: a file per rank, by DCP.

`torch.distributed.checkpoint` brings them to any number of ranks. Files are safetensors, since the format that it has
by default is read with pickle. The checkpoint itself says which folder is its own, and the checksum of each file: so
both are replaced together, in the moment in which the checkpoint is.
"""

import glob
import importlib.util
import os
import shutil
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from openclip_ext.errors import UserError
from openclip_ext.files import damage, load_tensors

_SUFFIX = ".parts"
#: In a loss's state: what `write_parts` returns.
PARTS = "parts"


def require_support() -> None:
    """Raises UserError: this torch cannot write tensors in parts as they are kept here."""
    if importlib.util.find_spec("torch.distributed.checkpoint.hf_storage") is None:
        raise UserError(
            f"torch {torch.__version__} writes no safetensors in parts, as a loss's state that is spread over "
            "processes needs: use torch 2.8 or newer, or --loss-arg …_shard=false"
        )


def write_parts(state: Mapping[str, DTensor], path: str | None) -> dict[str, Any]:
    """Write each rank's part of tensors, and return what `read_parts` and `parts_fault` need. All ranks take part.

    Args:
        state: tensors by name.
        path: of the checkpoint, on the first rank; its folder is one that all machines see.

    Returns:
        On the first rank: `folder`, its name beside the checkpoint; `files`, size and CRC-32 by name; `tensors`, shape
        and dtype by name.

    Raises:
        OSError: a rank could not write its part, on all ranks; nothing is left of the others' then.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    (folder,) = _broadcast(f"{path}.{uuid.uuid4().hex[:8]}{_SUFFIX}" if path else None)
    fault, files = None, {}
    try:
        save(dict(state), storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
        mine = f"shard-{dist.get_rank() + 1:05d}-"
        files = {name: _measured(os.path.join(folder, name)) for name in os.listdir(folder) if name.startswith(mine)}
    except CheckpointException as error:
        fault = next((str(reason[0]) for reason in error.failures.values()), str(error))
    except OSError as error:
        fault = str(error)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (fault, files))
    files = {name: measured for _, of_rank in found for name, measured in of_rank.items()}
    fault = next((reason for reason, _ in found if reason), None)
    if path and not fault and (missing := files.keys() - os.listdir(folder)):
        fault = f"{min(missing)} is not there for the first process: --logs must be a folder that all machines see"
    (fault,) = _broadcast(fault)
    if fault:
        if path:
            shutil.rmtree(folder, ignore_errors=True)
        raise OSError(fault)
    tensors = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    return {"folder": os.path.basename(folder), "files": files, "tensors": tensors}


def parts_of(loss_state: Mapping[str, Any]) -> dict[str, Tensor]:
    """By name, tensors without values like those that a checkpoint keeps in parts."""
    tensors = loss_state.get(PARTS, {}).get("tensors", {})
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in tensors.items()
    }


def read_parts(state: Mapping[str, Tensor], path: str, noted: Mapping[str, Any]) -> None:
    """Fill tensors, whole ones and such as are spread over any number of ranks. All ranks take part.

    Args:
        state: by name, of the shapes that were written.
        path: of the checkpoint.
        noted: what `write_parts` returned.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(os.path.join(os.path.dirname(path), noted["folder"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in a single process.*")  # as is meant
        load(dict(state), storage_reader=reader, no_dist=not dist.is_initialized())


def checkpoint_damage(path: str) -> str | None:
    """As `files.damage`, of a checkpoint and of what is kept in parts beside it."""
    fault = damage(path)
    if fault:
        return fault
    try:
        noted = load_tensors(path, "--resume", mapped=True)["loss"][PARTS]
    except (UserError, KeyError, TypeError, IndexError):  # it is none of ours, or has no parts
        return None
    for name, measured in noted["files"].items():
        place = os.path.join(noted["folder"], name)
        file = os.path.join(os.path.dirname(path), place)
        if not os.path.exists(file):
            return f"{place}, a part of its loss's state, is missing"
        if _measured(file) != measured:
            return f"{place}, a part of its loss's state, does not fit its checksum"
    return None


def remove_parts(path: str, keep: str | None = None, only: str | None = None) -> None:
    """Remove the parts beside a checkpoint, but for the folder named `keep`, or none but that named `only`."""
    for folder in glob.glob(f"{glob.escape(path)}.*{_SUFFIX}"):
        name = os.path.basename(folder)
        if name != keep and only in (None, name):
            shutil.rmtree(folder, ignore_errors=True)


def _measured(file: str) -> list[int]:
    """Size and CRC-32."""
    checksum = size = 0
    for chunk in _chunks(file):
        checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return [size, checksum]


def _chunks(file: str) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            yield chunk


def _broadcast(value: Any) -> list[Any]:
    values = [value]
    dist.broadcast_object_list(values)
    return values
