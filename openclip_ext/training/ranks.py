"""What ranks tell each other."""

from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator

Value = TypeVar("Value")


def gathered_to_first(value: Value, accelerator: Accelerator) -> list[Value]:
    """The values of all ranks on the first one, by rank; elsewhere only the own. A collective call."""
    if accelerator.num_processes == 1:
        return [value]
    ranks: list | None = [None] * accelerator.num_processes if accelerator.is_main_process else None
    dist.gather_object(value, ranks)
    return ranks or [value]
