"""Image-only training (`--pairs views`): a picture's two views are its pair, and the text tower rests.

Without a momentum encoder the loss is given the features of view one as `image_features` and of view two as
`text_features` (SimCLR's pairs). With one, queries q meet keys k of an averaged copy of the tower, both ways round, as
in MoCo-v3 (Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021):

    L = 1/2 [ loss(q_1, k_2) + loss(q_2, k_1) ],    q = norm(predictor(z)),   z and k unit features of tower and copy

    B   pictures on this rank       D   width of the embeddings       M   momentum

Other than there, a loss averages its two directions, so that keys are anchors too; their gradient reaches the queries
only. MoCo-v3's factor 2T is left out: here T is the model's learned `1 / logit_scale`, and the factor would train it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.losses import LossContext, ObjectivePlan
from openclip_ext.losses.two_ways import TwoWays
from openclip_ext.state.momentum import MomentumCopy
from openclip_ext.upstream.wrapper import Wrapper

PREDICTOR_RATIO = 4  # hidden width of the predictor over D


class MomentumEncoder(MomentumCopy):
    """The average of an image tower that maps images to (B, D).

    Runs in the mode the tower is in, so BatchNorm normalises by the batch at hand, as in MoCo-v3.
    """

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Keys, (B, D), of unit norm and without gradient."""
        return normalize(self.average(image), dim=-1)


class ViewsModel(Wrapper):
    """The image tower of an OpenCLIP model run on both views of a batch at once; all else in the model is frozen.

    Args:
        model: an OpenCLIP model that returns a dict.
        momentum: of the encoder of keys; None: both views are encoded by the tower itself.

    Attributes:
        momentum_encoder: the `MomentumEncoder`, or None.
    """

    def __init__(self, model: nn.Module, momentum: float | None) -> None:
        super().__init__(model)
        tower = upstream.freeze_text(model)
        self.momentum_encoder = None if momentum is None else MomentumEncoder(tower, momentum)

    def forward(self, image: Tensor, image_aug: Tensor) -> dict[str, Tensor]:
        """Unit features (B, D) of the two views, and the logit scale, with its bias if there is one.

        Returns:
            `image_features` z_1 and `text_features` z_2. With a momentum encoder `text_features` is k_2, and the pair
            the other way round is `image_features_swapped` z_2, `text_features_swapped` k_1.
        """
        both = torch.cat([image, image_aug])
        out = dict(self.model(both))
        first, second = out["image_features"].chunk(2)
        if self.momentum_encoder is None:
            return out | {"image_features": first, "text_features": second}
        first_key, second_key = self.momentum_encoder(both).chunk(2)
        return out | {
            "image_features": first,
            "text_features": second_key,
            "image_features_swapped": second,
            "text_features_swapped": first_key,
        }


class SymmetricObjective(TwoWays):
    """The mean of one objective over both ways round, with the predictor that makes queries of features.

    The predictor is a two-layer perceptron with LayerNorm where MoCo-v3 has BatchNorm, so that parts of a batch, on
    ranks or accumulated, give the gradient of the whole. As a part of the loss it is trained with it, without weight
    decay, and kept with it.

    Args:
        plan: of the objective, which is built once for (q_1, k_2) and once for (q_2, k_1).
        context: with the width of the embeddings.

    Raises:
        UserError: both ways would write to one file.
    """

    def __init__(self, plan: ObjectivePlan, context: LossContext) -> None:
        _require_own_files(plan.options)
        super().__init__(plan, context)
        assert context.widths is not None and context.widths.embed is not None
        width, hidden = context.widths.embed, PREDICTOR_RATIO * context.widths.embed
        self.predictor = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, width, bias=False)
        )

    def pairs(self, features: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(q_1, k_2) and (q_2, k_1) of features as `ViewsModel` names them."""
        first = self._queries(features["image_features"], features["text_features"])
        return first, self._queries(features["image_features_swapped"], features["text_features_swapped"])

    def _queries(self, features: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.predictor(features), dim=-1), keys.detach()


def _require_own_files(options: Any) -> None:
    for name, value in vars(options).items():
        if name.endswith("_path") and value:
            place = name.removesuffix("_path") + "_device"
            raise UserError(
                f"--momentum-encoder: keeps a memory for each way round, and --loss-arg {name}={value} names one file; "
                f"use {place}=device or cpu"
            )
