"""`openclip-ext losses`."""

import argparse
import dataclasses
import json
from typing import Any

from openclip_ext.options import describe_options
from openclip_ext.registry import LOSSES, TERMS, LossSpec, all_specs, get_spec, registered_names

HELP = "list the registered losses and terms, or show one with its options"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a loss or term")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    text, data = describe_one(args.name) if args.name else describe_all()
    print(json.dumps(data, indent=1) if args.json else text)
    return 0


def describe_all() -> tuple[str, dict[str, Any]]:
    """Every loss and term: a table, and the same as data."""
    lines: list[str] = []
    data: dict[str, Any] = {}
    for title, key, group in (("losses", "losses", LOSSES), ("loss terms", "terms", TERMS)):
        specs, broken = all_specs(group)
        data[key] = [_as_data(spec) for spec in specs.values()]
        lines += [f"{title}:"] + _table(specs.values()) + [f"  unusable: {reason}" for reason in broken.values()]
        if broken:
            data[f"broken_{key}"] = broken
    lines.append("options of one: openclip-ext losses NAME")
    return "\n".join(lines), data


def describe_one(name: str) -> tuple[str, dict[str, Any]]:
    """One loss or term with its options.

    Raises:
        UserError: there is none of this name.
    """
    is_term = name not in registered_names(LOSSES) and name in registered_names(TERMS)
    spec = get_spec(name, TERMS if is_term else LOSSES, flag="losses")
    flag = f"--loss-term {name}=WEIGHT,KEY=VALUE" if is_term else f"--loss {name} --loss-arg KEY=VALUE"
    lines = [f"{spec.name}: {spec.summary}", f"  paper    {spec.paper}", f"  package  {spec.package}"]
    lines += [f"  needs    {', '.join(_needs(spec)) or 'nothing'}", f"  use      {flag}", "  options"]
    options = describe_options(spec.options)
    for row in options:
        kind = " ".join(part for part in (row["type"], row["allowed"]) if part)
        lines.append(f"    {row['name']} = {row['default']}  ({kind})  {row['meaning']}")
    return "\n".join(lines if options else [*lines[:-1], "  no options"]), _as_data(spec)


def _table(specs) -> list[str]:
    rows = [(spec.name, spec.package, spec.summary) for spec in specs]
    if not rows:
        return ["  none"]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"  {name:<{widths[0]}}  {package:<{widths[1]}}  {summary}" for name, package, summary in rows]


def _as_data(spec: LossSpec) -> dict[str, Any]:
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.name != "build"}
    return fields | {"needs": _needs(spec), "options": describe_options(spec.options)}


def _needs(spec: LossSpec) -> list[str]:
    return sorted(spec.needs_for(spec.options()))
