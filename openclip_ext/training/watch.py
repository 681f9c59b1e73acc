"""Whether the other processes of a run are alive.

A process that is killed leaves the others waiting in a collective call: with Gloo until their connection to it breaks,
if it does, with NCCL for as long as the process group allows, hours. So each one says every few seconds in the store of
the process group that it is alive, and looks whether the others do.
"""

import contextlib
import datetime
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from openclip_ext.errors import RankError, UserError
from openclip_ext.redact import redacted

BEAT = 5.0  # seconds between two signs of life, or a tenth of the timeout
EXIT_CODE = 2

#: How messages of errors begin that PyTorch raises where another process or the way to it has failed.
_OF_OTHERS = re.compile("gloo|nccl|ucc|connection|socket|store|timed? ?out|recv|broken pipe", re.IGNORECASE)

_DONE, _FAILED, _LOST = "done", "failed ", "lost "


@contextlib.contextmanager
def watched(rank: int, world_size: int, timeout: float) -> Iterator[None]:
    """In the block, a process of the run that dies ends the others too, with a line that names it.

    Args:
        rank: of this process.
        world_size: number of processes.
        timeout: seconds from a death within which they end; 0: not looked for.

    Raises:
        RankError: a collective call has failed because another process has died, or ended with an error.
    """
    if world_size == 1 or timeout == 0:
        yield
        return
    watch = Watch(rank, world_size, timeout)
    watch.start()
    try:
        yield
    except Exception as error:
        if cause := _is_of_others(error) and watch.find_cause():
            watch.leave(_LOST + cause)
            _exit_soon(watch.beat)
            raise RankError(_line(cause, watch.rank)) from None
        watch.leave(_FAILED + _described(error))
        raise
    except BaseException:  # an interrupt, which the others may have noted only, and wait for this one
        watch.leave(_FAILED + "interrupted")
        raise
    watch.leave(_DONE)


@contextlib.contextmanager
def awaited(timeout: float) -> Iterator[None]:
    """In the block, where processes of a run find each other, this one ends with a line if the others do not come.

    Args:
        timeout: seconds to wait for them; 0: for ever.
    """
    timer = threading.Timer(timeout, _end_alone, [timeout])
    timer.daemon = True
    if timeout > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_alone(timeout: float) -> None:
    rank, size = os.environ.get("RANK", "0"), os.environ["WORLD_SIZE"]
    print(
        f"openclip-ext: --rank-timeout {timeout:g}: rank {rank} of {size} has not met the others in this time: one of "
        "them has died before it came, cannot reach MASTER_ADDR, or is slow, and then a longer time helps",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_CODE)


class Watch:
    """Says in the store that this process is alive, and ends it when another one is not.

    Two threads: one talks with the store, which may not answer, the other one looks at what has come of it. Both count
    in beats, not in seconds: a process that stands still for a while cannot tell how long the others were silent.

    Args:
        rank: of this process.
        world_size: number of processes.
        timeout: seconds in which a death is to be noticed by all.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.others = rank, [other for other in range(world_size) if other != rank]
        self.beat = min(BEAT, timeout / 10)
        self._patience = round(timeout / self.beat) - 5  # then the line is written, and the others may still read why
        # Its own connection: the process group's is held while a call waits. That one stays open as long as this does.
        self._of_group = dist.distributed_c10d._get_default_store()
        self._store = PrefixStore("openclip_ext_watch", self._of_group.clone())
        self._store.set_timeout(datetime.timedelta(seconds=timeout))
        self._left = threading.Event()
        self._suspect = threading.Event()  # the process group has failed: less patience is needed
        self._cause: str | None = None
        self._states: dict[int, str] = dict.fromkeys(self.others, "")
        self._answers, self._reachable = 0, True
        self._talking = threading.Thread(target=self._talk, name="watch store", daemon=True)

    def start(self) -> None:
        self._talking.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _talk(self) -> None:
        """Give signs of life, and take note of the others'."""
        place = f"{socket.gethostname()}, process {os.getpid()}"
        try:
            for other in self.others:
                self._store.compare_set(f"state {other}", "", "0 which has never said where it is")
            while True:
                self._answers += 1
                self._store.set(f"state {self.rank}", f"{self._answers} {place}")
                self._states = self._read_states()
                if self._left.wait(self.beat):
                    return
        except Exception:  # the store's own kinds of errors differ between versions
            self._reachable = False

    def _read_states(self) -> dict[int, str]:
        values = self._store.multi_get([f"state {other}" for other in self.others])
        return {other: value.decode() for other, value in zip(self.others, values, strict=True)}

    def _watch(self) -> None:
        seen, answers = self._states, 0
        missed, unanswered = dict.fromkeys(self.others, 0), 0
        while not self._left.wait(self.beat):
            if self._cause is not None:  # and the call that waits for the other one has not failed by itself
                self._end()
            states, unanswered = self._states, unanswered + 1
            if self._answers != answers:
                answers, unanswered = self._answers, 0
                for other, state in states.items():
                    missed[other] = 0 if state == _DONE or state != seen[other] else missed[other] + 1
                seen = states
            self._cause = self._judge(states, missed, unanswered)

    def _judge(self, states: dict[int, str], missed: dict[int, int], unanswered: int) -> str | None:
        """Why this process has to end; None: it has not. `missed`, `unanswered`: beats without a sign of life."""
        for other, state in states.items():
            if state.startswith(_LOST):
                return state.removeprefix(_LOST)
            if state.startswith(_FAILED):
                return f"rank {other} has ended: {state.removeprefix(_FAILED)}"
        patience = min(self._patience, 3) if self._suspect.is_set() else self._patience
        if not self._reachable or unanswered >= patience:
            keeper = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            return f"{keeper}, which keeps the store of the ranks, has died: it cannot be reached"
        silent = max(self.others, key=missed.__getitem__)
        if missed[silent] < patience:
            return None
        place = states[silent].partition(" ")[2]
        return f"rank {silent} ({place}) has died: no sign of life for {missed[silent] * self.beat:.0f} s"

    def find_cause(self) -> str | None:
        """After a collective call has failed: whose fault it is; None: all processes are alive."""
        self._suspect.set()
        end = time.monotonic() + 6 * self.beat
        while self._cause is None and time.monotonic() < end:
            time.sleep(self.beat / 10)
        return self._cause

    def leave(self, state: str) -> None:
        """Say why this process is silent from now on. The first one, which may keep the store, leaves last."""
        self._left.set()
        self._talking.join(2 * self.beat)
        if self._talking.is_alive() or not self._reachable:
            return
        with contextlib.suppress(Exception):
            self._store.set(f"state {self.rank}", state)
            end = time.monotonic() + 3 * self.beat
            while self.rank == 0 and time.monotonic() < end and not all(map(_has_left, self._read_states().values())):
                time.sleep(self.beat / 50)

    def _end(self) -> None:
        """End the process, whatever its threads wait for."""
        assert self._cause is not None
        print(f"openclip-ext: {_line(self._cause, self.rank)}", file=sys.stderr, flush=True)
        farewell = threading.Thread(target=self.leave, args=(_LOST + self._cause,), daemon=True)
        farewell.start()
        farewell.join(3 * self.beat)
        os._exit(EXIT_CODE)


def _has_left(state: str) -> bool:
    return state.startswith((_DONE, _FAILED, _LOST))


def _described(error: Exception) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return redacted(" ".join(text.split()))[:200]


def _line(cause: str, rank: int) -> str:
    return f"{cause}; rank {rank} ends too; go on with --resume latest"


def _is_of_others(error: Exception) -> bool:
    """Whether an error may come from another process."""
    if isinstance(error, UserError):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(_OF_OTHERS.search(str(error)))
    )


def _exit_soon(seconds: float) -> None:
    """End the process even where what it waits for at its end does not come."""
    timer = threading.Timer(max(seconds, 1), os._exit, [EXIT_CODE])
    timer.daemon = True
    timer.start()
