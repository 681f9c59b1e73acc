"""Values by direction and sample id, in the memory of the device, in that of the CPU, or in a file."""

import dataclasses
import math
import mmap
import os
import shutil
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from openclip_ext.errors import UserError


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a table is kept.

    Attributes:
        kind: `device`: with the module; `cpu`: in the CPU's memory, wherever the module is; `mmap`: in a file that is
            mapped into memory, one per machine, shared by its ranks.
        path: the file, for `mmap`.
    """

    kind: Literal["device", "cpu", "mmap"] = "device"
    path: str | None = None


class Table(nn.Module):
    """A table `values` of shape (2, N, ...), read and written by sample id.

    In memory it is part of `state_dict`. In a file it is not: the file, which starts as zeros and takes room on disk
    only for rows that were written, outlives the run itself.

    Args:
        shape: (2, N, ...).
        dtype: of the values.
        fill: what rows hold before they are written; 0 for `mmap`.
        placement: where to keep it.
        device: where the module is now.
        name: for messages.

    Raises:
        UserError: there is no room for it, or the file holds a table of another size.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, fill: float, placement: Placement, device=None, name="table"
    ) -> None:
        super().__init__()
        self.placement, self._map = placement, None
        device = torch.device(device or "cpu") if placement.kind == "device" else torch.device("cpu")
        size = math.prod(shape) * dtype.itemsize
        if placement.kind == "mmap":
            self._map = _mapped_file(placement.path, size, f"{name} of {' x '.join(map(str, shape))} {dtype}")
            values = torch.frombuffer(self._map, dtype=dtype).view(shape)
        else:
            _require_room(size, _free_memory(device), device.type, name)
            values = torch.full(shape, fill, dtype=dtype, device=device)
        self.register_buffer("values", values, persistent=placement.kind != "mmap")

    def _apply(self, fn, recurse=True):
        return super()._apply(fn, recurse) if self.placement.kind == "device" else self

    def read(self, ids: Tensor) -> Tensor:
        """Rows of both directions, (2, B, ...), on the device of `ids` (B,)."""
        return self.values[:, ids.to(self.values.device)].to(ids.device)

    def write(self, direction: int, ids: Tensor, rows: Tensor) -> None:
        """Replace the rows of one direction at `ids` (B,), which differ from each other."""
        place = self.values.device
        self.values[direction, ids.to(place)] = rows.to(place, self.values.dtype)

    def release(self) -> None:
        """Let go of the memory that pages of the file take up in this process; their content stays."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def _mapped_file(path: str | None, size: int, what: str) -> mmap.mmap:
    if not path:
        raise UserError(f"--loss-arg bank_device=mmap: name the file of the {what} with --loss-arg bank_path=FILE")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"--loss-arg bank_path={path}: {folder} is no folder; make it, or give another file")
    existing = os.path.getsize(path) if os.path.exists(path) else 0
    if existing not in (0, size):
        raise UserError(
            f"--loss-arg bank_path={path}: holds {existing} bytes, and the {what} takes {size}; it belongs to other "
            "data or another model: give another file, or delete this one"
        )
    if existing == 0:
        _require_room(size, shutil.disk_usage(folder).free, folder, what)
    with open(path, "a+b") as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _require_room(size: int, free: int, place: str, what: str) -> None:
    if size > free:
        raise UserError(
            f"the {what} takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {place}; use --loss-arg "
            "bank_device=cpu, or bank_device=mmap with bank_path=FILE on a larger disk, or a shorter bank_dtype"
        )
