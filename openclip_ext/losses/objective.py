"""What the training loop calls: a base loss plus weighted terms, with the hooks of a step."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


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
        self._weights = {"base": weight}

    def add_term(self, name: str, term: nn.Module, needs: frozenset[str], weight: float) -> None:
        """Add `weight` times the term, which returns `{"<name>_loss": tensor}`."""
        self.terms[name] = term
        self._needs[name] = needs
        self._weights[name] = weight

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
                    outputs[key] = self._weights[name] * value if key.endswith("_loss") else value
        return outputs if output_dict else total_loss(outputs)

    def _call(self, name, module, image_features, text_features, logit_scale, extra):
        names = {argument for need in self._needs[name] for argument in ARGUMENTS[need]}
        missing = sorted(names - extra.keys())
        if missing:
            raise TypeError(f"{type(module).__name__} needs {', '.join(missing)}")
        given = {key: extra[key] for key in names}
        return module(image_features, text_features, logit_scale, **given, output_dict=True)

    def set_num_ids(self, num_ids: int) -> None:
        """Let sample ids run from 0 to `num_ids` - 1 where they are no positions: the number of samples stays."""
        for module in self.modules():
            if module is not self and hasattr(module, "set_num_ids"):
                module.set_num_ids(num_ids)

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """Tell the parts that have a schedule the time. Call before each optimizer step."""
        for part in (self.base, *self.terms.values()):
            if hasattr(part, "begin_step"):
                part.begin_step(step=step, total_steps=total_steps)

    def commit(self) -> None:
        """Let the parts that have state write what `forward` staged. Call once after each optimizer step taken."""
        for part in (self.base, *self.terms.values()):
            if hasattr(part, "commit"):
                part.commit()


#: The keyword arguments of `forward` that satisfy each need.
ARGUMENTS = {
    "sample_ids": ("sample_ids",),
    "logit_bias": ("logit_bias",),
    "teacher_features": ("dist_image_features", "dist_text_features", "dist_logit_scale"),
    "caption_logits": ("logits", "labels"),
    "image_aug": ("image_features_aug",),
    "text_aug": ("text_features_aug",),
    "trunk_features": ("image_trunk_features", "text_trunk_features"),
}


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
