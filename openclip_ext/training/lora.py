"""`--lora`: train a low-rank change of the towers' Linear layers (Hu et al., "LoRA", ICLR 2022), through peft.

    y = W x + (alpha / r) B A x,   W (out, in) frozen, A (r, in) random, B (out, r) zero at the start

Adapted are the attention and MLP layers of the blocks of both towers, where a tower is not locked. Everything else is
frozen but the logit scale and its bias. A checkpoint's `state_dict` is that of the plain model, W + (alpha / r) B A for
W; what training goes on from stands beside it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.options import build_options, option, parse_assignments

if TYPE_CHECKING:
    from torch import Tensor, nn

_ADAPTER = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    r: int = option(16, "rank", allowed=">= 1", check=lambda r: r >= 1)
    alpha: float | None = option(
        None, "the change is multiplied by alpha / r; none: 2 r", allowed="above 0", check=lambda a: a is None or a > 0
    )
    dropout: float = option(0.0, "of a layer's input, before A", allowed="in [0, 1)", check=lambda p: 0 <= p < 1)
    targets: str | None = option(
        None, "last names of the layers to adapt, joined by +, such as in_proj+out_proj; none: all of attention and MLP"
    )


def parse_lora(text: str) -> LoRAOptions:
    """What follows `--lora`, such as `r=16,alpha=32`. Imports neither torch nor peft.

    Raises:
        UserError: an unknown option or a wrong value, or peft is not installed.
    """
    given = parse_assignments(text.split(","), "--lora", example="r=16")
    options = build_options(LoRAOptions, given, "LoRA", "--lora")
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"--lora {text}: needs peft, which is not installed; pip install peft")
    return dataclasses.replace(options, alpha=options.alpha or 2.0 * options.r)


class Adapters:
    """A model's adapters, made and put into it here.

    Args:
        model: an OpenCLIP model with its weights, neither copied nor sharded yet; its layers are wrapped in place.
        options: of LoRA.

    Raises:
        UserError: the model has no layer to adapt.
    """

    def __init__(self, model: nn.Module, options: LoRAOptions) -> None:
        import re

        from peft import LoraConfig, inject_adapter_in_model

        self.model, self.options = model, options
        scale = [p for p in (model.logit_scale, getattr(model, "logit_bias", None)) if p is not None]
        scale = [parameter for parameter in scale if parameter.requires_grad]
        names = _chosen(upstream.adaptable_layers(model), options.targets)
        config = LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft says int, and divides it by r
            lora_dropout=options.dropout,
            target_modules="|".join(map(re.escape, names)),
        )
        inject_adapter_in_model(config, model, _ADAPTER)
        for parameter in scale:
            parameter.requires_grad_(True)
        self._layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` of the plain model whose layers do what the adapted ones do."""
        import torch

        state = {
            upstream.plain_name(name.replace(".base_layer.", ".")): value
            for name, value in self.model.state_dict().items()
            if ".lora_" not in name
        }
        with torch.no_grad():
            for name, layer in self._layers.items():
                key = upstream.plain_name(f"{name}.weight")
                state[key] = state[key] + layer.get_delta_weight(_ADAPTER)
        return state

    def state_dict(self) -> dict[str, Tensor]:
        """The adapters, and the frozen weights of the layers that they change, which a merged one does not tell."""
        return {
            name: value
            for name, value in self.model.state_dict().items()
            if ".lora_" in name or name.endswith(".base_layer.weight")
        }

    def options_dict(self) -> dict:
        return dataclasses.asdict(self.options)

    def restore(self, content: dict, path: str) -> None:
        """Go on from `options` and `state_dict` of a checkpoint; the model holds all other weights already.

        Raises:
            UserError: other options made it, or other layers are adapted.
        """
        for key, value in self.options_dict().items():
            if key != "dropout" and content["options"].get(key) != value:
                raise UserError(
                    f"--lora {key}={value}: {path} was trained with {key}={content['options'].get(key)}; use that, or "
                    f"start from its merged weights with --pretrained {path}"
                )
        if content["state_dict"].keys() != self.state_dict().keys():
            raise UserError(
                f"--lora: the adapters of {path} are in other layers; lock the towers that were locked then"
            )
        self.model.load_state_dict(content["state_dict"], strict=False)

    def describe(self) -> str:
        """How much is trained, in words."""
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return f"LoRA of {len(self._layers)} layers, rank {self.options.r}: {trained:,} parameters are trained"


def _chosen(layers: Mapping[str, nn.Module], targets: str | None) -> list[str]:
    """Raises UserError: none of the layers has one of these names."""
    wanted = targets.split("+") if targets else None
    chosen = [name for name in layers if wanted is None or name.rpartition(".")[2] in wanted]
    present = sorted({name.rpartition(".")[2] for name in layers})
    if not present:
        raise UserError("--lora: neither tower has a Linear layer in its blocks that is trained; train without --lora")
    if missing := set(wanted or ()) - set(present):
        raise UserError(
            f"--lora targets={targets}: the towers' blocks have no {', '.join(sorted(missing))}; they have "
            f"{', '.join(present)}"
        )
    return chosen
