"""A running rate per sample and direction."""

import math

import torch
from torch import Tensor

from openclip_ext.ops.pairs import PairBatch
from openclip_ext.state.table import Placement, SampleTable, place_of_first


class RateTable(SampleTable):
    """Running averages `R_i <- (1 - g) R_i + g rho_i` of positive rates, one per sample and direction, kept as logs.

    The first visit of a sample sets `R_i = rho_i`. `blend` computes, `stage` remembers, `commit` writes: a loss that
    is evaluated several times in one optimizer step, or in a step that is then skipped, changes nothing before
    `commit`. Every rank holds the whole table and stages the updates of all ranks, so any rank's copy is complete.

    `values` (2, N) holds the logs; NaN: not visited yet.

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

    @torch.no_grad()
    def blend(self, ids: Tensor, log_estimate: Tensor, gamma: float) -> Tensor:
        """log of the average after this visit.

        Args:
            ids: (B,) sample ids.
            log_estimate: (2, B), log of this visit's estimates.
            gamma: weight g of this visit, in (0, 1].

        Returns:
            (2, B), in the dtype of `log_estimate`.

        Raises:
            IndexError: an id outside of the table.
        """
        self.check(ids, "rate table")
        old = self.read(ids).to(log_estimate.dtype)
        keep = math.log1p(-gamma) if gamma < 1 else -math.inf
        blended = torch.logaddexp(old + keep, log_estimate + math.log(gamma))
        return torch.where(old.isnan(), log_estimate, blended)

    def visit(self, pairs: PairBatch, log_estimate: Tensor, gamma: float) -> Tensor:
        """log of the averages of own anchors after this visit, (2, B); those of all ranks are staged.

        A collective call over several ranks. Arguments and errors as of `blend`.
        """
        log_rate = self.blend(pairs.ids, log_estimate, gamma)
        self.stage(pairs.all_ids, pairs.gathered(log_rate))
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
        mean = torch.where(mean.isfinite(), mean, self.read(ids))
        for direction, rows in enumerate(mean):
            self.write(direction, ids, rows)
