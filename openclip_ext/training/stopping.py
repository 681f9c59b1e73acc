"""Ending a run after the step at hand: when a signal asks for it, or its time is over."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

#: Why a run stops, beside numbers of signals.
GO_ON, TIME_IS_OVER = 0, 1000
_REASONS = (*SIGNALS, TIME_IS_OVER)

#: Seconds within which another signal is the same one: a launcher that gets it passes it on.
_SAME = 1.0


class Stop:
    """Whether this process is to stop, while in the context; the first signal asks for it, a second one ends at once.

    Args:
        max_minutes: from now on; None: no end.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal, self._came = GO_ON, 0.0
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    @property
    def reason(self) -> int:
        """The number of the signal, `TIME_IS_OVER`, or `GO_ON`."""
        if self._signal == GO_ON and self._deadline is not None and time.monotonic() >= self._deadline:
            return TIME_IS_OVER
        return self._signal

    def votes(self) -> list[int]:
        """For each reason 1 or 0: summed over ranks, `elected` knows which they agree on."""
        own = self.reason
        return [int(reason == own) for reason in _REASONS]

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # forked from it, and inherits the handler: it takes no step to finish
            if number == signal.SIGTERM:
                _end_at_once(number)
        elif self._signal == GO_ON:
            self._signal, self._came = number, time.monotonic()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, f"{describe(number)}: stops after this step; a second signal ends at once\n".encode())
        elif time.monotonic() - self._came > _SAME:
            _end_at_once(number)


def _end_at_once(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def elected(votes: Sequence[int]) -> int:
    """The reason for which all ranks stop, by the votes of all, or `GO_ON`."""
    return next((int(reason) for reason, count in zip(_REASONS, votes, strict=True) if count), GO_ON)


def describe(reason: int) -> str:
    """For the log."""
    return "--max-minutes" if reason == TIME_IS_OVER else signal.Signals(reason).name
