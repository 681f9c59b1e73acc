"""Contrastive objectives for OpenCLIP that work at small batch, by name, without a fork."""

import importlib
from typing import TYPE_CHECKING

from openclip_ext.errors import UserError
from openclip_ext.options import option
from openclip_ext.registry import LossSpec

if TYPE_CHECKING:
    from openclip_ext.losses import Loss, LossContext, PairLoss, create_loss
    from openclip_ext.ops.precision import promoted
    from openclip_ext.training.encode_again import KeptInputs

__version__ = "0.1.0"
__all__ = [
    "KeptInputs",
    "Loss",
    "LossContext",
    "LossSpec",
    "PairLoss",
    "UserError",
    "create_loss",
    "option",
    "promoted",
]

# Imported on first use: torch takes seconds, `openclip-ext --help` must not wait for it.
_LATE = {
    "KeptInputs": "openclip_ext.training.encode_again",
    "Loss": "openclip_ext.losses",
    "LossContext": "openclip_ext.losses",
    "PairLoss": "openclip_ext.losses",
    "create_loss": "openclip_ext.losses",
    "promoted": "openclip_ext.ops.precision",
}


def __getattr__(name: str):
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'openclip_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
