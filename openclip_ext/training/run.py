"""A training run from its flags to its last checkpoint."""

import argparse
import os
import random
import shutil
from importlib.metadata import version

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from openclip_ext import _host
from openclip_ext.data.hash_ids import HashIds
from openclip_ext.data.listing import ShardListing
from openclip_ext.data.pipeline import TrainLoader, train_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.errors import UserError
from openclip_ext.evaluation.during_training import Evaluator
from openclip_ext.training import setup, sharding
from openclip_ext.training.checkpoint import LATEST, Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from openclip_ext.training.log import EpochLog, append_json, logger, report_skips, start_logging, stop_logging
from openclip_ext.training.loop import Trainer
from openclip_ext.training.pair_model import feature_widths, pair_model
from openclip_ext.training.views import SymmetricObjective, ViewsModel


def train(args: argparse.Namespace) -> dict[str, float]:
    """Run what the flags say; returns the metrics of the last evaluation.

    Raises:
        UserError: see each flag. Nothing has been written then, unless it came up during training.
    """
    plan = setup.plan_objective(args)
    data = setup.training_data(args, plan)
    if args.model_config:
        _host.register_model_config(args.model_config)
    accelerator = setup.make_accelerator(args)
    folder = setup.run_folder(args, accelerator)
    checkpoint = _checkpoint(args, folder, accelerator)
    if args.check_shards and data and isinstance(data.source, ShardListing):
        setup.require_sizes(data.source, accelerator.is_main_process)
    _seed(args.seed)
    model, train_transform, eval_transform, tokenizer = _host.create_model(
        args, accelerator.device, logit_bias="logit_bias" in plan.needs
    )
    evaluator = setup.make_evaluator(args, accelerator, tokenizer, eval_transform)
    if data is None:
        return _evaluate_only(args, accelerator, model, evaluator, checkpoint)
    trainer, remarks = _trainer(args, accelerator, plan, data, model, train_transform, tokenizer, checkpoint)
    start = checkpoint.epoch if checkpoint else 0
    if checkpoint:
        checkpoint.content.clear()  # it is as large as the model and its optimizer
    elif args.resume:
        remarks.append(f"--resume {args.resume}: no checkpoint of this run yet: it starts from the beginning")
    with _Run(args, trainer, folder) as run:
        run.say_start(data, checkpoint, remarks)
        return run.epochs(start, evaluator)


def _trainer(
    args, accelerator: Accelerator, plan, data: setup.TrainingData, model, transform, tokenizer, checkpoint
) -> tuple[Trainer, list[str]]:
    """The prepared parts of training, restored from the checkpoint if there is one, and remarks for the log."""
    if "logit_bias" not in plan.needs and getattr(model, "logit_bias", None) is not None:
        model.logit_bias.requires_grad_(False)  # DDP would wait for its gradient
    if args.use_bn_sync and accelerator.num_processes > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if checkpoint:  # before the model may be copied or sharded
        checkpoint.restore_model(model, args.model)
    views = ViewsModel(model, args.momentum_encoder) if args.pairs == "views" else None
    paired, keys = views or pair_model(model, plan.needs), views and views.keys
    loss = _objective(args, accelerator, plan, data, paired)
    _seed(args.seed + accelerator.process_index)
    loader = _loader(args, accelerator, plan, data, transform, tokenizer)
    steps_per_epoch = loader.num_batches // args.accum_freq
    optimizer = _host.create_optimizer(args, model)
    prepared_model, prepared_optimizer = sharding.prepare(accelerator, paired, optimizer, list(loss.parameters()))
    remarks = [
        f"the {modality} tower has no output before its projection: its projected features stand in for trunk features"
        for modality in getattr(paired, "projected", [])
    ]
    if checkpoint:
        restored = checkpoint.restore(optimizer=optimizer, scaler=accelerator.scaler, loss=loss, keys=keys)
        remarks += [f"--resume {args.resume}: {remark}" for remark in restored]
    return Trainer(
        accelerator=accelerator,
        module=model,
        paired=paired,
        model=torch.compile(prepared_model) if args.torchcompile else prepared_model,
        loss=loss,
        optimizer=prepared_optimizer,
        schedule=None if args.skip_scheduler else _host.create_schedule(args, optimizer, steps_per_epoch),
        loader=loader,
        input_dtype=_host.input_dtype(args.precision),
        accum_freq=args.accum_freq,
        grad_clip_norm=args.grad_clip_norm,
        total_steps=steps_per_epoch * args.epochs,
        seed=args.seed,
        teacher=_host.create_teacher(args, accelerator.device) if args.distill_model else None,
        hash_ids=HashIds(data.num_ids) if data.sample_id == "hash" else None,
        keys=keys,
    ), remarks


def _objective(args, accelerator: Accelerator, plan, data: setup.TrainingData, paired):
    """The loss on the device, with room for the data's ids and for the widths of the model `paired`."""

    def build():
        return plan.build(data.size, accelerator.process_index, accelerator.num_processes)

    loss, widths = build(), None
    if args.momentum_encoder is not None or loss.wants_widths:
        widths = feature_widths(paired, _host.input_dtype(args.precision))
    if args.momentum_encoder is not None:
        loss = SymmetricObjective(loss, build(), widths["embed"])
    if data.num_ids != data.size:
        loss.set_num_ids(data.num_ids)
    loss.to(accelerator.device)
    if loss.wants_widths:
        loss.set_widths(**widths)
    return loss.to(accelerator.device)


def _loader(args, accelerator: Accelerator, plan, data: setup.TrainingData, transform, tokenizer) -> TrainLoader:
    """Batches of this rank. Raises UserError: an epoch has fewer than an optimizer step takes."""
    config = StreamConfig(
        source=data.source,
        batch_size=args.batch_size,
        sample_id=data.sample_id,
        resampled=args.dataset_resampled,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        **setup.row_format(args, plan, transform, tokenizer),
    )
    pin_memory = accelerator.device.type == "cuda"
    loader = train_loader(config, num_samples=data.num_samples, workers=args.workers, pin_memory=pin_memory)
    if loader.num_batches < args.accum_freq:
        raise UserError(
            f"--accum-freq {args.accum_freq}: an epoch has only {loader.num_batches} batches of "
            f"{args.batch_size} x {accelerator.num_processes}; use a smaller --accum-freq or --batch-size"
        )
    return loader


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
            self._finish_sync = _host.start_remote_sync(
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

    def say_start(self, data: setup.TrainingData, checkpoint: Checkpoint | None, remarks: list[str]) -> None:
        args, trainer, processes = self.args, self.trainer, self.accelerator.num_processes
        millions = sum(p.numel() for p in trainer.module.parameters()) / 1e6
        device = self.accelerator.device.type
        logger.info("%s, %.1f M parameters; %d process(es) on %s, precision %s",
                    args.model, millions, processes, device, args.precision)  # fmt: skip
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

    def epochs(self, start: int, evaluator: Evaluator) -> dict[str, float]:
        """Train from epoch `start` to the last; the metrics of the last evaluation."""
        metrics: dict[str, float] = {}
        if start >= self.args.epochs:
            logger.warning("nothing to train: the checkpoint has %d epochs and --epochs is %d", start, self.args.epochs)
        for epoch in range(start, self.args.epochs):
            self._epoch(epoch)
            done, last = epoch + 1, epoch + 1 == self.args.epochs
            if evaluator.due(done, last):
                metrics = _evaluate(evaluator, self.trainer.paired, done, last, self.folder)
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
        report_skips(gather_object(skipped) if self.accelerator.num_processes > 1 else skipped, f"epoch {epoch + 1}")
        if self.trainer.hash_ids and self.trainer.hash_ids.collisions:
            logger.warning("%d visits so far to sample ids that another sample holds; raise --sample-id-table",
                           self.trainer.hash_ids.collisions)  # fmt: skip

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
    """Without training data: score the model, as OpenCLIP does."""
    if checkpoint:
        checkpoint.restore_model(model, args.model)
    start_logging(None, console=accelerator.is_main_process, debug=args.debug)
    try:
        return _evaluate(evaluator, model, checkpoint.epoch if checkpoint else 0, True, None)
    finally:
        stop_logging()


def _evaluate(evaluator: Evaluator, model, epoch: int, last: bool, folder: str | None) -> dict[str, float]:
    metrics = evaluator.evaluate(model, epoch, last)
    report_skips(evaluator.skipped, "validation")
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
            distributed=trainer.accelerator.num_processes > 1,
        )
    previous = os.path.join(checkpoints, f"epoch_{epoch - 1}.pt")
    if main and args.delete_previous_checkpoint and targets and os.path.exists(previous):
        os.remove(previous)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
