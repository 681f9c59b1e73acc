"""A training run from its flags to its last checkpoint."""

import argparse
import datetime
import os
import random
import warnings
from importlib.metadata import version

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, gather_object

from openclip_ext import _host
from openclip_ext.data.check import check_shards
from openclip_ext.data.hash_ids import HashIds
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pipeline import StreamConfig, eval_loader, train_loader
from openclip_ext.errors import UserError
from openclip_ext.evaluation.during_training import Evaluator
from openclip_ext.evaluation.zero_shot import imagenet_loader
from openclip_ext.losses import ObjectivePlan
from openclip_ext.training.checkpoint import LATEST, Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from openclip_ext.training.log import EpochLog, append_json, logger, report_skips, start_logging, stop_logging
from openclip_ext.training.loop import Trainer

_MIXED = {"amp": "fp16", "amp_bf16": "bf16", "amp_bfloat16": "bf16"}
#: What a loss may ask for that this loop provides.
PROVIDED = frozenset({"sample_ids", "logit_bias"})


def train(args: argparse.Namespace) -> dict[str, float]:
    """Run what the flags say; returns the metrics of the last evaluation.

    Everything that can be wrong with the input is looked at before the run's folder is made.

    Raises:
        UserError: see each flag.
    """
    plan = ObjectivePlan(args.loss, args.loss_options, args.loss_terms)
    if plan.needs - PROVIDED:
        raise UserError(f"--loss {args.loss}: needs {', '.join(sorted(plan.needs - PROVIDED))}, which is not provided")
    listing = list_shards(args.train_data, args.train_data_upsampling_factors) if args.train_data else None
    id_space = _id_space(args, plan, listing) if listing else 0
    if args.model_config:
        _host.register_model_config(args.model_config)
    accelerator = _accelerator(args)
    folder = _run_folder(args, accelerator)
    checkpoint = _checkpoint(args, folder)
    if args.check_shards and listing and accelerator.is_main_process:
        _require_sizes(listing)
    _seed(args.seed)
    model, preprocess_train, preprocess_val, tokenizer = _host.create_model(
        args, accelerator.device, logit_bias="logit_bias" in plan.needs
    )
    evaluator = _evaluator(args, accelerator, tokenizer, preprocess_val)
    if listing is None:
        return _evaluate_only(args, accelerator, model, evaluator, checkpoint)
    loss = plan.build(id_space, accelerator.process_index, accelerator.num_processes).to(accelerator.device)
    _seed(args.seed + accelerator.process_index)
    stream = StreamConfig(
        listing=listing,
        batch_size=args.batch_size,
        image_transform=preprocess_train,
        tokenizer=tokenizer,
        sample_id=args.sample_id if "sample_ids" in plan.needs else None,
        resampled=args.dataset_resampled,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    loader = train_loader(
        stream,
        num_samples=args.train_num_samples or listing.length,
        workers=args.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    if "logit_bias" not in plan.needs and getattr(model, "logit_bias", None) is not None:
        model.logit_bias.requires_grad_(False)  # without a gradient DDP would wait for it forever
    optimizer = _host.create_optimizer(args, model, loss.parameters())
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    remarks = []
    if checkpoint:
        remarks = checkpoint.restore(
            model=model, optimizer=optimizer, scaler=accelerator.scaler, loss=loss, model_name=args.model
        )
    steps_per_epoch = loader.num_batches // args.accum_freq
    if steps_per_epoch == 0:
        raise UserError(
            f"--accum-freq {args.accum_freq}: an epoch has only {loader.num_batches} batches of "
            f"{args.batch_size} x {accelerator.num_processes}; use a smaller --accum-freq or --batch-size"
        )
    schedule = None if args.skip_scheduler else _host.create_schedule(args, optimizer, steps_per_epoch)
    trainer = Trainer(
        accelerator=accelerator,
        model=_compiled(prepared_model) if args.torchcompile else prepared_model,
        loss=loss,
        optimizer=prepared_optimizer,
        schedule=schedule,
        loader=loader,
        input_dtype=_host.input_dtype(args.precision),
        accum_freq=args.accum_freq,
        grad_clip_norm=args.grad_clip_norm,
        total_steps=steps_per_epoch * args.epochs,
        sample_ids=HashIds(id_space) if stream.sample_id == "hash" else None,
    )
    return _run(args, trainer, evaluator, folder, checkpoint, remarks)


def _run(args, trainer: Trainer, evaluator: Evaluator, folder, checkpoint: Checkpoint | None, remarks) -> dict:
    """The epochs of a run, with its folder open."""
    accelerator = trainer.accelerator
    main = accelerator.is_main_process
    log_path = _open_folder(args, folder, main)
    start_logging(log_path, console=main, debug=args.debug)
    try:
        _say_start(args, trainer, checkpoint, remarks)
        metrics: dict[str, float] = {}
        start = checkpoint.epoch if checkpoint else 0
        if start >= args.epochs:
            logger.warning("nothing to train: the checkpoint has %d epochs and --epochs is %d", start, args.epochs)
        for epoch in range(start, args.epochs):
            log = EpochLog(
                epoch=epoch,
                steps=trainer.steps_per_epoch,
                samples_per_step=args.batch_size * args.accum_freq * accelerator.num_processes,
                every=args.log_every_n_steps,
                path=os.path.join(folder, "metrics.jsonl") if main and folder else None,
                show=main,
            )
            try:
                skipped = trainer.train_epoch(epoch, log)
            finally:
                log.close()
            report_skips(gather_object(skipped) if accelerator.num_processes > 1 else skipped, epoch)
            if isinstance(trainer.sample_ids, HashIds) and trainer.sample_ids.collisions:
                logger.warning("%d visits to sample ids that another sample holds; raise --sample-id-table",
                               trainer.sample_ids.collisions)  # fmt: skip
            done, last = epoch + 1, epoch + 1 == args.epochs
            if evaluator.due(done, last):
                metrics = _evaluate(evaluator, trainer.unwrapped, done, last, folder, main) or metrics
            if main and folder:
                _save(args, trainer, folder, done, last)
            accelerator.wait_for_everyone()
        return metrics
    finally:
        stop_logging()


def _id_space(args, plan: ObjectivePlan, listing: ShardListing) -> int:
    """How many sample ids there are: N of the loss.

    Raises:
        UserError: the number of samples, or of ids where the loss needs them, cannot be known.
    """
    index = "openclip-ext shards index " + (os.path.dirname(listing.urls[0]) or ".")
    if args.train_num_samples is None and listing.length is None:
        raise UserError(
            f"--train-data {args.train_data}: the number of samples is not known; write sizes.json with: {index}, "
            "or give --train-num-samples"
        )
    if "sample_ids" not in plan.needs:
        return listing.length or args.train_num_samples
    if args.sample_id == "hash":
        return args.sample_id_table or 4 * (listing.length or args.train_num_samples)
    if listing.sizes is None:
        raise UserError(
            f"--loss {args.loss}: needs sample ids, and {args.train_data} has no sizes.json to number samples by; "
            f"write it with: {index}, or use --sample-id hash"
        )
    return listing.length


def _require_sizes(listing: ShardListing) -> None:
    for report in check_shards(listing, decode=False):
        if report.faults or report.expected is None:
            fault = ", ".join(report.faults) or "not in sizes.json"
            raise UserError(
                f"--check-shards: {report.url} holds {report.samples} samples, sizes.json says {report.expected} "
                f"({fault}); write it anew with: openclip-ext shards index {os.path.dirname(report.url) or '.'}"
            )


def _accelerator(args) -> Accelerator:
    """Device, processes and precision as the flags say. Turns the default fp16 off where there is no GPU."""
    cpu = args.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if cpu and args.precision in ("fp16", "pure_fp16"):
        raise UserError(f"--precision {args.precision}: needs a GPU; use fp32 or amp_bf16 on CPU")
    if cpu and args.precision == "amp":
        args.precision = "fp32"
    if torch.cuda.is_available() and not cpu:
        torch.backends.cuda.matmul.allow_tf32 = True  # as OpenCLIP does
        torch.backends.cudnn.benchmark = True
    return Accelerator(
        cpu=cpu,
        mixed_precision=_MIXED.get(args.precision, "no"),
        # Nothing here is divided by accumulation steps: the loop accumulates inside one backward call.
        gradient_accumulation_steps=1,
        kwargs_handlers=[DistributedDataParallelKwargs(static_graph=args.ddp_static_graph)],
    )


def _run_folder(args, accelerator: Accelerator) -> str | None:
    """The folder of this run, None with `--logs none`. Not made yet.

    Raises:
        UserError: it exists already.
    """
    if not args.logs or args.logs.lower() == "none":
        return None
    if args.name is None:
        stamp = datetime.datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
        (stamp,) = broadcast_object_list([stamp]) if accelerator.num_processes > 1 else (stamp,)
        model = args.model.replace("/", "-").replace(":", "-")
        args.name = f"{stamp}-model_{model}-loss_{args.loss}-lr_{args.lr}-b_{args.batch_size}-p_{args.precision}"
    folder = os.path.join(args.logs, args.name)
    if os.path.exists(os.path.join(folder, "out.log")) and args.resume is None:
        raise UserError(f"--name {args.name}: {folder} holds a run already; use another --name, or --resume latest")
    return folder


def _checkpoint(args, folder: str | None) -> Checkpoint | None:
    if args.resume is None:
        return None
    path = args.resume
    if path == "latest":
        path = latest_checkpoint(os.path.join(folder, "checkpoints"), args.save_most_recent) if folder else None
    return load_checkpoint(path) if path else None


def _open_folder(args, folder: str | None, main: bool) -> str | None:
    """Make the run's folder and write its flags; returns the path of its log file."""
    if not main or folder is None:
        return None
    os.makedirs(os.path.join(folder, "checkpoints"), exist_ok=True)
    with open(os.path.join(folder, "params.txt"), "w") as file:
        packages = ("openclip-ext", "open_clip_torch", "torch", "accelerate", "webdataset", "timm")
        values = {name: version(name) for name in packages} | vars(args)
        file.writelines(f"{name}: {value}\n" for name, value in sorted(values.items()))
    return os.path.join(folder, "out.log")


def _say_start(args, trainer: Trainer, checkpoint: Checkpoint | None, remarks: list[str]) -> None:
    accelerator, loader = trainer.accelerator, trainer.loader
    parameters = sum(p.numel() for p in trainer.unwrapped.parameters())
    logger.info(
        "%s, %.1f M parameters; loss %s; %d process(es) on %s, precision %s",
        args.model, parameters / 1e6, args.loss, accelerator.num_processes, accelerator.device.type, args.precision,
    )  # fmt: skip
    logger.info(
        "%d shards; %d steps of %d pairs per epoch, %d epochs",
        len(loader.stream.config.listing.urls), trainer.steps_per_epoch,
        args.batch_size * args.accum_freq * accelerator.num_processes, args.epochs,
    )  # fmt: skip
    if checkpoint:
        logger.info("resumed from %s after epoch %d", checkpoint.path, checkpoint.epoch)
        for remark in remarks:
            logger.warning("%s: %s", checkpoint.path, remark)


def _evaluator(args, accelerator: Accelerator, tokenizer, preprocess_val) -> Evaluator:
    pairs = None
    if args.val_data:
        config = StreamConfig(
            listing=list_shards(args.val_data, flag="--val-data"),
            batch_size=args.batch_size,
            image_transform=preprocess_val,
            tokenizer=tokenizer,
        )
        pairs = eval_loader(config, workers=args.workers)
    imagenet = {}
    for flag, path, prefix in (
        ("--imagenet-val", args.imagenet_val, "imagenet-zeroshot-val"),
        ("--imagenet-v2", args.imagenet_v2, "imagenetv2-zeroshot-val"),
    ):
        if path:
            imagenet[prefix] = imagenet_loader(
                path, preprocess_val, flag=flag, batch_size=args.batch_size, workers=args.workers
            )
    return Evaluator(
        tokenizer=tokenizer,
        device=accelerator.device,
        autocast=accelerator.autocast,
        dtype=_host.input_dtype(args.precision),
        pairs=pairs,
        imagenet=imagenet,
        val_frequency=args.val_frequency,
        zeroshot_frequency=args.zeroshot_frequency,
        progress=accelerator.is_main_process,
    )


def _evaluate_only(args, accelerator, model, evaluator: Evaluator, checkpoint: Checkpoint | None) -> dict[str, float]:
    """Without training data: score the model, as OpenCLIP does."""
    if checkpoint:
        weights = checkpoint.content.get("state_dict", checkpoint.content)
        _host.load_model_weights(model, weights, checkpoint.path, args.model)
    start_logging(None, console=accelerator.is_main_process, debug=args.debug)
    try:
        epoch = checkpoint.epoch if checkpoint else 0
        return _evaluate(evaluator, model, epoch, True, None, accelerator.is_main_process) or {}
    finally:
        stop_logging()


def _evaluate(evaluator: Evaluator, model, epoch: int, last: bool, folder: str | None, main: bool) -> dict | None:
    """Metrics on the first rank, None on the others."""
    if not main:
        return None
    metrics = evaluator.evaluate(model, epoch, last)
    shown = {name: value for name, value in metrics.items() if name.endswith(("R@1", "-top1", "clip_val_loss"))}
    logger.info("after epoch %d: %s", epoch, "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    if folder:
        append_json(os.path.join(folder, "checkpoints", "results.jsonl"), {"epoch": epoch, **metrics})
    return metrics


def _save(args, trainer: Trainer, folder: str, epoch: int, last: bool) -> None:
    """Write the checkpoints that `--save-frequency`, `--save-most-recent` and `--delete-previous-checkpoint` ask for."""
    checkpoints = os.path.join(folder, "checkpoints")
    targets = []
    if last or (args.save_frequency > 0 and epoch % args.save_frequency == 0):
        targets.append(f"epoch_{epoch}.pt")
    if args.save_most_recent:
        targets.append(LATEST)
    for target in targets:
        save_checkpoint(
            os.path.join(checkpoints, target),
            epoch=epoch,
            name=args.name,
            model=trainer.unwrapped,
            optimizer=trainer.optimizer,
            scaler=trainer.accelerator.scaler,
            loss=trainer.loss,
            distributed=trainer.accelerator.num_processes > 1,
        )
    previous = os.path.join(checkpoints, f"epoch_{epoch - 1}.pt")
    if args.delete_previous_checkpoint and targets and os.path.exists(previous):
        os.remove(previous)


def _compiled(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(model)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
