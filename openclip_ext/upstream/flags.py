"""Flags by their names, read-only, and what each is about: the one table of that. Imports no torch."""

import argparse
import enum
import fnmatch
from collections.abc import Mapping
from typing import Any


class Flags(argparse.Namespace):
    """Flags as attributes, under OpenCLIP's names, as its functions and those of `upstream` take them. Read-only."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: flags are read-only; derive others with replace()")

    def replace(self, **changes: Any) -> "Flags":
        """The same flags with other values for some."""
        return Flags(vars(self) | changes)


class Role(enum.Enum):
    """What a flag is about."""

    TRAINING = "how a run was trained: on its model card, in the order of the table"
    MODEL = "what model weights belong to, and how it sees images: an evaluation of a run takes it over"
    BOOKKEEPING = "neither what a run learns nor how it is scored: runs that differ in nothing else are alike"
    FOREIGN = "of OpenCLIP's own loop or data: openclip-ext train has no such thing"


#: A name that ends in * stands for all that begin so. What is not here has no role but its own.
ROLES: dict[str, Role] = {
    **dict.fromkeys(
        ("loss", "loss_arg", "loss_term", "epochs", "batch_size", "accum_freq", "world_size", "lr", "wd", "warmup",
         "opt", "lr_scheduler", "layer_decay", "image_lr", "text_lr", "lora", "ema", "warm_start_pass",
         "recent_batches", "recent_check", "recent_limit", "precision", "seed", "fusion", "task"),
        Role.TRAINING,
    ),
    **dict.fromkeys(
        ("force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length", "image_mean",
         "image_std", "image_interpolation", "image_resize_mode"),
        Role.MODEL,
    ),
    **dict.fromkeys(
        ("name", "logs", "log_local", "log_level", "log_path", "tensorboard_path", "checkpoint_path", "resume",
         "resume_other_loss", "report_to", "wandb", "wandb_notes", "wandb_project_name", "tensorboard", "debug",
         "save_logs", "save_frequency", "save_most_recent", "save_best", "save_every_steps", "keep_last", "max_minutes",
         "delete_previous_checkpoint", "copy_codebase", "log_every_n_steps", "profile",
         "remote_sync", "remote_sync_frequency", "remote_sync_protocol",
         "cache_dir", "rank", "local_rank", "rank_timeout", "max_skipped", "max_bad", "loss_tile",
         "loss_comm"),
        Role.BOOKKEEPING,
    ),
    **dict.fromkeys(
        ("audio_*", "pretrained_audio*", "naflex_*", "use_naflex*", "force_naflex*", "bucket_*", "length_bucketing*",
         "fsdp*", "image_key*", "text_key*", "json_text_key*", "text_pad_multiple*", "max_image_pixels*",
         "torchcompile_*", "val_retrieval*", "train_loss_ema*", "log_metric*", "text_pooler*"),
        Role.FOREIGN,
    ),
}  # fmt: skip


def flags_with(role: Role) -> tuple[str, ...]:
    """The names in the table that have the role, in its order."""
    return tuple(name for name, own in ROLES.items() if own is role)


def role_of(name: str) -> Role | None:
    """The role of a flag; None where it has none."""
    return ROLES.get(name) or next((role for pattern, role in ROLES.items() if fnmatch.fnmatch(name, pattern)), None)
