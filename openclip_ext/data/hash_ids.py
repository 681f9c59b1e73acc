"""Sample ids for streams without an index: hashes of the samples' keys, folded into a table."""

import torch
from torch import Tensor


class HashIds:
    """Maps 63-bit hashes into [0, table_size) and counts how many samples share a place with another.

    Memory: 8 bytes per place.
    """

    def __init__(self, table_size: int) -> None:
        self.table_size = table_size
        self.collisions = 0
        self._owner = torch.full((table_size,), -1, dtype=torch.int64)

    def __call__(self, hashes: Tensor) -> Tensor:
        """(B,) hashes to (B,) ids. A place belongs to the first sample that came; any other counts as a collision."""
        ids = hashes % self.table_size
        owner = self._owner[ids]
        free = owner == -1
        self._owner[ids[free]] = hashes[free]
        self.collisions += int((self._owner[ids] != hashes).sum())
        return ids
