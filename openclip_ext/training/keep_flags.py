"""Flags about what a run keeps, and goes on from. Imports no torch."""

from openclip_ext.errors import UserError
from openclip_ext.training.config import RunConfig


def add_keep_flags(ours) -> None:
    ours.add_argument(
        "--resume-other-loss",
        action="store_true",
        help="Let --resume go on with another --loss than the checkpoint's: model and optimizer are restored, the "
        "memory of the loss starts anew.",
    )
    ours.add_argument(
        "--save-best",
        metavar="METRIC",
        help="Keep the checkpoint at which this metric was best so far as checkpoints/best.pt, such as "
        "imagenet-zeroshot-val-top1; names are those in results.jsonl. Losses and ranks are best where they are least.",
    )
    ours.add_argument(
        "--save-every-steps",
        type=int,
        metavar="K",
        help="Keep a checkpoint every K optimizer steps too, as epoch_N_step_S.pt (with --save-most-recent as "
        "epoch_latest.pt): --resume latest goes on from there as if the run had not stopped.",
    )
    ours.add_argument(
        "--keep-last",
        type=int,
        default=2,
        metavar="N",
        help="How many checkpoints from within epochs to keep, the newest (default: %(default)s; 0: all).",
    )
    ours.add_argument(
        "--max-minutes",
        type=float,
        metavar="M",
        help="Stop after the step at which the run has taken M minutes, and keep a checkpoint to go on from, as after "
        "SIGTERM, SIGUSR1 or SIGINT.",
    )
    ours.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="Profile so many steps near the beginning: which parts of a step take its time goes to the log and to "
        "profile/step.txt in the run's folder, a trace for a browser to profile/trace.json.gz.",
    )


def require_keep_limits(config: RunConfig) -> None:
    """Raises UserError: a number that means nothing."""
    if config.save_every_steps is not None and config.save_every_steps < 1:
        raise UserError(f"--save-every-steps {config.save_every_steps}: must be at least 1")
    if config.max_minutes is not None and not config.max_minutes > 0:
        raise UserError(f"--max-minutes {config.max_minutes}: must be above 0")
    if config.profile < 0:
        raise UserError(f"--profile {config.profile}: must be a number of steps, or 0 for none")
    if config.profile and config.logs_folder is None:
        raise UserError(f"--profile {config.profile}: is written into the run's folder; there is none with --logs none")
    if config.keep_last < 0:
        raise UserError(f"--keep-last {config.keep_last}: must be at least 0, which keeps all")
