"""How it is learned: a loss, its options, and the number of pairs that accumulation makes of a batch."""

import dataclasses
from typing import Any

from runs.methods import SHORT, parse_method

from openclip_ext import create_loss
from openclip_ext.errors import UserError
from openclip_ext.losses import Objective
from openclip_ext.registry import TERMS, get_spec, registered_names

from .tasks import EMBED

#: Losses that keep nothing from step to step: what a memory has to beat.
STATELESS = ("clip", "dcl", "batch_corrected")

#: What terms need to know of a model, by which a method's terms are checked before any run.
_MODEL: dict[str, Any] = {"image_trunk_dim": EMBED, "vocab_size": 2, "special_token_ids": {0, 1}}


@dataclasses.dataclass(frozen=True)
class Method:
    """What `NAME[+OPTION=VALUE…]` says.

    An option is one of the loss, by its name or as in `SHORT`; a loss term with its weight; or `accumulate`, the pairs
    of one optimizer step, made of batches that are encoded twice.
    """

    text: str

    def __post_init__(self) -> None:
        self.build(num_samples=64)

    @property
    def name(self) -> str:
        return parse_method(self.text)[0]

    @property
    def options(self) -> dict[str, str]:
        return parse_method(self.text)[1]

    @property
    def terms(self) -> list[str]:
        """Names of its loss terms."""
        return [name for name in registered_names(TERMS) if name in self.options]

    @property
    def without_recent(self) -> str | None:
        """The same method without recent pairs; None: it has none."""
        options = get_spec(self.name).options
        default = getattr(options, "recent_batches", 0)
        if int(self.options.get("recent_batches", default)) == 0:
            return None
        parts = self.text.split("+")
        rest = [part for part in parts if part.partition("=")[0] not in (*SHORT, *SHORT.values())]
        return "+".join(rest + ["recent=0"] * (default > 0))

    @property
    def stateless(self) -> bool:
        return self.text in STATELESS

    def pairs_per_step(self, batch_size: int) -> int:
        """Pairs of one optimizer step, of batches of `batch_size`."""
        return int(self.options.get("accumulate", batch_size))

    def build(self, num_samples: int, embed_dim: int = EMBED) -> Objective:
        """The loss. Raises UserError: no such loss, option or value."""
        options: dict[str, Any] = dict(self.options)
        if not options.pop("accumulate", "1").isdigit():
            raise UserError(f"--methods {self.text}: accumulate must be a number of pairs, such as accumulate=1024")
        terms = {name: {"weight": options.pop(name)} for name in self.terms}
        return create_loss(self.name, num_samples=num_samples, embed_dim=embed_dim, terms=terms, **_MODEL, **options)
