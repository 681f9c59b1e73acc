"""Running the model again on inputs it was given before, for losses that ask how far it has moved (`Loss.probe`)."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from openclip_ext.losses import Loss

Inputs = dict[str, Tensor]


class KeptInputs:
    """What the model was given in the step that the loss asked to keep. In a loop of one's own:

        kept = KeptInputs(loss, model)
        …
            inputs = {"image": images, "text": texts}
            outputs = loss(**model(**inputs), sample_ids=ids, **kept.features([inputs], model))

    Args:
        loss: whose `probe` says when to keep and when to encode.
        model: whose dropout is off while it encodes again.
    """

    def __init__(self, loss: Loss, model: nn.Module) -> None:
        self._loss, self._model = loss, model
        self._kept: list[Inputs] | None = None

    def state(self) -> list[Inputs] | None:
        """What is kept now, in the memory of the CPU."""
        return self._kept and [{name: x.cpu() for name, x in part.items()} for part in self._kept]

    def restore(self, state: list[Inputs] | None, device: torch.device) -> None:
        """Inverse of `state`; without one the loss begins anew."""
        self._kept = state and [{name: x.to(device) for name, x in part.items()} for part in state]

    @torch.no_grad()
    def features(self, inputs: list[Inputs], run: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the loss is to be given in this step, beside the features of the step itself; mostly nothing.

        Args:
            inputs: keyword arguments of the model in this step, a dict per accumulated batch.
            run: the model, or what runs it; returns a dict, as OpenCLIP's models do with `output_dict=True`.

        Returns:
            `image_features_again`, `text_features_again` in a step in which the loss asks to `encode`; else nothing.
        """
        probe = self._loss.probe
        if probe == "keep":
            self._kept = [_first_views(part) for part in inputs]
        if probe == "forget":
            self._kept = None
        if probe != "encode" or self._kept is None:
            return {}
        with settled(self._model):
            parts = [run(**part) for part in self._kept]
        names = [name for name in parts[0] if "_features" in name]
        return {f"{name}_again": torch.cat([part[name] for part in parts]) for name in names}


def _first_views(inputs: Inputs) -> Inputs:
    """Without second views, unless those are what an image is paired with."""
    return {name: x for name, x in inputs.items() if "text" not in inputs or name in ("image", "text")}


@contextlib.contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """The model without dropout of any kind; BatchNorm as in training, but for its running statistics, which stay."""
    modes = [(module, module.training) for module in model.modules()]
    running = {module for module, training in modes if training and isinstance(module, _BatchNorm)}
    # Copies take their place: a forward pass of before, whose backward pass is to come, holds on to them.
    statistics = [(module, name, buffer) for module in running for name, buffer in module.named_buffers(recurse=False)]
    for norm, name, buffer in statistics:
        setattr(norm, name, buffer.clone())
    for module, _ in modes:
        module.training = module in running
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for norm, name, buffer in statistics:
            setattr(norm, name, buffer)
