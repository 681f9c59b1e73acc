"""Folders to write to."""

import os

from openclip_ext.errors import UserError


def make_out_folder(path: str | os.PathLike) -> None:
    """Make the folder of `--out` where there is none. Raises UserError: that cannot be done."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be made a folder ({error.strerror}); give another") from error
