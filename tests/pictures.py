"""Handwritten digits as files."""

import io
import tarfile

from openclip_ext.data import digits


def class_folders(root, split, count, skip=0):
    """The first images of a split of the digits, after `skip`, as one folder per class."""
    for number, (image, _, label) in enumerate(digits.digit_splits()[split][skip : skip + count]):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}.png").write_bytes(image)
    return root


def write_shard(path, samples):
    """A shard of samples: dicts of a file's extension to its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for number, sample in enumerate(samples):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{number:04}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def cls_shards(folder, *counts):
    """Digits as clip_benchmark keeps sets, so many in each shard."""
    rows = iter(digits.digit_splits()["test"])
    for number, count in enumerate(counts):
        samples = [{"png": image, "cls": str(label).encode()} for image, _, label in (next(rows) for _ in range(count))]
        write_shard(folder / f"{number}.tar", samples)
    (folder / "classnames.txt").write_text("\n".join(digits.CLASS_NAMES))
    return folder
