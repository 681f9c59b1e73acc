"""Deep feature separation: private features per modality hold what the other modality has no word for."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from openclip_ext.losses.base import Loss
from openclip_ext.losses.context import LossContext, require_widths
from openclip_ext.ops.gather import global_mean
from openclip_ext.ops.pair_sums import log_mean_ratio, pair_loss
from openclip_ext.ops.precision import promoted
from openclip_ext.options import NoOptions
from openclip_ext.registry import LossSpec

TEMPERATURE = 2.0  # of the uniformity, t in exp(-t ||.||^2)


class FeatureSeparationTerm(Loss):
    """`L_ortho + L_con + L_uni` over the G pairs of the global batch, with private features v^p, t^p of two heads:

        L_ortho = mean_j ( <v_j, v^p_j>^2 + <t_j, t^p_j>^2 )
        L_con   = 1/2 sum over modalities of  CE_j( logit_scale <p_j, p^a_k> over k, target k = j )
        L_uni   = 1/2 sum over modalities of  log mean_{j != k} exp(-2 ||p_j - p_k||^2)

    All features have unit norm, `a` marks second views. The heads are two-layer projections of the towers' pooled
    output before the shared projection. They are parameters of this term: trained with the model, kept in the loss's
    state, absent from the model's.

    Source: Jiang et al., CVPR 2023, intra-modality regularisation. L_con contrasts with second views and L_uni leaves
    out j = k, where the printed formulas would be constant in part.
    """

    def __init__(self, options: NoOptions, context: LossContext) -> None:
        super().__init__(options, context)
        widths = require_widths(context, "loss term feature_separation", "image_trunk", "text_trunk", "embed")
        self.heads = nn.ModuleDict()
        for modality, width in (("image", widths.image_trunk), ("text", widths.text_trunk)):
            assert width is not None and widths.embed is not None
            self.heads[modality] = nn.Sequential(
                nn.Linear(width, widths.embed), nn.GELU(), nn.Linear(widths.embed, widths.embed)
            )

    def private(self, modality: str, trunk_features: Tensor) -> Tensor:
        """Private unit features (B, D) of a modality's pooled tower outputs (B, width)."""
        return normalize(self.heads[modality](trunk_features), dim=-1)

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        image_trunk_features: Tensor,
        text_trunk_features: Tensor,
        image_trunk_features_aug: Tensor,
        text_trunk_features_aug: Tensor,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """Shared unit features (B, D) and pooled tower outputs (B, width) of both views.

        Returns:
            feature_separation_loss: the sum.
            orthogonality, private_contrastive, uniformity: its parts.
        """
        parts: dict[str, Any] = {"orthogonality": 0.0, "private_contrastive": 0.0, "uniformity": 0.0}
        for modality, shared, trunk, trunk_aug in (
            ("image", image_features, image_trunk_features, image_trunk_features_aug),
            ("text", text_features, text_trunk_features, text_trunk_features_aug),
        ):
            shared, trunk, trunk_aug = promoted(shared, trunk, trunk_aug)
            private, private_aug = self.private(modality, torch.cat([trunk, trunk_aug])).chunk(2)
            overlap = (shared * private).sum(1).square()
            parts["orthogonality"] += global_mean(overlap.sum(), len(overlap), self.context.world_size)
            parts["private_contrastive"] += self._contrastive(private, private_aug, logit_scale) / 2
            parts["uniformity"] += self._uniformity(private) / 2
        total = sum(parts.values())
        return {"feature_separation_loss": total} | {name: value.detach() for name, value in parts.items()}

    def _contrastive(self, private: Tensor, private_aug: Tensor, scale: Tensor) -> Tensor:
        """Cross entropy of each row's own second view among those of all rows."""
        pairs = self.context.gather_pairs(private, private_aug, scale)
        value = softplus(log_mean_ratio(pairs)[0] + pairs.log_count)
        # Second views are no anchors. The mean is over anchors of both directions.
        values = torch.stack([value, torch.zeros_like(value)])
        log_weight = torch.stack([pairs.log_count - value, torch.full_like(value, -math.inf)])
        return 2 * pair_loss(pairs, value=values, log_weight=log_weight)

    def _uniformity(self, private: Tensor) -> Tensor:
        """`log mean_{j != k} exp(-t ||p_j - p_k||^2)`: rows have unit norm, so it is the ratio of their scores."""
        pairs = self.context.gather_pairs(private, private, private.new_tensor(2 * TEMPERATURE))
        log_mean = log_mean_ratio(pairs)
        value = pairs.gathered(log_mean).logsumexp((0, 1)) - math.log(log_mean.shape[0] * len(pairs.all_ids))
        return pair_loss(pairs, value=value.expand_as(log_mean), log_weight=(-value).expand_as(log_mean))


SPEC = LossSpec(
    name="feature_separation",
    summary="private features per modality, orthogonal to the shared ones",
    paper="Jiang et al., CVPR 2023",
    needs=frozenset({"image_aug", "text_aug", "trunk_features", "widths"}),
    build=FeatureSeparationTerm,
)
