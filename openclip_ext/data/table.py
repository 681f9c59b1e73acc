"""Pairs that are not in shards: rows of a CSV file, or made up."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from openclip_ext.data.pairs import pairs_from_csv


@dataclasses.dataclass(frozen=True)
class Table:
    """Pairs by row number, which is their sample id.

    Attributes:
        name: for messages.
        rows: (image path, caption); None as a path stands for a black picture.
    """

    name: str
    rows: Sequence[tuple[Any, str]]

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self, row: int) -> dict[str, Any]:
        """What a training row holds besides: numbers, or lists of as many as in every other row."""
        return {}

    def load(self, row: int) -> tuple[Any, str]:
        """The picture in RGB and the caption. Raises whatever its decoder does where it cannot be opened."""
        path, caption = self.rows[row]
        if path is None:
            return Image.new("RGB", (224, 224)), caption
        with Image.open(path) as image:
            return image.convert("RGB"), caption


def csv_table(path: str, image_key: str, caption_key: str, separator: str | None) -> Table:
    """`--dataset-type csv`. Raises UserError: no such file or column, or a row without a value in one."""
    return Table(path, pairs_from_csv(path, image_key, caption_key, separator, check_images=False))


def synthetic_table(num_samples: int) -> Table:
    """`--dataset-type synthetic`: black pictures with one caption, to measure speed with."""
    return Table("synthetic data", [(None, "Dummy caption")] * num_samples)
