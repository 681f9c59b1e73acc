"""What every loss is: a module with named hooks, built at once from its options and a context.

Letters in shapes:

    B   pairs on this rank          G   pairs of all ranks
    D   width of the embeddings     N   pairs in the training set
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from openclip_ext.losses.context import LossContext
from openclip_ext.losses.recent import recent_pairs
from openclip_ext.ops.pair_sums import log_mean_ratio, pair_loss, stored_standing
from openclip_ext.ops.pairs import PairBatch
from openclip_ext.state.recent_pairs import RecentPairs


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

    def _compute(self, *features: Tensor, **extra: Tensor) -> dict[str, Tensor]:
        """Losses, whose names end in `_loss` and which are summed, and scalars to report.

        `compute(image_features, text_features, logit_scale, **extra)`: features (B, D) of unit norm, the inverse
        temperature (), and as keyword arguments what `openclip_ext.registry.NEEDS` says of the loss's needs.
        """
        raise NotImplementedError(f"{type(self).__name__} has no compute(image_features, text_features, logit_scale)")

    #: Defined by each loss, with the arguments that it needs.
    compute: Callable[..., dict[str, Tensor]] = _compute

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

    def expect(self, sample_ids: Tensor) -> None:
        """May be called before the model is run, with the ids (B,) that `compute` will be given, on all ranks.

        What is kept of them on other ranks can come meanwhile. For losses whose state is spread over ranks.
        """

    def commit(self) -> None:
        """Called after each optimizer step that was taken: write what `compute` staged. For losses with state."""

    def _warm_start(self, *features: Tensor, **extra: Tensor) -> None:
        """Write what a batch tells before training, without gradient; counts as no step. Arguments as of `compute`."""

    warm_start: Callable[..., None] = _warm_start

    @property
    def probe(self) -> str | None:
        """What is asked of the loop in this step, for losses that need features encoded again.

        `keep`: to keep what it gives the model. `encode`: to run the model, without gradient, on what it kept last, and
        to give the loss those features as `image_features_again` and `text_features_again`. `forget`: what was kept is
        not asked for any more. None: nothing. `openclip_ext.KeptInputs` does what is asked for.

        A loop that keeps nothing, or has lost it, gives nothing: the loss then asks anew.
        """
        return None

    @property
    def wants_warm_start(self) -> bool:
        """Whether `warm_start` does anything."""
        return type(self).warm_start is not Loss.warm_start

    @property
    def has_state(self) -> bool:
        """Whether `commit` does anything."""
        return type(self).commit is not Loss.commit


#: What a subclass may define and others call.
HOOKS = ("compute", "begin_step", "expect", "commit", "warm_start", "wants_warm_start", "scheduled", "has_state",
         "probe", "terms", "anchor_terms", "report", "visit")  # fmt: skip


class PairLoss(Loss):
    """A loss that is a sum over anchors, each weighing its negatives by `r_ij = exp(s_ij - s_ii)`.

    A subclass says in `terms` what an anchor is worth by the mean ratio of its negatives; where something else counts,
    such as a memory, in `anchor_terms`. Gathering the global batch, the gradient over all pairs, and the pairs of
    recent steps, if options say so, are done here.

    Args:
        options: with `recent_batches` and its kin where they are a `RecentOptions`.
        context: as of `Loss`.
    """

    least_pairs = 2  # of the global batch; with one there is no negative

    def __init__(self, options: Any = None, context: LossContext | None = None) -> None:
        super().__init__(options, context)
        self.recent: RecentPairs | None = recent_pairs(options, self.context.device)
        if self.recent is not None:
            self.context.require_gather("the memory of recent steps", "give --loss-arg recent_batches=0 or drop it")

    def compute(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *,
        sample_ids: Tensor | None = None, image_features_again: Tensor | None = None,
        text_features_again: Tensor | None = None, **extra: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`contrastive_loss`, the mean over both directions and all G anchors, and what `report` adds."""
        pairs = self.gather(image_features, text_features, logit_scale, sample_ids)
        log_mean = log_mean_ratio(pairs)
        value, log_weight = self.anchor_terms(pairs, log_mean)
        of_stored = None
        if pairs.stored is not None:
            stored_mean, stored_count = stored_standing(pairs)
            of_stored = self.terms(stored_mean, stored_count)[1] - stored_count
        loss = pair_loss(pairs, value=value, log_weight=log_weight, stored_log_weight=of_stored)
        if self.recent is not None:
            self.recent.visit(pairs, log_mean, image_features_again, text_features_again)
        return {"contrastive_loss": loss} | self.report(pairs) | (self.recent.report() if self.recent else {})

    def gather(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, sample_ids: Tensor | None
    ) -> PairBatch:
        """The global batch, with the stored pairs that may join it. A collective call over several ranks."""
        stored = None if self.recent is None else self.recent.joining()
        pairs = self.context.gather_pairs(image_features, text_features, logit_scale, sample_ids, stored)
        if len(pairs.all_ids) < self.least_pairs:
            raise ValueError("a contrastive loss needs at least two pairs in the global batch; raise --batch-size")
        return pairs

    def terms(self, log_mean: Tensor, log_count: Tensor) -> tuple[Tensor, Tensor]:
        """Value and log weight of anchors, by what is seen of their negatives now; elementwise.

        The gradient of anchor i is `exp(log_weight_i) * mean_j r_ij grad q_ij` over its negatives j, weights constant.

        Args:
            log_mean: `log mean_j r_ij` over the negatives j of an anchor.
            log_count: log of their number.
        """
        raise NotImplementedError(f"{type(self).__name__} has no terms(log_mean, log_count)")

    def anchor_terms(self, pairs: PairBatch, log_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Value and log weight of own anchors, (2, B) each, per direction; both are detached.

        Args:
            pairs: the global batch.
            log_mean: (2, B), `log mean_j r_ij` over the negatives j of each own anchor.
        """
        return self.terms(log_mean, pairs.log_count)

    def report(self, pairs: PairBatch) -> dict[str, Tensor]:
        """Scalars to report beside the loss, of a batch whose `anchor_terms` were just taken."""
        return {}

    @property
    def probe(self) -> str | None:
        return None if self.recent is None else self.recent.probe

    @property
    def has_state(self) -> bool:
        return self.recent is not None or type(self).commit is not PairLoss.commit

    def commit(self) -> None:
        """Write this step's pairs."""
        if self.recent is not None:
            self.recent.commit()


def total_loss(outputs: dict[str, Tensor]) -> Tensor:
    """The sum of the entries whose name ends in `_loss`; there is one."""
    return functools.reduce(torch.add, (value for name, value in outputs.items() if name.endswith("_loss")))
