"""What a checkpoint of a run with `--fusion` holds besides OpenCLIP's model."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.files import last_checkpoint, load_tensors
from openclip_ext.fusion.config import ANSWERING, FusionConfig, make_config
from openclip_ext.fusion.encoder import FusionEncoder
from openclip_ext.fusion.masking import Masking
from openclip_ext.fusion.tasks import TaskObjective
from openclip_ext.losses import LossContext, Vocabulary

#: Parts of an objective that another task can start from.
SHARED = ("encoder", "matching", "words", "head", "decoder")


def load_fusion(source: str, flag: str = "--fusion") -> tuple[str, dict[str, Any]]:
    """The checkpoint that a run's folder, or a file, is of a fusion model: its path and content.

    Raises:
        UserError: there is none.
    """
    path = last_checkpoint(source) if os.path.isdir(source) else source
    if path is None or not os.path.isfile(path):
        raise UserError(f"{flag} {source}: no such file; give a fusion config in JSON, a run's folder, or a checkpoint")
    content = load_tensors(path, flag, mapped=True)  # the model in it is read by others
    if "fusion" not in content:
        raise UserError(f"{flag} {path}: holds no fusion model; give a run that was trained with --fusion")
    return path, content


def answer_tokens(tokenizer: Callable[[list[str]], Tensor], answers: Sequence[str]) -> Tensor:
    """(A, M): token ids of the answers, without the columns in which all of them have padding."""
    tokens = tokenizer(list(answers))
    used = (tokens != tokens[:, -1:]).any(0).nonzero()
    return tokens[:, : int(used.max()) + 2] if len(used) else tokens


def take_weights(loss: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the parts of an objective that `weights` has in the same form: the encoder, whose twins start as its layers,
    and heads. A momentum copy of them starts anew."""
    for name, part in loss.named_children():
        own = {key.removeprefix(f"{name}."): x for key, x in weights.items() if key.startswith(f"{name}.")}
        if isinstance(part, FusionEncoder) and own:
            part.load(own)
        elif name in SHARED and own and _same_shapes(part, own):
            part.load_state_dict(own)
    copy = getattr(loss, "momentum", None)
    if copy is not None and weights:
        copy.restart()


def _same_shapes(part: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    own = part.state_dict()
    return own.keys() == weights.keys() and all(own[name].shape == weights[name].shape for name in own)


class Matcher(nn.Module):
    """The encoder and the head that tells whether an image and a text belong together."""

    def __init__(self, config: FusionConfig, vocabulary: Vocabulary, image_width: int, text_width: int) -> None:
        super().__init__()
        self.masking = Masking(vocabulary, config.mask_share, config.mask_id)
        self.encoder = FusionEncoder(config, image_width, text_width)
        self.matching = nn.Linear(config.width, 2)

    @torch.no_grad()
    def forward(self, text_tokens: Tensor, text_states: Tensor, image_states: Tensor) -> Tensor:
        """(B,): log of the odds that they belong together."""
        pooled = self.encoder(text_states, self.masking.attended(text_tokens), image_states)[:, 0]
        scores = self.matching(pooled).float()
        return scores[:, 1] - scores[:, 0]


def load_head(
    content: Mapping[str, Any], tokenizer: Any, widths: tuple[int, int], device: torch.device,
    autocast: Callable = contextlib.nullcontext,
) -> TaskObjective | Matcher:  # fmt: skip
    """What a checkpoint answers with, in evaluation mode: its task's head, or the matching head where it has no task.

    Args:
        content: of the checkpoint.
        tokenizer: of its model.
        widths: of the towers' tokens.
        device: where to put it.
        autocast: returns the context to run it in.
    """
    config, task = make_config(content["fusion"], "--fusion:"), content.get("task")
    vocabulary = Vocabulary(*upstream.read_vocabulary(tokenizer))
    head: TaskObjective | Matcher
    if task in ANSWERING:
        assert task is not None
        answers = content.get("answers")
        tokens = answer_tokens(tokenizer, answers) if answers else None
        head = TaskObjective(LossContext(vocabulary=vocabulary), config, task, *widths, autocast, tokens)
    else:
        head = Matcher(config, vocabulary, *widths)
    wanted = head.state_dict()
    head.load_state_dict({name: value for name, value in content["loss"].items() if name in wanted})
    return head.eval().requires_grad_(False).to(device)
