"""Models of OpenCLIP 3.3 in the folder format that `local-dir:` and `hf-hub:` names load."""

import shutil
from pathlib import Path
from typing import Any

from openclip_ext.errors import UserError


def save_pretrained(model, tokenizer, name: str, flags: dict[str, Any], folder: Path, *, repo: str | None) -> None:
    """Write `open_clip_config.json`, `open_clip_model.safetensors`, and the files of a tokenizer of Hugging Face's.

    Args:
        model: with its weights and the preprocessing that OpenCLIP attached to it.
        tokenizer: the model's.
        name: the architecture, as OpenCLIP made the model from.
        flags: OpenCLIP's `force_…` flags that the model was made with.
        folder: exists.
        repo: ORGANIZATION/NAME where a hub tokenizer will be found; None: where the architecture says.

    Raises:
        UserError: a tokenizer that OpenCLIP would not find again by the folder.
    """
    from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
    from open_clip.push_to_hf_hub import save_config_for_hf
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from safetensors.torch import save_file

    config = _model_config(model, name, flags)
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(str(folder))
        if repo:
            config["text_cfg"]["hf_tokenizer_name"] = repo
    elif not isinstance(tokenizer, SimpleTokenizer):  # OpenCLIP knows SigLIP's by the name of a built-in model alone
        raise UserError(
            f"--model {name}: OpenCLIP cannot load its {type(tokenizer).__name__} from a folder; name a tokenizer in "
            "the model config with text_cfg.hf_tokenizer_name"
        )
    save_config_for_hf(model, folder / HF_CONFIG_NAME, config)
    save_file(_separate(model.state_dict()), folder / HF_SAFE_WEIGHTS_NAME)
    shutil.copymode(folder / HF_CONFIG_NAME, folder / HF_SAFE_WEIGHTS_NAME)  # it is written for its owner alone


def _model_config(model, name: str, flags: dict[str, Any]) -> dict:
    """The architecture's config with what the flags force."""
    from open_clip import CLIP, get_model_config

    config = get_model_config(name.replace("/", "-") if ":" not in name else name)
    if flags.get("force_quick_gelu"):
        config["quick_gelu"] = True
    if flags.get("force_context_length"):
        config["text_cfg"]["context_length"] = flags["force_context_length"]
    if flags.get("force_image_size"):
        config["vision_cfg"]["image_size"] = model.visual.image_size
    if not isinstance(model, CLIP):
        config["custom_text"] = True
    if getattr(model, "logit_bias", None) is not None:
        config.setdefault("init_logit_bias", 0.0)  # that it has one; its value is among the weights
    return config


def _separate(weights: dict) -> dict:
    """The same without tensors that share memory, which a safetensors file cannot hold."""
    separate, seen = {}, set()
    for name, value in weights.items():
        value = value.detach().contiguous()
        place = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if place in seen else value
        seen.add(place)
    return separate


def model_card(name: str, description: str, details: dict[str, Any], usage: str) -> str:
    """The hub's README.md as OpenCLIP writes it, with the licence left open."""
    from open_clip.push_to_hf_hub import generate_readme

    card = {
        "tags": ("clip", "openclip-ext"),
        "license": "# fill in, such as mit or apache-2.0",
        "description": description,
        "details": details,
        "usage": usage,
    }
    return generate_readme(card, name)
