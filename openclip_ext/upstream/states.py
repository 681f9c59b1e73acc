"""OpenCLIP 3.3 and 4: where each family of towers has its token outputs, of patches and of words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openclip_ext.errors import UserError
from openclip_ext.upstream.models import example_inputs, in_evaluation
from openclip_ext.upstream.trunks import Trunk, watched

if TYPE_CHECKING:
    from torch import Tensor, nn


def find_states(model: nn.Module) -> tuple[dict[str, Trunk], tuple[int, int]]:
    """Where to see the token outputs of the `image` and `text` towers, (B, T, width) each, and both widths.

    They are those before any pooling. Images: patches, with the class token where there is one, or the places of a
    ResNet's or ConvNeXt's last map. Texts: one token per id.

    Raises:
        UserError: a tower has none.
    """
    from torch import no_grad

    towers: dict[str, Any] = {"image": model.visual, "text": getattr(model, "text", model)}
    found = {"image": _image_states(towers["image"]), "text": _text_states(towers["text"])}
    image, text = example_inputs(model, next(towers["image"].parameters()).dtype)
    with no_grad(), in_evaluation(model):
        seen = states_of(model, found, image, text)[1]
    for name, tower in towers.items():
        states = seen.get(name)
        if states is None or states.ndim != 3 or (name == "text" and states.shape[1] != text.shape[1]):
            raise UserError(
                f"--fusion: the {name} tower, a {type(tower).__name__}, has no token outputs; use a --model whose "
                f"{name} tower has one output per {'patch' if name == 'image' else 'token'}, such as ViT-B-16"
            )
    return found, (seen["image"].shape[2], seen["text"].shape[2])


def states_of(
    model: nn.Module, places: dict[str, Trunk], image: Tensor, text: Tensor
) -> tuple[dict, dict[str, Tensor]]:
    """What the model returns, and by modality its token outputs."""
    inputs = {"image": image, "text": text}
    with watched(places) as seen:
        out = dict(model(image, text))
    return out, {name: places[name].pool(value, inputs[name]) for name, value in seen.items()}


def _image_states(tower: Any) -> Trunk:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(tower, VisionTransformer):
        return Trunk(tower.transformer, False, lambda tokens, image: tokens)
    if isinstance(tower, ModifiedResNet):
        return Trunk(tower.attnpool, True, lambda x, image: x.flatten(2).mT)
    if isinstance(tower, TimmModel):
        import timm

        if isinstance(tower.trunk, timm.models.VisionTransformer):
            return Trunk(tower.trunk.norm, False, lambda tokens, image: tokens)
        channels_last = getattr(tower.trunk, "output_fmt", "NCHW") == "NHWC"

        def places(x: Tensor, image: Tensor) -> Tensor:
            if x.ndim != 4:
                return x
            return x.flatten(1, 2) if channels_last else x.flatten(2).mT

        return Trunk(tower.trunk, False, places)
    return Trunk(tower, False, lambda x, image: x)


def _text_states(tower: Any) -> Trunk:
    def tokens(out: Any, text: Tensor) -> Tensor:
        return getattr(out, "last_hidden_state", out)

    return Trunk(getattr(tower, "transformer", tower), False, tokens)
