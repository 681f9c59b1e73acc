"""Which losses and loss terms exist: records that installed packages declare through entry points.

A package registers a loss by an entry point in the group `open_clip.losses` (a term: `open_clip.loss_terms`) that
names a `LossSpec`. Nothing is imported until a spec is asked for.
"""

import dataclasses
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from openclip_ext.errors import UserError
from openclip_ext.options import NoOptions

if TYPE_CHECKING:
    from openclip_ext.stock_loop.hosting import Hosting

LOSSES = "open_clip.losses"
TERMS = "open_clip.loss_terms"
_KIND = {LOSSES: "loss", TERMS: "loss term"}

#: What a loss may ask of the loop and of the data pipeline; what none asks for is not computed.
NEEDS = frozenset(
    {
        "sample_ids",
        "logit_bias",
        "teacher_features",
        "caption_logits",
        "image_aug",
        "text_aug",
        "trunk_features",
        "stored_features",
    }  # fmt: skip
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpec:
    """One loss, or one additive term, as listed and built by name.

    Attributes:
        name: what follows `--loss`; equal to the name of the entry point.
        summary: what it does, in one line.
        build: `build(options, *, num_samples, rank, world_size) -> torch.nn.Module`; a class with this signature does.
        options: keyword-only dataclass whose fields are declared by `openclip_ext.option`.
        paper: where it was published.
        needs: a subset of `NEEDS`, what its forward must be given beyond features and logit scale; or a function of
            the options that returns one.
        package: the distribution that provides it; filled in by the registry.
    """

    name: str
    summary: str
    build: Callable[..., Any]
    options: type = NoOptions
    paper: str = ""
    needs: frozenset[str] | Callable[[Any], frozenset[str]] = frozenset()
    package: str = ""

    def __post_init__(self) -> None:
        self.needs_for(self.options())

    def needs_for(self, options: Any) -> frozenset[str]:
        """What it needs with these options. Raises ValueError: something that nobody can provide."""
        needs = frozenset(self.needs(options) if callable(self.needs) else self.needs)
        unknown = needs - NEEDS
        if unknown:
            raise ValueError(f"loss {self.name!r} needs {sorted(unknown)}; what can be provided: {sorted(NEEDS)}")
        return needs

    def host(self, args: Any) -> "Hosting":
        """This loss with its options and terms in another training loop than ours, checked, not yet built.

        All that such a loop has to know: look `--loss` up in the entry points, call this, and do what `Hosting` says.

        Args:
            args: the loop's parsed flags: OpenCLIP's, and `loss`, `loss_arg` (a list of `KEY=VALUE`) and `loss_term`
                (a list of `NAME=WEIGHT[,KEY=VALUE…]`).

        Raises:
            UserError: unknown name or option, a value that is not accepted, or flags that do not go together.
        """
        from openclip_ext.stock_loop.hosting import Hosting

        return Hosting(args)


def registered_names(group: str = LOSSES) -> list[str]:
    """Names of all registered losses (or terms, with `group=TERMS`), sorted, without importing any of them."""
    return sorted({point.name for point in entry_points(group=group)})


def get_spec(name: str, group: str = LOSSES, flag: str = "--loss") -> LossSpec:
    """The spec registered as `name`.

    Raises:
        UserError: no package registers it, two packages do, or the one that does fails to import.
    """
    points = _distinct(point for point in entry_points(group=group) if point.name == name)
    if not points:
        names = ", ".join(registered_names(group)) or "none; is the package installed (pip install openclip-ext)?"
        raise UserError(f"{flag} {name}: no such {_KIND[group]}; registered: {names}")
    if len(points) > 1:
        packages = " and ".join(sorted(_package(point) for point in points))
        raise UserError(
            f"{flag} {name}: registered by two packages, {packages}; uninstall one, or ask its author to rename it"
        )
    return _load(points[0], flag)


def all_specs(group: str = LOSSES) -> tuple[dict[str, LossSpec], dict[str, str]]:
    """Every usable spec by name, and for every unusable name the reason in one line."""
    specs, broken = {}, {}
    for name in registered_names(group):
        try:
            specs[name] = get_spec(name, group)
        except UserError as error:
            broken[name] = str(error)
    return specs, broken


def _load(point: EntryPoint, flag: str) -> LossSpec:
    try:
        spec = point.load()
    except Exception as error:  # a stranger's module may raise anything at import
        raise UserError(
            f"{flag} {point.name}: package {_package(point)} fails to import ({type(error).__name__}: {error}); "
            f"reinstall or update it"
        ) from error
    if not isinstance(spec, LossSpec):
        raise UserError(
            f"{flag} {point.name}: entry point {point.value} of package {_package(point)} is a {type(spec).__name__}, "
            f"not an openclip_ext.LossSpec"
        )
    if spec.name != point.name:
        raise UserError(
            f"{flag} {point.name}: package {_package(point)} registers a spec named {spec.name!r} under this name; "
            f"the two must agree"
        )
    return dataclasses.replace(spec, package=_package(point))


def _distinct(points) -> list[EntryPoint]:
    """One entry point per distribution: a package found twice on the path is still one package."""
    return list({(_package(point), point.value): point for point in points}.values())


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]
