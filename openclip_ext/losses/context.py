"""What a loss is built from, besides its options: sizes of the data and of the model, and its place among processes."""

import dataclasses
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from openclip_ext.errors import UserError
from openclip_ext.ops.pairs import PairBatch, StoredPairs, gather_pairs

Communication = Literal["gather", "ring"]


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
        mask_id: stands for a hidden word, where the tokenizer has one for that.
    """

    size: int
    special_ids: frozenset[int]
    end_id: int | None = None
    mask_id: int | None = None


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
        loss_tile: columns whose scores with this rank's anchors are formed at once; None: chosen by their number.
        loss_comm: `gather`: every rank holds the features of all; `ring`: they pass from rank to rank.
        shards_state: whether the caller's checkpoints take a state that is spread over ranks, so that a loss may spread
            a large one without being asked to.
    """

    num_samples: int | None = None
    num_ids: int | None = None
    rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    widths: Widths | None = None
    vocabulary: Vocabulary | None = None
    loss_tile: int | None = None
    loss_comm: Communication = "gather"
    shards_state: bool = False

    def __post_init__(self) -> None:
        tile = self.loss_tile
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
            raise UserError(f"--loss-tile {tile}: must be a whole number of at least 1, columns of a tile")
        if self.loss_comm not in get_args(Communication):
            raise UserError(f"--loss-comm {self.loss_comm}: must be one of {', '.join(get_args(Communication))}")

    def gather_pairs(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, sample_ids: Tensor | None = None,
        stored: StoredPairs | None = None,
    ) -> PairBatch:  # fmt: skip
        """The global batch; see `openclip_ext.ops.pairs.gather_pairs`. A collective call over several ranks."""
        return gather_pairs(
            image_features, text_features, logit_scale, sample_ids, self.rank, self.world_size, stored,
            self.loss_tile, self.loss_comm == "ring",
        )  # fmt: skip

    def require_gather(self, what: str, fix: str = "drop it") -> None:
        """Raises UserError: features are to pass from rank to rank, and `what` needs those of all ranks at once."""
        if self.loss_comm == "ring" and self.world_size > 1:
            raise UserError(f"--loss-comm ring: {what} holds the features of all ranks on each; {fix}")

    def log_negatives(self, negatives: int = 0) -> float:
        """log K for K `negatives` in the target loss; 0: all others of the training set, N - 1."""
        return math.log(negatives or self.require_num_samples() - 1)

    def require_num_samples(self, owner: str = "this loss") -> int:
        """N. Raises UserError: it is not known, or no number of pairs; `owner` is what needs it, for the message."""
        given = self.num_samples
        if given is None:
            raise UserError(f"{owner} needs the pairs in the training set: give create_loss(…, num_samples=N)")
        if isinstance(given, bool) or not isinstance(given, int) or given < 2:
            raise UserError(
                f"num_samples={given!r}: must be a whole number of at least 2, the pairs in the training set"
            )
        return given

    def require_num_ids(self) -> int:
        """How many ids there are. Raises UserError: it is not known."""
        return self.require_num_samples() if self.num_ids is None else self.num_ids


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
