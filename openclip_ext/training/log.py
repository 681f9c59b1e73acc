"""What a run says: a line for every so many steps, progress on a terminal, and a JSONL file with every scalar."""

import collections
import contextlib
import datetime
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from tqdm import tqdm

from openclip_ext.files import Rows
from openclip_ext.redact import redacted, redacted_values

logger = logging.getLogger("openclip_ext")
#: Takes a line for every so many steps, which a terminal shows as a progress bar.
step_logger = logging.getLogger("openclip_ext.steps")


class _ConsoleHandler(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """Goes without lines that a full disk does not take: training goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: Python would print a traceback for each."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _hide_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = redacted(record.getMessage()), ()
    return True


def start_logging(path: str | None, *, console: bool, debug: bool) -> None:
    """Send this package's log to the console and to a file, each if wanted."""
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    stop_logging()
    logger.addHandler(logging.NullHandler())  # else Python prints warnings on every rank
    if console:
        terminal = _ConsoleHandler()
        terminal.setFormatter(logging.Formatter("%(message)s"))
        terminal.addFilter(_hide_secrets)
        if sys.stderr.isatty():
            terminal.addFilter(lambda record: record.name != step_logger.name)
        logger.addHandler(terminal)
    if path:
        handler = _LogFile(path)
        handler.setFormatter(
            logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", datefmt="%Y-%m-%d,%H:%M:%S")
        )
        handler.addFilter(_hide_secrets)
        logger.addHandler(handler)


def stop_logging() -> None:
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class EpochLog:
    """Progress of one epoch on one rank; `write` is given a row of scalars when one is due.

    Scalars are read from the device only when they are shown or written: every `every` steps, and for the progress bar
    of a terminal at most twice a second.

    Args:
        epoch: from 0.
        steps: of an epoch.
        epochs: of the run.
        samples_per_step: on all ranks.
        done: steps of the epoch that were taken before.
        every: steps between rows, and between lines of the log.
        write: what takes a row; None: nothing does.
        show: this rank speaks: lines, and where they would be in the way, on a terminal, a progress bar.
    """

    def __init__(
        self,
        *,
        epoch: int,
        steps: int,
        epochs: int,
        samples_per_step: int,
        done: int = 0,
        every: int,
        write: Callable[[dict], None] | None,
        show: bool,
    ) -> None:
        self.epoch, self.steps, self.epochs = epoch, steps, epochs
        self.samples_per_step, self.every = samples_per_step, every
        self._write, self._show = write, show
        self._bar = tqdm(
            total=steps * samples_per_step,
            initial=done * samples_per_step,
            unit="sample",
            desc=f"epoch {epoch + 1}",
            disable=not (show and sys.stderr.isatty()),
        )
        self._start = self._window_start = time.perf_counter()
        self._window_steps, self._done = 0, done
        self._shown_at = -math.inf
        self._sums: collections.Counter[str] = collections.Counter()
        self._lines = 0

    def step(self, index: int, step: int, outputs: dict[str, Tensor], **scalars: float) -> None:
        """Report optimizer step number `index` of this epoch, `step` of the run."""
        self._bar.update(self.samples_per_step)
        self._window_steps += 1
        now = time.perf_counter()
        due = self._show and (index % self.every == 0 or index + 1 == self.steps)
        show = not self._bar.disable and now - self._shown_at > 0.5
        if not (due or show):
            return
        values = {name: float(value) for name, value in outputs.items()} | scalars
        values["loss"] = sum(value for name, value in values.items() if name.endswith("_loss"))
        if show:
            self._shown_at = now
            losses = (f"{name} {value:.4g}" for name, value in values.items() if name.endswith("_loss"))
            self._bar.set_postfix_str(" ".join(losses))
        if due:
            seconds = (now - self._window_start) / self._window_steps
            values["samples_per_second"] = self.samples_per_step / max(seconds, 1e-9)
            self._window_start, self._window_steps = now, 0
            step_logger.info(self._line(index, now, seconds, values))
            if self._write:
                self._write({"step": step, "epoch": self.epoch, **values})

    def _line(self, index: int, now: float, seconds: float, values: dict[str, float]) -> str:
        """As OpenCLIP writes it, and when the run will end: losses now, and in brackets their mean since the epoch's
        start."""
        names = [name for name in values if name == "loss" or name.endswith("_loss")]
        self._sums.update({name: values[name] for name in names})
        self._lines += 1
        losses = (f"{name.capitalize()}: {values[name]:#.5g} ({self._sums[name] / self._lines:#.5g})" for name in names)
        seen, samples = (index + 1) * self.samples_per_step, self.steps * self.samples_per_step
        percent = 100 * (index + 1) / self.steps
        left = (self.epochs - self.epoch) * self.steps - (index + 1)
        return (
            f"Train Epoch: {self.epoch} [{seen:>{len(str(samples))}}/{samples} ({percent:.0f}%)] "
            f"Batch (t): {seconds:.3f}, {values['samples_per_second']:#.5g}/s LR: {values['lr']:.6g} "
            f"Logit Scale: {values['logit_scale']:.3f} {' '.join(losses)} "
            f"ETA: {datetime.timedelta(seconds=round(left * (now - self._start) / (index + 1 - self._done)))}"
        )

    def close(self) -> None:
        self._bar.close()


class RowFiles:
    """JSONL files of a run in its folder; rows that a full disk does not take wait in memory."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._rows: dict[str, Rows] = {}
        self._waiting: set[str] = set()

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to a file; that it has to wait is said once."""
        rows = self._rows.setdefault(name, Rows(os.path.join(self._folder, name)))
        error = rows.append(redacted_values(row))
        if error and name not in self._waiting:
            logger.error("%s: cannot be written (%s); its rows wait in memory", rows.path, error.strerror)
            self._waiting.add(name)
        elif not error:
            self._waiting.discard(name)


def report_skips(rows: list[tuple[str, str, int]], when: str) -> None:
    """Say by kind and shard what could not be used."""
    totals: collections.Counter[tuple[str, str]] = collections.Counter()
    for kind, url, count in rows:
        totals[kind, url] += count
    for (kind, url), count in sorted(totals.items()):
        logger.warning("%s: %d x %s in %s", when, count, kind, os.path.relpath(url) if "://" not in url else url)
