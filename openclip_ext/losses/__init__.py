"""Objectives, one file each. `create_loss` builds a registered one by name."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from openclip_ext.losses.base import Loss, PairLoss
from openclip_ext.losses.context import Communication, LossContext, Vocabulary, Widths
from openclip_ext.losses.objective import Objective
from openclip_ext.losses.plan import ObjectivePlan


def create_loss(
    name: str,
    *,
    num_samples: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    embed_dim: int | None = None,
    image_trunk_dim: int | None = None,
    text_trunk_dim: int | None = None,
    vocab_size: int | None = None,
    special_token_ids: Collection[int] | None = None,
    end_token_id: int | None = None,
    loss_tile: int | None = None,
    loss_comm: Communication = "gather",
    terms: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Objective:
    """Build a registered loss, with additive terms if given.

    Args:
        name: a name listed by `openclip-ext losses`.
        num_samples: N, pairs in the training set; sample ids run from 0 to N - 1. Only for losses that need it.
        rank: of this process.
        world_size: number of processes; above 1, `torch.distributed` must be initialised before the first call.
        device: where the loss keeps its state.
        embed_dim: D, width of the features, as in OpenCLIP's model configs. For `emc2`, and terms with heads.
        image_trunk_dim: width of the image tower's pooled output before its projection. For terms with heads.
        text_trunk_dim: that of the text tower.
        vocab_size: V, token ids of captions run from 0 to V - 1. For `caption_words`.
        special_token_ids: those that are no words; padding too, if it has an id of its own.
        end_token_id: what follows it in a caption is padding, as in CLIP's, which pads with 0: the id of `!`.
        loss_tile: columns whose scores with this rank's anchors are formed at once; None: by their number. `emc2`
            with kernel=mh: anchors whose scores with all columns are.
        loss_comm: `gather`: each process holds the features of all, (G, D); `ring`: they pass from process to process
            while their scores are formed, twice a step. Not for what holds them anyway: `emc2`, recent pairs,
            `distill`. With one process both are the same.
        terms: term name to its options, among them `weight` (default 1), a number or a line over training, such as
            `{"brownian_bridge": {"weight": 0.25}, "geometric_consistency": {"weight": "0:0.1@0.5"}}`.
        **options: options of the loss; strings are converted to the declared type.

    Returns:
        A module to call as `loss(image_features, text_features, logit_scale, sample_ids=…)`. It returns a dict whose
        keys that end in `_loss` are to be summed; all others are scalars to report. Call `begin_step` before and
        `commit` after each optimizer step.

    Raises:
        UserError: unknown name or option, a value that is not accepted, or something missing that the loss needs.

    Example:
        >>> import torch, openclip_ext
        >>> loss = openclip_ext.create_loss("gamma_decomp", num_samples=1000, gamma=0.5)
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
        >>> loss.begin_step(step=0, total_steps=100)
        >>> sorted(loss(image, text, torch.tensor(14.3), sample_ids=torch.arange(4)))
        ['contrastive_loss', 'first_visits', 'gamma']
        >>> loss.commit()
    """
    context = LossContext(
        num_samples=num_samples, rank=rank, world_size=world_size, device=torch.device(device),
        widths=Widths(embed=embed_dim, image_trunk=image_trunk_dim, text_trunk=text_trunk_dim),
        vocabulary=_vocabulary(vocab_size, special_token_ids, end_token_id), loss_tile=loss_tile,
        loss_comm=loss_comm,
    )  # fmt: skip
    return ObjectivePlan(name, options, terms, flag="option").build(context)


def _vocabulary(size: int | None, special_ids: Collection[int] | None, end_id: int | None) -> Vocabulary | None:
    if size is None or special_ids is None:
        return None
    return Vocabulary(size, frozenset(special_ids), end_id)


__all__ = ["Loss", "LossContext", "Objective", "ObjectivePlan", "PairLoss", "Vocabulary", "Widths", "create_loss"]
