"""The memory that something takes at its peak."""

import resource
from collections.abc import Callable

import torch


def extra_bytes(function: Callable[[], object], cuda: bool) -> int:
    """The most that the process, or the GPU, holds while `function` runs, beyond what it held before.

    Where the system cannot forget an earlier peak, what lies below that one is not seen.
    """
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is what is held now
        read = _peak_of_status
    except OSError:
        read = _peak_of_process
    before = read()
    function()
    return read() - before


def _peak_of_status() -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _peak_of_process() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
