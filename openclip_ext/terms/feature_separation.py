"""Deep feature separation: private features per modality hold what the other modality has no word for."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from openclip_ext.losses.base import Loss
from openclip_ext.losses.context import LossContext, require_widths
from openclip_ext.ops.gather import gather_rows, gather_rows_with_grad, gather_sizes, global_mean
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
        scale = logit_scale.to(promoted(image_features)[0].dtype)
        sizes = gather_sizes(len(image_features), self.context.world_size, image_features.device)
        parts: dict[str, Any] = {"orthogonality": 0.0, "private_contrastive": 0.0, "uniformity": 0.0}
        for modality, shared, trunk, trunk_aug in (
            ("image", image_features, image_trunk_features, image_trunk_features_aug),
            ("text", text_features, text_trunk_features, text_trunk_features_aug),
        ):
            shared, trunk, trunk_aug = promoted(shared, trunk, trunk_aug)
            private, private_aug = self.private(modality, torch.cat([trunk, trunk_aug])).chunk(2)
            overlap = (shared * private).sum(1).square()
            parts["orthogonality"] += global_mean(overlap.sum(), len(overlap), self.context.world_size)
            parts["private_contrastive"] += self._contrastive(private, private_aug, scale, sizes) / 2
            parts["uniformity"] += self._uniformity(private, sizes) / 2
        total = sum(parts.values())
        return {"feature_separation_loss": total} | {name: value.detach() for name, value in parts.items()}

    def _contrastive(self, private: Tensor, private_aug: Tensor, scale: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Cross entropy of each row's own second view among those of all rows."""
        logits = scale * private @ gather_rows_with_grad(private_aug, sizes, self.context.rank).T
        total = cross_entropy(logits, self._own_columns(logits, sizes), reduction="sum")
        return global_mean(total, len(logits), self.context.world_size)

    def _uniformity(self, private: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """`log mean_{j != k} exp(-t ||p_j - p_k||^2)`."""
        cosine = private @ gather_rows_with_grad(private, sizes, self.context.rank).T
        own = self._own_columns(cosine, sizes)
        exponent = (-2 * TEMPERATURE * (1 - cosine)).scatter(1, own[:, None], -torch.inf)
        local = exponent.flatten().logsumexp(0)
        total = gather_rows(local[None], (1,) * self.context.world_size).logsumexp(0)
        pairs = sum(sizes) * (sum(sizes) - 1)
        # log of a sum over ranks: this rank's part of its gradient is its share of the sum, here times W.
        share = self.context.world_size * (local - total).exp().detach()
        return total - math.log(pairs) + share * (local - local.detach())

    def _own_columns(self, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Where among the gathered rows each row of this rank sits, (B,)."""
        return torch.arange(len(rows), device=rows.device) + sum(sizes[: self.context.rank])


SPEC = LossSpec(
    name="feature_separation",
    summary="private features per modality, orthogonal to the shared ones",
    paper="Jiang et al., CVPR 2023",
    needs=frozenset({"image_aug", "text_aug", "trunk_features", "widths"}),
    build=FeatureSeparationTerm,
)
