"""Which losses and loss terms exist: records that installed packages declare through entry points.

A package registers a loss by an entry point in the group `open_clip.losses` (a term: `open_clip.loss_terms`) that
names a `LossSpec`. Nothing is imported until a spec is asked for.
"""

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal

from openclip_ext.errors import UserError
from openclip_ext.options import NoOptions

if TYPE_CHECKING:
    from openclip_ext.stock_loop.hosting import Hosting

LOSSES = "open_clip.losses"
TERMS = "open_clip.loss_terms"
_KIND = {LOSSES: "loss", TERMS: "loss term"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Something that a loss may ask for.

    Attributes:
        meaning: what it is, in words that follow "it needs".
        provider: who has it: `data` (rows of batches), `model`, `loop` (see `openclip_ext.Loss.probe`), `teacher`, or
            `caller` (who encodes samples again).
        arguments: the keyword arguments of a loss's `forward` that hold it; none: it is part of `LossContext`.
        batch_keys: what batches hold for it.
        of_views: whether images alone have it, with two views of each.
        optional: whether `forward` can do without.
    """

    meaning: str
    provider: Literal["data", "model", "loop", "teacher", "caller"]
    arguments: tuple[str, ...] = ()
    batch_keys: tuple[str, ...] = ()
    of_views: bool = False
    optional: bool = False


#: What a loss may ask of the loop and of the data pipeline; what none asks for is not computed.
NEEDS: Mapping[str, Need] = types.MappingProxyType({
    "num_samples": Need(meaning="the number of pairs in the training set", provider="data", of_views=True),
    "sample_ids": Need(
        meaning="the ids of the samples, (B,), from 0 to num_samples - 1", provider="data",
        arguments=("sample_ids",), batch_keys=("sample_ids",), of_views=True,
    ),
    "image_aug": Need(
        meaning="features of second views of the images", provider="data",
        arguments=("image_features_aug",), batch_keys=("image_aug",),
    ),
    "text_aug": Need(
        meaning="features of second views of the texts", provider="data",
        arguments=("text_features_aug",), batch_keys=("text_aug",),
    ),
    "widths": Need(meaning="the widths of the features", provider="model", of_views=True),
    "logit_bias": Need(
        meaning="the model's logit_bias, which one made with init_logit_bias=-10 has", provider="model",
        arguments=("logit_bias",), of_views=True,
    ),
    "vocabulary": Need(meaning="the size and the special ids of the captions' vocabulary", provider="model"),
    "text_tokens": Need(
        meaning="the captions' token ids, (B, L), as the tokenizer pads them", provider="data",
        arguments=("text_tokens",),
    ),
    "trunk_features": Need(
        meaning="the towers' pooled outputs before their projections", provider="model",
        arguments=("image_trunk_features", "text_trunk_features"),
    ),
    "caption_logits": Need(
        meaning="logits and labels of caption tokens, from a CoCa model", provider="model",
        arguments=("logits", "labels"),
    ),
    "teacher_features": Need(
        meaning="features and logit scale of a teacher", provider="teacher",
        arguments=("dist_image_features", "dist_text_features", "dist_logit_scale"),
    ),
    "row_seeds": Need(
        meaning="a number of each sample's own in the epoch, (B,), to draw by", provider="data",
        arguments=("row_seeds",), batch_keys=("row_seeds",),
    ),
    "encoded_again": Need(
        meaning="features of a batch that it asked to keep, encoded again, in some steps", provider="loop",
        arguments=("image_features_again", "text_features_again"), optional=True, of_views=True,
    ),
    "stored_features": Need(
        meaning="embeddings, encoded again, of the samples that the loss's stored_ids names", provider="caller",
        arguments=("stored_features",),
    ),
})  # fmt: skip


def arguments(needs: Iterable[str]) -> set[str]:
    """The keyword arguments of a loss's `forward` that satisfy these needs.

    Who needs both trunk features and the second view of a modality gets the trunk features of that view too.
    """
    needs = frozenset(needs)
    names = {argument for need in needs for argument in NEEDS[need].arguments}
    if "trunk_features" in needs:
        names |= {f"{modality}_trunk_features_aug" for modality in ("image", "text") if f"{modality}_aug" in needs}
    return names


#: Arguments that a loss can do without.
OPTIONAL = frozenset(argument for need in NEEDS.values() if need.optional for argument in need.arguments)


def batch_keys(needs: Iterable[str] = NEEDS) -> set[str]:
    """What batches hold for these needs, besides `image` and `text`."""
    return {key for need in needs for key in NEEDS[need].batch_keys}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpec:
    """One loss, or one additive term, as listed and built by name.

    Attributes:
        name: what follows `--loss`; equal to the name of the entry point.
        summary: what it does, in one line.
        build: `build(options, context) -> torch.nn.Module`, context an `openclip_ext.LossContext`; a class with this
            signature does, such as a subclass of `openclip_ext.Loss`.
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
        unknown = needs - NEEDS.keys()
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
