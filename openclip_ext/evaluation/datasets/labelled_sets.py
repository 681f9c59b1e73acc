"""Labelled sets on disk: any folder or shards with class names and templates, and CIFAR."""

import os

from torch.utils.data import IterableDataset

from openclip_ext.data.listing import expand_urls, list_shards
from openclip_ext.errors import UserError
from openclip_ext.evaluation.datasets.class_folders import class_folders
from openclip_ext.evaluation.datasets.labelled import LabelledFiles, LabelledSet, LabelledShards
from openclip_ext.evaluation.datasets.prompts import CIFAR_TEMPLATES, Template, read_class_names, read_templates

#: What clip_benchmark calls these files beside its shards.
CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


def labelled_set(path: str, flag: str, class_names: str | None, templates: str | None) -> LabelledSet:
    """A folder with one folder of pictures per class, or shards whose samples have a picture and a `cls` file.

    Args:
        path: that folder; or a folder of shards, a pattern, or a folder whose `test` folder holds the shards, as
            clip_benchmark's do.
        flag: how it was named, for messages.
        class_names: a file with a name per line, by class index, which in class folders is their order; None:
            `classnames.txt` in the folder, or the names of class folders.
        templates: `openai`, `simple` or a file; None: `zeroshot_classification_templates.txt` in the folder, or
            `openai`.

    Raises:
        UserError: no such data, a file that does not fit, or another number of names than of class folders.
    """
    beside = os.path.join(path, TEMPLATES_FILE)
    found = templates or (beside if os.path.isfile(beside) else "openai")
    prompts = read_templates(found, "--templates")
    beside = os.path.join(path, CLASS_NAMES_FILE)
    names_file = class_names or (beside if os.path.isfile(beside) else None)
    names = read_class_names(names_file, "--class-names") if names_file else None
    shards = _shard_source(path, flag)
    if shards is not None:
        listing = list_shards(shards, flag=flag)
        if names is None:
            raise UserError(f"{flag} {path}: shards hold class indices only; give their names with --class-names FILE")
        return LabelledSet(LabelledShards(listing.urls, len(names)), names, prompts)
    folders, samples = class_folders(path, flag)
    if names is not None and len(names) != len(folders):
        raise UserError(
            f"--class-names {names_file}: has {len(names)} names, and {flag} {path} has {len(folders)} class folders"
        )
    return LabelledSet(LabelledFiles(samples), names or [name.replace("_", " ") for name in folders], prompts)


def _shard_source(path: str, flag: str) -> str | None:
    """What names the shards, in the folders that braces mean if need be; None: there are none.

    Raises UserError: braces do not pair.
    """
    if not os.path.isdir(path) and path.endswith(".tar"):
        return path
    parts = [path] if os.path.isdir(path) else expand_urls(path, flag)
    sources = [_shard_folder(part) for part in parts]
    return None if None in sources else "::".join(filter(None, sources))


def _shard_folder(path: str) -> str | None:
    for folder in (path, os.path.join(path, "test")):
        if os.path.isdir(folder) and any(name.endswith(".tar") for name in os.listdir(folder)):
            return folder
    return None


def cifar(folder: str, flag: str, num_classes: int) -> LabelledSet:
    """The test images of CIFAR-10 or CIFAR-100, as torchvision keeps them, with the names in its files.

    Args:
        folder: what holds `cifar-10-batches-py` or `cifar-100-python`, or that folder itself.
        flag: how it was named, for messages.
        num_classes: 10 or 100.

    Raises:
        UserError: they are not there, or not whole.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {10: CIFAR10, 100: CIFAR100}[num_classes]
    root, last = os.path.split(os.path.abspath(folder))
    root = root if last == kind.base_folder else folder
    try:  # these files are pickles: torchvision opens them only if their checksums are the published ones
        images = kind(root, train=False, download=False)
    except RuntimeError as error:
        raise UserError(
            f"{flag} {folder}: does not hold torchvision's {kind.base_folder}, or not all of it; unpack "
            f"{kind.filename} in it"
        ) from error
    return LabelledSet(images, [name.replace("_", " ") for name in images.classes], CIFAR_TEMPLATES)


def clip_benchmark_set(name: str, folder: str, flag: str) -> LabelledSet:
    """A classification set of clip_benchmark, with its class names and templates.

    Args:
        name: as clip_benchmark knows it.
        folder: where the set is; clip_benchmark downloads what it can where it is not.
        flag: how it was named, for messages.

    Raises:
        UserError: clip_benchmark is not installed, has no such set for classification, or cannot get it.
    """
    try:
        from clip_benchmark.datasets.builder import build_dataset
    except ImportError as error:
        raise UserError(
            f"{flag} {name}: clip_benchmark cannot be imported ({error}); pip install 'openclip-ext[eval]'"
        ) from error
    try:
        dataset = build_dataset(name, root=folder, transform=None, split="test", download=True)
    except Exception as error:  # its sets each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{flag} {name}={folder}: clip_benchmark cannot open it ({reason})") from error
    names, templates = getattr(dataset, "classes", None), getattr(dataset, "templates", None)
    stream = isinstance(dataset, IterableDataset)
    if not names or not isinstance(templates, list) or stream or name.endswith("multilabel"):
        raise UserError(f"{flag} {name}: is no set of clip_benchmark with pictures of one class each; use another")
    return LabelledSet(dataset, names, [Template(template) for template in templates])
