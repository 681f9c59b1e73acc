"""The model as terms need it: with features of second views, and with the pooled outputs of its towers."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from openclip_ext import upstream
from openclip_ext.losses import Widths
from openclip_ext.upstream.wrapper import Wrapper


class PairModel(Wrapper):
    """An OpenCLIP model run on both views at once.

    Args:
        model: an OpenCLIP model that returns a dict.
        trunk_features: return the towers' pooled outputs before their projections too.

    Attributes:
        projected: modalities whose tower has no such output; their projected features stand in.
    """

    def __init__(self, model: nn.Module, *, trunk_features: bool) -> None:
        super().__init__(model)
        self.trunk_features = trunk_features
        # Not as attributes of modules: their parts belong to the model already.
        self._trunks = upstream.find_trunks(model) if trunk_features else None
        self.projected = [name for name in ("image", "text") if self._trunks is not None and name not in self._trunks]

    def forward(
        self, image: Tensor, text: Tensor, image_aug: Tensor | None = None, text_aug: Tensor | None = None
    ) -> dict[str, Tensor]:
        """See `run_on_views`."""
        return run_on_views(self.model, self._trunks, image, text, image_aug, text_aug)


def run_on_views(
    model: Callable[[Tensor, Tensor], dict[str, Tensor]],
    trunks: dict | None,
    image: Tensor,
    text: Tensor,
    image_aug: Tensor | None = None,
    text_aug: Tensor | None = None,
) -> dict[str, Tensor]:
    """What the model returns for the first views, plus the features of second views under the same names with `_aug`.

    One forward pass per tower: second views are concatenated to the first.

    Args:
        model: of images and texts; OpenCLIP's, or a wrapper that runs it.
        trunks: of the model, by `upstream.find_trunks`: their pooled outputs are returned as
            `<modality>_trunk_features`, and projected features stand in for those of a tower that is not among them.
            None: none wanted.
        image, text: first views.
        image_aug, text_aug: second views, as many; None: none wanted.
    """
    inputs = {"image": image, "text": text}
    second = {name: x for name, x in (("image", image_aug), ("text", text_aug)) if x is not None}
    inputs |= {name: torch.cat([inputs[name], x]) for name, x in second.items()}
    with upstream.watched(trunks or {}) as seen:
        out = dict(model(inputs["image"], inputs["text"]))
    if trunks is not None:
        for name in inputs:
            features = trunks[name].pool(seen[name], inputs[name]) if name in trunks else out[f"{name}_features"]
            out[f"{name}_trunk_features"] = features
    for name in second:
        for key in (f"{name}_features", f"{name}_trunk_features"):
            if key in out:
                out[key], out[f"{key}_aug"] = out[key].chunk(2)
    return out


@torch.no_grad()
def feature_widths(model: nn.Module, dtype: torch.dtype | None) -> Widths:
    """The widths of a model's features, from one run on an empty pair; `dtype` is that of images."""
    image, text = upstream.example_inputs(getattr(model, "model", model), dtype)
    with upstream.in_evaluation(model):
        embed = cast(Wrapper, model).encode_image(image).shape[1]
        out = model(image, text) if getattr(model, "trunk_features", False) else {}
    trunks = {f"{name}_trunk": out.get(f"{name}_trunk_features") for name in ("image", "text")}
    return Widths(embed=embed, **{name: embed if x is None else x.shape[1] for name, x in trunks.items()})


def freeze_unused_bias(model: nn.Module, needs: frozenset[str]) -> None:
    """Take the logit bias of a model that has one out of training where the loss does not use it."""
    if "logit_bias" not in needs and getattr(model, "logit_bias", None) is not None:
        model.logit_bias.requires_grad_(False)  # DDP would wait for its gradient


def pair_model(model: nn.Module, needs: frozenset[str]) -> nn.Module:
    """The model itself where neither second views nor trunk features are needed, else a `PairModel`."""
    if not needs & {"image_aug", "text_aug", "trunk_features"}:
        return model
    return PairModel(model, trunk_features="trunk_features" in needs)
