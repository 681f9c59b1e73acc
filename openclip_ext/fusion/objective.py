"""Pre-training: contrast, matching and masked words in one objective, which the training loop calls as any loss.

    B   pairs on this rank      L   tokens of a caption      C   width of the cross-attention layers

Source: Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation" (ALBEF),
NeurIPS 2021. The contrastive loss is any registered one, on the towers' features against those of the momentum copy;
second views, which terms ask for, are the features of that copy, as Jiang et al., CVPR 2023, have it.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from openclip_ext.fusion.config import FusionConfig
from openclip_ext.fusion.encoder import FusionEncoder, WordHead
from openclip_ext.fusion.masking import Masking
from openclip_ext.fusion.matching import draw_negatives
from openclip_ext.losses import Loss, LossContext, ObjectivePlan
from openclip_ext.losses.composite import Composite
from openclip_ext.losses.context import require_vocabulary
from openclip_ext.losses.two_ways import TwoWays
from openclip_ext.losses.weights import parse_weight
from openclip_ext.ops.gather import gather_rows_with_grad, mean_over_ranks, with_global_value
from openclip_ext.ops.precision import promoted
from openclip_ext.state.momentum import MomentumCopy

#: Needs of terms that the momentum copy meets, and what of the data the objective needs itself.
BY_MOMENTUM = frozenset({"image_aug", "text_aug", "teacher_features"})
OF_DATA = frozenset({"row_seeds"})


class MomentumContrast(TwoWays):
    """A loss between images and momentum keys of texts, and between momentum keys of images and texts; their mean."""

    def pairs(self, features: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(image, key of its text), (key of the image, text); keys without gradient."""
        image_keys, text_keys = (features[f"{name}_features_aug"].detach() for name in ("image", "text"))
        return (features["image_features"], text_keys), (image_keys, features["text_features"])


class FusionObjective(Composite):
    """`contrast + terms + w_m matching + w_w words`, as ALBEF's, with any registered loss as the contrast.

        matching   cross entropy of two classes over the pairs, an image with a wrong text and a text with a wrong image
                   each: the mean over all of them, of all ranks; `draw_negatives` has which
        words      mean over hidden words of (1 - a) CE(y, p) + a CE(p_m, p): p the guess, y the word, p_m the guess of
                   the momentum copy, a the weight of its distillation

    The encoder and its heads are parameters of this loss, trained with the model, without weight decay, and kept
    beside it, so that the model's own checkpoint stays OpenCLIP's. Over accumulated batches and ranks, negatives are
    drawn from all pairs of a step.

    Args:
        plan: of the contrastive loss and the terms.
        context: with the vocabulary.
        config: see `FusionConfig`.
        image_width, text_width: of the towers' tokens.
        autocast: returns the context to run the encoder in.
    """

    def __init__(
        self, plan: ObjectivePlan, context: LossContext, config: FusionConfig, image_width: int, text_width: int,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:  # fmt: skip
        super().__init__(plan.options, context)
        vocabulary = require_vocabulary(context, "--fusion")
        self.config, self.autocast = config, autocast
        self.by_keys = config.keys == "momentum"
        self.contrast: Loss = (
            MomentumContrast(plan, context, terms=False) if self.by_keys else plan.build(context, terms=False)
        )
        self.terms = plan.build(context, base=False)
        self.masking = Masking(vocabulary, config.mask_share, config.mask_id)
        self.encoder = FusionEncoder(config, image_width, text_width)
        self.matching = nn.Linear(config.width, 2)
        self.words = WordHead(config.width, vocabulary.size)
        self.momentum = MomentumCopy(nn.ModuleList([self.encoder, self.words]), config.momentum)
        self._distill = parse_weight(config.distill)
        self._distill_now = self._distill.end

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        text_tokens: Tensor,
        row_seeds: Tensor,
        image_states: Tensor,
        text_states: Tensor,
        masked_states: Tensor,
        momentum_image_states: Tensor,
        momentum_masked_states: Tensor,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """Features, states and seeds as `FusionModel` names them.

        Returns:
            what the contrastive loss and the terms return, `matching_loss` and `words_loss` with their weights, and
            matching_accuracy, words_accuracy: shares of this rank's pairs and hidden words that are guessed right.
        """
        extra |= {name: value.detach() for name, value in extra.items() if "_features_aug" in name}
        extra |= {
            "text_tokens": text_tokens,
            "dist_image_features": extra["image_features_aug"],
            "dist_text_features": extra["text_features_aug"],
            "dist_logit_scale": logit_scale.detach(),
        }
        features = image_features, text_features, logit_scale
        outputs = self.contrast(*features, **extra) | self.terms(*features, **extra)
        attended = self.masking.attended(text_tokens)
        if self.config.matching:
            outputs |= self._match(*features, text_tokens, row_seeds, image_states, text_states, attended)
        if self.config.words:
            own, copy = (image_states, masked_states), (momentum_image_states, momentum_masked_states)
            outputs |= self._guess(own, copy, text_tokens, row_seeds, attended)
        return outputs

    def _match(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, tokens: Tensor, seeds: Tensor, image_states: Tensor,
        text_states: Tensor, attended: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`matching_loss` over pairs, images with wrong texts, and texts with wrong images, in this order."""
        ranks = {"rank": self.context.rank, "world_size": self.context.world_size}
        wrong = draw_negatives(image, text, logit_scale, tokens, seeds, **ranks)
        images, texts = (gather_rows_with_grad(x, wrong.sizes, self.context.rank) for x in (image_states, text_states))
        masks = self.masking.attended(wrong.tokens)
        of_image, of_text = wrong.text_of_image, wrong.image_of_text
        with self.autocast():
            pooled = self.encoder(
                torch.cat([text_states, texts[of_image], text_states]),
                torch.cat([attended, masks[of_image], attended]),
                torch.cat([image_states, image_states, images[of_text]]),
            )[:, 0]
            (scores,) = promoted(self.matching(pooled))
        count = len(tokens)
        is_match = torch.arange(3 * count, device=scores.device) < count
        counts = torch.cat([torch.ones_like(wrong.exist), wrong.exist, wrong.exist])
        total = (cross_entropy(scores, is_match.long(), reduction="none") * counts).sum()
        right = ((scores.argmax(1) == is_match) & counts).sum() / counts.sum()
        loss = self._mean(total, counts.sum())
        return {"matching_loss": self.config.matching * loss, "matching_accuracy": right}

    def _guess(
        self, own: tuple[Tensor, Tensor], copy: tuple[Tensor, Tensor], tokens: Tensor, seeds: Tensor, attended: Tensor
    ) -> dict[str, Tensor]:
        """`words_loss`, of (image states, states of the captions with hidden words) of the model and of its copy."""
        hidden = self.masking.mask(tokens, seeds)[1]
        words = tokens[hidden]
        with self.autocast():
            (scores,) = promoted(self.words(self.encoder(own[1], attended, own[0])[hidden]))
        share = self._distill_now
        total = (1 - share) * cross_entropy(scores, words, reduction="sum")
        if share:
            with torch.no_grad(), self.autocast():
                encoder, head = cast(Iterable[nn.Module], self.momentum.average)
                target = head(encoder(copy[1], attended, copy[0])[hidden]).to(scores.dtype).softmax(1)
            total = total + share * cross_entropy(scores, target, reduction="sum")
        count = hidden.sum()
        loss = self._mean(total, count)
        right = (scores.argmax(1) == words).sum() / count.clamp_min(1)
        return {"words_loss": self.config.words * loss, "words_accuracy": right}

    def _mean(self, total: Tensor, count: Tensor) -> Tensor:
        """As `global_mean`, and 0 where there is nothing on any rank."""
        world_size = self.context.world_size
        return with_global_value(
            total / mean_over_ranks(count.to(total.dtype), world_size).clamp_min(1 / world_size), world_size
        )

    @property
    def probe(self) -> str | None:
        return self.contrast.probe

    @property
    def scheduled(self) -> bool:
        return super().scheduled or not self._distill.constant

    @torch.no_grad()
    def warm_start(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **extra: Tensor) -> None:
        """As of the contrastive loss and the terms."""
        for part in (self.contrast, self.terms):
            part.warm_start(image_features, text_features, logit_scale, **extra)

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """Tell the parts the time."""
        self._distill_now = self._distill.at(step, total_steps)
        super().begin_step(step=step, total_steps=total_steps)

    def commit(self) -> None:
        """Let the parts write what they staged, and the momentum copy follow the encoder."""
        super().commit()
        self.momentum.update()


def data_needs(plan: ObjectivePlan) -> frozenset[str]:
    """What the data must give for a plan's loss and terms under this objective."""
    return (plan.needs - BY_MOMENTUM) | OF_DATA
