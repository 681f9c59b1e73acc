"""Scalars for TensorBoard and Weights & Biases, without which a run goes on where their files cannot be written."""

import threading
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from openclip_ext.training.accelerator import start_trackers
from openclip_ext.training.config import RunConfig
from openclip_ext.training.log import logger


class Tracking:
    """The trackers of `--report-to` on the rank that writes; they are told from `step` on."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, folder: str, step: int) -> None:
        self._accelerator, self._flag = accelerator, f"--report-to {config.report_to}"
        start_trackers(config, accelerator, folder, step)
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own, whose error the next call raises here: not a traceback too."""
        writer = type(failure.thread).__module__.startswith("tensorboard")
        if not (writer and isinstance(failure.exc_value, OSError)):
            self._hook(failure)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Report scalars. After the first error, which is said, nothing is."""
        if self._accelerator.trackers:
            self._guarded(self._accelerator.log, dict(values), step)

    def close(self) -> None:
        for tracker in list(self._accelerator.trackers):
            self._guarded(tracker.finish)
        self._accelerator.trackers = []
        threading.excepthook = self._hook

    def _guarded(self, call, *args) -> None:
        try:
            call(*args)
        except OSError as error:
            logger.error("%s: cannot be written (%s); the run goes on without", self._flag, error.strerror or error)
            self._accelerator.trackers = []
