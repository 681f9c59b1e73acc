"""Brownian bridge: the second view of an image lies between the image and its text."""

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize

from openclip_ext.losses.base import Loss
from openclip_ext.losses.context import LossContext
from openclip_ext.ops.counter_random import uniform
from openclip_ext.ops.gather import gather_sizes, global_mean
from openclip_ext.ops.precision import promoted
from openclip_ext.options import option
from openclip_ext.registry import LossSpec

#: Sampled tau stay this far from 0 and 1, where 1 / (tau (1 - tau)) has no finite mean.
MARGIN = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    tau: float = option(
        0.25, "share of the image in the bridge's mean", allowed="in [0, 1]", check=lambda tau: 0 <= tau <= 1
    )
    sample: bool = option(False, "draw tau anew for each pair, and divide by the bridge's variance, 2 tau (1 - tau)")


class BrownianBridgeTerm(Loss):
    """`mean_j || v^a_j - mu_j ||^2`, `mu = norm(tau v + (1 - tau) t)`, over the pairs j of the global batch.

    v, t and v^a are unit image, text and second-view image features; gradients flow through all three. With `sample`,
    `mean_j || v^a_j - mu_j ||^2 / (2 tau_j (1 - tau_j))`, tau_j ~ U(0.01, 0.99): over U(0, 1), as the paper has it,
    the expectation of that is infinite.

    Source: Jiang et al., "Understanding and Constructing Latent Modality Structures in Multi-Modal Representation
    Learning", CVPR 2023, inter-modality regularisation.
    """

    steps_taken: Tensor

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__(options, context)
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        image_features_aug: Tensor,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """Unit features (B, D). Returns `brownian_bridge_loss`, the global mean."""
        image, text, image_aug = promoted(image_features, text_features, image_features_aug)
        tau = self._tau(image)
        squared = (image_aug - normalize(tau * image + (1 - tau) * text, dim=-1)).square().sum(1, keepdim=True)
        if self.options.sample:
            squared = squared / (2 * tau * (1 - tau))
        value = global_mean(squared.sum(), len(squared), self.context.world_size)
        return {"brownian_bridge_loss": value}

    def commit(self) -> None:
        """Let the next step draw anew."""
        self.steps_taken += 1

    def _tau(self, image: Tensor) -> Tensor | float:
        """(B, 1) draws, a function of the step and of the place in the global batch; or the option."""
        if not self.options.sample:
            return self.options.tau
        sizes = gather_sizes(len(image), self.context.world_size, image.device)
        places = torch.arange(len(image), device=image.device) + sum(sizes[: self.context.rank])
        draws = uniform(self.steps_taken, places, stream=0).to(image.dtype)
        return (MARGIN + (1 - 2 * MARGIN) * draws)[:, None]


SPEC = LossSpec(
    name="brownian_bridge",
    summary="pulls an image's second view to the path between image and text",
    paper="Jiang et al., CVPR 2023",
    options=Options,
    needs=frozenset({"image_aug"}),
    build=BrownianBridgeTerm,
)
