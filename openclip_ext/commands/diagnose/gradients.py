"""Gradients of a loss with respect to the towers' last projections: of one step, and of the whole sample at once."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openclip_ext.commands.diagnose.sample import Sample
from openclip_ext.evaluation.ranks import Ranks
from openclip_ext.losses import LossContext, ObjectivePlan, Widths
from openclip_ext.losses.base import total_loss
from openclip_ext.training.encode_again import KeptInputs

#: Parts of the draws, of which the means are kept: what can be said without keeping each gradient.
GROUPS = 10


class Walk:
    """A loss that is shown batch after batch while the parameters stand still, with its schedule at its end.

    Where it asks for features to be encoded again, as for recent pairs, it gets the same, since nothing moves.
    """

    def __init__(self, plan: ObjectivePlan, sample: Sample, batch_size: int) -> None:
        context = LossContext(
            num_samples=len(sample), device=sample.device, widths=Widths(embed=sample.image.outputs.shape[1])
        )
        self.plan, self.sample = plan, sample
        self.loss = plan.build(context)
        steps = math.ceil(len(sample) / batch_size)  # a pass: with gamma=auto, samples come once
        self.loss.begin_step(step=steps, total_steps=steps)
        self._kept = KeptInputs(self.loss, nn.Identity())

    def gradient(self, ids: Tensor) -> Tensor:
        """Of one step on the pairs `ids` (B,), both projections' flattened; the loss's state goes on by a step."""
        leaves = [tower.outputs[ids].detach().requires_grad_() for tower in self.sample.towers]
        slopes = torch.autograd.grad(self._loss(ids, leaves), leaves)
        self.loss.commit()
        parts = [(tower.inputs[ids].T @ slope).flatten()
                 for tower, slope in zip(self.sample.towers, slopes, strict=True)]  # fmt: skip
        return torch.cat(parts)

    @torch.no_grad()
    def advance(self, ids: Tensor) -> None:
        """Let the loss's state go on by the step that `gradient` would be."""
        if self.loss.has_state:
            self._loss(ids, [tower.outputs[ids] for tower in self.sample.towers])
            self.loss.commit()

    def _loss(self, ids: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        image, text = (nn.functional.normalize(part, dim=-1) for part in outputs)
        again = self._kept.features([{"image": ids, "text": ids}], self._encoded)
        extra = {"sample_ids": ids, "logit_bias": self.sample.logit_bias} | again
        return total_loss(self.loss(image, text, self.sample.logit_scale, **extra))

    def _encoded(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        tower = self.sample.towers
        return {
            "image_features": nn.functional.normalize(tower[0].outputs[image], dim=-1),
            "text_features": nn.functional.normalize(tower[1].outputs[text], dim=-1),
        }


def target(plan: ObjectivePlan) -> tuple[str, dict[str, Any]]:
    """Name and options of a loss without memory and draws that, given all pairs as one batch, is what `plan` estimates.

    Over all pairs `clip` is `batch_corrected`, and what leaves the positive out is `dcl`. A loss of which nothing is
    known is its own target.
    """
    name, options = plan.spec.name, plan.options
    if name == "clip":
        return "batch_corrected", {}
    if name in ("dcl", "sogclr") or (name in ("gamma_decomp", "emc2") and options.decoupled):
        return "dcl", {}
    if name in ("batch_corrected", "gamma_decomp", "emc2"):
        return "batch_corrected", {"negatives": options.negatives}
    return name, dataclasses.asdict(options)


def full_gradient(plan: ObjectivePlan, sample: Sample) -> Tensor:
    """The gradient of the loss's target over all pairs of the sample."""
    name, options = target(plan)
    everything = torch.arange(len(sample), device=sample.device)
    return Walk(ObjectivePlan(name, options), sample, len(sample)).gradient(everything)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Gradients g of several batches, against that over all pairs F and that of `clip` over all pairs C.

    Attributes:
        errors: (groups, P), mean of g - F over each group of draws; on the first rank.
        cosines: by draw, of g with F.
        clip_cosines: of g with C.
        squares: |g|^2.
    """

    errors: Tensor
    cosines: list[float]
    clip_cosines: list[float]
    squares: list[float]


def draw_batches(sample: Sample, batch_size: int, draws: int, seed: int) -> list[Tensor]:
    """Pairs of each batch, without repetition within one; the same for every loss."""
    generator = torch.Generator().manual_seed(hash((seed, batch_size)) % 2**63)
    return [torch.randperm(len(sample), generator=generator)[:batch_size].to(sample.device) for _ in range(draws)]


def measure_draws(walk: Walk, batches: Sequence[Tensor], full: Tensor, clip_full: Tensor, ranks: Ranks) -> Draws:
    """Take the batches one after the other. Ranks share the groups; all let the loss's state see every batch."""
    errors: dict[int, Tensor] = {}
    numbers: list[tuple[int, float, float, float]] = []
    directions = torch.stack([full / full.norm(), clip_full / clip_full.norm()])
    counts = [0] * GROUPS
    for number, ids in enumerate(batches):
        group = number * GROUPS // len(batches)
        counts[group] += 1
        if group % ranks.world_size != ranks.rank:
            walk.advance(ids)
            continue
        gradient = walk.gradient(ids)
        error = gradient - full
        errors[group] = errors[group] + error if group in errors else error
        norm = gradient.norm()
        along, clip_along = (directions @ gradient / norm).tolist()
        numbers.append((number, along, clip_along, norm.item() ** 2))
    own = {group: (error / counts[group]).cpu() for group, error in errors.items()}
    shared = ranks.on_all((own, numbers))
    means = {group: error for part, _ in shared for group, error in part.items()}
    _, cosines, clip_cosines, squares = zip(*sorted(row for _, rows in shared for row in rows), strict=True)
    return Draws(torch.stack([means[group] for group in range(GROUPS)]), list(cosines), list(clip_cosines),
                 list(squares))  # fmt: skip
