"""What every loss is: a module with named hooks, built at once from its options and a context.

Letters in shapes:

    B   pairs on this rank          G   pairs of all ranks
    D   width of the embeddings     N   pairs in the training set
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from openclip_ext.errors import UserError
from openclip_ext.losses.recent import recent_pairs
from openclip_ext.ops.pairs import PairBatch, gather_pairs, log_mean_ratio, pair_loss
from openclip_ext.state.recent_pairs import RecentPairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widths:
    """Widths of what the model gives a loss.

    Attributes:
        embed: D, of `image_features` and `text_features`.
        image_trunk: of `image_trunk_features`, the image tower's pooled output before its projection.
        text_trunk: of `text_trunk_features`.
    """

    embed: int | None = None
    image_trunk: int | None = None
    text_trunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the token ids of captions mean.

    Attributes:
        size: V; ids run from 0 to V - 1.
        special_ids: those that are no words: where captions begin and end, what is unknown, and padding.
        end_id: what follows it in a caption is padding, whatever its id; None: padding is one of `special_ids`.
    """

    size: int
    special_ids: frozenset[int]
    end_id: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossContext:
    """Everything a loss is built from, besides its options.

    Attributes:
        num_samples: N, pairs in the training set; None: not known, which only a loss that does not need it accepts.
        num_ids: sample ids run from 0 to `num_ids` - 1, where that is not N. None: N.
        rank: of this process.
        world_size: number of processes.
        device: where the loss's state is kept.
        widths: None: not known, which only a loss that does not need them accepts.
        vocabulary: likewise.
    """

    num_samples: int | None = None
    num_ids: int | None = None
    rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    widths: Widths | None = None
    vocabulary: Vocabulary | None = None

    def log_negatives(self, negatives: int = 0) -> float:
        """log K for K `negatives` in the target loss; 0: all others of the training set, N - 1."""
        return math.log(negatives or self.require_num_samples() - 1)

    def require_num_samples(self) -> int:
        """N. Raises UserError: it is not known."""
        if self.num_samples is None:
            raise UserError("the number of pairs in the training set is not known: give create_loss(…, num_samples=N)")
        return self.num_samples

    def require_num_ids(self) -> int:
        """How many ids there are. Raises UserError: it is not known."""
        return self.require_num_samples() if self.num_ids is None else self.num_ids


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
        not asked for any more. None: nothing. In a loop:

            if loss.probe == "keep": kept = images, texts
            again = model(*kept) if loss.probe == "encode" else {}      # torch.no_grad(), dropout off
            loss(…, **{f"{name}_again": again[name] for name in again if name.endswith("_features")})

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
HOOKS = ("compute", "begin_step", "commit", "warm_start", "wants_warm_start", "scheduled", "has_state",
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

    def __init__(self, options: Any = None, context: LossContext | None = None) -> None:
        super().__init__(options, context)
        self.recent: RecentPairs | None = recent_pairs(options, self.context.device)

    def compute(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *,
        sample_ids: Tensor | None = None, image_features_again: Tensor | None = None,
        text_features_again: Tensor | None = None, **extra: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`contrastive_loss`, the mean over both directions and all G anchors, and what `report` adds."""
        pairs = self.gather(image_features, text_features, logit_scale, sample_ids)
        log_mean = log_mean_ratio(pairs)
        value, log_weight = self.anchor_terms(pairs, log_mean)
        of_stored = None if pairs.stored is None else self.terms(*pairs.stored_standing)[1]
        loss = pair_loss(pairs, value=value, log_weight=log_weight, stored_log_weight=of_stored)
        if self.recent is not None:
            self.recent.visit(pairs, log_mean, image_features_again, text_features_again)
        return {"contrastive_loss": loss} | self.report(pairs) | (self.recent.report() if self.recent else {})

    def gather(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, sample_ids: Tensor | None
    ) -> PairBatch:
        """The global batch, with the stored pairs that may join it. A collective call over several ranks."""
        context, stored = self.context, None if self.recent is None else self.recent.joining()
        return gather_pairs(
            image_features, text_features, logit_scale, sample_ids, context.rank, context.world_size, stored
        )

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


def require_widths(context: LossContext, owner: str, *names: str) -> Widths:
    """The context's widths.

    Raises:
        UserError: one of `names` is not known; `owner` is what needs it, for the message.
    """
    missing = [name for name in names if getattr(context.widths, name, None) is None]
    if missing or context.widths is None:
        wanted = ", ".join(f"{name}_dim=…" for name in missing)
        raise UserError(f"{owner} needs the widths of the model's features: give create_loss(…, {wanted})")
    return context.widths


def require_vocabulary(context: LossContext, owner: str) -> Vocabulary:
    """The context's vocabulary.

    Raises:
        UserError: it is not known, or its size is none or below a special id; `owner` is what needs it.
    """
    vocabulary = context.vocabulary
    if vocabulary is None:
        raise UserError(
            f"{owner} needs the vocabulary of the captions: give create_loss(…, vocab_size=…, special_token_ids=…)"
        )
    size = vocabulary.size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"vocab_size={size!r}: must be a whole number of at least 1, how many ids the tokenizer has")
    marks = vocabulary.special_ids if vocabulary.end_id is None else vocabulary.special_ids | {vocabulary.end_id}
    for token in marks:
        if not 0 <= token < size:
            raise UserError(f"vocab_size={size}: holds no special id {token}; give how many ids the tokenizer has")
    return vocabulary
