"""A training run from its flags to its last checkpoint."""

import argparse
import os
import shutil
from importlib.metadata import version

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from openclip_ext import upstream
from openclip_ext.data.listing import ShardListing
from openclip_ext.errors import UserError
from openclip_ext.evaluation.during_training import Evaluator
from openclip_ext.files import LATEST, latest_checkpoint
from openclip_ext.training.accelerator import make_accelerator
from openclip_ext.training.average import WeightAverage
from openclip_ext.training.build import build_trainer, seed_all
from openclip_ext.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from openclip_ext.training.data import TrainingData, require_sizes, training_data
from openclip_ext.training.evaluator import make_evaluator
from openclip_ext.training.folder import run_folder
from openclip_ext.training.learning_rates import describe
from openclip_ext.training.log import EpochLog, append_json, logger, report_skips, start_logging, stop_logging
from openclip_ext.training.loop import Trainer
from openclip_ext.training.objective import plan_objective
from openclip_ext.training.warm_start import warm_start_pass


def train(args: argparse.Namespace) -> dict[str, float]:
    """Run what the flags say; returns the metrics of the last evaluation.

    Raises:
        UserError: see each flag. Nothing has been written then, unless it came up during training.
    """
    plan = plan_objective(args)
    data = training_data(args, plan)
    if args.model_config:
        upstream.register_model_config(args.model_config)
    accelerator = make_accelerator(args)
    folder = run_folder(args, accelerator)
    checkpoint = _checkpoint(args, folder, accelerator)
    if args.check_shards and data and isinstance(data.source, ShardListing):
        require_sizes(data.source, accelerator.is_main_process)
    seed_all(args.seed)
    model, train_transform, eval_transform, tokenizer = upstream.create_model(
        args, accelerator.device, logit_bias="logit_bias" in plan.needs
    )
    vars(args).update(upstream.preprocessing(model))  # into params.txt: a checkpoint does not know its tag's
    evaluator = make_evaluator(args, accelerator, tokenizer, eval_transform)
    if data is None:
        return _evaluate_only(args, accelerator, model, evaluator, checkpoint)
    trainer, remarks = build_trainer(args, accelerator, plan, data, model, train_transform, tokenizer, checkpoint)
    start = checkpoint.epoch if checkpoint else 0
    new_memory = not (checkpoint and checkpoint.content.get("loss"))
    if checkpoint:
        checkpoint.content.clear()  # it is as large as the model and its optimizer
    elif args.resume:
        remarks.append(f"--resume {args.resume}: no checkpoint of this run yet: it starts from the beginning")
    with _Run(args, trainer, folder) as run:
        run.say_start(data, checkpoint, remarks)
        if args.warm_start_pass and new_memory and start < args.epochs:
            run.warm_start()
        return run.epochs(start, evaluator)


class _Run:
    """A run with its folder, logs, trackers and remote copy open."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer, folder: str | None) -> None:
        self.args, self.trainer, self.accelerator = args, trainer, trainer.accelerator
        self.main = self.accelerator.is_main_process
        self.run_folder = folder
        self.folder = folder if self.main else None  # where this rank writes
        self._finish_sync = None

    def __enter__(self) -> "_Run":
        args = self.args
        if self.folder:
            _make_folder(args, self.folder)
        start_logging(self._log_path(), console=self.main, debug=args.debug)
        if self.folder and args.remote_sync:
            remote = os.path.join(args.remote_sync, args.name)
            self._finish_sync = upstream.start_remote_sync(
                self.folder, remote, args.remote_sync_protocol, args.remote_sync_frequency
            )
        if args.report_to and self.folder:
            _start_trackers(args, self.accelerator, self.folder)
        return self

    def __exit__(self, kind, *exception) -> None:
        if self._finish_sync:
            self._finish_sync()
        stop_logging()
        if kind is None:  # ends trackers and the process group; after an error other ranks may not come here
            self.accelerator.end_training()

    def _log_path(self) -> str | None:
        """One file for the run, or with `--log-local` one per machine."""
        if not self.run_folder:
            return None
        if self.args.log_local and self.accelerator.is_local_main_process:
            os.makedirs(self.run_folder, exist_ok=True)
            return os.path.join(self.run_folder, f"out-{self.accelerator.process_index}.log")
        return os.path.join(self.run_folder, "out.log") if self.main else None

    def say_start(self, data: TrainingData, checkpoint: Checkpoint | None, remarks: list[str]) -> None:
        args, trainer, processes = self.args, self.trainer, self.accelerator.num_processes
        millions = sum(p.numel() for p in trainer.module.parameters()) / 1e6
        device = self.accelerator.device.type
        logger.info("%s, %.1f M parameters; %d process(es) on %s, precision %s",
                    args.model, millions, processes, device, args.precision)  # fmt: skip
        if trainer.adapters is not None:
            logger.info(trainer.adapters.describe())
        if levels := describe(trainer.optimizer):
            logger.info(levels)
        if self.accelerator.is_fsdp2:
            logger.info("parameters, gradients and the optimizer's state are sharded (FSDP)")
        logger.info("loss %s over %d samples; %d steps of %d pairs per epoch, %d epochs",
                    args.loss, data.size, trainer.steps_per_epoch, self._pairs_per_step, args.epochs)  # fmt: skip
        if checkpoint:
            logger.info("resumed from %s after epoch %d", checkpoint.path, checkpoint.epoch)
        for remark in remarks:
            logger.warning(remark)

    @property
    def _pairs_per_step(self) -> int:
        return self.args.batch_size * self.args.accum_freq * self.accelerator.num_processes

    def warm_start(self) -> None:
        """`--warm-start-pass`; a loss that keeps nothing between steps is left as it is."""
        if not self.trainer.loss.wants_warm_start:
            logger.warning("--warm-start-pass: loss %s keeps no memory of samples: there is nothing to fill",
                           self.args.loss)  # fmt: skip
            return
        self._report_skips(warm_start_pass(self.trainer, epoch=self.args.epochs), "warm start")
        logger.info("warm start: loss %s has seen one epoch of the data", self.args.loss)

    def _report_skips(self, skipped: list[tuple[str, str, int]], when: str) -> None:
        report_skips(gather_object(skipped) if self.accelerator.num_processes > 1 else skipped, when)

    def epochs(self, start: int, evaluator: Evaluator) -> dict[str, float]:
        """Train from epoch `start` to the last; the metrics of the last evaluation."""
        metrics: dict[str, float] = {}
        if start >= self.args.epochs:
            logger.warning("nothing to train: the checkpoint has %d epochs and --epochs is %d", start, self.args.epochs)
        for epoch in range(start, self.args.epochs):
            self._epoch(epoch)
            done, last = epoch + 1, epoch + 1 == self.args.epochs
            if evaluator.due(done, last):
                metrics = _evaluate(evaluator, self.trainer.paired, done, last, self.folder, self.trainer.average)
                self._track("val", metrics, done * self.trainer.steps_per_epoch)
            if self.run_folder:
                _save(self.args, self.trainer, self.run_folder, done, last)
            self.accelerator.wait_for_everyone()
        return metrics

    def _epoch(self, epoch: int) -> None:
        log = EpochLog(
            epoch=epoch,
            steps=self.trainer.steps_per_epoch,
            samples_per_step=self._pairs_per_step,
            every=self.args.log_every_n_steps,
            write=self._write_row if self.folder else None,
            show=self.main,
        )
        try:
            skipped = self.trainer.train_epoch(epoch, log)
        finally:
            log.close()
        self._report_skips(skipped, f"epoch {epoch + 1}")
        if self.trainer.hash_ids and self.trainer.hash_ids.collisions:
            logger.warning(
                "%d visits so far of samples beyond the %d that there is room for, which share ids; raise "
                "--sample-id-table", self.trainer.hash_ids.collisions, self.trainer.hash_ids.num_ids,
            )  # fmt: skip

    def _write_row(self, row: dict) -> None:
        append_json(os.path.join(self.folder, "metrics.jsonl"), row)
        self._track("train", row, row["step"])

    def _track(self, prefix: str, values: dict, step: int) -> None:
        if self.args.report_to:
            self.accelerator.log({f"{prefix}/{name}": value for name, value in values.items()}, step=step)


def _checkpoint(args, folder: str | None, accelerator: Accelerator) -> Checkpoint | None:
    """What `--resume` names. The first rank says which is the latest: another machine's disk may not show it."""
    if args.resume is None:
        return None
    path = args.resume
    if path == "latest":
        if folder is None or not args.name_given:
            raise UserError("--resume latest: name the run with --name, and its folder with --logs")
        path = latest_checkpoint(os.path.join(folder, "checkpoints"), args.save_most_recent)
        if accelerator.num_processes > 1:
            (path,) = broadcast_object_list([path])
        if path is None and args.remote_sync:
            raise UserError(f"--resume latest: {folder} holds no checkpoint; copy it from --remote-sync first")
    return load_checkpoint(path) if path else None


def _make_folder(args, folder: str) -> None:
    """Make the run's folder and record flags and versions in it."""
    os.makedirs(os.path.join(folder, "checkpoints"), exist_ok=True)
    packages = ("openclip-ext", "open_clip_torch", "torch", "accelerate", "webdataset", "timm")
    values = {name: version(name) for name in packages} | vars(args)
    with open(os.path.join(folder, "params.txt"), "w") as file:
        file.writelines(f"{name}: {value}\n" for name, value in sorted(values.items()))
    if args.copy_codebase:
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        target = os.path.join(folder, "code", os.path.basename(package))
        shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def _start_trackers(args, accelerator: Accelerator, folder: str) -> None:
    """TensorBoard below the run's folder, Weights & Biases under OpenCLIP's names."""
    accelerator.project_configuration.logging_dir = folder
    resume = "auto" if args.resume == "latest" else None
    wandb = {"name": args.name, "id": args.name, "notes": args.wandb_notes, "resume": resume}
    config = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str | bool)}
    accelerator.init_trackers(
        "tensorboard" if args.report_to == "tensorboard" else args.wandb_project_name, config, {"wandb": wandb}
    )


def _evaluate_only(args, accelerator, model, evaluator: Evaluator, checkpoint: Checkpoint | None) -> dict[str, float]:
    """Without training data: score the model, as OpenCLIP does, and with `--ema` the average in the checkpoint."""
    if checkpoint:
        checkpoint.restore_model(model, args.model)
    average = None if args.ema is None else WeightAverage(model, args.ema)
    remarks = checkpoint.restore_average(average) if checkpoint else []
    start_logging(None, console=accelerator.is_main_process, debug=args.debug)
    try:
        for remark in remarks:
            logger.warning("--resume %s: %s", args.resume, remark)
        return _evaluate(evaluator, model, checkpoint.epoch if checkpoint else 0, True, None, average)
    finally:
        stop_logging()


def _evaluate(
    evaluator: Evaluator, model, epoch: int, last: bool, folder: str | None, average: WeightAverage | None = None
) -> dict[str, float]:
    """Metrics of the model, and with `ema-` before their names those of the average of its weights."""
    metrics = evaluator.evaluate(model, epoch, last)
    report_skips(evaluator.skipped, "validation")
    if average is not None:
        with average.applied():
            metrics |= {f"ema-{name}": value for name, value in evaluator.evaluate(model, epoch, last).items()}
    shown = {name: value for name, value in metrics.items() if name.endswith(("R@1", "-top1", "clip_val_loss"))}
    logger.info("after epoch %d: %s", epoch, "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    if folder:
        append_json(os.path.join(folder, "checkpoints", "results.jsonl"), {"epoch": epoch, **metrics})
    return metrics


def _save(args, trainer: Trainer, folder: str, epoch: int, last: bool) -> None:
    """Write and remove what `--save-frequency`, `--save-most-recent` and `--delete-previous-checkpoint` ask for.

    All ranks take part; the first one writes.
    """
    main = trainer.accelerator.is_main_process
    checkpoints = os.path.join(folder, "checkpoints")
    targets = []
    if last or (args.save_frequency > 0 and epoch % args.save_frequency == 0):
        targets.append(f"epoch_{epoch}.pt")
    if args.save_most_recent:
        targets.append(LATEST)
    for target in targets:
        save_checkpoint(
            os.path.join(checkpoints, target) if main else None,
            epoch=epoch,
            name=args.name,
            model=trainer.module,
            optimizer=trainer.optimizer,
            scaler=trainer.accelerator.scaler,
            loss=trainer.loss,
            keys=trainer.keys,
            average=trainer.average,
            adapters=trainer.adapters,
            hash_ids=trainer.hash_ids,
            distributed=trainer.accelerator.num_processes > 1,
        )
    previous = os.path.join(checkpoints, f"epoch_{epoch - 1}.pt")
    if main and args.delete_previous_checkpoint and targets and os.path.exists(previous):
        os.remove(previous)
