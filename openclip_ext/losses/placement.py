"""Where a loss keeps a table: its options `<option>_device`, `_path` and `_shard`, and what is said of wrong ones."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist

from openclip_ext.errors import UserError
from openclip_ext.losses.context import LossContext
from openclip_ext.options import option
from openclip_ext.state.table import NoRoomError, Placement, WrongFileError, memory

Shard = bool | Literal["auto"]

#: The share of a rank's memory above which `auto` spreads a table over ranks.
_LARGE = 0.1


def shard_option(what: str) -> Any:
    """The option `<option>_shard`; `what` is kept, for its description."""
    return option(
        "auto",
        f"spread {what} over ranks, true or false; auto: in training, if it takes over a tenth of a rank's memory",
    )


def require_placement(name: str, device: str, path: str | None, shard: Shard) -> None:
    """Raises UserError: `mmap` without a file, with one in a folder that does not exist, or in parts."""
    if device != "mmap":
        return
    flag = f"--loss-arg {name}"
    if not path:
        raise UserError(f"{flag}_device=mmap: name the file with {flag}_path=FILE")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"{flag}_path={path}: {folder} is no folder; make it, or give another file")
    if shard is True:
        raise UserError(
            f"{flag}_shard=true: with {name}_device=mmap the ranks of a machine share one file; drop one of them"
        )


def place(
    context: LossContext, size: int, shard: Shard, kind: Literal["device", "cpu", "mmap"] = "device",
    path: str | None = None,
) -> Placement:  # fmt: skip
    """Where a table of `size` bytes goes, as all ranks find. A collective call over several.

    Args:
        context: of the loss.
        size: of the whole table.
        shard: whether it is spread over ranks; `auto`: where the caller can and it is large.
        kind, path: as of `Placement`.

    Raises:
        UserError: ranks disagree on how many samples there are, or their group is not there yet.
        NoRoomError: a rank has no room for what it would keep.
    """
    parts = context.world_size
    if parts > 1 and not dist.is_initialized():
        if shard is True:
            raise UserError(
                "a loss whose state is spread over ranks needs their group: call torch.distributed.init_process_group "
                "before it is built"
            )
        parts = 1
    if parts == 1:
        return Placement(kind, path)
    device = context.device if kind == "device" else torch.device("cpu")
    free, total = _memory_of_ranks(context, device)
    if kind == "mmap":
        return Placement(kind, path)
    if shard is False or (shard == "auto" and not (context.shards_state and size > _LARGE * min(total))):
        parts = 1
    for rank, room in enumerate(free):
        if size / parts > room:
            raise NoRoomError(
                f"a state of {size / 1e9:.1f} GB takes {size / parts / 1e9:.1f} GB on each rank, and "
                f"{room / 1e9:.1f} GB are free on rank {rank}"
            )
    return Placement(kind, path, parts, context.rank if parts > 1 else 0)


def _memory_of_ranks(context: LossContext, device: torch.device) -> tuple[list[int], list[int]]:
    """Bytes for each rank that are free, and that there are. Raises UserError: ranks have other numbers of samples."""
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = torch.tensor([context.require_num_ids(), *(size // sharing for size in memory(device))])
    of_ranks = own.to(context.device).new_empty(context.world_size, 3)
    dist.all_gather_into_tensor(of_ranks, own.to(context.device)[None])
    samples, free, total = of_ranks.T.tolist()
    for rank, number in enumerate(samples):
        if number != samples[0]:
            raise UserError(
                f"rank 0 has {samples[0]:,} samples and rank {rank} has {number:,}: a loss that remembers samples "
                "needs the same on all; give every process the same --train-data, of which each reads its share"
            )
    return free, total


@contextlib.contextmanager
def named_flags(name: str) -> Iterator[None]:
    """Errors of a table made in the block, worded with the options that mend them.

    Raises:
        UserError: there is no room for the table, or its file is another table's.
    """
    try:
        yield
    except NoRoomError as error:
        raise UserError(
            f"{error}; use --loss-arg {name}_device=cpu, or {name}_device=mmap with {name}_path=FILE on a larger disk, "
            f"or {name}_shard=true with more processes"
        ) from error
    except WrongFileError as error:
        raise UserError(
            f"--loss-arg {name}_path={error}; it belongs to other data or another model: give another file, or "
            "delete this one"
        ) from error
