"""What `--resume` names, and what is different from the run it is from."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from openclip_ext.errors import UserError, counted
from openclip_ext.files import checkpoints
from openclip_ext.redact import redacted_values
from openclip_ext.training.checkpoint import Checkpoint, load_checkpoint
from openclip_ext.training.config import RunConfig
from openclip_ext.training.parts import checkpoint_damage
from openclip_ext.training.record import Record, read_record


@dataclasses.dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from.

    Attributes:
        checkpoint: without the state of its loss where that is to start anew.
        record: what its run recorded, as of the checkpoint; None: nothing.
        remarks: for the log: newer checkpoints that are damaged.
    """

    checkpoint: Checkpoint
    record: Record | None
    remarks: tuple[str, ...] = ()

    @property
    def has_loss_state(self) -> bool:
        return bool(self.checkpoint.content.get("loss"))

    def with_loss(self, config: RunConfig) -> "Resumed":
        """Ready for the loss of the flags.

        Raises:
            UserError: it is another than the checkpoint's, and `--resume-other-loss` is not given.
        """
        content = self.checkpoint.content
        name = content.get("loss_name") or (self.record and self.record.flags.get("loss"))
        if "epoch" not in content or name in (None, config.loss):
            return self
        if not config.resume_other_loss:
            raise UserError(
                f"--resume {config.resume} --loss {config.loss}: the checkpoint's loss is {name}; use that, or add "
                "--resume-other-loss to go on without its memory"
            )
        kept = {key: value for key, value in content.items() if key not in ("loss", "loss_optimizer")}
        return dataclasses.replace(self, checkpoint=dataclasses.replace(self.checkpoint, content=kept))

    def changes(self, flags: dict[str, Any]) -> dict[str, list]:
        """See `Record.changes`; none where nothing is recorded."""
        return self.record.changes(flags) if self.record else {}


def find_resumed(config: RunConfig, folder: str | None, accelerator: Accelerator) -> Resumed | None:
    """What `--resume` names; None where it names nothing, or the latest checkpoint of a run that has none yet.

    The first rank says which is the latest, and what was recorded: another machine's disk may not show it.

    Raises:
        UserError: no such file, not a checkpoint, or a damaged one.
    """
    path, remarks, main = config.resume, (), accelerator.is_main_process
    if path == "latest":
        assert folder is not None
        found = checkpoints(os.path.join(folder, "checkpoints"), config.save_most_recent) if main else []
        path, remarks, fault = _of_first_rank(_newest_whole(found), accelerator)
        if fault:
            raise UserError(fault)
        if path is None and config.remote_sync:
            raise UserError(f"--resume latest: {folder} holds no checkpoint; copy it from --remote-sync first")
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    if config.resume != "latest":
        looked_at = main and not path.endswith(".safetensors")
        fault = _of_first_rank(checkpoint_damage(path) if looked_at else None, accelerator)
        if fault:
            raise UserError(f"--resume {path}: is damaged ({fault}); give an older checkpoint, or a whole copy of it")
    run = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    record = _of_first_rank(read_record(run) if accelerator.is_main_process else None, accelerator)
    return Resumed(checkpoint, record and record.as_of(checkpoint.epoch, checkpoint.step), remarks)


def _newest_whole(paths: Sequence[str]) -> tuple[str | None, tuple[str, ...], str | None]:
    """Of checkpoints, the newest first: the first whole one, what to say of those before it, and what is wrong where
    none is whole."""
    remarks: list[str] = []
    for path in paths:
        fault = checkpoint_damage(path)
        if fault is None:
            return path, tuple(remarks), None
        remarks.append(f"--resume latest: {path} is damaged ({fault}); passed over")
    if not remarks:
        return None, (), None
    number = counted(len(paths), "checkpoint")
    return None, (), f"{remarks[0]}, and none of {number} is whole; train anew under another --name, or --resume a copy"


def _of_first_rank(value: Any, accelerator: Accelerator) -> Any:
    if accelerator.num_processes > 1:
        (value,) = broadcast_object_list([value])
    return value


def new_record(config: RunConfig, resumed: Resumed | None, steps: int, remarks: list[str]) -> Record:
    """The flags of now, and what changed since the run that is resumed, which is added to the remarks."""
    flags = redacted_values(vars(config.flags))
    history = resumed.record.history if resumed and resumed.record else []
    if resumed and (changed := resumed.changes(flags)):
        remarks += say_changes(config.resume, changed)
        history = [*history, {"epoch": resumed.checkpoint.epoch, "step": steps, "changed": changed}]
    return Record(flags, history)


def say_changes(resume: str | None, changed: dict[str, list]) -> list[str]:
    """A line for the log for each flag that changed."""
    return [f"--resume {resume}: {name} was {_shown(old)}, is {_shown(new)}" for name, (old, new) in changed.items()]


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
