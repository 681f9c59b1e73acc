"""A model at frozen parameters, as far as a loss and its gradient see it: what a sample of pairs is encoded to.

M   pairs of the sample         W   width of what a tower's last projection is given
B   pairs of a batch            D   width of the features
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclasses.dataclass(frozen=True)
class Tower:
    """One modality.

    Attributes:
        inputs: (M, W), what the last projection is given. Of a tower that does not show it, the features themselves:
            its gradients are those of a linear map behind the features, at the identity.
        outputs: (M, D), what it gives, of which the features are the direction.
    """

    inputs: Tensor
    outputs: Tensor

    def features(self) -> Tensor:
        """(M, D), of unit norm."""
        return normalize(self.outputs, dim=-1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """M pairs, the inverse temperature (), and the logit bias () of a model that has one."""

    image: Tower
    text: Tower
    logit_scale: Tensor
    logit_bias: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image.outputs)

    @property
    def towers(self) -> tuple[Tower, Tower]:
        return self.image, self.text

    @property
    def device(self) -> torch.device:
        return self.image.outputs.device


def make_sample(encoded: dict[str, Tensor], device: torch.device) -> Sample:
    """The sample of what `encoding.encode` returns."""
    placed = {name: value.to(device) for name, value in encoded.items() if value.is_floating_point()}
    image, text = (Tower(placed[f"{name}_inputs"], placed[f"{name}_outputs"]) for name in ("image", "text"))
    return Sample(image, text, placed["logit_scale"], placed.get("logit_bias"))
