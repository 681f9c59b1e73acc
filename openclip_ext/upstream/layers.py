"""OpenCLIP 3.3: the layers of its towers: which belongs where, at which depth, and which can be adapted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from openclip_ext.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    Part = nn.Module | nn.Parameter | list[nn.Parameter] | None


def tower_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """All parameters of the `image` and of the `text` tower, projections included.

    The logit scale, its bias and CoCa's text decoder belong to neither.
    """
    return {"image": _parameters([model.get_submodule("visual")]), "text": _parameters(_text_parts(model))}


def tower_layers(model: nn.Module, tower: str) -> list[list[nn.Parameter]]:
    """The parameters of a tower by layer, from its input to its head, as OpenCLIP's main branch groups them.

    First come the embeddings, then the blocks (in a ResNet the stages, in timm's towers what their `group_matcher`
    says), the last with the norm that follows it, then the head: what projects to the shared space, and pooling that
    has parameters of its own.

    Args:
        model: an OpenCLIP model.
        tower: `image` or `text`.

    Raises:
        UserError: a kind of tower whose layers are not known.
    """
    if tower == "image":
        blocks, norms, head = _image_layers(model.visual)
    else:
        blocks, norms, head = _text_layers(getattr(model, "text", model))
    layers = [_parameters([block]) for block in blocks]
    layers[-1] += _parameters(norms)
    layers.append(_parameters(head))
    above = {id(parameter) for layer in layers for parameter in layer}
    below = [parameter for parameter in tower_parameters(model)[tower] if id(parameter) not in above]
    return [layer for layer in (below, *layers[:-1]) if layer] + layers[-1:]


def adaptable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linear layers inside the blocks of both towers whose weights are trained, by name.

    Attention of OpenCLIP's own blocks, of version 3.3 or 4, is replaced first by a module that does the same. Left out
    are embeddings, heads, convolutions, CoCa's text decoder, and the bare input projection of 3.3's rarely used
    `CustomResidualAttentionBlock`.
    """
    from torch.nn import Linear, MultiheadAttention
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    from openclip_ext.upstream.attention_v3 import LinearAttention
    from openclip_ext.upstream.attention_v4 import LinearSelfAttention, is_replaceable

    layers = [layer for tower in ("image", "text") for layer in tower_layers(model, tower)[:-1]]
    trained = {id(parameter) for layer in layers for parameter in layer if parameter.requires_grad}
    for module in list(model.modules()):
        attention: Any = getattr(module, "attn", None)
        if id(getattr(attention, "in_proj_weight", None)) not in trained:
            continue
        if isinstance(attention, MultiheadAttention):
            module.attn = LinearAttention(attention)
        elif is_replaceable(attention):
            module.attn = LinearSelfAttention(attention)
    return {
        name: module
        for name, module in model.named_modules()
        # The kind that is left out here is read past its `forward` by attention that was not replaced.
        if isinstance(module, Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
        if id(module.weight) in trained
    }


def plain_name(name: str) -> str:
    """A parameter's name as it was before `adaptable_layers` replaced attention."""
    return name.replace(".attn.in_proj.", ".attn.in_proj_")


def _image_layers(tower: Any) -> tuple[list[Part], list[Part], list[Part]]:
    """(blocks, what follows the last, head)."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(tower, VisionTransformer):
        pools = tower.attn_pool, getattr(tower, "attn_pool_contrastive", None)
        return list(tower.transformer.resblocks), [tower.ln_post], [*pools, tower.proj]
    if isinstance(tower, ModifiedResNet):
        return [tower.layer1, tower.layer2, tower.layer3, tower.layer4], [], [tower.attnpool]
    if isinstance(tower, TimmModel) and hasattr(tower.trunk, "group_matcher"):
        return _timm_layers(tower)
    raise _unknown(tower)


def _timm_layers(tower: Any) -> tuple[list[Part], list[Part], list[Part]]:
    from timm.models import group_parameters

    names = group_parameters(tower.trunk, tower.trunk.group_matcher())
    layers: list[Part] = [[tower.trunk.get_parameter(name) for name in names[depth]] for depth in sorted(names)]
    head = [list(tower.head.parameters()) or layers.pop()]  # without a head of OpenCLIP's, the trunk's own is it
    return layers, [], head


def _text_layers(tower: Any) -> tuple[list[Part], list[Part], list[Part]]:
    from open_clip.hf_model import HFTextEncoder
    from torch.nn import ModuleList

    if isinstance(tower, HFTextEncoder):
        transformer = tower.transformer
        encoder = getattr(transformer, "encoder", transformer)
        blocks = max((m for m in encoder.modules() if isinstance(m, ModuleList)), key=len)
        norms = [getattr(encoder, name, None) for name in ("final_layer_norm", "layer_norm")]
        return list(blocks), norms, [getattr(transformer, "pooler", None), tower.proj]
    if hasattr(getattr(tower, "transformer", None), "resblocks"):
        return list(tower.transformer.resblocks), [tower.ln_final], [tower.text_projection]
    raise _unknown(tower)


def _text_parts(model: nn.Module) -> list[Part]:
    if hasattr(model, "text"):
        return [model.get_submodule("text")]
    names = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    return [getattr(model, name) for name in names]


def _parameters(parts: Iterable[Part]) -> list[nn.Parameter]:
    from torch.nn import Module

    found: list[nn.Parameter] = []
    for part in parts:
        if isinstance(part, Module):
            found += part.parameters()
        elif isinstance(part, list):
            found += part
        elif part is not None:
            found.append(part)
    return found


def _unknown(tower: nn.Module) -> UserError:
    return UserError(
        f"--layer-decay, --lora: the layers of {type(tower).__name__} are not known; leave the flag out, or give the "
        "tower a learning rate with --image-lr or --text-lr"
    )
