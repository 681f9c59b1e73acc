"""What the time of a training step goes into, by PyTorch's profiler."""

import os
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from openclip_ext.errors import counted
from openclip_ext.files import atomic
from openclip_ext.training.log import logger

FOLDER, TABLE, TRACE = "profile", "step.txt", "trace.json.gz"
PARTS = ("data", "encoders", "loss", "optimizer")
_SKIPPED = 5  # steps before those that are profiled, in which libraries are loaded and kernels are chosen
_ROWS = 25


def part(name: str) -> record_function:
    """In the block, a step does one of `PARTS`. Costs microseconds where nothing is profiled."""
    assert name in PARTS
    return record_function(name)


class StepProfile:
    """Profiles some steps of a run, and writes what it finds into its folder; use as a context manager.

    `profile/trace.json.gz` is for chrome://tracing or ui.perfetto.dev, `profile/step.txt` to read: the share of each
    part of a step, and the operations that take longest. The encoders' part has their backward pass in it; the loss
    computes its gradient with its value.

    Args:
        folder: of the run; None: another rank profiles, and this object does nothing.
        steps: how many, after some that are left out.
    """

    def __init__(self, folder: str | None, steps: int) -> None:
        self._folder, self._steps = folder, steps
        self._profile: profile | None = None

    def __enter__(self) -> "StepProfile":
        if self._folder is not None and self._steps:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            schedule = torch.profiler.schedule(wait=_SKIPPED - 1, warmup=1, active=self._steps, repeat=1)
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *cuda], schedule=schedule, on_trace_ready=self._write, acc_events=True
            )
            self._profile.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._profile is not None:
            self._profile.stop()
            logger.warning("--profile %d: the run ends before it has taken %s", self._steps,
                           counted(_SKIPPED + self._steps, "step"))  # fmt: skip

    def step(self) -> None:
        """A step of the run is over."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, found: profile) -> None:
        assert self._folder is not None
        if self._profile is None or found.step_num < _SKIPPED + self._steps:
            return  # stopped early
        self._profile = None
        folder = os.path.join(self._folder, FOLDER)
        os.makedirs(folder, exist_ok=True)
        found.export_chrome_trace(os.path.join(folder, TRACE))
        events = found.key_averages()
        milliseconds, shares = step_shares(events)
        line = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
        line = f"a step of {milliseconds:.1f} ms, mean of {self._steps}: {line}"
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        with atomic(os.path.join(folder, TABLE)) as path, open(path, "w") as file:
            file.write(f"{line}\n\n{events.table(sort_by=key, row_limit=_ROWS)}\n")
        logger.info("%s; the operations are in %s, for a browser %s", line, os.path.join(folder, TABLE), TRACE)


def step_shares(events: Iterable) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step, and the share of it that each part takes, from a profiler's averages.

    Of a device's time where there is one, and then `idle` is when it has nothing to do, such as where it waits for
    data; else of the host's, and what is in no part is `rest`.
    """
    steps = [event for event in events if event.key.startswith("ProfilerStep")]
    total = sum(event.cpu_time_total for event in steps)
    parts = {event.key: event for event in events if event.key in PARTS and event.cpu_time_total > 0}
    if any(event.device_time_total for event in parts.values()):
        shares = {name: parts[name].device_time_total / total for name in PARTS[1:] if name in parts}
        left = "idle"
    else:
        shares = {name: parts[name].cpu_time_total / total for name in PARTS if name in parts}
        left = "rest"
    return total / sum(event.count for event in steps) / 1000, shares | {left: 1 - sum(shares.values())}
