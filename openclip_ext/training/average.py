"""`--ema`: the exponential average of the weights over optimizer steps."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from openclip_ext.training import sharding


class WeightAverage:
    """`a <- d a + (1 - d) p` for every parameter p that is trained, after each step; beginning as a copy.

    What is not trained, and buffers, are the model's: running statistics are averages already. The average of a sharded
    model is sharded as it is. It takes the memory of the trained weights, and no second model: `applied` exchanges the
    two in place.

    Args:
        model: as it is trained, that is after it was sharded.
        decay: d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self._blend = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step."""
        pairs = self._local_pairs()
        self._blend([average for average, _ in pairs], [parameter for _, parameter in pairs], len(pairs))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the average as its weights; afterwards it has its own again, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a whole `state_dict` of the model with the average as its weights.

        Raises:
            KeyError: a trained weight is missing.
        """
        for name, average in self._average.items():
            _local(average).copy_(_local(sharding.sharded_like(state[name], average)))

    @torch.no_grad()
    def _exchange(self) -> None:
        sharding.reshard(self._model)  # what was gathered would stay as it is
        for average, parameter in self._local_pairs():
            own = parameter.clone()
            parameter.copy_(average)
            average.copy_(own)

    def _local_pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(_local(average), _local(self._trained[name])) for name, average in self._average.items()]


def _local(value: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value
