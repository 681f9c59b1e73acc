"""What to measure between epochs, as flags name it."""

import argparse

from accelerate import Accelerator

from openclip_ext import upstream
from openclip_ext.data.captions import require_caption_key
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.data.table import csv_table
from openclip_ext.evaluation.datasets.imagenet import imagenet_folder
from openclip_ext.evaluation.datasets.labelled import LabelledBatches
from openclip_ext.evaluation.datasets.probe_sets import probe_data
from openclip_ext.evaluation.during_training import Evaluator, ZeroShotSet
from openclip_ext.evaluation.ranks import Ranks
from openclip_ext.training.data import _dataset_type, caption_format


def make_evaluator(args: argparse.Namespace, accelerator: Accelerator, tokenizer, transform) -> Evaluator:
    """What `--val-data`, `--imagenet-val`, `--imagenet-v2` and `--probe-val` ask for.

    Raises:
        UserError: a path that does not fit.
    """
    ranks = Ranks(accelerator.process_index, accelerator.num_processes)
    loading = {"batch_size": args.batch_size, "workers": args.workers, "ranks": ranks}
    pairs = None
    if args.val_data:
        if _dataset_type(args.val_data, args.dataset_type, "--val-data") == "csv":
            source = csv_table(args.val_data, args.csv_img_key, args.csv_caption_key, args.csv_separator)
        else:
            source = list_shards(args.val_data, flag="--val-data")
            require_caption_key(source.urls, args.caption_key)
        config = StreamConfig(
            source=source,
            batch_size=args.batch_size,
            image_transform=transform,
            tokenizer=tokenizer,
            captions=caption_format(args),
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        pairs = eval_loader(config, workers=args.workers)
    zero_shot = []
    for flag, path, prefix in (
        ("--imagenet-val", args.imagenet_val, "imagenet-zeroshot-val"),
        ("--imagenet-v2", args.imagenet_v2, "imagenetv2-zeroshot-val"),
    ):
        if path:
            labelled = imagenet_folder(path, flag)
            batches = LabelledBatches(labelled.pictures, transform, **loading)
            zero_shot.append(ZeroShotSet(prefix, batches, labelled.class_names, labelled.templates))
    probe = None
    if args.probe_train:
        probe = probe_data(args.probe_train, args.probe_val, transform, **loading)
    return Evaluator(
        tokenizer=tokenizer,
        device=accelerator.device,
        autocast=accelerator.autocast,
        dtype=upstream.input_dtype(args.precision),
        pairs=pairs,
        zero_shot=zero_shot,
        probe=probe,
        ranks=ranks,
        val_frequency=args.val_frequency,
        zeroshot_frequency=args.zeroshot_frequency,
        progress=accelerator.is_main_process,
    )
