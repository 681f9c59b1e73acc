"""What every loss is: a module with named hooks, built at once from its options and a context.

Letters in shapes:

    B   pairs on this rank          G   pairs of all ranks
    D   width of the embeddings     N   pairs in the training set
"""

import dataclasses
import difflib
import math
from typing import Any

import torch
from torch import Tensor, nn

from openclip_ext.errors import UserError
from openclip_ext.ops.pairs import PairBatch, gather_pairs, log_mean_ratio, pair_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widths:
    """Widths of what the model gives a loss.

    Attributes:
        embed: D, of `image_features` and `text_features`.
        image_trunk: of `image_trunk_features`, the image tower's pooled output before its projection.
        text_trunk: of `text_trunk_features`.
    """

    embed: int
    image_trunk: int | None = None
    text_trunk: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossContext:
    """Everything a loss is built from, besides its options.

    Attributes:
        num_samples: N, pairs in the training set; None: not known, which only a loss that does not need it accepts.
        num_ids: sample ids run from 0 to `num_ids` - 1; above N only where they are hashes. None: N.
        rank: of this process.
        world_size: number of processes.
        device: where the loss's state is kept.
        widths: None: not known, which only a loss that does not need them accepts.
    """

    num_samples: int | None = None
    num_ids: int | None = None
    rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    widths: Widths | None = None

    def __post_init__(self) -> None:
        if self.num_ids is None:
            object.__setattr__(self, "num_ids", self.num_samples)

    def log_negatives(self, negatives: int = 0) -> float:
        """log K for K `negatives` in the target loss; 0: all others of the training set, N - 1."""
        return math.log(negatives or self.num_samples - 1)


class Loss(nn.Module):
    """A loss or an additive term: `compute` and, where it has a schedule or state, some of the hooks below.

    A method whose name is nearly that of a hook is an error when the class is defined, since it would never be called.

    Args:
        options: what the loss's options dataclass holds.
        context: see `LossContext`.
    """

    def __init__(self, options: Any = None, context: LossContext | None = None) -> None:
        super().__init__()
        self.options = options
        self.context = context or LossContext()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if name.startswith("_"):
                continue
            (near,) = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.8) or [name]
            if near != name and not hasattr(super(cls, cls), name):
                raise TypeError(f"{cls.__name__}.{name}: no hook of a loss; did you mean {near}?")

    def compute(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **extra: Tensor
    ) -> dict[str, Tensor]:
        """Losses, whose names end in `_loss` and which are summed, and scalars to report.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm.
            logit_scale: (), the inverse temperature.
            **extra: what `openclip_ext.registry.NEEDS` says of the needs of the loss.
        """
        raise NotImplementedError(f"{type(self).__name__} has no compute(image_features, text_features, logit_scale)")

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, output_dict: bool = True,
        **extra: Any,
    ) -> dict[str, Tensor] | Tensor:  # fmt: skip
        """What `compute` returns; without `output_dict` the sum of the losses in it."""
        outputs = self.compute(image_features, text_features, logit_scale, **extra)
        return outputs if output_dict else total_loss(outputs)

    @property
    def scheduled(self) -> bool:
        """Whether the loss depends on the time that `begin_step` tells; untold, it acts as at the end of training."""
        return False

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """Called before each optimizer step, of which training has `total_steps`. For losses with a schedule."""

    def commit(self) -> None:
        """Called after each optimizer step that was taken: write what `compute` staged. For losses with state."""

    def warm_start(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **extra: Tensor) -> None:
        """Write what a batch tells before training, without gradient; counts as no step. Arguments as of `compute`."""

    @property
    def wants_warm_start(self) -> bool:
        """Whether `warm_start` does anything."""
        return type(self).warm_start is not Loss.warm_start

    @property
    def has_state(self) -> bool:
        """Whether `commit` does anything."""
        return type(self).commit is not Loss.commit


#: What a subclass may define and others call.
HOOKS = ("compute", "begin_step", "commit", "warm_start", "wants_warm_start", "scheduled", "has_state",
         "anchor_terms", "report", "visit")  # fmt: skip


class PairLoss(Loss):
    """A loss that is a sum over anchors, each weighing its negatives by `r_ij = exp(s_ij - s_ii)`.

    A subclass says in `anchor_terms` what each anchor is worth; gathering the global batch and the gradient over all
    pairs is done here.
    """

    def compute(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *,
        sample_ids: Tensor | None = None, **extra: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`contrastive_loss`, the mean over both directions and all G anchors, and what `report` adds."""
        pairs = self.gather(image_features, text_features, logit_scale, sample_ids)
        value, log_weight = self.anchor_terms(pairs, log_mean_ratio(pairs))
        loss = pair_loss(pairs, value=value, log_weight=log_weight)
        return {"contrastive_loss": loss} | self.report(pairs)

    def gather(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, sample_ids: Tensor | None
    ) -> PairBatch:
        """The global batch. A collective call over several ranks."""
        context = self.context
        return gather_pairs(image_features, text_features, logit_scale, sample_ids, context.rank, context.world_size)

    def anchor_terms(self, pairs: PairBatch, log_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Value and log weight of each own anchor, (2, B) each, per direction; both are detached.

        The gradient of anchor i is `exp(log_weight_i) * mean_j r_ij grad q_ij` over its negatives j, weights constant.

        Args:
            pairs: the global batch.
            log_mean: (2, B), `log mean_j r_ij` over the negatives j of each own anchor.
        """
        raise NotImplementedError(f"{type(self).__name__} has no anchor_terms(pairs, log_mean)")

    def report(self, pairs: PairBatch) -> dict[str, Tensor]:
        """Scalars to report beside the loss, of a batch whose `anchor_terms` were just taken."""
        return {}


def total_loss(outputs: dict[str, Tensor]) -> Tensor:
    """The sum of the entries whose name ends in `_loss`."""
    return sum(value for name, value in outputs.items() if name.endswith("_loss"))


def require_widths(context: LossContext, owner: str, *names: str) -> Widths:
    """The context's widths.

    Raises:
        UserError: one of `names` is not known; `owner` is what needs it, for the message.
    """
    missing = [name for name in names if getattr(context.widths, name, None) is None]
    if missing:
        wanted = ", ".join(f"{name}_dim=…" for name in missing)
        raise UserError(f"{owner} needs the widths of the model's features: give create_loss(…, {wanted})")
    return context.widths
