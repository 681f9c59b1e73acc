"""Flags of `openclip-ext train`: OpenCLIP's own, plus ours. Imports no torch."""

import argparse
import os
from collections.abc import Sequence

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.options import parse_assignments, parse_terms
from openclip_ext.training.lora import parse_lora

#: OpenCLIP flags that this loop does not take, and what to do instead.
REFUSED = {
    "horovod": "start several processes with accelerate launch or torchrun",
    "trace": "it is for inference; trace the exported checkpoint",
    "torchscript": "use --torchcompile, or script the exported checkpoint",
    "use_bnb_linear": "train without it",
}


class _Parser(argparse.ArgumentParser):
    """Answers a wrong flag in one line, without the usage text of a hundred flags."""

    def error(self, message: str):
        raise UserError(f"{message}; see openclip-ext train --help")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    ours.add_argument(
        "--model-config", metavar="FILE", help="An OpenCLIP model config in JSON; --model is its file's name."
    )
    _add_image_flags(ours)
    _add_tuning_flags(parser.add_argument_group("added by openclip-ext for fine-tuning"))
    return parser


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


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed and checked flags, with `loss_options` and `loss_terms` as dicts.

    Raises:
        UserError: an unknown flag, a wrong value, or flags that exclude each other.
    """
    args = build_parser().parse_args(argv)
    for name, remedy in REFUSED.items():
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: {remedy}")
    if (args.pretrained or "").startswith(upstream.SCHEMES) and not _given("--model", argv):
        args.model, args.pretrained = args.pretrained, ""
    elif args.model_config and not _given("--model", argv):
        args.model = os.path.splitext(os.path.basename(args.model_config))[0]
    args.name_given = args.name is not None
    args.precision_given = _given("--precision", argv)
    if not _given("--csv-separator", argv):
        args.csv_separator = None  # OpenCLIP's default is a tab, whatever the file has
    if args.dataset_type != "synthetic" and not any(
        (args.train_data, args.val_data, args.imagenet_val, args.imagenet_v2, args.probe_train)
    ):
        raise UserError("--train-data: give the shards to train on, such as --train-data 'shards/{000..331}.tar'")
    for name in ("batch_size", "accum_freq", "epochs", "log_every_n_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.ddp_static_graph and args.accum_freq > 1:
        raise UserError("--ddp-static-graph: cannot be combined with --accum-freq; drop one")
    if args.siglip and args.loss not in (None, "siglip"):
        raise UserError(f"--siglip --loss {args.loss}: these exclude each other; drop one")
    args.loss = args.loss or ("siglip" if args.siglip else "clip")
    args.loss_options = parse_assignments(args.loss_arg, "--loss-arg")
    args.loss_terms = parse_terms(args.loss_term)
    _require_views_agree(args)
    if bool(args.probe_train) != bool(args.probe_val):
        raise UserError("--probe-train, --probe-val: give both or neither")
    if args.caption_separator == "":
        raise UserError("--caption-separator: must not be empty")
    if args.train_data_upsampling_factors and not args.dataset_resampled:
        raise UserError("--train-data-upsampling-factors: needs --dataset-resampled")
    known = {"", "all", "tensorboard", "wandb"}
    if not set(args.report_to.replace(" ", "").split(",")) <= known:
        raise UserError(f"--report-to {args.report_to}: use tensorboard, wandb, or both joined by a comma")
    upstream.fill_optimizer_defaults(args)
    if args.lr is None:
        raise UserError("--lr: give a learning rate with a timm optimizer")
    _require_tuning_makes_sense(args)
    return args


def _given(flag: str, argv: Sequence[str]) -> bool:
    return any(part.partition("=")[0] == flag for part in argv)


def _require_views_agree(args: argparse.Namespace) -> None:
    """Raises UserError: a flag that has no meaning with `--pairs views`, or none without it."""
    momentum = args.momentum_encoder
    if args.pairs == "views":
        for name in ("val_data", "caption_key", "caption_separator", "distill_model"):
            if getattr(args, name):
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise UserError(f"{flag}: needs captions, and --pairs views has none; drop one of the two")
    elif momentum is not None:
        raise UserError(f"--momentum-encoder {momentum}: is for training on images alone; add --pairs views")
    if momentum is None:
        return
    if not 0 <= momentum < 1:
        raise UserError(f"--momentum-encoder {momentum}: must be in [0, 1), such as 0.99")
    _require_averages_move(args, "--momentum-encoder")


def _require_averages_move(args: argparse.Namespace, flag: str) -> None:
    if args.precision not in ("fp32", "amp", "amp_bf16", "amp_bfloat16"):
        raise UserError(
            f"--precision {args.precision}: an average of weights in half precision stands still; use amp_bf16 with "
            f"{flag}"
        )


def _require_tuning_makes_sense(args: argparse.Namespace) -> None:
    """Raises UserError: a value of a fine-tuning flag that means nothing."""
    for name in ("layer_decay", "image_layer_decay", "text_layer_decay"):
        decay = getattr(args, name)
        if decay is not None and not 0 < decay <= 1:
            raise UserError(f"--{name.replace('_', '-')} {decay}: must be in (0, 1], such as 0.75")
    for tower in ("image", "text"):
        rate = getattr(args, f"{tower}_lr")
        if rate is not None and rate <= 0:
            raise UserError(f"--{tower}-lr {rate}: must be above 0; to keep the tower as it is use --lock-{tower}")
        if rate is not None and args.lr <= 0:
            raise UserError(f"--{tower}-lr {rate}: follows the schedule of --lr, which is {args.lr}; give one above 0")
    args.lora_options = None if args.lora is None else parse_lora(args.lora)
    if args.ema is not None:
        if not 0 <= args.ema < 1:
            raise UserError(f"--ema {args.ema}: must be in [0, 1), such as 0.999")
        _require_averages_move(args, "--ema")
