"""What to measure between epochs, as flags name it."""

from accelerate import Accelerator

from openclip_ext import upstream
from openclip_ext.data.listing import list_shards
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.data.table import csv_table
from openclip_ext.evaluation.datasets.imagenet import imagenet_folder
from openclip_ext.evaluation.datasets.labelled import LabelledBatches
from openclip_ext.evaluation.datasets.probe_sets import probe_data
from openclip_ext.evaluation.during_training import Evaluator
from openclip_ext.evaluation.ranks import Ranks
from openclip_ext.training.config import RunConfig
from openclip_ext.training.data import _dataset_type, caption_format


def make_evaluator(config: RunConfig, accelerator: Accelerator, tokenizer, transform) -> Evaluator:
    """What `--val-data`, `--imagenet-val`, `--imagenet-v2` and `--probe-val` ask for.

    Raises:
        UserError: a path that does not fit.
    """
    ranks = Ranks(accelerator.process_index, accelerator.num_processes)
    loading = {"batch_size": config.batch_size, "workers": config.workers, "ranks": ranks}
    pairs = None
    if config.val_data:
        if _dataset_type(config.val_data, config.dataset_type, "--val-data") == "csv":
            source = csv_table(config.val_data, config.csv_img_key, config.csv_caption_key, config.csv_separator)
        else:
            source = list_shards(config.val_data, flag="--val-data")
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
    imagenet = {}
    for flag, path, prefix in (
        ("--imagenet-val", config.imagenet_val, "imagenet-zeroshot-val"),
        ("--imagenet-v2", config.imagenet_v2, "imagenetv2-zeroshot-val"),
    ):
        if path:
            pictures = imagenet_folder(path, flag).pictures
            imagenet[prefix] = LabelledBatches(pictures, transform, **loading)
    probe = None
    if config.probe_train:
        probe = probe_data(config.probe_train, config.probe_val, transform, **loading)
    return Evaluator(
        tokenizer=tokenizer,
        device=accelerator.device,
        autocast=accelerator.autocast,
        dtype=upstream.input_dtype(config.precision),
        pairs=pairs,
        imagenet=imagenet,
        probe=probe,
        ranks=ranks,
        val_frequency=config.val_frequency,
        zeroshot_frequency=config.zeroshot_frequency,
        progress=accelerator.is_main_process,
    )
