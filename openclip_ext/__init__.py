"""Contrastive objectives for OpenCLIP that work at small batch, by name, without a fork."""

from openclip_ext.errors import UserError
from openclip_ext.options import option
from openclip_ext.registry import LossSpec

__version__ = "0.1.0"
__all__ = ["LossSpec", "UserError", "create_loss", "option", "promoted"]


def __getattr__(name: str):
    # Imported on first use: torch takes seconds, `openclip-ext --help` must not wait for it.
    if name == "create_loss":
        from openclip_ext.losses import create_loss

        return create_loss
    if name == "promoted":
        from openclip_ext.ops.precision import promoted

        return promoted
    raise AttributeError(f"module 'openclip_ext' has no attribute {name!r}")
