"""Names of the checkpoints of a run."""

import os
import re

LATEST = "epoch_latest.pt"


def latest_checkpoint(folder: str, most_recent: bool) -> str | None:
    """The checkpoint that `--resume latest` means, None if there is none.

    Args:
        folder: where the run keeps its checkpoints.
        most_recent: the run uses `--save-most-recent`: its fixed file name counts, as in OpenCLIP.
    """
    if most_recent:
        path = os.path.join(folder, LATEST)
        return path if os.path.exists(path) else None
    names = os.listdir(folder) if os.path.isdir(folder) else []
    epochs = {int(match[1]): name for name in names if (match := re.fullmatch(r"epoch_(\d+)\.pt", name))}
    return os.path.join(folder, epochs[max(epochs)]) if epochs else None


def last_checkpoint(run: str) -> str | None:
    """The checkpoint of a run's last epoch, None if it keeps none."""
    folder = os.path.join(run, "checkpoints")
    return latest_checkpoint(folder, most_recent=False) or latest_checkpoint(folder, most_recent=True)
