"""Geometric consistency: distances within and across modalities, and within and across views, agree."""

import dataclasses

from torch import Tensor

from openclip_ext.losses.base import Loss
from openclip_ext.ops.gather import global_mean, mean_over_ranks
from openclip_ext.ops.gram import sum_of_squared_cross_gaps, sum_of_squared_gaps
from openclip_ext.ops.precision import promoted
from openclip_ext.options import option
from openclip_ext.registry import LossSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    views: bool = option(True, "compare with second views of image and text too; false: CyCLIP's two terms, one view")


class GeometricConsistencyTerm(Loss):
    """Squared differences of similarities over the G pairs of the global batch, unit features v, t, second views a:

        1/G sum_jk [ (<v_j, t_k> - <v_k, t_j>)^2 + (<v_j, v_k> - <t_j, t_k>)^2 ]
      + 1/G sum_jk [ (<v_j, v_k> - <v^a_j, v^a_k>)^2 + (<t_j, t_k> - <t^a_j, t^a_k>)^2 ]      with `views`
      + 1/G sum_j (<v_j, t_j> - <v^a_j, t^a_j>)^2                                             with `views`

    The value grows with G, as published. Time O(G D^2), memory O(G D + D^2) once G > 2 D (`openclip_ext.ops.gram`).

    Source: Jiang et al., CVPR 2023, intra- and inter-modality regularisation; the first line is CyCLIP's (Goel et al.,
    NeurIPS 2022).
    """

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        image_features_aug: Tensor | None = None,
        text_features_aug: Tensor | None = None,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """Unit features (B, D). Returns `geometric_consistency_loss`."""
        image, text = promoted(image_features, text_features)
        total = sum_of_squared_cross_gaps(image, text, self.context.world_size)
        if self.options.views:
            assert image_features_aug is not None and text_features_aug is not None  # as the needs say
            image_aug, text_aug = promoted(image_features_aug, text_features_aug)
            total = total + sum_of_squared_gaps(image, image_aug, self.context.world_size)
            total = total + sum_of_squared_gaps(text, text_aug, self.context.world_size)
        value = total / (
            self.context.world_size * mean_over_ranks(total.new_tensor(len(image)), self.context.world_size)
        )
        if self.options.views:
            gaps = (image * text).sum(1) - (image_aug * text_aug).sum(1)
            value = value + global_mean(gaps.square().sum(), len(gaps), self.context.world_size)
        return {"geometric_consistency_loss": value}


SPEC = LossSpec(
    name="geometric_consistency",
    summary="similarities agree within and across modalities and views",
    paper="Jiang et al., CVPR 2023",
    options=Options,
    needs=lambda options: frozenset({"image_aug", "text_aug"} if options.views else ()),
    build=GeometricConsistencyTerm,
)
