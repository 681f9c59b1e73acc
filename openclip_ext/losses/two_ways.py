"""One loss over two pairs of features: queries of each side against keys of the other."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from openclip_ext.losses.composite import Composite
from openclip_ext.losses.context import LossContext
from openclip_ext.losses.objective import Objective
from openclip_ext.losses.plan import ObjectivePlan

AGAIN = "_again"  # how names of features end that were encoded again


class TwoWays(Composite):
    """The mean of one objective over two pairs of features, which a subclass makes in `pairs`.

    Each way has an objective, and so a memory, of its own: every memory sees each sample once per epoch, in one role,
    as its formulas assume, at the price of twice the state. One call on the queries of both ways against the keys of
    both would keep positives in line row by row, but only a loss that takes sample ids could tell that the key of a
    sample's other side is no negative of it.

    Args:
        plan: of the objective, which is built once per way.
        context: see `LossContext`.
        terms: False: build it without the plan's terms.
    """

    def __init__(self, plan: ObjectivePlan, context: LossContext, *, terms: bool = True) -> None:
        super().__init__(plan.options, context)
        self.objectives = nn.ModuleList([plan.build(context, terms=terms) for _ in range(2)])

    def pairs(self, features: dict[str, Tensor]) -> Sequence[tuple[Tensor, Tensor]]:
        """What stands for image and text features in each way, of what the model returns."""
        raise NotImplementedError(f"{type(self).__name__} has no pairs(features)")

    def compute(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **extra: Tensor
    ) -> dict[str, Tensor]:
        """Losses and report scalars by name, each the mean of both ways."""
        features = {"image_features": image_features, "text_features": text_features, **extra}
        again = self._again(extra)
        first, second = (
            objective(*pair, logit_scale, **(extra | kept))
            for objective, pair, kept in zip(self._ways, self.pairs(features), again, strict=True)
        )
        # A scalar that one way alone reports, of a check of freshness that the other has ended, is that way's.
        return first | second | {name: (value + second[name]) / 2 for name, value in first.items() if name in second}

    @torch.no_grad()
    def _again(self, extra: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What each way is given as features encoded again."""
        again = {name.removesuffix(AGAIN): value for name, value in extra.items() if name.endswith(AGAIN)}
        if not again:
            return [{}, {}]
        names = f"image_features{AGAIN}", f"text_features{AGAIN}"
        return [dict(zip(names, pair, strict=True)) for pair in self.pairs(again)]

    @property
    def _ways(self) -> Sequence[Objective]:
        return cast(Sequence[Objective], self.objectives)

    @property
    def probe(self) -> str | None:
        """Both ways begin their checks together, and what one needs no more is kept for the other."""
        asked = {way.probe for way in self._ways}
        return next((name for name in ("keep", "encode", None) if name in asked), "forget")

    @torch.no_grad()
    def warm_start(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **extra: Tensor) -> None:
        """As `Objective.warm_start`, each way."""
        features = {"image_features": image_features, "text_features": text_features, **extra}
        for objective, pair in zip(self._ways, self.pairs(features), strict=True):
            objective.warm_start(*pair, logit_scale, **extra)
