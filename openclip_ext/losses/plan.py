"""From names and options to a loss with its terms."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from openclip_ext.errors import UserError
from openclip_ext.losses.base import Loss
from openclip_ext.losses.context import LossContext
from openclip_ext.losses.objective import Objective
from openclip_ext.losses.weights import Weight, parse_weight
from openclip_ext.options import build_options
from openclip_ext.registry import TERMS, LossSpec, get_spec

#: Hooks that are called on a `Loss` alone.
_CALLED = ("begin_step", "commit", "warm_start")


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

    def __init__(
        self, name: str, options: Mapping[str, Any], terms: Mapping[str, Mapping[str, Any]] | None = None,
        flag: str = "--loss-arg", weight: float = 1.0,
    ) -> None:  # fmt: skip
        self.weight = weight
        self.spec = get_spec(name)
        self.options = build_options(self.spec.options, options, f"loss {name}", flag)
        self.terms: list[tuple[LossSpec, Weight, Any]] = []
        for term_name, term_options in (terms or {}).items():
            term, given = get_spec(term_name, TERMS, flag="--loss-term"), dict(term_options)
            weight_of_term = _weight(term_name, given.pop("weight", 1.0))
            built = build_options(term.options, given, f"loss term {term_name}", f"--loss-term {term_name}")
            self.terms.append((term, weight_of_term, built))

    @property
    def needs(self) -> frozenset[str]:
        """What the loop must provide; see `openclip_ext.registry.NEEDS`."""
        return self._base_needs.union(*(term.needs_for(options) for term, _, options in self.terms))

    @property
    def _base_needs(self) -> frozenset[str]:
        return self.spec.needs_for(self.options)

    def build(self, context: LossContext, *, base: bool = True, terms: bool = True) -> Objective:
        """The loss with its terms, on the context's device.

        Args:
            context: see `LossContext`.
            base, terms: False: leave out the loss, or its terms, for who calls them on other features.

        Raises:
            UserError: the context lacks something that a part needs, or there is no room for a part's state.
        """
        if "num_samples" in self.needs:
            context.require_num_samples(f"loss {self.spec.name}")
        loss = self._part(self.spec, self.options, context) if base else None
        needs = self._base_needs if base else frozenset()
        objective = Objective(self.spec.name, loss, needs, context, self.weight)
        for term, weight, options in self.terms if terms else ():
            objective.add_term(term.name, self._part(term, options, context), term.needs_for(options), weight)
        return objective.to(context.device)

    @staticmethod
    def _part(spec: LossSpec, options: Any, context: LossContext) -> nn.Module:
        part = spec.build(options, context)
        if not isinstance(part, nn.Module):
            kind = type(part).__name__
            raise UserError(
                f"{spec.name}: package {spec.package} builds a {kind}, not a torch.nn.Module; ask its author"
            )
        if not isinstance(part, Loss) and (hooks := [hook for hook in _CALLED if hasattr(part, hook)]):
            raise UserError(
                f"{spec.name}: its package {spec.package} builds a {type(part).__name__} with {hooks[0]}(), which "
                "nobody would call: derive it from openclip_ext.Loss"
            )
        return part


def _weight(term: str, given: Any) -> Weight:
    try:
        return parse_weight(given)
    except ValueError as error:
        raise UserError(
            f"--loss-term {term}={given}: the weight must be a number >= 0, or a line over training such as 0:0.5, or "
            "0:0.5@0.2 over its first fifth"
        ) from error
