"""What the training loop calls: a base loss plus weighted terms, with the hooks of a step."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from openclip_ext.losses.weights import Weight


class Objective(nn.Module):
    """A base loss and additive terms behind one call.

    Hands each part only what its spec says it needs, multiplies the terms by their weights, and passes `begin_step`
    and `commit` on to the parts that have them.

    Attributes:
        needs: what `forward` must be given besides features and logit scale (see `openclip_ext.registry.NEEDS`).
    """

    def __init__(self, base: nn.Module, needs: frozenset[str], weight: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.terms = nn.ModuleDict()
        self._needs = {"base": needs}
        self._weights = {"base": Weight(weight, weight)}
        self._weights_now = {"base": weight}

    def add_term(self, name: str, term: nn.Module, needs: frozenset[str], weight: Weight) -> None:
        """Add `weight` times the term, which returns `{"<name>_loss": tensor}`."""
        self.terms[name] = term
        self._needs[name] = needs
        self._weights[name] = weight
        self._weights_now[name] = weight.end

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*self._needs.values())

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, output_dict: bool = True, **extra
    ) -> dict[str, Tensor] | Tensor:
        """Losses and report scalars by name; without `output_dict`, the sum of the losses.

        Raises:
            TypeError: something a part needs is missing from `extra`.
        """
        outputs: dict[str, Tensor] = {}
        with _float32(image_features.device):
            for name, part in {"base": self.base, **self.terms}.items():
                for key, value in self._call(name, part, image_features, text_features, logit_scale, extra).items():
                    outputs[key] = self._weights_now[name] * value if key.endswith("_loss") else value
                if not self._weights[name].constant:
                    outputs[f"{name}_weight"] = torch.tensor(self._weights_now[name])
        return outputs if output_dict else total_loss(outputs)

    def _call(self, name, module, image_features, text_features, logit_scale, extra):
        given = self._given(name, module, extra)
        return module(image_features, text_features, logit_scale, **given, output_dict=True)

    def _given(self, name: str, module: nn.Module, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        names = arguments(self._needs[name])
        missing = sorted(names - extra.keys())
        if missing:
            raise TypeError(f"{type(module).__name__} needs {', '.join(missing)}")
        return {key: extra[key] for key in names}

    @property
    def wants_warm_start(self) -> bool:
        """Whether any part has use for `warm_start`."""
        return any(hasattr(part, "warm_start") for part in self._parts())

    @torch.no_grad()
    def warm_start(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **extra) -> None:
        """Let the parts that have state write what a batch tells before training; it counts as no step.

        Arguments are those of `forward`; to be called on every rank.
        """
        with _float32(image_features.device):
            for name, part in {"base": self.base, **self.terms}.items():
                if hasattr(part, "warm_start"):
                    part.warm_start(image_features, text_features, logit_scale, **self._given(name, part, extra))

    def set_num_ids(self, num_ids: int) -> None:
        """Let sample ids run from 0 to `num_ids` - 1 where they are no positions: the number of samples stays."""
        for module in self.modules():
            if module is not self and hasattr(module, "set_num_ids"):
                module.set_num_ids(num_ids)

    @property
    def wants_widths(self) -> bool:
        """Whether any part has use for `set_widths`."""
        return any(hasattr(part, "set_widths") for part in self._parts())

    def set_widths(self, *, image_trunk: int, text_trunk: int, embed: int) -> None:
        """Let the parts that have heads, or a memory of embeddings, make them.

        Args:
            image_trunk: width of `image_trunk_features`, the image tower's pooled output before its projection.
            text_trunk: width of `text_trunk_features`.
            embed: width of `image_features` and `text_features`.
        """
        for part in self._parts():
            if hasattr(part, "set_widths"):
                part.set_widths(image_trunk=image_trunk, text_trunk=text_trunk, embed=embed)

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """Tell weights and parts that have a schedule the time. Call before each optimizer step."""
        self._weights_now = {name: weight.at(step, total_steps) for name, weight in self._weights.items()}
        for part in self._parts():
            if hasattr(part, "begin_step"):
                part.begin_step(step=step, total_steps=total_steps)

    def commit(self) -> None:
        """Let the parts that have state write what `forward` staged. Call once after each optimizer step taken."""
        for part in self._parts():
            if hasattr(part, "commit"):
                part.commit()

    def _parts(self) -> tuple[nn.Module, ...]:
        return (self.base, *self.terms.values())


_ARGUMENTS = {
    "sample_ids": ("sample_ids",),
    "logit_bias": ("logit_bias",),
    "teacher_features": ("dist_image_features", "dist_text_features", "dist_logit_scale"),
    "caption_logits": ("logits", "labels"),
    "image_aug": ("image_features_aug",),
    "text_aug": ("text_features_aug",),
    "stored_features": ("stored_features",),
    "trunk_features": ("image_trunk_features", "text_trunk_features"),
}


def arguments(needs: frozenset[str]) -> set[str]:
    """The keyword arguments of `forward` that satisfy these needs.

    Who needs both trunk features and the second view of a modality gets the trunk features of that view too.
    """
    names = {argument for need in needs for argument in _ARGUMENTS[need]}
    if "trunk_features" in needs:
        names |= {f"{modality}_trunk_features_aug" for modality in ("image", "text") if f"{modality}_aug" in needs}
    return names


@contextlib.contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: at a logit scale of 100 either would move a score by some hundredths."""
    matmul = torch.backends.cuda.matmul
    tf32 = device.type == "cuda" and matmul.allow_tf32
    try:
        if tf32:
            matmul.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if tf32:
            matmul.allow_tf32 = True


def total_loss(outputs: dict[str, Tensor]) -> Tensor:
    """The sum of the entries whose name ends in `_loss`."""
    return sum(value for name, value in outputs.items() if name.endswith("_loss"))
