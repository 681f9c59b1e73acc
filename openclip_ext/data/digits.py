"""The demo set: scikit-learn's 1,797 handwritten digits with captions that say what can be seen."""

import io
import random

import numpy as np
from PIL import Image

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a handwritten {}", "the digit {}", "the number {} in ink", "a picture of a {}")
IMAGE_SIZE = 32


def digit_splits(seed: int = 0) -> dict[str, list[tuple[bytes, str, int]]]:
    """`train` (70 %), `val` (10 %) and `test` (20 %): lists of (PNG bytes, caption, class index)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    attributes = _attributes(digits.images)
    rng = random.Random(seed)
    splits: dict[str, list] = {"train": [], "val": [], "test": []}
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if index % 10 == 0 else "test" if index % 10 in (1, 2) else "train"
        caption = _caption(CLASS_NAMES[label], [names[index] for names in attributes], rng)
        splits[split].append((_png(image), caption, int(label)))
    return splits


def _attributes(images: np.ndarray) -> list[list[str]]:
    """Stroke, width and slant of each 8×8 image in words, by terciles over the set."""
    rows, columns = np.mgrid[:8, :8]
    mass = images.sum((1, 2))
    x = (images * columns).sum((1, 2)) / mass
    y = (images * rows).sum((1, 2)) / mass
    dx, dy = columns - x[:, None, None], rows - y[:, None, None]
    width = (images * dx**2).sum((1, 2)) / mass
    slant = (images * dx * dy).sum((1, 2)) / mass
    return [
        _terciles(mass, ("thin", "", "bold")),
        _terciles(width, ("narrow", "", "wide")),
        _terciles(slant, ("leaning right", "upright", "leaning left")),
    ]


def _terciles(values: np.ndarray, names: tuple[str, str, str]) -> list[str]:
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    return [names[int(value > low) + int(value > high)] for value in values]


def _caption(name: str, attributes: list[str], rng: random.Random) -> str:
    """A template filled with the digit and its attributes, each of which is mentioned three times in four."""
    stroke, width, slant = (word if rng.random() < 0.75 else "" for word in attributes)
    subject = " ".join(word for word in (stroke, width, name) if word)
    return " ".join([rng.choice(TEMPLATES).format(subject), slant]).strip()


def _png(image: np.ndarray) -> bytes:
    picture = Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR
    )
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
