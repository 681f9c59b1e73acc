"""Whether this checkout is installed with the named extras, as pyproject.toml wants it; exit status 0: it is.

    python scripts/installed.py [EXTRA]...

Looks at what is there, asks no index, and imports nothing of what it looks for.
"""

import sys
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, whose pip brings it
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def missing(project: dict, extras: list[str]) -> list[str]:
    """What is not there, in words."""
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    lines = [line for line in wanted if not satisfied(Requirement(line))]
    try:
        package = metadata.distribution(project["name"])
    except metadata.PackageNotFoundError:
        return [project["name"], *lines]
    if not is_this_checkout(package):
        lines.append(f"{project['name']} of this folder")
    known = {(entry.group, entry.name, entry.value) for entry in package.entry_points}
    named = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    entries = {(group, name, value) for group, values in named.items() for name, value in values.items()}
    return lines + [f"entry point {name}" for _, name, _ in sorted(entries - known)]


def satisfied(requirement: Requirement) -> bool:
    if requirement.marker and not requirement.marker.evaluate():
        return True
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def is_this_checkout(package: metadata.Distribution) -> bool:
    """Whether it was installed in place from this folder."""
    origin = package.read_text("direct_url.json") or ""
    return f'"{ROOT.as_uri()}"' in origin and '"editable": true' in origin


if __name__ == "__main__":
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lacking = missing(content["project"], sys.argv[1:])
    print("\n".join(lacking))
    sys.exit(bool(lacking))
