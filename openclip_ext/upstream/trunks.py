"""OpenCLIP 3.3: where each family of towers has its pooled output, before the projection to the shared space."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Trunk:
    """How to see a tower's pooled output.

    Attributes:
        module: part of the tower whose input or output holds it.
        takes_input: look at the module's input instead of its output.
        pool: from that and the tower's own input to the pooled output (B, width).
    """

    module: nn.Module
    takes_input: bool
    pool: Callable[[Tensor, Tensor], Tensor]


def find_trunks(model: nn.Module) -> dict[str, Trunk]:
    """The trunks of the `image` and `text` towers; a tower without an output before its projection is left out."""
    trunks = {"image": _image_trunk(model), "text": _text_trunk(model)}
    return {modality: trunk for modality, trunk in trunks.items() if trunk is not None}


def find_projections(model: nn.Module) -> dict[str, Trunk]:
    """Where to see what the last linear map of the `image` and `text` towers is given.

    A tower's features, before they are given unit norm, are that times the map's weights, plus its bias if it has one.
    A tower that shows no such input, as a ResNet, which projects inside its attention, is left out.
    """
    from open_clip.hf_model import HFTextEncoder
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from torch.nn import Linear

    found = find_trunks(model)
    for modality, tower in (("image", model.visual), ("text", getattr(model, "text", model))):
        projection: Any = None
        if isinstance(tower, ModifiedResNet):
            found.pop(modality, None)
        elif isinstance(tower, TimmModel) and len(tower.head):
            projection = getattr(tower.head, "proj", None) or getattr(tower.head, "mlp", None)
            found.pop(modality)  # what a head without either ends in, such as attention, is no linear map
        elif isinstance(tower, HFTextEncoder):
            projection = tower.proj
        linear = [module for module in projection.modules() if isinstance(module, Linear)] if projection else []
        if linear:
            found[modality] = _before(linear[-1])
    return found


@contextlib.contextmanager
def watched(trunks: dict[str, Trunk]) -> Iterator[dict[str, Tensor]]:
    """What the trunks' modules see in a forward pass inside, by the trunks' names."""
    seen: dict[str, Tensor] = {}

    def attach(name: str, trunk: Trunk):
        def before(module, inputs):
            seen[name] = inputs[0]

        def after(module, inputs, output):
            seen[name] = output

        if trunk.takes_input:
            return trunk.module.register_forward_pre_hook(before)
        return trunk.module.register_forward_hook(after)

    handles = [attach(name, trunk) for name, trunk in trunks.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _image_trunk(model: nn.Module) -> Trunk | None:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    tower: Any = model.visual
    if isinstance(tower, VisionTransformer) and tower.proj is not None:
        return Trunk(tower.transformer, False, lambda tokens, image: tower._pool(tokens)[0])
    if isinstance(tower, ModifiedResNet):
        # Its attention pooling ends in the projection. The mean over positions is that attention's query.
        return Trunk(tower.attnpool, True, lambda x, image: x.mean((2, 3)))
    if isinstance(tower, TimmModel):
        return _timm_trunk(tower)
    return None


def _timm_trunk(tower: Any) -> Trunk | None:
    if len(tower.head):
        channels_last = getattr(tower.trunk, "output_fmt", "NCHW") == "NHWC"

        def pool(x: Tensor, image: Tensor) -> Tensor:
            if x.ndim == 4:
                return x.mean((1, 2) if channels_last else (2, 3))
            return x.mean(1) if x.ndim == 3 else x

        return Trunk(tower.trunk, False, pool)
    projection = tower.trunk.get_classifier()  # an identity where there is no projection at all
    return _before(projection) if list(projection.parameters()) else None


def _text_trunk(model: nn.Module) -> Trunk | None:
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import text_global_pool

    tower: Any = getattr(model, "text", model)
    if isinstance(tower, HFTextEncoder):
        return _before(tower.proj) if list(tower.proj.parameters()) else None
    projection = getattr(tower, "text_projection", None)
    if projection is None:
        return None
    if callable(projection):
        return _before(projection)
    pool_type = getattr(tower, "text_pool_type", None) or tower.pool_type
    eos_id = getattr(tower, "text_eos_id", None) or getattr(tower, "eos_id", None)

    def pool(x: Tensor, text: Tensor) -> Tensor:
        return x if x.ndim == 2 else text_global_pool(x, text, pool_type, eos_token_id=eos_id)

    return Trunk(tower.ln_final, False, pool)


def _before(projection: nn.Module) -> Trunk:
    """A projection's input is the pooled output."""
    return Trunk(projection, True, lambda pooled, _: pooled)
