"""`openclip-ext` with Accelerate's FSDP, which Accelerate takes up on GPUs only, on processes without one."""

import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from openclip_ext.cli import main

_init = AcceleratorState.__init__


def _init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    """What Accelerate does itself where it finds several GPUs."""
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = _init_with_fsdp

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
