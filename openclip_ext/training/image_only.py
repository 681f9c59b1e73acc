"""Image-only training (`--pairs views`): a picture's two views are its pair, and the text tower rests.

Without a momentum encoder the loss is given the features of view one as `image_features` and of view two as
`text_features` (SimCLR's pairs). With one, queries q meet keys k of an averaged copy of the tower, both ways round, as
in MoCo-v3 (Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021):

    L = 1/2 [ loss(q_1, k_2) + loss(q_2, k_1) ],    q = norm(predictor(z)),   z and k unit features of tower and copy

    B   pictures on this rank       D   width of the embeddings       M   momentum

Other than there, a loss averages its two directions, so that keys are anchors too; their gradient reaches the queries
only. MoCo-v3's factor 2T is left out: here T is the model's learned `1 / logit_scale`, and the factor would train it.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.losses import Loss, LossContext, Objective, ObjectivePlan
from openclip_ext.training.pair_model import Wrapper

PREDICTOR_RATIO = 4  # hidden width of the predictor over D


class MomentumEncoder(nn.Module):
    """The average of an image tower over its steps, `a <- M a + (1 - M) p`, beginning as a copy of it.

    Runs in the mode the tower is in, so BatchNorm normalises by the batch at hand, as in MoCo-v3. Buffers are not
    averaged but taken from the tower with each update: running statistics are averages already.

    Args:
        tower: maps images to (B, D).
        momentum: M, in [0, 1).
    """

    def __init__(self, tower: nn.Module, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.average = copy.deepcopy(tower).requires_grad_(False)
        self._tower = (tower,)  # not as a module: it is the model's part already

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Keys, (B, D), of unit norm and without gradient."""
        return normalize(self.average(image), dim=-1)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the tower by one step."""
        (tower,) = self._tower
        averages: list[Tensor] = list(self.average.parameters())
        current: list[Tensor] = list(tower.parameters())
        torch._foreach_lerp_(averages, current, 1 - self.momentum)
        for own, other in zip(self.average.buffers(), tower.buffers(), strict=True):
            own.copy_(other)


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


class SymmetricObjective(Loss):
    """The mean of one objective over both ways round, with the predictor that makes queries of features.

    Each way has an objective, and so a memory, of its own: every memory sees each picture once per epoch, in one role,
    as its formulas assume, at the price of twice the state. One call on (q_1; q_2) against (k_2; k_1) would keep
    positives in line row by row, but only a loss that takes sample ids could tell that k_1 is no negative of q_1:
    `clip`, `dcl`, `siglip` and `batch_corrected` would push a view off itself.

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
        super().__init__(plan.options, context)
        _require_own_files(plan.options)
        self.objectives = nn.ModuleList([plan.build(context), plan.build(context)])
        assert context.widths is not None and context.widths.embed is not None
        width, hidden = context.widths.embed, PREDICTOR_RATIO * context.widths.embed
        self.predictor = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, width, bias=False)
        )

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        image_features_swapped: Tensor,
        text_features_swapped: Tensor,
        image_features_again: Tensor | None = None,
        text_features_again: Tensor | None = None,
        image_features_swapped_again: Tensor | None = None,
        text_features_swapped_again: Tensor | None = None,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """Losses and report scalars by name, each the mean of both ways; features as `ViewsModel` returns them."""
        pairs = (image_features, text_features), (image_features_swapped, text_features_swapped)
        again = (
            self._again(image_features_again, text_features_again),
            self._again(image_features_swapped_again, text_features_swapped_again),
        )
        first, second = (
            objective(*self._queries(*pair), logit_scale, **extra, **kept)
            for objective, pair, kept in zip(self.objectives, pairs, again, strict=True)
        )
        return {name: (value + second[name]) / 2 for name, value in first.items()}

    def _queries(self, features: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.predictor(features), dim=-1), keys.detach()

    @torch.no_grad()
    def _again(self, features: Tensor | None, keys: Tensor | None) -> dict[str, Tensor]:
        if features is None:
            return {}
        assert keys is not None
        return dict(zip(("image_features_again", "text_features_again"), self._queries(features, keys), strict=True))

    @property
    def _ways(self) -> Sequence[Objective]:
        return cast(Sequence[Objective], self.objectives)

    @property
    def probe(self) -> str | None:
        return self._ways[0].probe

    @property
    def wants_warm_start(self) -> bool:
        return self._ways[0].wants_warm_start

    @torch.no_grad()
    def warm_start(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        image_features_swapped: Tensor,
        text_features_swapped: Tensor,
        **extra: Tensor,
    ) -> None:
        """As `Objective.warm_start`, each way round."""
        pairs = (image_features, text_features), (image_features_swapped, text_features_swapped)
        for objective, pair in zip(self._ways, pairs, strict=True):
            objective.warm_start(*self._queries(*pair), logit_scale, **extra)

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """As `Objective.begin_step`."""
        for objective in self._ways:
            objective.begin_step(step=step, total_steps=total_steps)

    def commit(self) -> None:
        """As `Objective.commit`."""
        for objective in self._ways:
            objective.commit()


def _require_own_files(options: Any) -> None:
    for name, value in vars(options).items():
        if name.endswith("_path") and value:
            place = name.removesuffix("_path") + "_device"
            raise UserError(
                f"--momentum-encoder: keeps a memory for each way round, and --loss-arg {name}={value} names one file; "
                f"use {place}=device or cpu"
            )
