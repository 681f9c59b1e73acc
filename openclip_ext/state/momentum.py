"""The average of a module over its steps, which runs beside it and is kept in checkpoints."""

import copy

import torch
from torch import Tensor, nn


class MomentumCopy(nn.Module):
    """`a <- M a + (1 - M) p` after each step, for every parameter p of a module, beginning as a copy of it.

    Buffers are not averaged but taken over with each update: running statistics are averages already.

    Args:
        module: what is followed.
        momentum: M, in [0, 1).

    Attributes:
        average: the averaged module, in the mode of training or evaluation that the copy is put in. No gradient.
    """

    def __init__(self, module: nn.Module, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.average = copy.deepcopy(module).requires_grad_(False)
        self._followed = (module,)  # not as a module: it is part of another already

    def restart(self) -> None:
        """Become a copy of the module again."""
        (module,) = self._followed
        self.average.load_state_dict(module.state_dict())

    @torch.no_grad()
    def update(self) -> None:
        """Follow the module by one step."""
        (module,) = self._followed
        averages: list[Tensor] = list(self.average.parameters())
        current: list[Tensor] = list(module.parameters())
        torch._foreach_lerp_(averages, current, 1 - self.momentum)
        for own, other in zip(self.average.buffers(), module.buffers(), strict=True):
            own.copy_(other)
