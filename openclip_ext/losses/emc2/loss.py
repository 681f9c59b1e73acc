"""Markov chains over the negatives of the whole training set, one per sample and direction."""

import dataclasses
import logging
from typing import Literal

import torch
from torch import Tensor, nn

from openclip_ext.errors import UserError
from openclip_ext.losses.base import PairLoss
from openclip_ext.losses.context import LossContext, require_widths
from openclip_ext.losses.emc2.chain import Chain, Moves, chain_report
from openclip_ext.losses.emc2.proposing import propose
from openclip_ext.losses.emc2.resampling import resample
from openclip_ext.losses.placement import Shard, named_flags, place, require_placement, shard_option
from openclip_ext.losses.recent import RecentOptions, recent_needs
from openclip_ext.ops.gather import global_mean
from openclip_ext.ops.pair_sums import log_mean_ratio, loss_with_sums, score_weighted_loss
from openclip_ext.ops.pairs import PairBatch
from openclip_ext.options import option
from openclip_ext.registry import LossSpec
from openclip_ext.state.negative_bank import Held, NegativeBank, bank_bytes
from openclip_ext.state.rate_table import RateTable

logger = logging.getLogger("openclip_ext")

KERNELS = ("mh", "isir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RecentOptions):
    kernel: Literal["mh", "isir"] = option(
        "isir", "how a chain moves: Metropolis-Hastings (the paper), or resampling, which averages over its draws"
    )
    burn_in: float = option(
        0.5, "share of a visit's proposals left out of the gradient; mh only", allowed="in [0, 1)",
        check=lambda share: 0 <= share < 1,
    )  # fmt: skip
    steps: int = option(
        0, "R, proposals per visit; 0: as many as there are gathered negatives; mh only", allowed=">= 0",
        check=lambda steps: steps >= 0,
    )  # fmt: skip
    decoupled: bool = option(True, "leave the positive out of the denominator, as the paper does")
    gamma: float = option(
        1.0, "weight of the current batch in the rate that tells the positive's share; only with decoupled=false",
        allowed="in (0, 1]", check=lambda gamma: 0 < gamma <= 1,
    )  # fmt: skip
    negatives: int = option(
        0, "K, negatives in the target loss; 0: all others of the training set", allowed=">= 0", check=lambda k: k >= 0
    )
    bank: Literal["embedding", "index"] = option(
        "embedding", "what is kept of a state: its embedding, or its id alone, for callers that encode it again"
    )
    bank_dtype: Literal["float16", "bfloat16", "float32"] = option("float16", "of stored embeddings")
    bank_device: Literal["device", "cpu", "mmap"] = option(
        "device", "where embeddings are kept: with the model, in the CPU's memory, or in a file"
    )
    bank_path: str | None = option(None, "the file, for bank_device=mmap")
    bank_shard: Shard = shard_option("the bank")

    def __post_init__(self) -> None:
        # Found wrong as early as other options.
        require_placement("bank", self.bank_device, self.bank_path, self.bank_shard)


class EMC2Loss(PairLoss):
    """Target: the decoupled global loss `mean_i log sum_{j != i} exp(s_ij - s_ii)`, directions averaged.

    Its gradient is `E_{j ~ p_i} grad s_ij - grad s_ii`, `p_i(j) ~ exp(s_ij)` over all N - 1 negatives. The expectation
    is that over the states of a Markov chain per anchor, whose law is p_i at any batch size. The chain's state stays
    with the sample between visits; both scores of an acceptance ratio use the current parameters.

        candidates  negatives of the global batch, and the stored state with its stored embedding
        kernel      mh: R uniform proposals from the candidates, accepted with probability min(1, exp(s_new - s_old));
                    isir: the next state is drawn from the softmax of the candidates
        weights     mh: share of kept steps spent at each candidate, the stored state included; isir: the softmax

    Columns of recent steps join the candidates, if options say so. Gradients flow through both sides of a pair of the
    batch, and through the anchor only for a stored embedding.

    `decoupled=false` keeps the positive in the denominator: each anchor's term is multiplied by `K Z / (1 + K Z)`,
    with Z the batch's mean of exp(s_ij - s_ii), or its running average for gamma < 1.

    The value returned is the batch's estimate of the target, `mean_i log(K Z_i)`, or of `log(1 + K Z_i)`.

    Source: Yau et al., "EMC2: Efficient MCMC Negative Sampling for Contrastive Learning with Global Convergence", ICML
    2024. There proposals come from the batch alone, which leaves p_i invariant only for few of them; with the stored
    state among them it is for any number (`openclip_ext.losses.emc2.kernels`).
    """

    kernel: Tensor
    steps_taken: Tensor

    def __init__(self, options: Options, context: LossContext) -> None:
        context.require_gather("loss emc2, whose chains move to any column,")
        super().__init__(options, context)
        self.log_negatives = context.log_negatives(options.negatives)
        self.register_buffer("kernel", torch.tensor(KERNELS.index(options.kernel)))
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))
        self._remark: str | None = None
        self.rates = None
        width = require_widths(context, "loss emc2", "embed").embed if options.bank == "embedding" else 0
        assert width is not None
        num_ids, dtype = context.require_num_ids(), getattr(torch, options.bank_dtype)
        with named_flags("bank"):
            size, shard = bank_bytes(num_ids, width, dtype), options.bank_shard
            placement = place(context, size, shard, options.bank_device, options.bank_path)
            if options.gamma < 1 and not options.decoupled:
                beside = dataclasses.replace(placement, kind="device", path=None)
                self.rates = RateTable(num_ids, beside, context.device)
            self.bank = NegativeBank(num_ids, width, dtype, placement, context.device)

    def expect(self, sample_ids: Tensor) -> None:
        """Let the states and rates of samples (B,) come from the ranks that keep them."""
        self.bank.expect(sample_ids)
        if self.rates is not None:
            self.rates.expect(sample_ids)

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        sample_ids: Tensor | None = None,
        stored_features: Tensor | None = None,
        image_features_again: Tensor | None = None,
        text_features_again: Tensor | None = None,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """The loss of the global batch.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm.
            logit_scale: (), the inverse temperature.
            sample_ids: (B,), in [0, num_samples).
            stored_features: (2, B, D), embeddings of `stored_ids(sample_ids)`; with bank=index only.
            image_features_again: (B', D), of the step that `probe` asked to keep, encoded now.
            text_features_again: (B', D), likewise.

        Returns:
            contrastive_loss: the batch's estimate of the target, with the chains' gradient.
            acceptance, stored_weight, age_mean, age_max, effective_samples: see `chain.chain_report`.

        Raises:
            IndexError: a sample id outside of the bank.
        """
        assert sample_ids is not None  # as the needs say
        pairs = self.gather(image_features, text_features, logit_scale, sample_ids)
        held = self._read(pairs)
        chains = _chains(pairs, held, stored_features)
        moves, log_mean, loss = self._visit(pairs, chains, self.steps_taken)
        report = chain_report(chains, moves, self.steps_taken - held.stored_at, self.context.world_size)
        if self.recent is not None:
            self.recent.visit(pairs, log_mean, image_features_again, text_features_again)
            report |= self.recent.report()
        return {"contrastive_loss": loss} | report

    @torch.no_grad()
    def warm_start(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        sample_ids: Tensor,
        stored_features: Tensor | None = None,
        **extra: Tensor,
    ) -> None:
        """Write the states to which the batch's chains move on a visit before training, which counts as no step.

        Arguments are those of `compute`.
        """
        pairs = self.gather(image_features, text_features, logit_scale, sample_ids)
        # Draws of their own, so that a sample's first step does not repeat them.
        chains = _chains(pairs, self._read(pairs), stored_features)
        self._visit(pairs, chains, torch.full_like(self.steps_taken, -1))
        self.bank.commit(self.steps_taken)
        if self.rates is not None:
            self.rates.commit()

    def stored_ids(self, sample_ids: Tensor) -> Tensor:
        """Ids of the current states, (2, B), texts' of images first; -1: none yet.

        A collective call where the bank is spread over ranks.
        """
        return self.bank.read_ids(sample_ids)

    def commit(self) -> None:
        """Write the chains' states of this step's samples, and its pairs."""
        super().commit()
        self.bank.commit(self.steps_taken)
        if self.rates is not None:
            self.rates.commit()
        self.steps_taken += 1

    def _read(self, pairs: PairBatch) -> Held:
        """What the bank holds of own samples before the visit. A collective call where it is spread over ranks."""
        self.bank.check(pairs.all_ids)
        return self.bank.read(pairs)

    def _visit(self, pairs: PairBatch, chains: list[Chain], step: Tensor) -> tuple[list[Moves], Tensor, Tensor]:
        """Move the chains with draws of `step` (), and stage their new states.

        Returns the moves, `log mean_j r_ij` over all negatives j of own anchors (2, B), and the loss.
        """
        options = self.options
        if options.kernel == "isir":
            moves, log_sum, log_in_batch = resample(pairs, chains, step)
            log_mean = log_mean_ratio(pairs, log_in_batch)
            value, share = self._value(pairs, log_mean)
            recent = [chain.recent for chain in chains if chain.recent is not None]
            held = self._held(chains, moves, share)
            loss = score_weighted_loss(pairs, value=value, factor=share.log() - log_sum, in_stored=recent, held=held)
        else:
            log_mean = log_mean_ratio(pairs)
            value, share = self._value(pairs, log_mean)
            moves, sums = propose(pairs, chains, share, step, options.steps, options.burn_in)
            held = self._held(chains, moves, share)
            loss = loss_with_sums(pairs, value=value, sums=sums, held=held)
        loss = self._reaching_stored(loss, pairs, chains, held)
        self._stage(pairs, torch.stack([chain.moved_to(move) for chain, move in zip(chains, moves, strict=True)]))
        return moves, log_mean, loss

    @staticmethod
    def _held(chains: list[Chain], moves: list[Moves], share: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per direction the stored states, (B, D), and by what their scores count in the gradient, (B,)."""
        parts = zip(chains, moves, share, strict=True)
        return [(chain.stored, factor * move.stored_weight) for chain, move, factor in parts]

    def _reaching_stored(self, loss: Tensor, pairs: PairBatch, chains: list[Chain], held: list) -> Tensor:
        """The loss, with a gradient of stored states too where a caller has encoded them again."""
        for chain, (stored, weight) in zip(chains, held, strict=True):
            if stored.requires_grad:
                scores = pairs.logit_scale.detach() * torch.linalg.vecdot(chain.anchors, stored.to(chain.anchors.dtype))
                term = global_mean((weight * scores).sum(), len(weight), self.context.world_size) / 2
                loss = loss + (term - term.detach())
        return loss

    def _value(self, pairs: PairBatch, log_mean: Tensor) -> tuple[Tensor, Tensor]:
        """The value of own anchors, and by what their candidates' weights are multiplied, (2, B) each."""
        log_rate = log_mean + self.log_negatives  # of K Z
        if self.options.decoupled:
            return log_rate, torch.ones_like(log_rate)
        value = nn.functional.softplus(log_rate)
        if self.rates is not None:
            log_rate = self.rates.visit(pairs, log_rate, self.options.gamma)
        return value, log_rate.sigmoid()

    def _stage(self, pairs: PairBatch, state: Tensor) -> None:
        """What `commit` will write: the columns (2, B) to which own chains moved; -1: they stayed."""
        columns = [pairs.all_ids, pairs.all_text, pairs.all_image]
        if recent := pairs.stored:
            columns = [torch.cat(both) for both in zip(columns, (recent.ids, recent.text, recent.image), strict=True)]
        self.bank.stage(pairs.all_ids, pairs.gathered(state), *columns)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        saved = state_dict.get(prefix + "kernel")
        if saved is not None and saved.item() != self.kernel.item():
            raise UserError(
                f"--loss-arg kernel={self.options.kernel}: the checkpoint's chains were made by kernel="
                f"{KERNELS[saved.item()]}; use that, or start from its weights with --pretrained"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._compare_file(int(self.steps_taken))

    def _compare_file(self, step: int) -> None:
        """Where the file of embeddings, which no checkpoint holds, is of another step: what to say of it."""
        stamp = self.bank.embedding.stamp if self.bank.embedding is not None else None
        if stamp is None or stamp == step:
            return
        found = f"was written to until step {stamp}" if stamp else "holds nothing of that"
        self._remark = (
            f"--loss-arg bank_path={self.options.bank_path}: {found}, and the checkpoint is of step {step}: stored "
            f"embeddings of samples that came {'since' if stamp > step else 'between'} differ, until they come again"
        )

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """Only now what `load_state_dict` has found is in the log of a run."""
        remark, self._remark = self._remark, None
        if remark:
            logger.warning(remark)


def _chains(pairs: PairBatch, held: Held, stored_features: Tensor | None) -> list[Chain]:
    """The own anchors' chains, per direction, as they are before the visit."""
    stored = stored_features if held.embedding is None else held.embedding
    assert stored is not None  # as the needs say
    return [Chain(pairs, direction, held.ids[direction], stored[direction]) for direction in range(2)]


SPEC = LossSpec(
    name="emc2",
    summary="Markov chains sample negatives of the whole training set; a bank holds each sample's current one",
    paper="Yau et al., ICML 2024",
    options=Options,
    needs=lambda options: (
        recent_needs(options)
        | {"sample_ids", "num_samples", "stored_features" if options.bank == "index" else "widths"}
    ),
    build=EMC2Loss,
)
