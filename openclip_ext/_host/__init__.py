"""Every touch of OpenCLIP's internals: one module per major version of `open_clip_torch`.

The functions below are the whole interface; another major version is another module that defines them.
Nothing here imports torch before it is needed.
"""

from openclip_ext._host.v3 import (
    BLOCKS,
    build_parser,
    checkpoint_from_model,
    clip_loss,
    create_model,
    create_optimizer,
    create_schedule,
    create_teacher,
    distill_loss,
    fill_optimizer_defaults,
    imagenet_names,
    input_dtype,
    load_model_weights,
    register_model_config,
    siglip_loss,
    start_remote_sync,
    zero_shot_weights,
)

__all__ = [
    "BLOCKS",
    "build_parser",
    "checkpoint_from_model",
    "clip_loss",
    "create_model",
    "create_optimizer",
    "create_schedule",
    "create_teacher",
    "distill_loss",
    "fill_optimizer_defaults",
    "imagenet_names",
    "input_dtype",
    "load_model_weights",
    "register_model_config",
    "siglip_loss",
    "start_remote_sync",
    "zero_shot_weights",
]
