"""What to measure between epochs, as flags name it, and measuring it."""

import sys
from typing import Any

from accelerate import Accelerator

from openclip_ext import upstream
from openclip_ext.data.captions import require_caption_key
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.data.table import Table, csv_table
from openclip_ext.errors import UserError
from openclip_ext.evaluation.datasets.imagenet import imagenet_folder
from openclip_ext.evaluation.datasets.labelled import LabelledBatches, LabelledShards
from openclip_ext.evaluation.datasets.labelled_sets import labelled_set
from openclip_ext.evaluation.datasets.probe_sets import probe_data
from openclip_ext.evaluation.during_training import (
    PAIR_METRICS,
    PROBE_METRICS,
    ZERO_SHOT_SCORES,
    Evaluator,
    ZeroShotSet,
)
from openclip_ext.evaluation.ranks import ALONE, Ranks
from openclip_ext.evaluation.tasks.zero_shot import set_name
from openclip_ext.training.average import WeightAverage
from openclip_ext.training.checkpoint import Checkpoint
from openclip_ext.training.config import RunConfig
from openclip_ext.training.data import caption_format, dataset_type
from openclip_ext.training.log import logger, report_skips, start_logging, stop_logging

#: By flag: what the metrics' names begin with, as OpenCLIP calls them.
_IMAGENET = {"imagenet_val": "imagenet-zeroshot-val", "imagenet_v2": "imagenetv2-zeroshot-val"}


def metric_names(config: RunConfig) -> list[str]:
    """What will be measured between epochs. Raises UserError: two sets of `--zero-shot` have one name."""
    names = []
    if config.zeroshot_frequency > 0:
        sets = [prefix for dest, prefix in _IMAGENET.items() if getattr(config, dest)]
        sets += [_prefix(path) for path in config.zero_shot]
        if twice := [path for path in config.zero_shot if sets.count(_prefix(path)) > 1]:
            raise UserError(f"--zero-shot {twice[-1]}: another set is called {_prefix(twice[-1])} too; rename a folder")
        names += [f"{name}-{score}" for name in sets for score in ZERO_SHOT_SCORES]
    if config.val_frequency > 0:
        names += PAIR_METRICS if config.val_data else ()
        names += PROBE_METRICS if config.probe_train else ()
    return names if config.ema is None else names + [f"ema-{name}" for name in names]


def _prefix(path: str) -> str:
    return f"{set_name(path)}-zeroshot-val"


def _zero_shot_sets(config: RunConfig, transform, loading: dict[str, Any]) -> list[ZeroShotSet]:
    labelled = {
        prefix: imagenet_folder(path, f"--{dest.replace('_', '-')}", config.classes)
        for dest, prefix in _IMAGENET.items()
        if (path := getattr(config, dest))
    }
    for path in config.zero_shot:
        labelled[_prefix(path)] = labelled_set(path, "--zero-shot", config.class_names, config.templates)
    sets = []
    for name, found in labelled.items():
        shared = not isinstance(found.pictures, LabelledShards)
        batches = LabelledBatches(found.pictures, transform, **loading | ({} if shared else {"ranks": ALONE}))
        sets.append(ZeroShotSet(name, batches, found.class_names, found.templates, shared))
    return sets


def make_evaluator(config: RunConfig, accelerator: Accelerator, tokenizer, transform) -> Evaluator:
    """What `--val-data`, `--imagenet-val`, `--imagenet-v2`, `--zero-shot` and `--probe-val` ask for.

    Raises:
        UserError: a path that does not fit.
    """
    ranks = Ranks(accelerator.process_index, accelerator.num_processes)
    loading: dict[str, Any] = {"batch_size": config.batch_size, "workers": config.workers, "ranks": ranks}
    pairs = None
    if config.val_data:
        source: Table | ShardListing
        if dataset_type(config.val_data, config.dataset_type) == "csv":
            source = csv_table(config.val_data, config.csv_img_key, config.csv_caption_key, config.csv_separator)
        else:
            source = list_shards(config.val_data, flag="--val-data")
            require_caption_key(source.urls, config.caption_key)
        stream = StreamConfig(
            source=source,
            batch_size=config.batch_size,
            image_transform=transform,
            tokenizer=tokenizer,
            captions=caption_format(config),
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        pairs = eval_loader(stream, workers=config.workers)
    probe = None
    if config.probe_train:
        assert config.probe_val is not None  # flags come together
        probe = probe_data(config.probe_train, config.probe_val, transform, **loading)
    return Evaluator(
        tokenizer=tokenizer,
        device=accelerator.device,
        autocast=accelerator.autocast,
        dtype=upstream.input_dtype(config.precision),
        pairs=pairs,
        zero_shot=_zero_shot_sets(config, transform, loading),
        probe=probe,
        ranks=ranks,
        val_frequency=config.val_frequency,
        zeroshot_frequency=config.zeroshot_frequency,
        progress=accelerator.is_main_process and sys.stderr.isatty(),
    )


def evaluate_only(
    config: RunConfig, accelerator, model, evaluator: Evaluator, checkpoint: Checkpoint | None
) -> dict[str, float]:
    """Without training data: score the model, as OpenCLIP does, and with `--ema` the average in the checkpoint."""
    if checkpoint:
        checkpoint.restore_model(model, config.model)
    average = None if config.ema is None else WeightAverage(model, config.ema)
    remarks = checkpoint.restore_average(average) if checkpoint else []
    start_logging(None, console=accelerator.is_main_process, debug=config.debug)
    try:
        for remark in remarks:
            logger.warning("--resume %s: %s", config.resume, remark)
        return evaluate(evaluator, model, checkpoint.epoch if checkpoint else 0, True, average)
    finally:
        stop_logging()


def evaluate(
    evaluator: Evaluator, model, epoch: int, last: bool, average: WeightAverage | None = None
) -> dict[str, float]:
    """Metrics of the model, and with `ema-` before their names those of the average of its weights."""
    metrics = evaluator.evaluate(model, epoch, last)
    report_skips(evaluator.skipped, "validation")
    if average is not None:
        with average.applied():
            metrics |= {f"ema-{name}": value for name, value in evaluator.evaluate(model, epoch, last).items()}
    shown = {name: value for name, value in metrics.items() if name.endswith(("R@1", "-top1", "clip_val_loss"))}
    logger.info("after epoch %d: %s", epoch, "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    return metrics
