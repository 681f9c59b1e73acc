"""Sample ids for streams without an index: the order in which samples are met, told apart by hashes of their keys."""

import numpy as np
import torch
from torch import Tensor


class HashIds:
    """Numbers 63-bit hashes from 0 on, in the order in which they come: equal hashes, equal numbers.

    Who numbers the same hashes in the same order has the same numbers: of several ranks, each is to number those of
    all. Memory: 14 bytes per number that there is room for (20 from 2^31 on).

    Args:
        num_ids: how many different hashes there is room for. Further ones share the numbers of others.

    Attributes:
        collisions: visits, so far, of hashes that share another's number.
    """

    def __init__(self, num_ids: int) -> None:
        self.num_ids = num_ids
        self.collisions = 0
        self._count = 0
        self._hashes = np.empty(num_ids, np.int64)  # by number
        # An open hash table with linear probing, so never full: numbers by place, -1 where there is none.
        number = np.int32 if num_ids < 2**31 else np.int64
        self._places = np.full(num_ids + num_ids // 2 + 1, -1, number)

    @property
    def hashes(self) -> Tensor:
        """(n,) those that have numbers of their own, in that order: called with them, a new instance goes on alike."""
        return torch.from_numpy(self._hashes[: self._count].copy())

    def __call__(self, hashes: Tensor) -> Tensor:
        """(B,) hashes to (B,) numbers; those not met yet get the next ones."""
        values = hashes.numpy()
        ids = self._find(values)
        if (ids == -1).any():
            self._add(values[ids == -1])
            ids = self._find(values)
        sharing = ids == -1
        self.collisions += int(sharing.sum())
        return torch.from_numpy(np.where(sharing, values % self.num_ids, ids))

    def _find(self, values: np.ndarray) -> np.ndarray:
        """The numbers of hashes, -1 where one has none."""
        ids = np.full(len(values), -1, np.int64)
        rows, places = np.arange(len(values)), values % len(self._places)
        while len(rows):
            numbers = self._places[places]
            taken = numbers != -1
            found = taken & (self._hashes[numbers] == values[rows])
            ids[rows[found]] = numbers[found]
            further = taken & ~found
            rows, places = rows[further], (places[further] + 1) % len(self._places)
        return ids

    def _add(self, values: np.ndarray) -> None:
        """Give hashes that have none the next numbers, as long as there is room."""
        first = np.sort(np.unique(values, return_index=True)[1])
        new = values[first][: self.num_ids - self._count]
        numbers = self._count + np.arange(len(new))
        self._hashes[numbers] = new
        self._count += len(new)
        places = new % len(self._places)
        while len(numbers):
            free = self._places[places] == -1
            self._places[places[free]] = numbers[free]
            waiting = self._places[places] != numbers  # where it was taken, or two wanted it
            numbers, places = numbers[waiting], (places[waiting] + 1) % len(self._places)
