"""What a fusion model is made of, as a JSON file beside OpenCLIP's model config says it. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from openclip_ext.errors import UserError
from openclip_ext.files import read_json
from openclip_ext.options import build_options, option

#: What `--task` takes, beside pre-training, and of those with classes what they are.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "nlvr2": ("false", "true"),
    "ve": ("entailment", "neutral", "contradiction"),
    "assign": ("first", "second", "neither"),
}
ANSWERING = ("vqa", *CLASSES)
TASKS = (*ANSWERING, "retrieval")
TWO_IMAGES = ("nlvr2", "assign")
#: Whose data are questions in files of their own; the others train on pairs.
QUESTIONS = ("vqa", "nlvr2", "ve")


def _positive(value: float) -> bool:
    return value > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """A fusion model and its pre-training; defaults are ALBEF's."""

    layers: int = option(6, "cross-attention layers", allowed=">= 1", check=_positive)
    width: int = option(768, "of the layers", allowed=">= 1", check=_positive)
    heads: int = option(12, "attention heads per layer; a divisor of width", allowed=">= 1", check=_positive)
    mlp_ratio: float = option(4.0, "hidden width of a layer's MLP over width", allowed="> 0", check=_positive)
    dropout: float = option(0.1, "in the layers", allowed="in [0, 1)", check=lambda p: 0 <= p < 1)
    decoder_layers: int = option(6, "of the answer decoder (vqa)", allowed=">= 1", check=_positive)
    momentum: float = option(
        0.995,
        "share of itself that a momentum copy keeps in each step",
        allowed="in [0, 1)",
        check=lambda m: 0 <= m < 1,
    )
    keys: Literal["momentum", "online"] = option(
        "momentum", "what images and texts are contrasted with: features of the momentum copy, or the towers' own"
    )
    mask_share: float = option(0.15, "of words to be guessed", allowed="in (0, 1)", check=lambda p: 0 < p < 1)
    mask_id: int | None = option(
        None, "token id of a gap; none: the tokenizer's, or its largest that marks nothing", allowed=">= 0",
        check=lambda token: token is None or token >= 0,
    )  # fmt: skip
    distill: str = option(
        "0:0.4@0.03", "weight of the momentum copy's guesses of words, in [0, 1]; a number, or a line over training"
    )
    matching: float = option(1.0, "weight of the matching loss", allowed=">= 0", check=lambda w: w >= 0)
    words: float = option(1.0, "weight of the loss of masked words", allowed=">= 0", check=lambda w: w >= 0)


def read_config(path: str) -> FusionConfig:
    """The config in a file.

    Raises:
        UserError: no such file, no JSON object, an unknown key, or a value that is not accepted.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"--fusion {path}: cannot be read ({error.strerror}); give a JSON file, or a run") from error
    except ValueError as error:
        raise UserError(f'--fusion {path}: no JSON ({error}); give one such as {{"layers": 6}}') from error
    if not isinstance(content, dict):
        raise UserError(f'--fusion {path}: must hold an object, such as {{"layers": 6}}')
    return make_config(content, f"--fusion {path}:")


def make_config(values: Mapping[str, Any], source: str) -> FusionConfig:
    """The config of these values; `source` begins messages. Raises UserError: as `read_config`."""
    config = build_options(FusionConfig, values, "a fusion model", source)
    if config.width % config.heads:
        raise UserError(f"{source} heads={config.heads}: must divide width={config.width}")
    from openclip_ext.losses.weights import parse_weight

    try:
        weight = parse_weight(config.distill)
        accepted = max(weight.start, weight.end) <= 1
    except ValueError:
        accepted = False
    if not accepted:
        raise UserError(f"{source} distill={config.distill}: must be in [0, 1], or a line there such as 0:0.4@0.03")
    return config


def require_same(config: FusionConfig, saved: Mapping[str, Any] | None, source: str) -> None:
    """Raises UserError: the checkpoint `source` is of another fusion model, or of none."""
    if saved is None:
        raise UserError(f"{source}: was trained without --fusion; start from its weights with --pretrained")
    now = dataclasses.asdict(config)
    for name, value in now.items():
        if name in saved and saved[name] != value:
            raise UserError(
                f"{source}: its fusion model has {name}={saved[name]}, and --fusion says {name}={value}; use the "
                "config it was trained with"
            )
