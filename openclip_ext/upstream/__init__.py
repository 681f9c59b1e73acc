"""Every touch of OpenCLIP's internals. A version is in a module's name where 3.3 and 4 differ.

The functions below are the whole interface. Nothing here imports torch, or OpenCLIP, before it is
needed: `attention_v3`, which imports torch, is imported by what needs it.
"""

import importlib.util
import re
from pathlib import Path

from openclip_ext.upstream import v3, v4
from openclip_ext.upstream.export import model_card, save_pretrained
from openclip_ext.upstream.flags import Flags, Role, flags_with, role_of
from openclip_ext.upstream.layers import adaptable_layers, plain_name, tower_layers, tower_parameters
from openclip_ext.upstream.loop import autocast, create_schedule, input_dtype, start_remote_sync
from openclip_ext.upstream.losses import distill_loss
from openclip_ext.upstream.models import (
    create_teacher,
    embedding_width,
    example_inputs,
    freeze_text,
    in_evaluation,
    load_model_weights,
    local_weights,
    preprocessing,
    register_model_config,
)
from openclip_ext.upstream.states import find_states, states_of
from openclip_ext.upstream.tokenizers import create_tokenizer, find_mask_id, read_vocabulary
from openclip_ext.upstream.trunks import find_projections, find_trunks, watched
from openclip_ext.upstream.weights import SCHEMES
from openclip_ext.upstream.zero_shot import CLASSES_PER_BATCH, imagenet_names, imagenet_templates, zero_shot_weights


def _major_version() -> int:
    """Of the `open_clip` that an import would find, which may be a checkout in front of the installed one."""
    spec = importlib.util.find_spec("open_clip")
    text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    found = re.search(r"__version__ = ['\"](\d+)\.", text)
    return int(found[1]) if found else 3


def default_flags() -> Flags:
    """OpenCLIP's flags where none is given."""
    return Flags(vars(build_parser().parse_args([])))


_own = v4 if _major_version() >= 4 else v3
BLOCKS = _own.BLOCKS
build_parser = _own.build_parser
checkpoint_from_state = _own.checkpoint_from_state
create_model = _own.create_model
create_optimizer = _own.create_optimizer
optimizer_defaults = _own.optimizer_defaults
require_supported = _own.require_supported

__all__ = [
    "SCHEMES",
    "BLOCKS",
    "CLASSES_PER_BATCH",
    "Flags",
    "Role",
    "adaptable_layers",
    "autocast",
    "build_parser",
    "checkpoint_from_state",
    "create_model",
    "create_optimizer",
    "create_schedule",
    "create_teacher",
    "create_tokenizer",
    "default_flags",
    "distill_loss",
    "embedding_width",
    "example_inputs",
    "find_mask_id",
    "find_projections",
    "find_states",
    "find_trunks",
    "flags_with",
    "freeze_text",
    "in_evaluation",
    "imagenet_names",
    "imagenet_templates",
    "input_dtype",
    "load_model_weights",
    "local_weights",
    "model_card",
    "optimizer_defaults",
    "plain_name",
    "preprocessing",
    "read_vocabulary",
    "register_model_config",
    "require_supported",
    "role_of",
    "save_pretrained",
    "start_remote_sync",
    "states_of",
    "tower_layers",
    "tower_parameters",
    "watched",
    "zero_shot_weights",
]
