"""What OpenCLIP's training loop takes from its other modules: schedules, precision, remote copies."""

import argparse
from collections.abc import Callable

from openclip_ext.errors import UserError


def create_schedule(args: argparse.Namespace, optimizer, steps_per_epoch: int) -> Callable[[int], float]:
    """A function of the step that sets the learning rate of all groups.

    Raises:
        UserError: unknown schedule, or no cool-down length for one that needs it.
    """
    from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr

    total = steps_per_epoch * args.epochs
    if args.lr_scheduler == "cosine":
        return cosine_lr(optimizer, args.lr, args.warmup, total)
    if args.lr_scheduler == "const":
        return const_lr(optimizer, args.lr, args.warmup, total)
    if args.lr_scheduler == "const-cooldown":
        if args.epochs_cooldown is None:
            raise UserError("--lr-scheduler const-cooldown: give the number of cool-down epochs with --epochs-cooldown")
        cooldown = steps_per_epoch * args.epochs_cooldown
        power, end = args.lr_cooldown_power, args.lr_cooldown_end
        return const_lr_cooldown(optimizer, args.lr, args.warmup, total, cooldown, power, end)
    raise UserError(f"--lr-scheduler {args.lr_scheduler}: use cosine, const, or const-cooldown")


def start_remote_sync(local: str, remote: str, protocol: str, seconds: int):
    """Copy a run's folder to a remote place now and every so often, with OpenCLIP's own code; returns what ends it.

    Raises:
        UserError: the first copy failed.
    """
    from open_clip_train.file_utils import remote_sync, start_sync_process

    if not remote_sync(local, remote, protocol):
        raise UserError(f"--remote-sync {remote}: the first copy by {protocol} failed; see the message above")
    process = start_sync_process(seconds, local, remote, protocol)
    process.start()

    def finish() -> None:
        process.terminate()
        process.join()
        remote_sync(local, remote, protocol)

    return finish


def input_dtype(precision: str):
    """The dtype of images under `--precision`; None: leave as they are."""
    from open_clip import get_input_dtype

    return get_input_dtype(precision)


def autocast(precision: str, device):
    """A function that returns the context to run a model in under `--precision`."""
    from open_clip_train.precision import get_autocast

    return get_autocast(precision, device_type=device.type)
