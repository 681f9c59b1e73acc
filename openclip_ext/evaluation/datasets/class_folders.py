"""Pictures in one folder per class."""

import os
import re

from torchvision.datasets import ImageFolder

from openclip_ext.errors import UserError


def class_folders(folder: str, flag: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Names of the folders in `folder`, and (file, position of its folder) of all pictures in them.

    In the order in which torchvision's `ImageFolder` numbers them; folders whose names are all numbers in theirs.

    Raises:
        UserError: no such folder, no folder in it, or one without a picture.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder")
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        if empty := re.match(r"Found no valid file for the classes (.*?)\. Supported", reason):
            raise UserError(f"{flag} {folder}: no picture in class folder {empty[1].split(', ')[0]}") from error
        raise UserError(f"{flag} {folder}: holds no class folders; give a folder with one folder per class") from error
    names = found.classes
    if not all(name.isdecimal() for name in names):
        return names, found.samples
    order = sorted(range(len(names)), key=lambda position: int(names[position]))
    position_of = {old: new for new, old in enumerate(order)}
    samples = sorted((position_of[label], path) for path, label in found.samples)
    return [names[old] for old in order], [(path, label) for label, path in samples]
