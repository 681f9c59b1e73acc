"""Where a loss keeps a table: its options `<option>_device` and `<option>_path`, and what is said of wrong ones."""

import contextlib
import os
from collections.abc import Iterator

from openclip_ext.errors import UserError
from openclip_ext.state.table import NoRoomError, WrongFileError


def require_placement(option: str, device: str, path: str | None) -> None:
    """Raises UserError: `mmap` without a file, or with one in a folder that does not exist."""
    if device != "mmap":
        return
    flag = f"--loss-arg {option}"
    if not path:
        raise UserError(f"{flag}_device=mmap: name the file with {flag}_path=FILE")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"{flag}_path={path}: {folder} is no folder; make it, or give another file")


@contextlib.contextmanager
def named_flags(option: str) -> Iterator[None]:
    """Errors of a table made in the block, worded with the options that mend them.

    Raises:
        UserError: there is no room for the table, or its file is another table's.
    """
    try:
        yield
    except NoRoomError as error:
        raise UserError(
            f"{error}; use --loss-arg {option}_device=cpu, or {option}_device=mmap with {option}_path=FILE on a larger "
            "disk"
        ) from error
    except WrongFileError as error:
        raise UserError(
            f"--loss-arg {option}_path={error}; it belongs to other data or another model: give another file, or "
            "delete this one"
        ) from error
