"""Pictures with captions and classes, by split."""

import csv
import dataclasses
import io
import json
import os
import random

from PIL import Image

from openclip_ext.commands.demo.body import MODEL, MODEL_CONFIG
from openclip_ext.data import digits
from openclip_ext.data.pairs import pairs_from_csv, pairs_from_folder
from openclip_ext.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where pictures come from, and which model is trained on them.

    Attributes:
        pairs: a CSV, or a folder that holds a folder per class; empty: scikit-learn's handwritten digits.
        captions: the CSV's column of captions.
        classes: its column of classes.
        model_config: JSON of an architecture; empty: the demo's small one.
        weights: to start from; empty: from scratch.
        frozen: keep the image tower as it is.
    """

    pairs: str = ""
    captions: str = "title"
    classes: str = ""
    model_config: str = ""
    weights: str = ""
    frozen: bool = False


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture, as bytes or by its path, its caption, and its class."""

    image: bytes | str
    caption: str
    label: int

    def picture(self) -> Image.Image:
        return Image.open(io.BytesIO(self.image) if isinstance(self.image, bytes) else self.image).convert("RGB")


@dataclasses.dataclass(frozen=True)
class Splits:
    """Examples by split (`train`, `val`, `test`), and how classes are named in texts."""

    examples: dict[str, list[Example]]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def load(source: Source) -> Splits:
    """Always the same for a source: of a CSV or a folder a fifth is for the test, a tenth for validation.

    Raises:
        UserError: no such file or column, or no classes.
    """
    if not source.pairs:
        found = {name: [Example(*row) for row in rows] for name, rows in digits.digit_splits().items()}
        return Splits(found, digits.CLASS_NAMES, digits.TEMPLATES)
    pairs, classes = _from_csv(source) if os.path.isfile(source.pairs) else _from_folder(source)
    names = sorted(set(classes))
    if len(names) < 2:
        raise UserError(f"--pairs {source.pairs}: all pictures are of one class; name a column with --classes")
    rows = [Example(image, text, names.index(name)) for (image, text), name in zip(pairs, classes, strict=True)]
    random.Random(0).shuffle(rows)
    test, val = len(rows) // 5, len(rows) * 3 // 10
    split = {"test": rows[:test], "val": rows[test:val], "train": rows[val:]}
    return Splits(split, tuple(names), ("a picture of {}", "{}"))


def _from_csv(source: Source) -> tuple[list[tuple[str, str]], list[str]]:
    pairs = pairs_from_csv(source.pairs, "filepath", source.captions, None)
    with open(source.pairs, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if source.classes not in rows[0]:
        raise UserError(f"--classes {source.classes}: {source.pairs} has the columns {', '.join(rows[0])}; name one")
    return pairs, [row[source.classes] for row in rows]


def _from_folder(source: Source) -> tuple[list[tuple[str, str]], list[str]]:
    """A caption is the name of the picture's folder, which is its class, after `a picture of`."""
    pairs = pairs_from_folder(source.pairs, "a picture of {}")
    return pairs, [os.path.basename(os.path.dirname(path)).replace("_", " ") for path, _ in pairs]


def model_flags(source: Source, folder: str) -> dict[str, object]:
    """Flags of `openclip-ext train` that name the model; the small one's JSON is written to `folder`."""
    if not source.model_config:
        path = os.path.join(folder, f"{MODEL}.json")
        with open(path, "w") as file:
            json.dump(MODEL_CONFIG, file)
        return {"--model": MODEL, "--model-config": path}
    name = os.path.splitext(os.path.basename(source.model_config))[0]
    flags: dict[str, object] = {"--model": name, "--model-config": source.model_config}
    return flags | ({"--pretrained": source.weights} if source.weights else {})
