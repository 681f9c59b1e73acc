"""Every loss at every batch size: its gradients drawn, summed up, and held against those of `clip`."""

from typing import Any

import torch
from tqdm import tqdm

from openclip_ext.commands.diagnose.gradients import (
    Draws,
    Walk,
    draw_batches,
    full_gradient,
    measure_draws,
    target,
)
from openclip_ext.commands.diagnose.negatives import Negatives
from openclip_ext.commands.diagnose.sample import Sample
from openclip_ext.commands.diagnose.stationary import settle
from openclip_ext.commands.diagnose.statistics import equivalent_batch, group_means, summarise
from openclip_ext.errors import UserError
from openclip_ext.evaluation.ranks import Ranks
from openclip_ext.losses import ObjectivePlan
from openclip_ext.losses.recent import RecentOptions
from openclip_ext.options import parse_assignments
from openclip_ext.registry import get_spec

#: What a loss may need to be measured on features alone.
PROVIDED = frozenset({"num_samples", "sample_ids", "widths", "logit_bias", "encoded_again"})


def parse_loss(text: str) -> ObjectivePlan:
    """`NAME[:KEY=VALUE,…]`; without recent pairs, unless it says so, since they may not be fresh.

    Raises:
        UserError: an unknown loss or option, or a need that features alone do not meet.
    """
    name, _, options = text.partition(":")
    values: dict[str, Any] = dict(parse_assignments(filter(None, options.split(",")), f"--losses {name}:"))
    if issubclass(get_spec(name, flag="--losses").options, RecentOptions):
        values = {"recent_batches": 0} | values
    plan = ObjectivePlan(name, values, flag=f"--losses {name}:")
    if beyond := plan.needs - PROVIDED:
        raise UserError(
            f"--losses {text}: needs {', '.join(sorted(beyond))}, which features alone do not give; drop it"
        )
    return plan


def measure_losses(
    plans: dict[str, ObjectivePlan], sample: Sample, negatives: Negatives, sizes: list[int], draws: int, seed: int,
    ranks: Ranks, progress: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """An entry per loss: `name`, `target`, `target_cosine`, and `batches`, an entry per batch size.

    Args:
        plans: by name, `clip` among them.
        sample: the encoded pairs.
        negatives: of the sample.
        sizes: of batches.
        draws: of each size.
        seed: of the draws.
        ranks: that share the draws.
        progress: show a progress bar.

    Raises:
        UserError: a loss needs a logit bias and the model has none, or its gradient over all pairs is not finite or 0.
    """
    targets = {name: target(plan) for name, plan in plans.items()}
    full: dict[str, torch.Tensor] = {}
    for name, plan in plans.items():
        if "logit_bias" in plan.needs and sample.logit_bias is None:
            raise UserError(f"--losses {name}: needs a logit bias, which this model has not; drop it")
        if repr(targets[name]) not in full:
            full[repr(targets[name])] = _require_comparable(full_gradient(plan, sample), name)
    clip_full = full[repr(targets["clip"])]
    drawn: dict[str, dict[int, Draws]] = {name: {} for name in plans}
    settled: dict[tuple[str, int], dict[str, Any]] = {}
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with tqdm(total=len(plans) * sum(sizes), desc="gradients", bar_format=bar_format, disable=not progress) as bar:
        for size in sizes:
            batches = draw_batches(sample, size, draws, seed)
            for name, plan in plans.items():
                walk = Walk(plan, sample, size)
                settled[name, size] = settle(walk, negatives, size, seed)
                drawn[name][size] = measure_draws(walk, batches, full[repr(targets[name])], clip_full, ranks)
                bar.update(size)
    clip = {size: group_means(drawn["clip"][size].cosines) for size in sizes}
    rows = []
    for name in plans:
        own = full[repr(targets[name])]
        cosine = (own @ clip_full / (own.norm() * clip_full.norm())).item()
        found_at = [
            {
                "batch_size": size,
                **summarise(found, own),
                "equivalent_batch": equivalent_batch(group_means(found.cosines), clip, len(sample)),
                "clip_equivalent_batch": equivalent_batch(group_means(found.clip_cosines), clip, len(sample)),
                "memory": settled[name, size],
            }
            for size, found in drawn[name].items()
        ]
        rows.append({"name": name, "target": targets[name][0], "target_cosine": cosine, "batches": found_at})
    return rows


def _require_comparable(gradient: torch.Tensor, name: str) -> torch.Tensor:
    if gradient.isfinite().all() and gradient.norm() > 1e-5:  # of features that are all alike rounding is left
        return gradient
    raise UserError(
        f"--losses {name}: its gradient over all pairs is zero or not finite: there is nothing to compare steps with; "
        "drop the loss, or take another checkpoint"
    )
