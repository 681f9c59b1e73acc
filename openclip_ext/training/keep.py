"""Which checkpoints a run keeps."""

import math
import os
from collections.abc import Mapping
from typing import Any

from accelerate.utils import broadcast_object_list

from openclip_ext.errors import UserError
from openclip_ext.files import LATEST, checkpoints, remove_partial, step_file, step_files
from openclip_ext.training.checkpoint import save_checkpoint
from openclip_ext.training.config import RunConfig
from openclip_ext.training.evaluator import metric_names
from openclip_ext.training.log import logger
from openclip_ext.training.loop import Trainer
from openclip_ext.training.parts import remove_parts

BEST = "best.pt"
#: Metrics that are best where they are least end so.
_LOWER_IS_BETTER = ("loss", "_rank")


def require_metric(config: RunConfig) -> None:
    """Raises UserError: `--save-best` names what will not be measured, or two measured sets have one name."""
    names = metric_names(config)
    if config.save_best and config.save_best not in names:
        there = f"there are {', '.join(names)}" if names else "add --val-data, --imagenet-val or --zero-shot"
        raise UserError(f"--save-best {config.save_best}: this run measures no such thing; {there}")


class Keeper:
    """Writes and removes a run's checkpoints as flags say. All ranks take part; the first one writes.

    Args:
        config: `--save-frequency`, `--save-every-steps`, `--keep-last`, `--save-most-recent`, `--save-best`,
            `--delete-previous-checkpoint`.
        trainer: what a checkpoint holds.
        folder: the run's.
        best: what the checkpoint that the run goes on from says of the best one; None: nothing.
        notes: plain values that checkpoints hold besides.
    """

    def __init__(
        self, config: RunConfig, trainer: Trainer, folder: str, best: dict[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.notes = notes or {}
        self.config, self.trainer = config, trainer
        self.main = trainer.accelerator.is_main_process
        self.folder = os.path.join(folder, "checkpoints")
        if self.main:
            remove_partial(self.folder)
        still_there = best and best["metric"] == config.save_best and os.path.exists(os.path.join(self.folder, BEST))
        self.best = best if still_there else None

    def keep(self, epoch: int, last: bool, metrics: dict[str, float]) -> None:
        """After `epoch` completed epochs, and what was measured then on the first rank, if anything."""
        config, targets, best = self.config, [], self.best
        if self._is_best(epoch, metrics):
            targets.append(BEST)
        if last or (config.save_frequency > 0 and epoch % config.save_frequency == 0):
            targets.append(f"epoch_{epoch}.pt")
        if config.save_most_recent:
            targets.append(LATEST)
        failed = {target: error for target in targets if (error := self._save(target, epoch))}
        if self.best and BEST in targets and BEST not in failed:
            logger.info("best so far: %s %.4f after epoch %d, kept as %s", *self.best.values(), BEST)
        if BEST in failed:
            self.best = best
        previous = os.path.join(self.folder, f"epoch_{epoch - 1}.pt")
        written = set(targets) - {BEST, *failed}
        if self.main and config.delete_previous_checkpoint and written and os.path.exists(previous):
            _remove(previous)
        if last:
            self._require_written(failed)

    def _require_written(self, failed: dict[str, str]) -> None:
        """Raises UserError on all ranks: the run's last checkpoint could not be written."""
        if self.trainer.accelerator.num_processes > 1:
            (failed,) = broadcast_object_list([failed])
        for name, reason in failed.items():
            raise UserError(
                f"the run's last checkpoint, {os.path.join(self.folder, name)}, could not be written ({reason}); make "
                "room, and go on with --resume latest"
            )

    def keep_step(self, last: bool = False) -> str:
        """Within an epoch; the path of what is kept. Raises UserError: it is the last one, and cannot be written."""
        clock, most_recent = self.trainer.clock, self.config.save_most_recent
        name = LATEST if most_recent else step_file(clock.epoch, clock.step)
        reason = self._save(name, clock.epoch)
        if last:
            self._require_written({name: reason} if reason else {})
        path = os.path.join(self.folder, name)
        if self.main and self.config.keep_last and not reason:
            files = step_files(self.folder)
            # Newer ones are there where a run has gone on before from an older one; this one is not among the oldest.
            first = files.index(path) if path in files else 0
            for old in files[first + self.config.keep_last :]:
                _remove(old)
        return path

    def _is_best(self, epoch: int, metrics: dict[str, float]) -> bool:
        """On all ranks, as the first one finds."""
        metric = self.config.save_best
        if metric is None:
            return False
        value = metrics.get(metric, math.nan)
        sign = -1 if metric.endswith(_LOWER_IS_BETTER) else 1
        better = not math.isnan(value) and (self.best is None or sign * value > sign * self.best["value"])
        found = {"metric": metric, "value": value, "epoch": epoch} if better else None
        if self.trainer.accelerator.num_processes > 1:
            (found,) = broadcast_object_list([found])
        self.best = found or self.best
        return found is not None

    def _save(self, name: str, epoch: int) -> str | None:
        """Write a checkpoint; returns why it could not be written, which is in the log then, and None if it is."""
        try:
            self._write(name, epoch)
        except OSError as error:
            reason = error.strerror or str(error)
            kept = [os.path.basename(path) for path in checkpoints(self.folder, self.config.save_most_recent)[:1]]
            logger.error("%s: could not be written (%s); %s, and training goes on to the next checkpoint",
                         os.path.join(self.folder, name), reason,
                         f"{kept[0]} is kept" if kept else "there is no earlier one")  # fmt: skip
            return reason
        return None

    def _write(self, name: str, epoch: int) -> None:
        trainer = self.trainer
        save_checkpoint(
            os.path.join(self.folder, name) if self.main else None,
            epoch=epoch,
            name=self.config.name or "",
            model=trainer.module,
            optimizer=trainer.optimizer,
            scaler=trainer.accelerator.scaler,
            loss=trainer.loss,
            momentum_encoder=trainer.momentum_encoder,
            average=trainer.average,
            adapters=trainer.adapters,
            hash_ids=trainer.hash_ids,
            clock=trainer.time_state(),
            distributed=trainer.accelerator.num_processes > 1,
            notes={"loss_name": self.config.loss, **self.notes} | ({"best": self.best} if self.best else {}),
        )


def _remove(path: str) -> None:
    os.remove(path)
    remove_parts(path)
