"""Handwritten digits as files."""

from openclip_ext.data import digits


def class_folders(root, split, count, skip=0):
    """The first images of a split of the digits, after `skip`, as one folder per class."""
    for number, (image, _, label) in enumerate(digits.digit_splits()[split][skip : skip + count]):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}.png").write_bytes(image)
    return root
