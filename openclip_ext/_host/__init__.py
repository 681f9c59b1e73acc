"""Every touch of OpenCLIP's internals: the modules `v3*` for its major version 3.

The functions below are the whole interface; another major version is other modules that define them.
Nothing here imports torch before it is needed: `v3_attention`, which does, is imported by what needs it.
"""

from openclip_ext._host.v3 import (
    BLOCKS,
    autocast,
    build_parser,
    checkpoint_from_state,
    clip_loss,
    create_model,
    create_optimizer,
    create_schedule,
    create_teacher,
    distill_loss,
    example_inputs,
    fill_optimizer_defaults,
    freeze_text,
    input_dtype,
    load_model_weights,
    local_weights,
    register_model_config,
    siglip_loss,
    start_remote_sync,
)
from openclip_ext._host.v3_export import model_card, save_pretrained
from openclip_ext._host.v3_layers import adaptable_layers, plain_name, tower_layers, tower_parameters
from openclip_ext._host.v3_trunks import find_trunks, watched
from openclip_ext._host.v3_weights import SCHEMES
from openclip_ext._host.v3_zero_shot import CLASSES_PER_BATCH, imagenet_names, imagenet_templates, zero_shot_weights

__all__ = [
    "SCHEMES",
    "BLOCKS",
    "CLASSES_PER_BATCH",
    "adaptable_layers",
    "autocast",
    "build_parser",
    "checkpoint_from_state",
    "clip_loss",
    "create_model",
    "create_optimizer",
    "create_schedule",
    "create_teacher",
    "distill_loss",
    "example_inputs",
    "fill_optimizer_defaults",
    "find_trunks",
    "freeze_text",
    "imagenet_names",
    "imagenet_templates",
    "input_dtype",
    "load_model_weights",
    "local_weights",
    "model_card",
    "plain_name",
    "register_model_config",
    "save_pretrained",
    "siglip_loss",
    "start_remote_sync",
    "tower_layers",
    "tower_parameters",
    "watched",
    "zero_shot_weights",
]
