"""Random draws that are made a second time."""

import contextlib
from collections.abc import Iterator

import torch


def random_state(device: torch.device) -> tuple:
    """Of the CPU's generator, and of the device's where that has its own."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def replayed(state: tuple) -> Iterator[None]:
    """Random draws as they were at `state`, and afterwards as if nothing had been drawn here."""
    now = random_state(torch.device("cuda") if state[1] is not None else torch.device("cpu"))
    _set(state)
    try:
        yield
    finally:
        _set(now)


def _set(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
