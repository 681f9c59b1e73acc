"""The current negative of every sample's chain."""

import dataclasses

import torch
from torch import Tensor, nn

from openclip_ext.state.exchange import Gathered, Reader, gather_ids
from openclip_ext.state.table import Placement, SampleTable, place_of_first

DIRECTIONS = 2
EMPTY = -1


@dataclasses.dataclass(frozen=True)
class Held:
    """What a bank holds of own samples, per direction.

    Attributes:
        ids: (2, B), of the states; negative: none yet.
        stored_at: (2, B), the step after which each was stored.
        embedding: (2, B, D); None: the bank keeps none.
    """

    ids: Tensor
    stored_at: Tensor
    embedding: Tensor | None


class NegativeBank(nn.Module):
    """Per sample and direction: the id of the chain's state, its embedding as it was when stored, and when that was.

    `stage` remembers, `commit` writes, once per optimizer step. Every rank stages the updates of all ranks, and writes
    those of the rows that it keeps; with a file, ranks of one machine write the same values to the same place.

    Memory: 2 N (16 + D * bytes per number) bytes; ids and steps are always in memory.

    Args:
        num_samples: N, ids run from 0 to N - 1.
        width: D of the embeddings; 0: keep ids only.
        dtype: of the embeddings.
        placement: of the embeddings; in parts, of all of it.
        device: where the module is.
    """

    def __init__(self, num_samples: int, width: int, dtype: torch.dtype, placement: Placement, device=None) -> None:
        super().__init__()
        beside = dataclasses.replace(placement, kind="device" if placement.kind == "device" else "cpu", path=None)
        shape = (DIRECTIONS, num_samples)
        self.ids = SampleTable(shape, torch.int64, EMPTY, "negative bank", beside, device)
        self.stored_at = SampleTable(shape, torch.int64, 0, "negative bank", beside, device)
        self.embedding = None
        if width:
            in_state = placement.kind != "mmap"  # a checkpoint would hold all of the file
            self.embedding = SampleTable((*shape, width), dtype, 0, "negative bank", placement, device, in_state)
        self._staged: tuple[Tensor, ...] | None = None
        self._reader = Reader([self.ids, self.stored_at, *([] if self.embedding is None else [self.embedding])])

    def check(self, ids: Tensor) -> None:
        """Raises IndexError: an id outside of the bank."""
        self.ids.check(ids)

    def expect(self, ids: Tensor) -> None:
        """Let what is held of own samples (B,), which is read next, come from other ranks. As `Reader.expect`."""
        self._reader.expect(ids)

    def read(self, samples: Gathered) -> Held:
        """What is held of own samples. A collective call where the bank is in parts, unless they were expected."""
        ids, stored_at, *embedding = self._reader.read(samples)
        return Held(ids, stored_at, embedding[0] if embedding else None)

    def read_ids(self, ids: Tensor) -> Tensor:
        """Ids (2, B) of the states of any samples (B,). A collective call where the bank is in parts."""
        return Reader([self.ids]).read(gather_ids(ids, self.ids))[0]

    def stage(self, ids: Tensor, state: Tensor, column_ids: Tensor, texts: Tensor, images: Tensor) -> None:
        """Remember what `commit` will write. Replaces what was staged before.

        Args:
            ids: (G,) samples of the global batch.
            state: (2, G) columns at which their chains are, C of them; -1: where they were.
            column_ids: (C,) samples of the columns.
            texts: (C, D) embeddings of the columns of direction 0.
            images: (C, D) embeddings of those of direction 1.
        """
        self._staged = (ids, state, column_ids, texts, images)

    @torch.no_grad()
    def commit(self, step: Tensor) -> None:
        """Write what was staged, as stored at `step` (). Of a sample that came several times the last one counts.

        A file is stamped first with how many steps what it holds may be of.
        """
        if self._staged is None:
            return
        if self.embedding is not None and self.embedding.stamp is not None:
            self.embedding.stamp = int(step) + 1
        (ids, state, column_ids, *columns), self._staged = self._staged, None
        place, rows = place_of_first(ids), torch.arange(len(ids), device=ids.device)
        last = torch.zeros_like(ids).scatter_reduce(0, place, rows, "amax")[place]
        for direction in range(DIRECTIONS):
            column = state[direction, last]
            moved, column = column >= 0, column.clamp_min(0)
            self.ids.write(direction, ids, column_ids[column], moved)
            self.stored_at.write(direction, ids, step.expand_as(ids), moved)
            if self.embedding is not None:
                self.embedding.write(direction, ids, columns[direction][column], moved)


def bank_bytes(num_samples: int, width: int, dtype: torch.dtype) -> int:
    """What a bank of so many samples takes."""
    return DIRECTIONS * num_samples * (2 * torch.int64.itemsize + width * dtype.itemsize)
