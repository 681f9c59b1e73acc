"""A learning rate per tower, and one that falls from a tower's head to its input.

The rate of a parameter is the schedule's times `lr_scale`, which its group in the optimizer holds, as in timm:

    lr_scale = (rate of the tower / --lr) * decay ** (layers between the parameter's and the head, itself counted)

so a head has the tower's own rate, and its embeddings the smallest. What belongs to no tower (the logit scale, a
caption decoder, parameters of the loss) has the schedule's.

Source of the decay: Clark et al., "ELECTRA", ICLR 2020; for vision Bao et al., "BEiT", ICLR 2022.
"""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from openclip_ext import upstream
from openclip_ext.training.config import RunConfig

TOWERS = ("image", "text")


def scale_learning_rates(config: RunConfig, model: nn.Module, optimizer: Optimizer) -> None:
    """Split the groups of an optimizer that has not stepped yet by `lr_scale`; without such flags, leave them.

    Raises:
        UserError: the order of a tower's layers is not known.
    """
    layers: dict[int, tuple[str, int]] = {}
    scales: dict[tuple[str, int] | None, float] = {None: 1.0}
    for tower in TOWERS:
        for depth, (scale, parameters) in enumerate(_tower_scales(config, model, tower)):
            scales[tower, depth] = scale
            layers |= {id(parameter): (tower, depth) for parameter in parameters}
    if not layers:
        return
    groups = []
    for group in optimizer.param_groups:
        # By layer even where scales are equal: so a resumed run with other rates has the same groups.
        parts: dict[tuple[str, int] | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(layers.get(id(parameter)), []).append(parameter)
        for layer, parameters in parts.items():
            groups.append(group | {"params": parameters, "lr_scale": scales[layer], "lr": group["lr"] * scales[layer]})
    optimizer.param_groups[:] = groups  # in place: optimizers that wrap another share the list


def _tower_scales(config: RunConfig, model: nn.Module, tower: str) -> list[tuple[float, list[nn.Parameter]]]:
    """`lr_scale` and parameters of each layer, from the input to the head; none where no flag is about the tower."""
    rate, decay = config.tower_lr(tower), config.tower_layer_decay(tower)
    if rate is None and decay is None:
        return []
    base = 1.0 if rate is None else rate / config.lr
    if decay is None:
        return [(base, upstream.tower_parameters(model)[tower])]
    layers = upstream.tower_layers(model, tower)
    return [(base * decay ** (len(layers) - 1 - depth), layer) for depth, layer in enumerate(layers)]


def scaled(schedule: Callable[[int], float], optimizer: Optimizer) -> Callable[[int], float]:
    """A schedule that returns its rate and sets that for all groups, as one that respects their `lr_scale`."""

    def set_rates(step: int) -> float:
        rate = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)  # OpenCLIP 4 has done so already, 3.3 has not
        return rate

    return set_rates


def describe(optimizer: Optimizer) -> str | None:
    """How far the groups' rates lie apart, in words; None where they are equal."""
    scales = {group["lr_scale"] for group in optimizer.param_groups if "lr_scale" in group}
    if not scales:
        return None
    return f"learning rates: {min(scales):.3g} to {max(scales):.3g} times the schedule's, {len(scales)} levels"
