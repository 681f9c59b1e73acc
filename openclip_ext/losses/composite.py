"""Losses that are made of others."""

from collections.abc import Iterator

from torch import Tensor, nn

from openclip_ext.losses.base import Loss


class Composite(Loss):
    """A loss whose submodules are losses, or lists of them: what it is told of time and steps, it tells them."""

    @property
    def scheduled(self) -> bool:
        """Whether any of them has a schedule."""
        return any(loss.scheduled for loss in self._losses())

    @property
    def has_state(self) -> bool:
        """Whether any of them writes something on `commit`."""
        return any(loss.has_state for loss in self._losses())

    @property
    def wants_warm_start(self) -> bool:
        """Whether any of them has use for `warm_start`."""
        return any(loss.wants_warm_start for loss in self._losses())

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """Tell those that have a schedule the time. Call before each optimizer step."""
        for loss in self._losses():
            loss.begin_step(step=step, total_steps=total_steps)

    def expect(self, sample_ids: Tensor) -> None:
        """Let those that keep something of samples (B,) fetch it."""
        for loss in self._losses():
            loss.expect(sample_ids)

    def commit(self) -> None:
        """Let those that have state write what `forward` staged. Call once after each optimizer step taken."""
        for loss in self._losses():
            loss.commit()

    def _losses(self) -> Iterator[Loss]:
        for child in self.children():
            members = child.children() if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
            yield from (member for member in members if isinstance(member, Loss))
