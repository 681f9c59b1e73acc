"""A running rate per sample and direction."""

import math

import torch
from torch import Tensor

from openclip_ext.ops.pairs import PairBatch
from openclip_ext.state.exchange import Reader
from openclip_ext.state.table import Placement, SampleTable, place_of_first


class RateTable(SampleTable):
    """Running averages `R_i <- (1 - g) R_i + g rho_i` of positive rates, one per sample and direction, kept as logs.

    The first visit of a sample sets `R_i = rho_i`. `visit` computes and `stage` remembers, `commit` writes: a loss that
    is evaluated several times in one optimizer step, or in a step that is then skipped, changes nothing before
    `commit`. Every rank stages the updates of all ranks, and writes those of the rows that it keeps.

    `values` (2, N) holds the logs; NaN: not visited yet.

    Attributes:
        first_visits: (), the share of the samples of the last visit, on all ranks, that had not been visited before.

    Args:
        num_samples: N, how many samples there are; ids run from 0 to N - 1. Memory: 8 N bytes.
        placement: where to keep it.
        device: where the module is.

    Raises:
        NoRoomError, WrongFileError: as of `SampleTable`.
    """

    def __init__(
        self, num_samples: int, placement: Placement | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__((2, num_samples), torch.float32, math.nan, "rate table", placement or Placement(), device)
        self._staged: tuple[Tensor, Tensor] | None = None
        self._reader = Reader([self])
        self.first_visits = torch.tensor(math.nan)

    def expect(self, ids: Tensor) -> None:
        """Let the rates of own samples (B,), which the next visit is of, come from other ranks. As `Reader.expect`."""
        self._reader.expect(ids)

    @torch.no_grad()
    def visit(self, pairs: PairBatch, log_estimate: Tensor, gamma: float) -> Tensor:
        """log of the averages of own anchors after this visit; those of all ranks are staged.

        A collective call over several ranks.

        Args:
            pairs: the global batch.
            log_estimate: (2, B), log of this visit's estimates.
            gamma: weight g of this visit, in (0, 1].

        Returns:
            (2, B), in the dtype of `log_estimate`.

        Raises:
            IndexError: an id outside of the table.
        """
        self.check(pairs.all_ids)
        (old,) = self._reader.read(pairs)
        log_rate = blended(old, log_estimate, gamma)
        gathered = pairs.gathered(torch.cat([log_rate, old[:1].isnan()]))
        self.first_visits = gathered[2].float().mean()
        self.stage(pairs.all_ids, gathered[:2])
        return log_rate

    def stage(self, ids: Tensor, log_rate: Tensor) -> None:
        """Remember what `commit` will write: (G,) ids and (2, G) log rates. Replaces what was staged before."""
        self._staged = (ids, log_rate)

    @torch.no_grad()
    def commit(self) -> None:
        """Write the staged rates. An id that was staged several times gets the mean of its rates.

        Rates that are not finite are left out. Without anything staged, nothing happens.
        """
        if self._staged is None:
            return
        (ids, log_rate), self._staged = self._staged, None
        place = place_of_first(ids).expand(2, -1)
        largest = torch.full_like(log_rate, -math.inf).scatter_reduce(1, place, log_rate, "amax").gather(1, place)
        total = torch.zeros_like(log_rate).scatter_add(1, place, (log_rate - largest).exp())
        count = torch.zeros_like(log_rate).scatter_add(1, place, torch.ones_like(log_rate))
        mean = (largest + (total / count).gather(1, place).log()).to(self.values.dtype)
        for direction, rows in enumerate(mean):
            self.write(direction, ids, rows, rows.isfinite())


def blended(old: Tensor, log_estimate: Tensor, gamma: float) -> Tensor:
    """log of `(1 - g) R + g rho`, elementwise, in the dtype of `log_estimate`.

    Args:
        old: log R; NaN: there is none, and rho is returned.
        log_estimate: log rho.
        gamma: g, in (0, 1].
    """
    old = old.to(log_estimate.dtype)
    keep = math.log1p(-gamma) if gamma < 1 else -math.inf
    both = torch.logaddexp(old + keep, log_estimate + math.log(gamma))
    return torch.where(old.isnan(), log_estimate, both)


def rate_bytes(num_samples: int) -> int:
    """What a table of so many samples takes."""
    return 2 * num_samples * torch.float32.itemsize
