"""OpenCLIP's model as the fusion objective needs it: with the tokens of its towers, and those of a momentum copy."""

import torch
from torch import Tensor, nn

from openclip_ext import upstream
from openclip_ext.fusion.masking import Masking
from openclip_ext.state.momentum import MomentumCopy
from openclip_ext.upstream.wrapper import Wrapper


class FusionModel(Wrapper):
    """An OpenCLIP model that also returns token outputs, of captions with hidden words too.

    Args:
        model: an OpenCLIP model that returns a dict.
        masking: hides words; None: none are hidden.
        momentum: of a copy of both towers; None: there is none.
        trunk_features: return the towers' pooled outputs before their projections too.

    Attributes:
        momentum_encoder: the copy, or None.
        projected: modalities whose tower has no such output; their projected features stand in.
        state_widths: of the tokens of images and of texts.

    Raises:
        UserError: a tower has no token outputs.
    """

    def __init__(
        self, model: nn.Module, masking: Masking | None = None, momentum: float | None = None,
        trunk_features: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.masking, self.trunk_features = masking, trunk_features
        self.momentum_encoder = None if momentum is None else MomentumCopy(model, momentum)
        # Not as attributes of modules: their parts belong to the models already.
        self._views = [_View(model, trunk_features)]
        if self.momentum_encoder is not None:
            self._views.append(_View(self.momentum_encoder.average, trunk_features))
        self.projected = self._views[0].projected
        self.state_widths = self._views[0].widths

    def forward(self, image: Tensor, text: Tensor, row_seeds: Tensor | None = None) -> dict[str, Tensor]:
        """What the model returns, and more; of B pairs, T and L tokens of an image and of a caption.

        Args:
            image: (B, 3, H, W); or (B, 2, 3, H, W), whose features are (B, 2, …).
            text: (B, L).
            row_seeds: (B,), by which words are hidden; None: none are.

        Returns:
            image_features, text_features, logit_scale: the model's.
            image_states, text_states: (B, T, width of the tower), (B, L, …), before any pooling.
            masked_states: of captions with hidden words, if asked for.
            …_trunk_features: of towers, if asked for.
            …_aug, or momentum_…: features, trunk features; and states, of the momentum copy, if there is one.
        """
        masked = None
        if self.masking is not None and row_seeds is not None:
            masked = self.masking.mask(text, row_seeds)[0]
        own = self._views[0]
        out = own(self.model, image, text, masked)
        if self.momentum_encoder is None:
            return out
        with torch.no_grad():
            seen = self._views[1](self.momentum_encoder.average, image, text, masked)
        out |= {f"{name}_aug": value for name, value in seen.items() if name.endswith("_features")}
        out |= {f"momentum_{name}": value for name, value in seen.items() if name.endswith("_states")}
        return out


class _View:
    """Where a model shows its tokens and pooled outputs, and one pass over it that collects them."""

    def __init__(self, model: nn.Module, trunk_features: bool) -> None:
        self._states, self.widths = upstream.find_states(model)
        self._trunks = upstream.find_trunks(model) if trunk_features else {}
        self._pooled = ("image", "text") if trunk_features else ()
        self.projected = [name for name in self._pooled if name not in self._trunks]

    def __call__(self, model: nn.Module, image: Tensor, text: Tensor, masked: Tensor | None) -> dict[str, Tensor]:
        several = image.ndim == 5
        images = image.flatten(0, 1) if several else image
        texts = text if masked is None else torch.cat([text, masked])
        with upstream.watched(self._trunks) as seen:
            out, states = upstream.states_of(model, self._states, images, texts)
        out = {name: value for name, value in out.items() if value is not None}
        out |= {f"{name}_states": value for name, value in states.items()}
        inputs = {"image": images, "text": texts}
        for name in self._pooled:
            pooled = self._trunks[name].pool(seen[name], inputs[name]) if name in self._trunks else None
            out[f"{name}_trunk_features"] = out[f"{name}_features"] if pooled is None else pooled
        if masked is not None:
            out["text_states"], out["masked_states"] = out["text_states"].chunk(2)
            out |= {name: out[name].chunk(2)[0] for name in ("text_features", "text_trunk_features") if name in out}
        if several:
            names = [name for name in out if name.startswith("image_")]
            out |= {name: out[name].unflatten(0, image.shape[:2]) for name in names}
        return out
