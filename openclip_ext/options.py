"""Flags, and typed options of a loss: declared as a dataclass, parsed from `key=value`, checked, printed."""

import argparse
import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from openclip_ext.errors import UserError

_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag in one line, without a usage text of a hundred flags, and says what was meant."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does, but there are no unknown ones. Raises UserError."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return namespace, unknown

    def _meant(self, unknown: list[str]) -> str:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        given = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        meant = [near[0] for word in given if (near := difflib.get_close_matches(word, flags, n=1, cutoff=0.7))]
        return f"; did you mean {' '.join(meant)}?" if meant else ""


def require_use(flags: argparse.Namespace, given: Collection[str], needs: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError: a flag is given, and no other that it has a use with.

    Args:
        flags: all of them.
        given: names of those that are looked at.
        needs: by name others, of which one must be on; of `name=value` its value must be, or include, that one.
    """
    for name, others in needs.items():
        if name in given and not any(_is_on(flags, *other.split("=")) for other in others):
            value = getattr(flags, name)
            words = " ".join(map(str, value)) if isinstance(value, list) else value
            one = "it" if len(others) == 1 else "one"
            known = " or ".join(_as_flag(*other.split("=")) for other in others)
            raise UserError(f"{_as_flag(name, words)}: is for {known}; add {one}, or drop the flag")


def _is_on(flags: argparse.Namespace, name: str, wanted: str | None = None) -> bool:
    value = getattr(flags, name, None)
    if wanted is None:
        return bool(value)
    return wanted in value if isinstance(value, list) else value == wanted


def _as_flag(name: str, value: Any = None) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None else f"{flag} {value}"


def option(default: Any, meaning: str, *, allowed: str = "", check: Callable[[Any], bool] | None = None) -> Any:
    """Declare one field of an options dataclass.

    Args:
        default: the value when nothing is given; it must pass `check`.
        meaning: what the option does, in one line; printed by `openclip-ext losses NAME`.
        allowed: the accepted range in words, for error messages, such as "in (0, 1]".
        check: returns whether a value of the right type is accepted.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, "allowed": allowed, "check": check})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """For a loss without options."""


def describe_options(options_type: type) -> list[dict[str, Any]]:
    """Name, type, default, accepted values and meaning of each option, in the order of declaration."""
    hints = typing.get_type_hints(options_type)
    return [
        {
            "name": field.name,
            "type": _type_name(hints[field.name]),
            "default": field.default,
            "allowed": _allowed(hints[field.name], field.metadata.get("allowed", "")),
            "meaning": field.metadata.get("meaning", ""),
        }
        for field in dataclasses.fields(options_type)
    ]


def parse_assignments(assignments: Iterable[str], flag: str, example: str = "gamma=0.5") -> dict[str, str]:
    """Split `key=value` strings as given to `flag`. Raises UserError where there is no `=` or a key comes twice."""
    values: dict[str, str] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise UserError(f"{flag} {assignment}: expected key=value, such as {flag} {example}")
        if key in values:
            raise UserError(f"{flag} {assignment}: {key} is given twice; keep one")
        values[key] = value
    return values


def parse_terms(assignments: Iterable[str]) -> dict[str, dict[str, str]]:
    """`NAME=WEIGHT[,KEY=VALUE…]` strings to {name: {"weight": …, key: value}}.

    Raises:
        UserError: no weight, or a term given twice.
    """
    terms: dict[str, dict[str, str]] = {}
    for assignment in assignments:
        head, *options = assignment.split(",")
        name, _, weight = head.partition("=")
        if not name or not weight:
            raise UserError(f"--loss-term {assignment}: expected NAME=WEIGHT, such as --loss-term {name}=0.5")
        if name in terms:
            raise UserError(f"--loss-term {assignment}: {name} is given twice; keep one")
        terms[name] = {"weight": weight} | parse_assignments(options, f"--loss-term {name}")
    return terms


def build_options(options_type: type, values: Mapping[str, Any], owner: str, flag: str = "option") -> Any:
    """An instance of `options_type` from strings or typed values.

    Args:
        options_type: a keyword-only dataclass whose fields come from `option`.
        values: option name to value; strings are converted to the declared type.
        owner: whose options these are, for error messages, such as "loss gamma_decomp".
        flag: how the values were given, for error messages.

    Raises:
        UserError: an unknown name, a value of the wrong type, or one outside of the accepted range.
    """
    hints = typing.get_type_hints(options_type)
    fields = {field.name: field for field in dataclasses.fields(options_type)}
    converted = {}
    for name, value in values.items():
        if name not in fields:
            known = ", ".join(fields) or "none: it takes no options"
            raise UserError(f"{flag} {name}={value}: {owner} has no option {name!r}; its options: {known}")
        metadata = fields[name].metadata
        try:
            converted[name] = _convert(value, hints[name])
            accepted = metadata.get("check") is None or metadata["check"](converted[name])
        except (ValueError, TypeError):
            accepted = False
        if not accepted:
            wanted = f"{_type_name(hints[name])} {_allowed(hints[name], metadata.get('allowed', ''))}".strip()
            raise UserError(
                f"{flag} {name}={value}: {name} of {owner} must be {wanted} (default {fields[name].default})"
            )
    return options_type(**converted)


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _convert(value: Any, wanted: Any) -> Any:
    """`value` as `wanted`: a plain type, a Literal, or a union of those and None."""
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        parts = [part for part in typing.get_args(wanted) if part is not type(None)]
        for part in sorted(parts, key=lambda part: not _is_literal(part)):
            with contextlib.suppress(ValueError, TypeError):
                return _convert(value, part)
        raise ValueError(value)
    if typing.get_origin(wanted) is typing.Literal:
        for choice in typing.get_args(wanted):
            if str(choice) == str(value):
                return choice
        raise ValueError(value)
    if wanted is bool:
        return value if isinstance(value, bool) else _BOOLEANS[_lowered(value)]
    if isinstance(value, bool):
        raise TypeError(value)
    if wanted is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    number = wanted(value)
    if wanted is float and number != number:
        raise ValueError(value)
    return number


def _lowered(value: Any) -> str:
    lowered = str(value).lower()
    if lowered not in _BOOLEANS:
        raise ValueError(value)
    return lowered


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of"
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_part_name(part) for part in typing.get_args(hint))
    return hint.__name__


def _part_name(part: Any) -> str:
    if typing.get_origin(part) is typing.Literal:
        return " or ".join(map(str, typing.get_args(part)))
    return "none" if part is type(None) else part.__name__


def _allowed(hint: Any, declared: str) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(str(choice) for choice in typing.get_args(hint))
    return declared
