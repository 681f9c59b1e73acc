"""`scripts/setup.sh` and `scripts/installed.py`: what is installed already is not installed again."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def installed():
    spec = importlib.util.spec_from_file_location("installed", SCRIPTS / "installed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(installed, tmp_path, monkeypatch):
    """A function that makes a package of these entry points look installed, in place, from a folder."""

    def make(entry_points, folder=installed.ROOT, editable=True):
        site = tmp_path / "site" / "made_up-1.0.dist-info"
        site.mkdir(parents=True, exist_ok=True)
        (site / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        (site / "entry_points.txt").write_text(entry_points)
        origin = {"dir_info": {"editable": editable}, "url": Path(folder).as_uri()}
        (site / "direct_url.json").write_text(json.dumps(origin))
        monkeypatch.syspath_prepend(str(site.parent))

    return make


PROJECT = {
    "name": "made-up",
    "dependencies": ["numpy", "torch>=2"],
    "optional-dependencies": {"test": ["pytest>=8"], "more": ["no-such-package-at-all>=1", "numpy>=999"]},
    "scripts": {"made-up": "a.b:main"},
    "entry-points": {"open_clip.losses": {"x": "a.x:SPEC"}},
}
ENTRIES = "[console_scripts]\nmade-up = a.b:main\n[open_clip.losses]\nx = a.x:SPEC\n"


def test_nothing_is_missing_where_all_is_there_whatever_else_is(installed, package):
    package(ENTRIES)
    assert installed.missing(PROJECT, []) == []
    assert installed.missing(PROJECT, ["test"]) == []


def test_what_is_missing_is_named(installed, package, tmp_path):
    assert installed.missing(PROJECT, []) == ["made-up"]
    package(ENTRIES)
    assert installed.missing(PROJECT, ["test", "more"]) == ["no-such-package-at-all>=1", "numpy>=999"]
    package("[console_scripts]\nmade-up = a.b:main\n")
    assert installed.missing(PROJECT, []) == ["entry point x"]
    package(ENTRIES, folder=tmp_path)
    assert installed.missing(PROJECT, []) == ["made-up of this folder"]
    package(ENTRIES, editable=False)
    assert installed.missing(PROJECT, []) == ["made-up of this folder"]


#: What is asked for where it is missing: by extras, or by who has shards on object storage.
OPTIONAL = {"clip-benchmark", "fsspec", "peft", "transformers"}


def test_what_the_package_imports_is_declared_once(installed):
    project = installed.tomllib.loads((installed.ROOT / "pyproject.toml").read_text())["project"]
    declared = [re.match(r"[\w-]+", line)[0].replace("_", "-") for line in project["dependencies"]]
    assert len(declared) == len(set(declared))
    imported = set()
    for path in (installed.ROOT / "openclip_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    packages = metadata.packages_distributions()
    for name in imported - sys.stdlib_module_names - {"openclip_ext"}:
        known_as = {package.lower().replace("_", "-") for package in packages.get(name, [name.replace("_", "-")])}
        assert known_as & {*declared, *OPTIONAL}, f"{name} is imported and not declared"


def test_a_requirement_of_another_platform_is_none(installed):
    version = metadata.version("numpy")
    for text, expected in (("no-such; sys_platform == 'plan9'", True), (f"numpy=={version}", True),
                           (f"numpy!={version}", False)):  # fmt: skip
        assert installed.satisfied(installed.Requirement(text)) is expected


@pytest.mark.parametrize(
    ("script", "asked", "wanted"), [("test.sh", "test", ".[test]"), ("demo.sh", "", "."), ("demo.sh", "-", None)]
)
def test_the_scripts_install_only_what_is_missing(tmp_path, script, asked, wanted):
    """`bin/python` is one that writes down what it is called with, and lacks something unless `asked` is a dash."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    lacking = 0 if asked == "-" else 1
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" != scripts/installed.py ] || exit {lacking}\n')
    python.chmod(0o755)
    environment = os.environ | {"VENV": str(tmp_path)}
    subprocess.run(["bash", str(SCRIPTS / script), "--flag"], env=environment, check=True, capture_output=True)
    first, *calls, last = (tmp_path / "calls").read_text().splitlines()
    installs = [line for line in calls if "pip install" in line]
    assert first.split() == ["scripts/installed.py", *asked.replace("-", "").split()]
    assert [line.split()[-1] for line in installs] == ([wanted] if wanted else [])
    assert last.endswith("--flag")
