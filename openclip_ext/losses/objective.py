"""What the training loop calls: a base loss plus weighted terms, with the hooks of a step."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from openclip_ext.errors import UserError
from openclip_ext.losses.base import Loss
from openclip_ext.losses.composite import Composite
from openclip_ext.losses.context import LossContext
from openclip_ext.losses.weights import Weight
from openclip_ext.registry import NEEDS, OPTIONAL, arguments

#: Calls without `commit` after which a loop is taken to have forgotten it: a gradient scaler may skip some first steps.
_UNCOMMITTED = 20
#: Times that features encoded again are asked for in vain until it is said: who calls a loss a few times may not care.
_UNANSWERED = 20


class Objective(Composite):
    """A base loss and additive terms behind one call.

    Hands each part only what its spec says it needs, multiplies the terms by their weights, and passes the hooks on to
    the parts that have them. A part may be any `torch.nn.Module` that is called as a loss of OpenCLIP's is.

    Attributes:
        needs: what `forward` must be given besides features and logit scale (see `openclip_ext.registry.NEEDS`).
    """

    def __init__(
        self, name: str, base: nn.Module | None, needs: frozenset[str], context: LossContext, weight: float = 1.0
    ) -> None:
        super().__init__(context=context)
        self.base = base
        self.terms = nn.ModuleDict()
        self._needs = {"base": needs}
        self._titles = {"base": f"loss {name}"}
        self._weights = {"base": Weight(weight, weight)}
        self._weights_now = {"base": weight}
        self._told_time, self._uncommitted, self._unanswered = False, 0, 0

    def add_term(self, name: str, term: nn.Module, needs: frozenset[str], weight: Weight) -> None:
        """Add `weight` times the term, which returns `{"<name>_loss": tensor}`."""
        self.terms[name] = term
        self._needs[name] = needs
        self._titles[name] = f"loss term {name}"
        self._weights[name] = weight
        self._weights_now[name] = weight.end

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*self._needs.values())

    def compute(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **extra: Any
    ) -> dict[str, Tensor]:
        """Losses and report scalars by name.

        Raises:
            UserError: an argument that a part needs is missing, or one of another type or size than it must be.
        """
        _require_usable(image_features, text_features, logit_scale, extra)
        if self.training and torch.is_grad_enabled():
            self._warn_of_missing_calls(extra)
        outputs: dict[str, Tensor] = {}
        with _float32(image_features.device):
            for name, part in self._parts().items():
                given = self._given(name, extra)
                found = part(image_features, text_features, logit_scale, **given, output_dict=True)
                for key, value in found.items():
                    outputs[key] = self._weights_now[name] * value if key.endswith("_loss") else value
                if not self._weights[name].constant:
                    outputs[f"{name}_weight"] = torch.tensor(self._weights_now[name])
        return outputs

    def _given(self, name: str, extra: dict[str, Any]) -> dict[str, Tensor]:
        names = arguments(self._needs[name])
        given = {key: extra[key] for key in names if extra.get(key) is not None}
        if missing := sorted(names - given.keys() - OPTIONAL):
            meanings = {argument: need.meaning for need in NEEDS.values() for argument in need.arguments}
            raise UserError(
                f"{self._titles[name]} needs {missing[0]}=…, {meanings.get(missing[0], 'as the first view has it')}"
            )
        return given

    def _warn_of_missing_calls(self, extra: dict[str, Any]) -> None:
        if self.scheduled and not self._told_time:
            self._told_time = True
            warnings.warn(
                f"{self._titles['base']} has a schedule: call loss.begin_step(step=…, total_steps=…) before each "
                "optimizer step; until then it acts as at the end of training",
                stacklevel=6,
            )
        self._uncommitted += 1
        if self.has_state and self._uncommitted == _UNCOMMITTED:
            warnings.warn(
                f"{self._titles['base']} or a term of it keeps a state, which only loss.commit() writes: call it after "
                f"each optimizer step; {_UNCOMMITTED} calls passed without",
                stacklevel=6,
            )
        unanswered = self.probe == "encode" and extra.get("image_features_again") is None
        self._unanswered += unanswered
        if unanswered and self._unanswered == _UNANSWERED:
            warnings.warn(
                f"{self._titles['base']} has no use of recent pairs unless it is given features encoded again: see "
                "help(openclip_ext.KeptInputs), or take recent_batches=0",
                stacklevel=6,
            )

    @property
    def probe(self) -> str | None:
        """As of `Loss`; of the base loss, since no term asks for features encoded again."""
        return self.base.probe if isinstance(self.base, Loss) else None

    @property
    def scheduled(self) -> bool:
        """Whether a weight or a part has a schedule."""
        return super().scheduled or not all(weight.constant for weight in self._weights.values())

    @torch.no_grad()
    def warm_start(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **extra: Any) -> None:
        """Let the parts that have state write what a batch tells before training; it counts as no step.

        Arguments are those of `forward`; to be called on every rank.
        """
        with _float32(image_features.device):
            for name, part in self._parts().items():
                if isinstance(part, Loss):
                    part.warm_start(image_features, text_features, logit_scale, **self._given(name, extra))

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """Tell weights and parts that have a schedule the time. Call before each optimizer step."""
        self._told_time = True
        self._weights_now = {name: weight.at(step, total_steps) for name, weight in self._weights.items()}
        super().begin_step(step=step, total_steps=total_steps)

    def commit(self) -> None:
        """Let the parts that have state write what `forward` staged. Call once after each optimizer step taken."""
        self._uncommitted = 0
        super().commit()

    def _parts(self) -> dict[str, nn.Module]:
        return ({} if self.base is None else {"base": self.base}) | dict(self.terms)


def _require_usable(image_features: Any, text_features: Any, logit_scale: Any, extra: dict[str, Any]) -> None:
    """Raises UserError: an argument that a slip of the caller's has made no tensor, or one of another length."""
    named = {"image_features": image_features, "text_features": text_features, "logit_scale": logit_scale}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            fix = "model.logit_scale.exp()" if name == "logit_scale" else "what the model returns"
            raise UserError(f"{name}={value!r}: must be a tensor, such as {fix}")
    if len(image_features) != len(text_features):
        raise UserError(
            f"image_features {tuple(image_features.shape)} and text_features {tuple(text_features.shape)}: must hold "
            "as many rows, one per pair"
        )
    ids = extra.get("sample_ids")
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise UserError(f"sample_ids={ids!r}: must be a tensor of whole numbers, such as torch.tensor([0, 1, 2])")
    if ids.shape != (len(image_features),):
        raise UserError(f"sample_ids {tuple(ids.shape)}: must be one id per pair, ({len(image_features)},)")


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
