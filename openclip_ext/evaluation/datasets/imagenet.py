"""Folders of ImageNet's classes: ImageNet itself, and the sets that hold its classes or a part of them."""

import functools

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.evaluation.datasets.labelled import LabelledFiles, LabelledSet, class_folders

NUM_CLASSES = 1000


def imagenet_folder(folder: str, flag: str, classes: str | None = None) -> LabelledSet:
    """Pictures in class folders named by wnid, or by class index as ImageNet-V2's are; OpenCLIP's names and templates.

    Args:
        folder: one folder per class.
        flag: how it was named, for messages.
        classes: which classes an image may be taken for where the folder has not all: `present`, those in the folder;
            `all`, ImageNet's 1,000; None: the folder must have all.

    Raises:
        UserError: no such folder, a folder in it that is no class or holds no picture, or too few of them.
    """
    names, samples = class_folders(folder, flag)
    index_of = {name: _class_index(name, folder, flag) for name in names}
    if len(names) != NUM_CLASSES and classes is None:
        raise UserError(
            f"{flag} {folder}: holds {len(names)} class folders and ImageNet has {NUM_CLASSES}; give the folder that "
            "holds all wnid folders, or choose among those that are there with --classes present"
        )
    class_names, templates = upstream.imagenet_names()
    present = sorted(index_of.values())
    chosen = present if classes == "present" else range(NUM_CLASSES)
    position_of = {index: position for position, index in enumerate(chosen)}
    positions = [position_of[index_of[name]] for name in names]
    pictures = LabelledFiles([(path, positions[label]) for path, label in samples])
    note = ""
    if len(names) < NUM_CLASSES:
        them = "those" if classes == "present" else f"all {NUM_CLASSES:,}"
        note = f"images of {len(names)} of ImageNet's classes, each taken for one of {them} (--classes {classes})"
    return LabelledSet(pictures, [class_names[index] for index in chosen], templates, note)


def _class_index(name: str, folder: str, flag: str) -> int:
    if name.isdecimal() and int(name) < NUM_CLASSES:
        return int(name)
    try:
        return wnids()[name]
    except KeyError as error:
        raise UserError(
            f"{flag} {folder}: its folder {name} is neither a wnid of ImageNet's {NUM_CLASSES} classes, such as "
            "n01440764, nor a class index"
        ) from error


@functools.cache
def wnids() -> dict[str, int]:
    """WordNet ids of ImageNet's classes, to class indices: the order of OpenCLIP's class names (timm's list)."""
    from timm.data import ImageNetInfo

    return {wnid: index for index, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
