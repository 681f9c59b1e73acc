"""Flags on what may go wrong before a run ends. Imports no torch."""

import argparse

from openclip_ext.errors import UserError


def add_fault_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rank-timeout", type=float, default=300.0, metavar="SECONDS",
        help="End a process within this time after another one of the run has died, with a line that names it; 0: "
        "wait. Default: %(default)g.",
    )  # fmt: skip
    group.add_argument(
        "--max-skipped", type=int, default=100, metavar="N",
        help="End the run after N steps in a row whose loss or gradient is not finite (default: %(default)s). Such a "
        "step changes nothing, and is told with its rank, samples and shards.",
    )  # fmt: skip
    group.add_argument(
        "--max-bad", type=float, metavar="SHARE",
        help="End the run once more than this share of an epoch's samples cannot be used, such as 0.01; the kinds of "
        "faults and the shards are named. Default: no limit.",
    )  # fmt: skip


def require_fault_limits(rank_timeout: float, max_skipped: int, max_bad: float | None) -> None:
    """Raises UserError: a limit that means nothing."""
    if not rank_timeout >= 0:
        raise UserError(f"--rank-timeout {rank_timeout}: must be a number of seconds, or 0 to wait for ever")
    if max_skipped < 1:
        raise UserError(f"--max-skipped {max_skipped}: must be at least 1")
    if max_bad is not None and not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad {max_bad}: must be a share between 0 and 1, such as 0.01")
