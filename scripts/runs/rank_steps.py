"""Steps of a loss on several gloo processes: what they take, what each process holds, and what comes over its link."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from openclip_ext import create_loss
from openclip_ext.state.table import SampleTable

from .methods import parse_method

SCALE = 20.0


def measure_steps(
    rank: int, world_size: int, methods: list[str], batch: int, width: int, samples: int, steps: int
) -> list[dict[str, Any]]:
    """Of each loss, medians over steps that are taken in turns, of forward, backward and `commit`.

    Args:
        rank, world_size: of this process.
        methods: `NAME[+OPTION=VALUE…]` each.
        batch: pairs of each process.
        width: D.
        samples: N.
        steps: that are timed, after two that are not.

    Returns:
        cpu, wall: seconds of a step; bytes, calls: that this process received in it, and by how many collective calls;
        state: bytes of tables by sample that it keeps; resident: by how much its memory grew with them.
    """
    takes, found = [], []
    for method in methods:
        before = psutil.Process().memory_info().rss
        step, state = _stepper(method, rank, world_size, batch, width, samples)
        found.append({"state": state, "resident": psutil.Process().memory_info().rss - before, "cpu": [], "wall": []})
        takes.append(step)
    for number in range(steps + 2):
        for step, row in zip(takes, found, strict=True):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            with contextlib.ExitStack() as stack:
                count = stack.enter_context(counted()) if number == 1 else None
                step()
            if count:
                row |= count
            elif number > 1:
                row["cpu"].append(time.process_time() - cpu)
                row["wall"].append(time.perf_counter() - wall)
    return [row | {key: statistics.median(row[key]) for key in ("cpu", "wall")} for row in found]


def _stepper(
    method: str, rank: int, world_size: int, batch: int, width: int, samples: int
) -> tuple[Callable[[], None], int]:
    """A function that takes a step of a loss, and the bytes of the loss's tables."""
    name, options = parse_method(method)
    given: dict[str, Any] = {"num_samples": samples, "rank": rank, "world_size": world_size, **options}
    loss = create_loss(name, embed_dim=width, **given)
    tables = [table for table in loss.modules() if isinstance(table, SampleTable)]
    generator = torch.Generator().manual_seed(0)  # the same on all
    scale = torch.tensor(SCALE, requires_grad=True)
    bias = {"logit_bias": torch.tensor(-SCALE / 2)} if name == "siglip" else {}
    loss.begin_step(step=0, total_steps=1)

    def step() -> None:
        ids = torch.randint(samples, (world_size * batch,), generator=generator)[rank * batch : (rank + 1) * batch]
        image, text = (normalize(torch.randn(batch, width), dim=-1).requires_grad_() for _ in range(2))
        loss(image, text, scale, sample_ids=ids, output_dict=False, **bias).backward()
        loss.commit()

    return step, sum(table.values.numel() * table.values.itemsize for table in tables)


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts what this process receives by the collective calls that losses make."""
    count, others = {"bytes": 0, "calls": 0}, (dist.get_world_size() - 1) / dist.get_world_size()

    def counting(call: Callable, factor: float) -> Callable:
        def counted_call(tensor, *given, **named):
            count["bytes"] += round(factor * tensor.numel() * tensor.itemsize)
            count["calls"] += 1
            return call(tensor, *given, **named)

        return counted_call

    # An all_reduce sends and receives twice, as a sum over parts and as their copy.
    factors = {"all_gather_into_tensor": others, "all_to_all_single": others, "all_reduce": 2 * others}
    with contextlib.ExitStack() as stack:
        for name, factor in factors.items():
            stack.enter_context(mock.patch.object(dist, name, counting(getattr(dist, name), factor)))
        yield count


def gather_seconds(rank: int, world_size: int, size: int, repeats: int) -> float:
    """CPU seconds of a gather of `size` numbers of each process, median."""
    own, everyone, seconds = torch.zeros(size), torch.zeros(world_size * size), []
    for _ in range(repeats + 1):
        start = time.process_time()
        dist.all_gather_into_tensor(everyone, own)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])
