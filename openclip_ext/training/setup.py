"""From flags to the parts of a run. Whatever can be wrong with the input is found here, before anything is written."""

import argparse
import dataclasses
import datetime
import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    ProjectConfiguration,
    broadcast_object_list,
    is_tensorboard_available,
    is_wandb_available,
)
from torchvision.transforms import AutoAugment, Compose

from openclip_ext import _host
from openclip_ext.data.captions import CaptionFormat
from openclip_ext.data.check import check_shards
from openclip_ext.data.listing import ShardListing, list_shards
from openclip_ext.data.pipeline import eval_loader
from openclip_ext.data.streams import StreamConfig
from openclip_ext.data.table import Table, csv_table, synthetic_table
from openclip_ext.errors import UserError
from openclip_ext.evaluation.class_folders import probe_data
from openclip_ext.evaluation.during_training import Evaluator
from openclip_ext.evaluation.imagenet import imagenet_folder
from openclip_ext.evaluation.labelled import LabelledBatches
from openclip_ext.evaluation.ranks import Ranks
from openclip_ext.losses import ObjectivePlan
from openclip_ext.training import sharding

_MIXED = {"amp": "fp16", "amp_bf16": "bf16", "amp_bfloat16": "bf16"}


def plan_objective(args: argparse.Namespace) -> ObjectivePlan:
    """The loss and its terms, with those that OpenCLIP adds for distillation and for CoCa models.

    Raises:
        UserError: unknown names or options, or a need that the model does not meet.
    """
    terms, weight = dict(args.loss_terms), 1.0
    if args.distill_model:
        if not args.distill_pretrained:
            raise UserError(f"--distill-model {args.distill_model}: give its weights with --distill-pretrained")
        terms.setdefault("distill", {})
    coca = "coca" in args.model.lower().rsplit("/", 1)[-1]
    if coca:
        terms.setdefault("caption", {"weight": args.coca_caption_loss_weight})
        weight = args.coca_contrastive_loss_weight
    plan = ObjectivePlan(args.loss, args.loss_options, terms, weight=weight)
    if "stored_features" in plan.needs:
        raise UserError(
            "--loss-arg bank=index: is for callers that encode stored samples again, and shards are read in order; use "
            "bank=embedding, with bank_device=cpu or mmap if it is too large"
        )
    if "caption_logits" in plan.needs and not coca:
        raise UserError(f"--loss-term caption: --model {args.model} makes no captions; use a CoCa model")
    if coca and plan.needs & {"image_aug", "text_aug"}:
        raise UserError(
            f"--model {args.model}: a CoCa model makes captions of first views only; drop the --loss-term that needs "
            "second views, or use another model"
        )
    if "teacher_features" in plan.needs and not args.distill_model:
        raise UserError(f"--loss {args.loss}: it or a term of it needs a teacher; name one with --distill-model")
    if args.pairs == "views":
        _require_views_only(args, plan, coca)
    return plan


def _require_views_only(args: argparse.Namespace, plan: ObjectivePlan, coca: bool) -> None:
    """Raises UserError: the model, the loss or a term needs more than two views of an image and the sample's id."""
    if coca:
        raise UserError(f"--model {args.model}: a CoCa model makes captions, and --pairs views has none; use another")
    parts = [(f"--loss {plan.spec.name}", plan.spec, plan.options)]
    parts += [(f"--loss-term {spec.name}", spec, options) for spec, _, options in plan.terms]
    for flag, spec, options in parts:
        beyond = spec.needs_for(options) - {"sample_ids", "logit_bias"}
        if beyond:
            raise UserError(
                f"{flag}: needs {', '.join(sorted(beyond))}, and with --pairs views there are two views of each image "
                "and nothing else; drop it"
            )


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What to train on.

    Attributes:
        source: shards or a table.
        num_samples: per epoch and over all ranks.
        size: N of the loss, the samples there are.
        num_ids: sample ids run from 0 to this; above `size` only where they are hashes.
        sample_id: how samples are identified, None where the loss does not need it.
    """

    source: ShardListing | Table
    num_samples: int
    size: int
    num_ids: int
    sample_id: str | None


def training_data(args: argparse.Namespace, plan: ObjectivePlan) -> TrainingData | None:
    """What `--train-data` and its kin name; None where they name nothing.

    Raises:
        UserError: nothing matches, or the number of samples, or of ids where the loss needs them, cannot be known.
    """
    wanted = args.sample_id if "sample_ids" in plan.needs else None
    kind = _dataset_type(args.train_data, args.dataset_type, "--train-data")
    if args.caption_key and kind != "webdataset":
        raise UserError(f"--caption-key {args.caption_key}: shards have JSON, {kind} data has not; drop the flag")
    if kind == "synthetic":
        if not args.train_num_samples:
            raise UserError("--dataset-type synthetic: give the number of samples with --train-num-samples")
        table = synthetic_table(args.train_num_samples)
    elif not args.train_data:
        return None
    elif kind == "csv":
        table = csv_table(args.train_data, args.csv_img_key, args.csv_caption_key, args.csv_separator)
    else:
        return _shard_data(args, wanted)
    return TrainingData(table, len(table), len(table), len(table), wanted and "index")


def _dataset_type(path: str | None, given: str, flag: str) -> str:
    if given != "auto":
        return given
    return "csv" if path and path.endswith((".csv", ".tsv")) else "webdataset"


def _shard_data(args: argparse.Namespace, wanted: str | None) -> TrainingData:
    listing = list_shards(args.train_data, args.train_data_upsampling_factors)
    num_samples = args.train_num_samples or listing.length
    index = "openclip-ext shards index " + (os.path.dirname(listing.urls[0]) or ".")
    if num_samples is None:
        raise UserError(
            f"--train-data {args.train_data}: the number of samples is not known; write sizes.json with: {index}, "
            "or give --train-num-samples"
        )
    size = num_ids = listing.length or num_samples
    if wanted == "hash":
        num_ids = args.sample_id_table or 4 * size
    elif wanted == "index" and listing.sizes is None:
        raise UserError(
            f"--loss {args.loss}: needs sample ids, and {args.train_data} has no sizes.json to number samples by; "
            f"write it with: {index}, or use --sample-id hash"
        )
    return TrainingData(listing, num_samples, size, num_ids, wanted)


def require_sizes(listing: ShardListing, progress: bool) -> None:
    """`--check-shards`. Raises UserError: a shard holds another number of samples than `sizes.json` says."""
    for report in check_shards(listing, decode=False, progress=progress):
        if report.faults or report.expected is None:
            fault = ", ".join(report.faults) or "not in sizes.json"
            raise UserError(
                f"--check-shards: {report.url} holds {report.samples} samples, sizes.json says {report.expected} "
                f"({fault}); write it anew with: openclip-ext shards index {os.path.dirname(report.url) or '.'}"
            )


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Device, processes and precision as OpenCLIP's flags or Accelerate's configuration say.

    Without a GPU the default, fp16 autocast, becomes fp32.

    Raises:
        UserError: the two disagree, the precision needs a GPU, or Accelerate is to split the model in a way that this
            loop does not support.
    """
    _agree_with_accelerate(args)
    cpu = args.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if cpu and args.precision in ("fp16", "pure_fp16"):
        raise UserError(f"--precision {args.precision}: needs a GPU; use fp32 or amp_bf16 on CPU")
    if cpu and args.precision == "amp":
        args.precision = "fp32"
    if torch.cuda.is_available() and not cpu:
        torch.backends.cuda.matmul.allow_tf32 = True  # as OpenCLIP does
        torch.backends.cudnn.benchmark = True
        _choose_gpu(args.device)
    mixed = _MIXED.get(args.precision, "no")
    plugin = sharding.fsdp_plugin(mixed)
    # The first rank fits probes and writes checkpoints while the others wait.
    group = {"backend": args.dist_backend, "init_method": args.dist_url, "timeout": datetime.timedelta(hours=6)}
    handlers = [
        DistributedDataParallelKwargs(static_graph=args.ddp_static_graph),
        InitProcessGroupKwargs(**{key: value for key, value in group.items() if value is not None}),
    ]
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        # Nothing here is divided by accumulation steps: the loop accumulates inside one backward call.
        gradient_accumulation_steps=1,
        kwargs_handlers=handlers,
        fsdp_plugin=plugin,
        log_with=_trackers(args.report_to) or None,
        project_config=ProjectConfiguration(logging_dir=args.logs),  # of trackers; the run's folder once it is known
    )
    if plugin and args.pairs == "views":
        raise UserError("--pairs views: does not go with FSDP; launch without it: accelerate launch --multi_gpu")
    if plugin and not accelerator.is_fsdp2:
        raise UserError(
            "Accelerate is configured for FSDP, which it has for GPUs only; launch without it: accelerate launch "
            "--multi_gpu"
        )
    return accelerator


def _choose_gpu(device: str) -> None:
    """`--device cuda:N` for a single process; several are placed by their local rank. Raises UserError: no such GPU."""
    _, _, index = device.partition(":")
    if not index or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    if not index.isdigit() or int(index) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} GPU(s), counted from cuda:0")
    torch.cuda.set_device(int(index))


def _trackers(report_to: str) -> list[str]:
    """What `--report-to` names. Raises UserError: one of them is not installed."""
    available = {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    wanted = [name for name in available if name in report_to or "all" in report_to]
    for name in wanted:
        if not available[name]:
            raise UserError(f"--report-to {report_to}: {name} is not installed; pip install {name}")
    return wanted


def _agree_with_accelerate(args: argparse.Namespace) -> None:
    """Take the precision from `accelerate launch` where no flag gives it. Raises UserError where both do and differ."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if configured in ("fp16", "bf16"):
        if args.precision_given and _MIXED.get(args.precision) != configured:
            raise UserError(
                f"--precision {args.precision}: Accelerate is configured for {configured}; drop the flag, or launch "
                "with accelerate launch --mixed_precision no"
            )
        args.precision = "amp" if configured == "fp16" else "amp_bf16"
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto", str(args.accum_freq)):
        raise UserError(
            f"--accum-freq {args.accum_freq}: Accelerate is configured for {steps} gradient accumulation steps; give "
            f"--accum-freq {steps}, or launch with accelerate launch --gradient_accumulation_steps 1"
        )
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"  # else Accelerate divides gradients by it


def run_folder(args: argparse.Namespace, accelerator: Accelerator) -> str | None:
    """The folder of this run, None with `--logs none`. Not made yet.

    Raises:
        UserError: it holds a run already.
    """
    if not args.logs or args.logs.lower() == "none":
        return None
    if args.name is None:
        stamp = datetime.datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
        (stamp,) = broadcast_object_list([stamp]) if accelerator.num_processes > 1 else (stamp,)
        model = args.model.replace("/", "-").replace(":", "-")
        args.name = f"{stamp}-model_{model}-loss_{args.loss}-lr_{args.lr}-b_{args.batch_size}-p_{args.precision}"
    folder = os.path.join(args.logs, args.name)
    if os.path.exists(os.path.join(folder, "params.txt")) and args.resume is None:
        raise UserError(f"--name {args.name}: {folder} holds a run already; use another --name, or --resume latest")
    return folder


def caption_format(args: argparse.Namespace) -> CaptionFormat:
    """Where captions are, of training and of validation data."""
    return CaptionFormat(separator=args.caption_separator, key=args.caption_key)


def row_format(args: argparse.Namespace, plan: ObjectivePlan, transform, tokenizer) -> dict[str, Any]:
    """What training rows hold: the fields of `RowFormat`, second views only where they are needed."""
    views = args.pairs == "views"
    image_aug = Compose([AutoAugment(), transform]) if args.view_aug == "auto" else transform
    return {
        "image_transform": transform,
        "tokenizer": tokenizer,
        "image_aug_transform": image_aug if views or "image_aug" in plan.needs else None,
        "text_aug": "text_aug" in plan.needs,
        "captions": None if views else caption_format(args),
    }


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
    imagenet = {}
    for flag, path, prefix in (
        ("--imagenet-val", args.imagenet_val, "imagenet-zeroshot-val"),
        ("--imagenet-v2", args.imagenet_v2, "imagenetv2-zeroshot-val"),
    ):
        if path:
            pictures = imagenet_folder(path, flag).pictures
            imagenet[prefix] = LabelledBatches(pictures, transform, **loading)
    probe = None
    if args.probe_train:
        probe = probe_data(args.probe_train, args.probe_val, transform, **loading)
    return Evaluator(
        tokenizer=tokenizer,
        device=accelerator.device,
        autocast=accelerator.autocast,
        dtype=_host.input_dtype(args.precision),
        pairs=pairs,
        imagenet=imagenet,
        probe=probe,
        ranks=ranks,
        val_frequency=args.val_frequency,
        zeroshot_frequency=args.zeroshot_frequency,
        progress=accelerator.is_main_process,
    )
