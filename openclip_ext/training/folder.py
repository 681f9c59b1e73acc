"""The folder of a run: its name, whether it can be written to, and what is in it from the beginning."""

import datetime
import os
import shutil

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from openclip_ext.errors import UserError
from openclip_ext.training.config import RunConfig
from openclip_ext.training.record import Record


def choose_name(config: RunConfig, accelerator: Accelerator) -> str | None:
    """`--name`, or one of the time and the main settings; None where nothing is kept and none is given."""
    if config.name is not None or config.logs_folder is None:
        return config.name
    stamp = datetime.datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
    (stamp,) = broadcast_object_list([stamp]) if accelerator.num_processes > 1 else (stamp,)
    model = config.model.replace("/", "-").replace(":", "-")
    return f"{stamp}-model_{model}-loss_{config.loss}-lr_{config.lr}-b_{config.batch_size}-p_{config.precision}"


def run_folder(config: RunConfig, accelerator: Accelerator) -> str | None:
    """The folder of this run, which has a name; None with `--logs none`. Not made yet.

    Raises:
        UserError: it holds a run already, or cannot be made or written to.
    """
    if config.logs_folder is None:
        return None
    assert config.name is not None
    folder = os.path.join(config.logs_folder, config.name)
    if os.path.exists(os.path.join(folder, "params.txt")) and config.resume is None:
        raise UserError(f"--name {config.name}: {folder} holds a run already; use another --name, or --resume latest")
    if accelerator.is_main_process:
        _require_writable(folder, config.logs_folder)
    return folder


def _require_writable(folder: str, logs: str) -> None:
    """Raises UserError: the folder, or the one it would be made in, is none or cannot be written to."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"--logs {logs}: {place} is no folder; give a folder for runs, or none to keep nothing")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--logs {logs}: {place} cannot be written to; give another folder, or none to keep nothing")


def make_run_folder(config: RunConfig, folder: str, record: Record) -> None:
    """Make it, with its folder for checkpoints, the record of the run and the code where it is to hold that.

    Raises:
        UserError: that cannot be done.
    """
    try:
        os.makedirs(os.path.join(folder, "checkpoints"), exist_ok=True)
    except OSError as error:
        raise UserError(f"--logs: {folder} cannot be made ({error.strerror}); give another folder") from error
    try:
        record.write(folder)
    except OSError as error:
        raise UserError(
            f"--logs: {folder} cannot be written to ({error.strerror}); make room, or give another"
        ) from error
    if config.copy_codebase:
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        target = os.path.join(folder, "code", os.path.basename(package))
        shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def entries(folder: str) -> set[str] | None:
    """What is in a folder; None: there is none."""
    return set(os.listdir(folder)) if os.path.isdir(folder) else None


def remove_new_entries(folder: str, before: set[str] | None) -> None:
    """Leave in the folder what was there before; where there was none, leave none."""
    for name in (entries(folder) or set()) - (before or set()):
        path = os.path.join(folder, name)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
    if before is None and os.path.isdir(folder):
        os.rmdir(folder)
