"""Objectives, one file each. `create_loss` builds a registered one by name."""

from collections.abc import Mapping
from typing import Any

from openclip_ext.losses.objective import Objective
from openclip_ext.options import build_options
from openclip_ext.registry import LOSSES, TERMS, get_spec


def create_loss(
    name: str,
    *,
    num_samples: int,
    rank: int = 0,
    world_size: int = 1,
    terms: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Objective:
    """Build a registered loss, with additive terms if given.

    Args:
        name: a name listed by `openclip-ext losses`.
        num_samples: N, pairs in the training set; sample ids run from 0 to N - 1.
        rank: of this process.
        world_size: number of processes; above 1, `torch.distributed` must be initialised before the first call.
        terms: term name to its options, among them `weight` (default 1), such as `{"brownian_bridge": {"weight": 0.25}}`.
        **options: options of the loss; strings are converted to the declared type.

    Returns:
        A module to call as `loss(image_features, text_features, logit_scale, sample_ids=…)`. It returns a dict whose
        keys that end in `_loss` are to be summed; all others are scalars to report. Call `begin_step` before and
        `commit` after each optimizer step.

    Raises:
        UserError: unknown name or option, or a value that is not accepted.

    Example:
        >>> import torch, openclip_ext
        >>> loss = openclip_ext.create_loss("gamma_decomp", num_samples=1000, gamma=0.5)
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
        >>> sorted(loss(image, text, torch.tensor(14.3), sample_ids=torch.arange(4)))
        ['contrastive_loss', 'first_visits', 'gamma']
        >>> loss.commit()
    """
    world = {"num_samples": num_samples, "rank": rank, "world_size": world_size}
    spec = get_spec(name)
    base = spec.build(build_options(spec.options, options, f"loss {name}"), **world)
    objective = Objective(base, spec.needs)
    for term_name, term_options in (terms or {}).items():
        term_options = dict(term_options)
        weight = float(term_options.pop("weight", 1.0))
        term = get_spec(term_name, TERMS, flag="--loss-term")
        module = term.build(build_options(term.options, term_options, f"loss term {term_name}"), **world)
        objective.add_term(term_name, module, term.needs, weight)
    return objective


__all__ = ["LOSSES", "Objective", "create_loss"]
