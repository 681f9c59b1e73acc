"""Objectives, one file each. `create_loss` builds a registered one by name."""

from collections.abc import Mapping
from typing import Any

from openclip_ext.errors import UserError
from openclip_ext.losses.objective import Objective
from openclip_ext.losses.weights import Weight, parse_weight
from openclip_ext.options import build_options
from openclip_ext.registry import TERMS, get_spec


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
        terms: term name to its options, among them `weight` (default 1), a number or a line over training, such as
            `{"brownian_bridge": {"weight": 0.25}, "geometric_consistency": {"weight": "0:0.1@0.5"}}`.
        **options: options of the loss; strings are converted to the declared type.

    Returns:
        A module to call as `loss(image_features, text_features, logit_scale, sample_ids=…)`. It returns a dict whose
        keys that end in `_loss` are to be summed; all others are scalars to report. Call `begin_step` before and
        `commit` after each optimizer step; with terms that have heads of their own, `set_widths` before the first.

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
    return ObjectivePlan(name, options, terms, flag="option").build(num_samples, rank, world_size)


class ObjectivePlan:
    """A loss and its terms by name, looked up and checked, not yet built: the data's size may not be known yet.

    Args:
        name: of the loss.
        options: of the loss.
        terms: as in `create_loss`.
        flag: how the options were given, for error messages.
        weight: of the loss itself; 1 but for CoCa models.

    Raises:
        UserError: unknown name or option, or a value that is not accepted.
    """

    def __init__(self, name, options, terms=None, flag="--loss-arg", weight=1.0) -> None:
        self.weight = weight
        self.spec = get_spec(name)
        self.options = build_options(self.spec.options, options, f"loss {name}", flag)
        self.terms = []
        for term_name, term_options in (terms or {}).items():
            term, given = get_spec(term_name, TERMS, flag="--loss-term"), dict(term_options)
            weight = _weight(term_name, given.pop("weight", 1.0))
            built = build_options(term.options, given, f"loss term {term_name}", f"--loss-term {term_name}")
            self.terms.append((term, weight, built))

    @property
    def needs(self) -> frozenset[str]:
        """What the loop must provide; see `openclip_ext.registry.NEEDS`."""
        return self._base_needs.union(*(term.needs_for(options) for term, _, options in self.terms))

    @property
    def _base_needs(self) -> frozenset[str]:
        return self.spec.needs_for(self.options)

    def build(self, num_samples: int, rank: int, world_size: int) -> Objective:
        world = {"num_samples": num_samples, "rank": rank, "world_size": world_size}
        objective = Objective(self.spec.build(self.options, **world), self._base_needs, self.weight)
        for term, weight, options in self.terms:
            objective.add_term(term.name, term.build(options, **world), term.needs_for(options), weight)
        return objective


def _weight(term: str, given: Any) -> Weight:
    try:
        return parse_weight(given)
    except ValueError as error:
        raise UserError(
            f"--loss-term {term}={given}: the weight must be a number >= 0, or a line over training such as 0:0.5, or "
            "0:0.5@0.2 over its first fifth"
        ) from error


__all__ = ["Objective", "ObjectivePlan", "create_loss"]
