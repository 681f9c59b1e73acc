"""The contrastive loss over the whole training set, made decomposable by Gamma auxiliary variables."""

import dataclasses
import logging
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from openclip_ext.losses.context import LossContext
from openclip_ext.losses.rates import RateLoss, RateOptions
from openclip_ext.losses.recent import recent_batches, recent_needs
from openclip_ext.ops.counter_random import log_gamma_mean
from openclip_ext.ops.pairs import PairBatch
from openclip_ext.options import option
from openclip_ext.registry import LossSpec

logger = logging.getLogger("openclip_ext")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RateOptions):
    recent_batches: int = recent_batches(16)
    gamma: float | Literal["auto"] = option(
        "auto",
        "weight of the current batch in the rate memory, at the end of its schedule; auto: by how often a sample comes",
        allowed="in (0, 1]",
        check=lambda g: g == "auto" or 0 < g <= 1,
    )
    gamma_decay: float = option(
        0.5,
        "share of training over which the weight falls from 1 to gamma along a cosine; 0 with a warm start",
        allowed="in [0, 1]",
        check=lambda share: 0 <= share <= 1,
    )
    draws: int = option(
        0,
        "m, Gamma draws averaged per anchor and step; 0: their conditional mean",
        allowed=">= 0",
        check=lambda m: m >= 0,
    )
    max_weight: float | None = option(
        None,
        "c: an anchor's weight is kept between 1/c and c times what the batch alone would give it; none: not bounded",
        allowed=">= 1",
        check=lambda c: c is None or c >= 1,
    )
    decoupled: bool = option(False, "leave the positive out of the denominator")
    negatives: int = option(
        0, "K, negatives in the target loss; 0: all others of the training set", allowed=">= 0", check=lambda k: k >= 0
    )


def auto_gamma(visits: float) -> float:
    """The weight of the current batch for a run that sees each sample `visits` times: `min(1, 4.177 visits^-0.7265)`.

    1, that is no memory, up to 7 visits; .78 for 10, .47 for 20. Where samples come rarely, their rates are stale.

    Source: the rule that FastCLIP's authors give for their own method (README of DRRho-CLIP).
    """
    return min(1.0, 4.177 * max(visits, 1e-9) ** -0.7265)


class GammaDecompLoss(RateLoss):
    """Target: `L = mean_i log(iota + K Z_i)`, `Z_i = mean_{j != i} r_ij` over all N - 1 others, r_ij = exp(q_ij).

    q_ij = s_ij - s_ii, directions are averaged, iota is 1, or 0 if `decoupled`. Since `1/x = integral of exp(-u x) du`,
    an auxiliary variable per anchor turns the log into a plain sum over pairs, whose gradient any batch estimates
    without bias:

        rate      R_i <- (1 - g) R_i + g (iota + K mean_{j in batch} r_ij)      per sample and direction
        E-step    u_i ~ Gamma(shape m, rate m R_i), or its mean 1 / R_i when draws = 0
        M-step    gradient  u_i K mean_j r_ij grad q_ij,  u_i and r_ij held constant

    The value returned is the mean of `log R_i`, the current estimate of L. With `gamma=auto` a run that sees a sample
    up to seven times keeps no memory of rates: it is `batch_corrected`, with recent pairs where they are fresh.

    Source: Chen et al., "Why do We Need Large Batchsizes in Contrastive Learning? A Gradient-Bias Perspective",
    NeurIPS 2022. The rate memory and its schedule follow SogCLR (ICML 2022) and FastCLIP (2024).
    """

    steps_taken: Tensor

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__(options, context)
        self.log_negatives = context.log_negatives(options.negatives)
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))
        self._time: tuple[int, int] | None = None
        self._visits: float | None = None

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """The weight of the batch follows a cosine from 1 to `gamma` over the first `gamma_decay` of training."""
        self._time = step, total_steps

    @property
    def scheduled(self) -> bool:
        """Whether the weight of the current batch changes over training."""
        return self.options.gamma != 1 and self.options.gamma_decay > 0

    @property
    def gamma(self) -> float:
        """The weight at the end; of `auto`, 1 as long as it is not known how often a sample will come."""
        if self.options.gamma != "auto":
            return self.options.gamma
        return 1.0 if self._visits is None else auto_gamma(self._visits)

    @property
    def batch_weight(self) -> float:
        if self._time is None or self.options.gamma_decay == 0:
            return self.gamma
        step, total_steps = self._time
        progress = min(step / (self.options.gamma_decay * total_steps), 1.0)
        return self.gamma + (1 - self.gamma) * (1 + math.cos(math.pi * progress)) / 2

    def visit(self, pairs: PairBatch, log_mean: Tensor) -> Tensor:
        """As of `RateLoss`."""
        if self._time is not None:
            visits = self._time[1] * len(pairs.all_ids) / self.context.require_num_samples()
            if self._visits != visits and self.options.gamma == "auto":
                logger.info("gamma_decomp: gamma=auto is %.3g: each sample comes %.3g times%s", auto_gamma(visits),
                            visits, "" if auto_gamma(visits) < 1 else ", too rarely for a memory of rates")  # fmt: skip
            self._visits = visits
        return super().visit(pairs, log_mean)

    def estimate(self, log_mean: Tensor) -> Tensor:
        """`log(iota + K mean r)`."""
        log_estimate = self.log_negatives + log_mean
        return log_estimate if self.options.decoupled else softplus(log_estimate)

    def log_weight(self, log_rate: Tensor) -> Tensor:
        """`K / R`, which is `u K` for the mean of u."""
        return self.log_negatives - log_rate

    def anchor_terms(self, pairs: PairBatch, log_mean: Tensor) -> tuple[Tensor, Tensor]:
        """`log R`, weighted by `u K`."""
        log_rate, log_weight = super().anchor_terms(pairs, log_mean)
        log_weight = log_weight + self._log_draws(pairs.ids)
        if self.options.max_weight is not None:
            alone, bound = self.log_weight(self.estimate(log_mean)), math.log(self.options.max_weight)
            log_weight = alone + (log_weight - alone).clamp(-bound, bound)
        return log_rate, log_weight

    def report(self, pairs: PairBatch) -> dict[str, Tensor]:
        """`gamma`, the weight of the current batch; `first_visits`, the share of the batch never seen before."""
        return {"gamma": torch.tensor(self.batch_weight), "first_visits": self.rates.first_visits}

    def commit(self) -> None:
        """Write the rates of this step's samples."""
        super().commit()
        self.steps_taken += 1

    def _log_draws(self, ids: Tensor) -> Tensor | float:
        """log of Gamma(m, m) draws for anchors of both directions, (2, B); 0 for draws = 0."""
        draws = self.options.draws
        if draws == 0:
            return 0.0
        return torch.stack([log_gamma_mean(self.steps_taken, ids, direction, draws) for direction in range(2)])


SPEC = LossSpec(
    name="gamma_decomp",
    summary="the loss over the whole training set from small batches: a rate memory and Gamma auxiliary variables",
    paper="Chen et al., NeurIPS 2022",
    options=Options,
    needs=lambda options: recent_needs(options) | {"sample_ids", "num_samples"},
    build=GammaDecompLoss,
)
