"""The contrastive loss over the whole training set, made decomposable by Gamma auxiliary variables."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from openclip_ext.losses.base import LossContext
from openclip_ext.losses.placement import named_flags, require_placement
from openclip_ext.losses.rates import RateLoss
from openclip_ext.losses.recent import RecentOptions, recent_needs
from openclip_ext.ops.counter_random import log_gamma_mean
from openclip_ext.ops.pairs import PairBatch
from openclip_ext.options import option
from openclip_ext.registry import LossSpec
from openclip_ext.state.table import Placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RecentOptions):
    gamma: float = option(
        0.2,
        "weight of the current batch in the rate memory, at the end of its schedule",
        allowed="in (0, 1]",
        check=lambda g: 0 < g <= 1,
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
    decoupled: bool = option(False, "leave the positive out of the denominator")
    negatives: int = option(
        0, "K, negatives in the target loss; 0: all others of the training set", allowed=">= 0", check=lambda k: k >= 0
    )
    rate_device: Literal["device", "cpu", "mmap"] = option(
        "device", "where the rates are kept: with the model, in the CPU's memory, or in a file"
    )
    rate_path: str | None = option(None, "the file, for rate_device=mmap")

    def __post_init__(self) -> None:
        require_placement("rate", self.rate_device, self.rate_path)  # found wrong as early as other options


class GammaDecompLoss(RateLoss):
    """Target: `L = mean_i log(iota + K Z_i)`, `Z_i = mean_{j != i} r_ij` over all N - 1 others, r_ij = exp(q_ij).

    q_ij = s_ij - s_ii, directions are averaged, iota is 1, or 0 if `decoupled`. Since `1/x = integral of exp(-u x) du`,
    an auxiliary variable per anchor turns the log into a plain sum over pairs, whose gradient any batch estimates
    without bias:

        rate      R_i <- (1 - g) R_i + g (iota + K mean_{j in batch} r_ij)      per sample and direction
        E-step    u_i ~ Gamma(shape m, rate m R_i), or its mean 1 / R_i when draws = 0
        M-step    gradient  u_i K mean_j r_ij grad q_ij,  u_i and r_ij held constant

    The value returned is the mean of `log R_i`, the current estimate of L.

    Source: Chen et al., "Why do We Need Large Batchsizes in Contrastive Learning? A Gradient-Bias Perspective",
    NeurIPS 2022. The rate memory and its schedule follow SogCLR (ICML 2022) and FastCLIP (2024).
    """

    def __init__(self, options: Options, context: LossContext) -> None:
        with named_flags("rate"):
            super().__init__(options, context, Placement(options.rate_device, options.rate_path))
        self.log_negatives = context.log_negatives(options.negatives)
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))
        self._gamma = options.gamma

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """Set the weight of the current batch: a cosine from 1 to `gamma` over the first `gamma_decay` of training."""
        gamma, decay_steps = self.options.gamma, self.options.gamma_decay * total_steps
        progress = min(step / decay_steps, 1.0) if decay_steps > 0 else 1.0
        self._gamma = gamma + (1 - gamma) * (1 + math.cos(math.pi * progress)) / 2

    @property
    def scheduled(self) -> bool:
        """Whether the weight of the current batch changes over training."""
        return self.options.gamma < 1 and self.options.gamma_decay > 0

    @property
    def batch_weight(self) -> float:
        return self._gamma

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
        return log_rate, log_weight + self._log_draws(pairs.ids)

    def report(self, pairs: PairBatch) -> dict[str, Tensor]:
        """`gamma`, the weight of the current batch; `first_visits`, the share of the batch never seen before."""
        first_visits = self.rates.read(pairs.all_ids)[0].isnan().float().mean()
        return {"gamma": torch.tensor(self._gamma), "first_visits": first_visits}

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
