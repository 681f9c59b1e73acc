"""Values by direction and sample id, in the memory of the device, in that of the CPU, or in a file.

A table is whole on every rank, or in parts: then rank k of W keeps the samples from `k ceil(N / W)` on, as many.
Blocks, not every W-th sample: `DTensor` and `torch.distributed.checkpoint` bring blocks to any other number of ranks.
That a batch may lie on few ranks costs little: were it all on one, that one would send half of what each rank receives
when features are gathered.
"""

import dataclasses
import functools
import math
import mmap
import os
import shutil
import weakref
from collections.abc import Callable
from typing import Literal

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a table is kept.

    Attributes:
        kind: `device`: with the module; `cpu`: in the CPU's memory, wherever the module is; `mmap`: in a file, one per
            machine, shared by its ranks.
        path: the file, for `mmap`; its folder exists.
        parts: W, ranks over which it is spread; 1: every rank keeps all of it. A file is never in parts.
        rank: of this process among them.
    """

    kind: Literal["device", "cpu", "mmap"] = "device"
    path: str | None = None
    parts: int = 1
    rank: int = 0


#: Devices that say how many elements of a mask are true without the host waiting for them.
_COUNTS_AT_ONCE = ("cpu",)

#: Bytes behind the values in a file: a number that tells how old they are.
_STAMP = 8


class NoRoomError(ValueError):
    """A table is larger than what is free where it is to be."""


class WrongFileError(ValueError):
    """The file named for a table holds something else."""


class SampleTable(nn.Module):
    """A table `values` of shape (2, N, ...), read and written by sample id.

    In parts, `values` are this rank's, and `state_dict` has them as a `DTensor` of the whole table; it loads such, and
    whole tables.

    Args:
        shape: (2, N, ...), of all ranks.
        dtype: of the values.
        fill: what rows hold before they are written.
        name: for messages.
        placement: where to keep it.
        device: where the module is now.
        in_state: part of `state_dict`. Otherwise, in a file, rows start as zeros that take no room on disk, and those
            of a file that exists are kept.

    Raises:
        NoRoomError: there is no room for it.
        WrongFileError: the file holds a table of another size.
    """

    values: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        fill: float,
        name: str,
        placement: Placement,
        device: torch.device | None = None,
        in_state: bool = True,
    ) -> None:
        super().__init__()
        self.placement, self.name = placement, name
        self.num_samples = shape[1]
        self.block = -(-self.num_samples // placement.parts)
        self._first = min(placement.rank * self.block, self.num_samples)
        shape = (shape[0], min(self.block, self.num_samples - self._first), *shape[2:])
        self._file: int | None = None
        device = torch.device(device or "cpu") if placement.kind == "device" else torch.device("cpu")
        size = math.prod(shape) * dtype.itemsize
        what = f"{name} of {' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
        if placement.kind == "mmap":
            assert placement.path is not None
            self._file = _file(placement.path, size, what)
            weakref.finalize(self, os.close, self._file)
            values = torch.frombuffer(mmap.mmap(self._file, size), dtype=dtype).view(shape)
            if in_state:
                values.fill_(fill)
        else:
            require_room(size, device, what)
            values = torch.full(shape, fill, dtype=dtype, device=device)
        self.register_buffer("values", values, persistent=in_state)

    def _apply(self, fn, recurse=True):
        return super()._apply(fn, recurse) if self.placement.kind == "device" else self

    def check(self, ids: Tensor) -> None:
        """Raises IndexError: an id outside of the table.

        On a GPU the device stops with the message, so that the host need not wait for it.
        """
        outside = (ids < 0) | (ids >= self.num_samples)
        where = f"outside of the {self.name} of {self.num_samples} samples; num_samples must cover the whole data set"
        if outside.is_cuda:
            torch._assert_async(~outside.any(), f"a sample id is {where}")
        elif outside.any():
            raise IndexError(f"sample id {ids[outside][0].item()} is {where}")

    @property
    def stamp(self) -> int | None:
        """The number with which the file was stamped last, 0: with none; None: there is no file."""
        if self._file is None:
            return None
        return int.from_bytes(os.pread(self._file, _STAMP, self.values.numel() * self.values.itemsize), "little")

    @stamp.setter
    def stamp(self, number: int) -> None:
        if self._file is not None:
            os.pwrite(self._file, number.to_bytes(_STAMP, "little"), self.values.numel() * self.values.itemsize)

    def read(self, ids: Tensor) -> Tensor:
        """Rows of both directions, (2, B, ...), on the device of `ids` (B,), all of which are kept here."""
        if self._file is None:
            return self.values[:, ids.to(self.values.device) - self._first].to(ids.device)
        rows = torch.empty((2, len(ids), *self.values.shape[2:]), dtype=self.values.dtype)
        for direction, part in enumerate(rows):
            self._transfer(os.preadv, direction, ids, part)
        return rows.to(ids.device)

    def write(self, direction: int, ids: Tensor, rows: Tensor, chosen: Tensor | None = None) -> None:
        """Replace the rows of one direction, as far as they are kept here.

        Args:
            direction: 0 or 1.
            ids: (B,); equal ones have equal rows.
            rows: (B, ...).
            chosen: (B,) bool, which of them to replace, the same for equal ids; None: all.
        """
        place = self.values.device
        ids, rows = ids.to(place), rows.to(place, self.values.dtype)
        chosen = None if chosen is None else chosen.to(place)
        if self._file is not None:
            if chosen is not None:
                ids, rows = ids[chosen], rows[chosen]
            self._transfer(os.pwritev, direction, ids, rows.contiguous())
            return
        if self.placement.parts > 1:
            if not self.values.shape[1]:
                return
            ids, rows, chosen = self._kept_here(ids, rows, chosen)
        if chosen is not None:  # how many they are is known to the device only
            rows = torch.where(chosen.view(-1, *(1,) * (rows.ndim - 1)), rows, self.values[direction, ids])
        self.values[direction, ids] = rows

    def _kept_here(self, ids: Tensor, rows: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What to write where, and which of it.

        How many rows are kept here, a GPU does not tell without a wait: in place of what other ranks keep, it writes
        the first row that is kept here once more.
        """
        place = ids - self._first
        here = (place >= 0) & (place < self.values.shape[1])
        if ids.device.type in _COUNTS_AT_ONCE:
            return place[here], rows[here], None if chosen is None else chosen[here]
        which = torch.where(here, torch.arange(len(ids), device=ids.device), here.int().argmax())
        here = here[which] if chosen is None else (here & chosen)[which]
        return place[which].clamp(0, self.values.shape[1] - 1), rows[which], here

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key, parts = prefix + "values", self.placement.parts
        if parts > 1 and key in destination:
            shape = (self.values.shape[0], self.num_samples, *self.values.shape[2:])
            stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
            destination[key] = DTensor.from_local(
                destination[key], self._mesh, [Shard(1)], run_check=False, shape=torch.Size(shape), stride=stride
            )

    @functools.cached_property
    def _mesh(self) -> DeviceMesh:
        """Of the ranks over which it is spread."""
        return init_device_mesh(self.values.device.type, (self.placement.parts,))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        key = prefix + "values"
        value = state_dict.get(key)
        if isinstance(value, DTensor):
            state_dict[key] = value.to_local()
        elif value is not None and self.placement.parts > 1 and value.ndim > 1 and value.shape[1] == self.num_samples:
            state_dict[key] = value.narrow(1, self._first, self.values.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _transfer(self, call: Callable, direction: int, ids: Tensor, rows: Tensor) -> None:
        """Between the file and `rows` (B, ...), one call per row.

        Through the mapping, a row that is alone on its pages would cost a page fault, which takes several times as
        long, and pages would pile up in this process.
        """
        if not len(ids):
            return
        size = rows[0].numel() * rows.itemsize
        memory = rows.view(torch.uint8).numpy().data.cast("B")
        first = direction * self.values.shape[1]
        for row, sample in enumerate(ids.tolist()):
            call(self._file, [memory[row * size : (row + 1) * size]], (first + sample) * size)


def describe_parts(module: nn.Module) -> str | None:
    """What of a module's state is spread over ranks, for the log; None: nothing."""
    tables = [part for part in module.modules() if isinstance(part, SampleTable) and part.placement.parts > 1]
    if not tables:
        return None
    each = sum(table.values.numel() * table.values.itemsize for table in tables) / 1e9
    names = ", ".join(dict.fromkeys(table.name for table in tables))
    return f"{names}: spread over {tables[0].placement.parts} processes, {each:.3g} GB on this one"


def place_of_first(ids: Tensor) -> Tensor:
    """For each of `ids` (B,) a number below B, the same for equal ones and different for others, (B,)."""
    return torch.searchsorted(ids.sort().values, ids)


def require_room(size: int, device: torch.device, what: str) -> None:
    """Raises NoRoomError: `size` bytes for `what` are more than is free in the device's memory."""
    _require_room(size, memory(device)[0], device.type, what)


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes of the device's memory that are free, and that there are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _file(path: str, size: int, what: str) -> int:
    existing = os.path.getsize(path) if os.path.exists(path) else 0
    if existing not in (0, size, size + _STAMP):
        raise WrongFileError(f"{path}: holds {existing} bytes, and the {what} takes {size}")
    if existing == 0:
        folder = os.path.dirname(os.path.abspath(path))
        _require_room(size, shutil.disk_usage(folder).free, folder, what)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    os.truncate(file, size + _STAMP)
    return file


def _require_room(size: int, free: int, place: str, what: str) -> None:
    if size > free:
        raise NoRoomError(f"the {what} takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {place}")
