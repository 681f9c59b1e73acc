"""From a model, a loss and data to a `Trainer` that can take its first step."""

import random
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from openclip_ext import upstream
from openclip_ext.data.hash_ids import HashIds
from openclip_ext.data.pipeline import TrainLoader, train_loader
from openclip_ext.data.streams import Start, StreamConfig
from openclip_ext.errors import UserError, counted
from openclip_ext.losses import LossContext, Vocabulary
from openclip_ext.ops.pairs import least_bytes
from openclip_ext.state.table import NoRoomError, describe_parts, require_room
from openclip_ext.training import sharding
from openclip_ext.training.average import WeightAverage
from openclip_ext.training.clock import Clock, start_of
from openclip_ext.training.config import RunConfig
from openclip_ext.training.data import TrainingData, row_format
from openclip_ext.training.faults import Faults
from openclip_ext.training.fusion import Fusion
from openclip_ext.training.image_only import SymmetricObjective, ViewsModel
from openclip_ext.training.learning_rates import describe, scale_learning_rates, scaled
from openclip_ext.training.loop import Trainer
from openclip_ext.training.lora import Adapters
from openclip_ext.training.pair_model import feature_widths, freeze_unused_bias, pair_model
from openclip_ext.training.parts import require_support


def build_trainer(
    config: RunConfig,
    accelerator: Accelerator,
    plan,
    data: TrainingData,
    model,
    transform,
    tokenizer,
    checkpoint,
    fusion: Fusion | None = None,
) -> tuple[Trainer, list[str]]:
    """The prepared parts of training, restored from the checkpoint if there is one, and remarks for the log."""
    model, adapters = _to_train(config, accelerator, plan, model, checkpoint)
    vocabulary = None
    if fusion or "vocabulary" in plan.needs:
        vocabulary = Vocabulary(*upstream.read_vocabulary(tokenizer), mask_id=upstream.find_mask_id(tokenizer))
    paired = _paired(config, plan, model, fusion, vocabulary)
    _require_room(config, accelerator, upstream.embedding_width(model))
    loss = _objective(config, accelerator, plan, data, paired, fusion, vocabulary, tokenizer)
    seed_all(config.seed + accelerator.process_index)
    time = checkpoint.content.get("clock") if checkpoint else None
    loader = _loader(config, accelerator, plan, data, transform, tokenizer, start_of(time))
    clock = Clock(
        loader, accelerator, accum_freq=config.accum_freq, epochs=config.epochs, seed=config.seed,
        epoch=checkpoint.epoch if checkpoint else 0,
    )  # fmt: skip
    optimizer = upstream.create_optimizer(config.flags, model)
    scale_learning_rates(config, model, optimizer)
    loss_parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    prepared_model, prepared_optimizer = sharding.prepare(accelerator, paired, optimizer, loss_parameters)
    trainer = Trainer(
        accelerator=accelerator,
        module=model,
        paired=paired,
        model=cast(nn.Module, torch.compile(prepared_model)) if config.torchcompile else prepared_model,
        loss=loss,
        optimizer=prepared_optimizer,
        schedule=_schedule(config, optimizer, clock.steps_per_epoch),
        loader=loader,
        input_dtype=upstream.input_dtype(config.precision),
        accum_freq=config.accum_freq,
        grad_clip_norm=config.grad_clip_norm,
        clock=clock,
        faults=_faults(config, accelerator, data, loader),
        teacher=upstream.create_teacher(config.flags, accelerator.device) if config.distill_model else None,
        hash_ids=HashIds(data.num_ids) if data.sample_id == "hash" else None,
        momentum_encoder=getattr(paired, "momentum_encoder", None),
        average=None if config.ema is None else WeightAverage(model, config.ema),
        adapters=adapters,
    )
    remarks = [
        f"the {modality} tower has no output before its projection: its projected features stand in for trunk features"
        for modality in getattr(paired, "projected", [])
    ]
    remarks += _warmup_remarks(config, clock.total_steps)
    resumed = [*loader.remarks, *(_restore(trainer, checkpoint, optimizer, data) if checkpoint else [])]
    return trainer, remarks + [f"--resume {config.resume}: {remark}" for remark in resumed]


def _restore(trainer: Trainer, checkpoint, optimizer, data: TrainingData) -> list[str]:
    """Bring everything but the model to where it was; returns remarks for the log.

    Args:
        trainer: built, and not yet used.
        checkpoint: to go on from.
        optimizer: as it was before it was prepared.
        data: says how samples are told apart.
    """
    remarks = checkpoint.restore(
        optimizer=optimizer,
        scaler=trainer.accelerator.scaler,
        loss=trainer.loss,
        momentum_encoder=trainer.momentum_encoder,
        average=trainer.average,
    )
    checkpoint.restore_ids(data.sample_id, trainer.hash_ids)
    if time := checkpoint.content.get("clock"):
        trainer.restore_time(time)
    return remarks


def _faults(config: RunConfig, accelerator: Accelerator, data: TrainingData, loader: TrainLoader) -> Faults:
    return Faults(
        source=data.source,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        samples=loader.num_samples,
        max_skipped=config.max_skipped,
        max_bad=config.max_bad,
    )


def _to_train(
    config: RunConfig, accelerator: Accelerator, plan, model, checkpoint
) -> tuple[torch.nn.Module, Adapters | None]:
    """The model with the checkpoint's weights, and its adapters if it has some; neither copied nor sharded yet."""
    freeze_unused_bias(model, plan.needs)
    if config.use_bn_sync and accelerator.num_processes > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.pairs == "views":
        upstream.freeze_text(model)  # so that it gets no adapters
    if checkpoint:
        checkpoint.restore_model(model, config.model)
    adapters = Adapters(model, config.lora) if config.lora else None
    if checkpoint:
        checkpoint.restore_adapters(adapters)
    return model, adapters


def _schedule(config: RunConfig, optimizer, steps_per_epoch: int) -> Callable[[int], float] | None:
    if config.skip_scheduler:
        return None
    schedule = upstream.create_schedule(config.flags, optimizer, steps_per_epoch)
    return scaled(schedule, optimizer) if describe(optimizer) else schedule


def _warmup_remarks(config: RunConfig, total_steps: int) -> list[str]:
    """OpenCLIP's default warm-up is longer than many a fine-tuning, which then learns next to nothing."""
    warmup = config.flags.warmup
    if config.skip_scheduler or warmup < total_steps:
        return []
    return [
        f"--warmup {warmup}: the run has {counted(total_steps, 'step')}, so its learning rate rises to "
        f"{config.lr * total_steps / warmup:.2g} and no further; for --lr {config.lr:g} give fewer, such as --warmup "
        f"{max(1, total_steps // 10)}"
    ]


def _require_room(config: RunConfig, accelerator: Accelerator, width: int) -> None:
    """Raises UserError: the loss alone takes more memory than there is, however narrow its tiles."""
    ranks, own = accelerator.num_processes, config.batch_size * config.accum_freq
    needed = least_bytes(own, ranks, width, tile=config.loss_tile, ring=config.loss_comm == "ring")
    try:
        require_room(needed, accelerator.device, f"loss of {counted(own * ranks, 'pair')} a step")
    except NoRoomError as error:
        accumulated = f" --accum-freq {config.accum_freq}" if config.accum_freq > 1 else ""
        narrower = "" if config.loss_tile is None else f", or a --loss-tile below {config.loss_tile}"
        raise UserError(f"--batch-size {config.batch_size}{accumulated}: {error}; use fewer pairs{narrower}") from error


def _paired(config: RunConfig, plan, model, fusion: Fusion | None, vocabulary: Vocabulary | None) -> nn.Module:
    """The model as the loss needs it."""
    if fusion:
        assert vocabulary is not None
        return fusion.model(model, vocabulary, trunk_features="trunk_features" in plan.needs)
    return ViewsModel(model, config.momentum_encoder) if config.pairs == "views" else pair_model(model, plan.needs)


def _objective(
    config: RunConfig, accelerator: Accelerator, plan, data: TrainingData, paired, fusion: Fusion | None,
    vocabulary: Vocabulary | None, tokenizer,
):  # fmt: skip
    """The loss on the device, with room for the data's ids, for the model `paired`."""
    symmetric = config.momentum_encoder is not None
    widths = None
    if symmetric or "widths" in plan.needs:
        widths = feature_widths(paired, upstream.input_dtype(config.precision))
    context = LossContext(
        num_samples=data.size,
        num_ids=data.num_ids,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        widths=widths,
        vocabulary=vocabulary,
        loss_tile=config.loss_tile,
        loss_comm=config.loss_comm,
        shards_state=True,
    )
    if fusion:
        loss = fusion.objective(plan, context, paired, accelerator.autocast, tokenizer).to(accelerator.device)
    elif symmetric:
        loss = SymmetricObjective(plan, context).to(accelerator.device)
    else:
        loss = plan.build(context)
    if describe_parts(loss):
        require_support()
    return loss


def _loader(
    config: RunConfig, accelerator: Accelerator, plan, data: TrainingData, transform, tokenizer, start: Start | None
) -> TrainLoader:
    """Batches of this rank. Raises UserError: an epoch has fewer than an optimizer step takes."""
    stream = StreamConfig(
        source=data.source,
        batch_size=config.batch_size,
        sample_id=data.sample_id,
        resampled=config.dataset_resampled,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        **row_format(config, plan, transform, tokenizer),
    )
    pin_memory = accelerator.device.type == "cuda"
    loader = train_loader(
        stream, num_samples=data.num_samples, workers=config.workers, pin_memory=pin_memory, start=start
    )
    if loader.num_batches < config.accum_freq:
        raise UserError(
            f"--accum-freq {config.accum_freq}: an epoch has only {loader.num_batches} batches of "
            f"{config.batch_size} x {accelerator.num_processes}; use a smaller --accum-freq or --batch-size"
        )
    return loader


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
