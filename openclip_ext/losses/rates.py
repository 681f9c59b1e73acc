"""Pair losses that remember a rate per sample and direction."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from openclip_ext.losses.base import PairLoss
from openclip_ext.losses.context import LossContext
from openclip_ext.losses.placement import Shard, named_flags, place, require_placement, shard_option
from openclip_ext.losses.recent import RecentOptions
from openclip_ext.ops.pair_sums import log_mean_ratio
from openclip_ext.ops.pairs import PairBatch
from openclip_ext.options import option
from openclip_ext.state.rate_table import RateTable, rate_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateOptions(RecentOptions):
    """Part of the options of a loss that remembers rates."""

    rate_device: Literal["device", "cpu", "mmap"] = option(
        "device", "where the rates are kept: with the model, in the CPU's memory, or in a file"
    )
    rate_path: str | None = option(None, "the file, for rate_device=mmap")
    rate_shard: Shard = shard_option("the rates")

    def __post_init__(self) -> None:
        # Found wrong as early as other options.
        require_placement("rate", self.rate_device, self.rate_path, self.rate_shard)


class RateLoss(PairLoss):
    """A pair loss in which a running average takes the place of the batch's own estimate of an anchor's normaliser.

    `R_i <- (1 - g) R_i + g rho_i` per sample and direction, rho_i the estimate of the batch. A subclass says what rho
    and g are.

    Args:
        options: with where rates are kept.
        context: as of `Loss`.

    Raises:
        UserError: there is no room for the rates, or their file is another's.
    """

    def __init__(self, options: RateOptions, context: LossContext) -> None:
        super().__init__(options, context)
        num_ids = context.require_num_ids()
        with named_flags("rate"):
            size, shard = rate_bytes(num_ids), options.rate_shard
            placement = place(context, size, shard, options.rate_device, options.rate_path)
            self.rates = RateTable(num_ids, placement, context.device)

    def expect(self, sample_ids: Tensor) -> None:
        """Let the rates of samples (B,) come from the ranks that keep them."""
        self.rates.expect(sample_ids)

    def estimate(self, log_mean: Tensor) -> Tensor:
        """log rho of own anchors, (2, B), from the log of their mean ratio."""
        return log_mean

    @property
    def batch_weight(self) -> float:
        """g, the weight of the current batch, in (0, 1]."""
        raise NotImplementedError

    def log_weight(self, log_rate: Tensor) -> Tensor:
        """log weight of an anchor whose log rate is `log_rate`; elementwise."""
        raise NotImplementedError

    def terms(self, log_mean: Tensor, log_count: Tensor) -> tuple[Tensor, Tensor]:
        """`log rho` and its weight: what anchors without a memory are worth, such as stored ones."""
        log_rate = self.estimate(log_mean)
        return log_rate, self.log_weight(log_rate)

    def anchor_terms(self, pairs: PairBatch, log_mean: Tensor) -> tuple[Tensor, Tensor]:
        """`log R` after this visit, and its weight."""
        log_rate = self.visit(pairs, log_mean)
        return log_rate, self.log_weight(log_rate)

    def visit(self, pairs: PairBatch, log_mean: Tensor) -> Tensor:
        """log R of own anchors after this visit, (2, B), which is staged."""
        return self.rates.visit(pairs, self.estimate(log_mean), self.batch_weight)

    @torch.no_grad()
    def warm_start(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, sample_ids: Tensor, **extra: Tensor
    ) -> None:
        """Write the batch's own rates before training, as at a first visit; no step is counted.

        The memory counts only where g is below 1.
        """
        pairs = self.gather(image_features, text_features, logit_scale, sample_ids)
        self.visit(pairs, log_mean_ratio(pairs))
        self.rates.commit()

    def commit(self) -> None:
        """Write the rates of this step's samples, and its pairs."""
        super().commit()
        self.rates.commit()
