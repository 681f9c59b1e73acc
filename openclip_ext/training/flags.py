"""Flags of `openclip-ext train`: OpenCLIP's own, plus ours. Imports no torch."""

import argparse
import os
from collections.abc import Sequence

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.evaluation.tasks.zero_shot import (
    add_classes_argument,
    add_labelled_arguments,
    require_words_have_a_set,
)
from openclip_ext.fusion.config import ANSWERING, TASKS
from openclip_ext.options import Parser, require_use
from openclip_ext.training.config import RunConfig, run_config
from openclip_ext.training.fault_flags import add_fault_flags, require_fault_limits
from openclip_ext.training.keep_flags import add_keep_flags, require_keep_limits

#: The least that numbers may be.
_AT_LEAST = {
    1: ("batch_size", "accum_freq", "epochs", "log_every_n_steps", "recent_check"),
    0: ("recent_batches", "lr", "wd", "warmup", "eps", "workers", "grad_clip_norm", "epochs_cooldown",
        "lr_cooldown_end"),
}  # fmt: skip

#: What flags have a use with; see `require_use`. That of `--view-aug` depends on the loss: `training_data`.
_USED_WITH = {"classes": ("imagenet_val", "imagenet_v2"), "sample_id_table": ("sample_id=hash",)}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="openclip-ext train",
        parents=[upstream.build_parser()],
        conflict_handler="resolve",
        allow_abbrev=False,
        description="Train or fine-tune a CLIP model with any registered loss. OpenCLIP's flags, then ours.",
    )
    ours = parser.add_argument_group("added by openclip-ext")
    ours.add_argument("--loss", help="Name of a registered loss; see openclip-ext losses. Default: clip.")
    ours.add_argument(
        "--loss-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="An option of the loss, such as gamma=0.5; repeatable. See openclip-ext losses NAME.",
    )
    ours.add_argument(
        "--loss-term",
        action="append",
        default=[],
        metavar="NAME=WEIGHT[,KEY=VALUE…]",
        help="A registered term to add to the loss; repeatable. WEIGHT is a number, or a line over training: 0:0.5, or "
        "0:0.5@0.2 over its first fifth.",
    )
    ours.add_argument(
        "--model-config", metavar="FILE", help="An OpenCLIP model config in JSON; --model is its file's name."
    )
    add_keep_flags(ours)
    add_fault_flags(ours)
    _add_data_flags(ours)
    _add_image_flags(ours)
    zero_shot = parser.add_argument_group("added by openclip-ext for evaluation every --zeroshot-frequency epochs")
    add_labelled_arguments(zero_shot)
    add_classes_argument(zero_shot, "--imagenet-val and --imagenet-v2 must have all")
    _add_tuning_flags(parser.add_argument_group("added by openclip-ext for fine-tuning"))
    _add_fusion_flags(parser.add_argument_group("added by openclip-ext for fusion models"))
    return parser


def _add_data_flags(ours) -> None:
    ours.add_argument(
        "--train-data",
        metavar="DATA",
        help="What to train on: shards or folders of them, with braces or stars, a sizes.json for all shards it names, "
        "or several of these joined by ::; or a CSV. Names that begin with pipe: are commands that are run, those in a "
        "sizes.json too: use only one that you trust.",
    )
    ours.add_argument(
        "--recent-batches",
        type=int,
        metavar="K",
        help="Let the pairs of up to K recent steps join the batch, as far as the model has not moved away from them, "
        "which is measured; as --loss-arg recent_batches=K.",
    )
    ours.add_argument(
        "--recent-check", type=int, metavar="STEPS", help="Steps between two measurements of that; as --loss-arg."
    )
    ours.add_argument(
        "--recent-limit", type=float, metavar="SHARE",
        help="Largest error of scores, over their spread, with which recent pairs may join; as --loss-arg.",
    )  # fmt: skip
    ours.add_argument(
        "--loss-tile", type=int, metavar="COLUMNS",
        help="Form scores of a process's pairs with so many columns at once. Default: by the batch, some 4 MiB of them "
        "on a CPU and 256 MiB on a GPU.",
    )  # fmt: skip
    ours.add_argument(
        "--loss-comm", choices=["gather", "ring"], default="gather",
        help="How features of several processes meet: each process gathers those of all, or they pass from one to the "
        "next while their scores are formed, twice a step (ring): for batches whose features take much memory.",
    )  # fmt: skip
    ours.add_argument(
        "--sample-id",
        choices=["index", "hash"],
        default="index",
        help="Identify a sample by its position in the shards (needs sizes.json), or by its key (hash), for streams "
        "without that: keys must differ, ids are given in the order in which samples come. Takes 14 bytes of memory "
        "per sample and process, and 8 in checkpoints.",
    )
    ours.add_argument(
        "--sample-id-table",
        type=int,
        metavar="N",
        help="How many different samples --sample-id hash has room for; further ones share the ids of others. The "
        "loss's memory has as many rows. Default: the number of samples.",
    )
    ours.add_argument(
        "--check-shards",
        action="store_true",
        help="Count the samples of all shards before the first step; any difference from sizes.json is an error.",
    )
    ours.add_argument(
        "--caption-separator",
        metavar="TEXT",
        help="Splits a caption into several, one of which is drawn each time; a second view is another of them.",
    )
    ours.add_argument(
        "--caption-key",
        metavar="KEY",
        help="Where a sample's JSON holds its caption or captions. Default: where sizes.json says, else its text.",
    )


def _add_image_flags(ours) -> None:
    ours.add_argument(
        "--pairs",
        choices=["captions", "views"],
        default="captions",
        help="What an image is paired with: its caption, or a second view of itself: image-only training, which needs "
        "no captions and leaves the text tower as it is.",
    )
    ours.add_argument(
        "--momentum-encoder",
        type=float,
        metavar="M",
        help="With --pairs views: match features, through a predictor, with those of an average of the image tower "
        "over its steps, which keeps the share M of itself in each, such as 0.99.",
    )
    ours.add_argument(
        "--view-aug",
        choices=["standard", "auto"],
        default="standard",
        help="Second view of an image, where one is needed: the training augmentation again, or AutoAugment first.",
    )
    for name, purpose in (("train", "fitted on"), ("val", "measured on")):
        ours.add_argument(
            f"--probe-{name}",
            metavar="FOLDER",
            help=f"Images in one folder per class that nearest neighbours and a linear probe on the image tower are "
            f"{purpose}, every --val-frequency epochs.",
        )


def _add_tuning_flags(tuning) -> None:
    tuning.add_argument(
        "--layer-decay",
        type=float,
        metavar="X",
        help="Multiply the learning rate by X for each layer further from a tower's head, such as 0.75; both towers.",
    )
    for tower, alias in (("image", "visual"), ("text", None)):
        for what, meaning in (
            ("lr", f"Learning rate of the {tower} tower, on the schedule of --lr, where it is to differ."),
            ("layer-decay", f"--layer-decay of the {tower} tower, where it is to differ."),
        ):
            names = [f"--{name}-{what}" for name in (tower, alias) if name]
            dest = names[0].removeprefix("--").replace("-", "_")
            tuning.add_argument(*names, dest=dest, type=float, metavar="X", help=meaning)
    tuning.add_argument(
        "--lora",
        metavar="r=16[,alpha=32][,dropout=0][,targets=A+B]",
        help="Train a low-rank change of the towers' attention and MLP layers and nothing else but the logit scale; "
        "needs peft. Checkpoints hold merged weights.",
    )
    tuning.add_argument(
        "--ema",
        type=float,
        metavar="DECAY",
        help="Keep an exponential average of the weights, such as 0.999; it is evaluated beside them, and kept in "
        "checkpoints as state_dict_ema.",
    )
    tuning.add_argument(
        "--warm-start-pass",
        action="store_true",
        help="Before the first step, run over an epoch of the data without gradient and fill the memory of the loss.",
    )


def _add_fusion_flags(fusion) -> None:
    fusion.add_argument(
        "--fusion",
        metavar="CONFIG",
        help="Train cross-attention over the towers' tokens with them (ALBEF): a JSON file with its options, such as "
        '{"layers": 6}; or a run or checkpoint of such a model, to start from it.',
    )
    fusion.add_argument(
        "--task",
        choices=TASKS,
        help="Fine-tune for it: visual question answering, NLVR2's statements on two images, SNLI-VE's entailment, "
        "retrieval, or assign: which of two images a caption is of, the stage before nlvr2. --train-data is then the "
        "published file of questions or statements; of retrieval and assign, pairs.",
    )
    fusion.add_argument(
        "--task-images", metavar="FOLDER", help="Pictures of the questions. Default: images beside their file."
    )
    fusion.add_argument(
        "--answers", metavar="FILE",
        help="With --task vqa: a JSON list of the answers there are. Default: the 3,128 most frequent of the data.",
    )  # fmt: skip


def parse_args(argv: Sequence[str]) -> RunConfig:
    """What a command line asks for, checked as far as that needs nothing but the command line.

    Raises:
        UserError: an unknown flag, a wrong value, or flags that exclude each other.
    """
    parser = build_parser()
    flags = upstream.Flags(vars(parser.parse_args(argv)))
    upstream.require_supported(flags)
    given = _given(parser, argv)
    flags = flags.replace(**_inferred_names(flags, given))
    if "csv_separator" not in given:
        flags = flags.replace(csv_separator=None)  # OpenCLIP's default is a tab, whatever the file has
    flags = flags.replace(**upstream.optimizer_defaults(flags))
    if flags.lr is None:
        raise UserError("--lr: give a learning rate with a timm optimizer")
    config = run_config(flags, given)
    _require_data(config)
    _require_numbers(flags)
    require_fault_limits(config.rank_timeout, config.max_skipped, config.max_bad)
    if config.ddp_static_graph and config.accum_freq > 1:
        raise UserError("--ddp-static-graph: cannot be combined with --accum-freq; drop one")
    require_keep_limits(config)
    _require_views_agree(config)
    _require_fusion_agrees(config)
    if bool(config.probe_train) != bool(config.probe_val):
        raise UserError("--probe-train, --probe-val: give both or neither")
    require_use(flags, given, _USED_WITH)
    require_words_have_a_set(config.zero_shot, config.class_names, config.templates)
    if config.save_best and not (config.logs_folder and (config.train_data or config.dataset_type == "synthetic")):
        raise UserError(f"--save-best {config.save_best}: needs --train-data, and a folder in --logs to keep it in")
    known = {"", "all", "tensorboard", "wandb"}
    if not set(config.report_to.replace(" ", "").split(",")) <= known:
        raise UserError(f"--report-to {config.report_to}: use tensorboard, wandb, or both joined by a comma")
    if config.resume == "latest" and not (config.name and config.logs_folder):
        raise UserError("--resume latest: name the run with --name, and its folder with --logs")
    _require_tuning_makes_sense(config)
    return config


def _require_numbers(flags: upstream.Flags) -> None:
    """Raises UserError: a number is too small or too large."""
    for least, names in _AT_LEAST.items():
        for name in names:
            value = getattr(flags, name)
            if value is not None and not value >= least:  # nor is "nan"
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name in ("beta1", "beta2"):
        value = getattr(flags, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"--{name} {value}: must be in [0, 1), such as 0.9")


def _given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """Names of the flags that are on the command line."""
    words = {part.partition("=")[0] for part in argv}
    return {action.dest for action in parser._actions if words & set(action.option_strings)}


def _inferred_names(flags: upstream.Flags, given: set[str]) -> dict[str, str]:
    """`--model` of weights that bring their own, or of a config's file; and the loss."""
    if flags.siglip and flags.loss not in (None, "siglip"):
        raise UserError(f"--siglip --loss {flags.loss}: these exclude each other; drop one")
    names = {"loss": flags.loss or ("siglip" if flags.siglip else "clip")}
    if "model" in given:
        return names
    if (flags.pretrained or "").startswith(upstream.SCHEMES):
        return names | {"model": flags.pretrained, "pretrained": ""}
    if flags.model_config:
        return names | {"model": os.path.splitext(os.path.basename(flags.model_config))[0]}
    return names


def _require_data(config: RunConfig) -> None:
    """Raises UserError: neither training nor evaluation data, or a flag about data that has no meaning."""
    to_measure = (config.val_data, config.imagenet_val, config.imagenet_v2, config.zero_shot, config.probe_train)
    if config.dataset_type != "synthetic" and not config.train_data and not any(to_measure):
        raise UserError("--train-data: give the shards to train on, such as --train-data 'shards/{000..331}.tar'")
    if config.caption_separator == "":
        raise UserError("--caption-separator: must not be empty")
    if config.train_data_upsampling_factors and not config.dataset_resampled:
        raise UserError("--train-data-upsampling-factors: needs --dataset-resampled")


def _require_views_agree(config: RunConfig) -> None:
    """Raises UserError: a flag that has no meaning with `--pairs views`, or none without it."""
    momentum = config.momentum_encoder
    if config.pairs == "views":
        for name in ("val_data", "caption_key", "caption_separator", "distill_model"):
            if getattr(config, name):
                flag = f"--{name.replace('_', '-')} {getattr(config, name)}"
                raise UserError(f"{flag}: needs captions, and --pairs views has none; drop one of the two")
    elif momentum is not None:
        raise UserError(f"--momentum-encoder {momentum}: is for training on images alone; add --pairs views")
    if momentum is None:
        return
    if not 0 <= momentum < 1:
        raise UserError(f"--momentum-encoder {momentum}: must be in [0, 1), such as 0.99")
    _require_averages_move(config, "--momentum-encoder")


def _require_fusion_agrees(config: RunConfig) -> None:
    """Raises UserError: a flag that has no meaning with `--fusion` or `--task`, or none without."""
    for name, needed in (("task", "fusion"), ("task_images", "task"), ("answers", "task")):
        if getattr(config, name) and not getattr(config, needed):
            flag = f"--{name.replace('_', '-')} {getattr(config, name)}"
            raise UserError(f"{flag}: is for fusion models; add --{needed}, or drop it")
    if not config.fusion:
        return
    if config.pairs == "views":
        raise UserError(f"--fusion {config.fusion}: needs captions, and --pairs views has none; drop one of the two")
    if config.task in ANSWERING and (config.loss_terms or config.loss_options or "loss" in config.given):
        raise UserError(f"--task {config.task}: is trained by answers alone; drop --loss, --loss-arg and --loss-term")
    _require_averages_move(config, "--fusion")


def _require_averages_move(config: RunConfig, flag: str) -> None:
    if config.precision not in ("fp32", "amp", "amp_bf16", "amp_bfloat16"):
        raise UserError(
            f"--precision {config.precision}: an average of weights in half precision stands still; use amp_bf16 with "
            f"{flag}"
        )


def _require_tuning_makes_sense(config: RunConfig) -> None:
    """Raises UserError: a value of a fine-tuning flag that means nothing."""
    for name in ("layer_decay", "image_layer_decay", "text_layer_decay"):
        decay = getattr(config, name)
        if decay is not None and not 0 < decay <= 1:
            raise UserError(f"--{name.replace('_', '-')} {decay}: must be in (0, 1], such as 0.75")
    for tower in ("image", "text"):
        rate = config.tower_lr(tower)
        if rate is not None and rate <= 0:
            raise UserError(f"--{tower}-lr {rate}: must be above 0; to keep the tower as it is use --lock-{tower}")
        if rate is not None and config.lr <= 0:
            raise UserError(f"--{tower}-lr {rate}: follows the schedule of --lr, which is {config.lr}; use one above 0")
    if config.ema is not None:
        if not 0 <= config.ema < 1:
            raise UserError(f"--ema {config.ema}: must be in [0, 1), such as 0.999")
        _require_averages_move(config, "--ema")
