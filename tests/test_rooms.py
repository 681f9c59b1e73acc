"""The package's modules import downward only, and never in a circle.

A room is a folder at the package's root, or a module there. `ROOMS` is their order; a module imports from its own room
or from one below. Imports inside functions and under `TYPE_CHECKING` count: they are arrows all the same.
"""

import ast
import graphlib
from collections import defaultdict
from pathlib import Path

import pytest

import openclip_ext

PACKAGE = Path(openclip_ext.__file__).parent
NAME = "openclip_ext"

#: From top to bottom. `__init__` is the public face: it shows what is below to others than this package.
ROOMS = [
    "__main__", "cli", "__init__", "commands", "stock_loop", "testing", "training", "evaluation", "report", "data",
    "fusion", "terms", "losses", "state", "upstream", "ops", "registry", "options", "processes", "files", "redact",
    "errors",
]  # fmt: skip

#: `LossSpec.host`, which patched copies of OpenCLIP's loop call: a record knows its way into another loop.
ALLOWED = ("registry", "stock_loop.hosting")

AT_THE_ROOT = {
    "__init__.py",
    "__main__.py",
    "cli.py",
    "errors.py",
    "files.py",
    "redact.py",
    "registry.py",
    "options.py",
    "processes.py",
}


def sources(package):
    """{name below the package, a folder's own ending in `__init__`: source} of every module."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path.read_text()
        for path in sorted(package.rglob("*.py"))
    }


def arrows(modules):
    """(importer, imported) for every import of one module by another."""

    def module_of(name):
        """The module that a dotted name below the package means: itself, or the one it is an attribute of."""
        for known in (name, f"{name}.__init__".lstrip(".")):
            if known in modules:
                return known
        return module_of(name.rpartition(".")[0])

    found = set()
    for importer, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Import():
                    names = [alias.name for alias in node.names]
                case ast.ImportFrom(level=0, module=str(module)):
                    names = [f"{module}.{alias.name}" for alias in node.names]
                case ast.ImportFrom():
                    raise AssertionError(f"{importer}: write imports within the package in full")
                case _:
                    continue
            for name in names:
                head, _, rest = name.partition(".")
                if head == NAME:
                    found.add((importer, module_of(rest)))
    return found


def room(module):
    return module.partition(".")[0]


def upward(arrows):
    """The arrows that go up the order of rooms, as lines to read."""
    return sorted(f"{a} imports {b}" for a, b in arrows if ROOMS.index(room(b)) < ROOMS.index(room(a)))


def circles(arrows):
    """Of every folder, one circle among what lies in it, if there is any: modules, and folders as a whole."""
    inside = defaultdict(lambda: defaultdict(set))
    for importer, imported in arrows:
        a, b = importer.split("."), imported.split(".")
        depth = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if depth is not None:
            inside[".".join(a[:depth])][a[depth]].add(b[depth])
    found = []
    for folder, imports in sorted(inside.items()):
        try:
            graphlib.TopologicalSorter(imports).prepare()
        except graphlib.CycleError as error:
            found.append(f"{folder or NAME}: {' -> '.join(error.args[1])}")
    return found


def test_every_import_of_the_package_goes_down_and_none_goes_round():
    found = arrows(sources(PACKAGE))
    assert ALLOWED in found, "the exception is gone: take it out of this test"
    assert upward(found - {ALLOWED}) == []
    assert circles(found - {ALLOWED}) == []


def test_the_packages_root_holds_rooms_and_seven_modules():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files == AT_THE_ROOT
    assert folders | {name.removesuffix(".py") for name in files} == set(ROOMS)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({"losses.dcl": "from openclip_ext.ops.pairs import mean", "ops.pairs": "import torch"}, []),
        ({"ops.pairs": "from openclip_ext.losses.dcl import Dcl", "losses.dcl": ""}, ["ops.pairs imports losses.dcl"]),
        ({"ops.pairs": "import openclip_ext.losses.dcl", "losses.dcl": ""}, ["ops.pairs imports losses.dcl"]),
        ({"ops.pairs": "from openclip_ext.losses import dcl", "losses.dcl": ""}, ["ops.pairs imports losses.dcl"]),
        ({"ops.gram": "from openclip_ext.terms import f", "terms.__init__": ""}, ["ops.gram imports terms.__init__"]),
        ({"ops.pairs": "from openclip_ext import create_loss", "__init__": ""}, ["ops.pairs imports __init__"]),
        ({"errors": "def f():\n    import openclip_ext.files", "files": ""}, ["errors imports files"]),
        ({"errors": "if TYPE_CHECKING:\n    import openclip_ext.files", "files": ""}, ["errors imports files"]),
    ],
)  # fmt: skip
def test_an_arrow_up_is_seen(modules, expected):
    assert upward(arrows(modules)) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({("data.rows", "data.tar"), ("data.pack", "data.rows"), ("data.pack", "data.tar")}, []),
        ({("data.rows", "data.tar"), ("data.tar", "data.rows")}, ["data: "]),
        ({("data.rows", "data.tar"), ("data.tar", "data.pack"), ("data.pack", "data.rows")}, ["data: "]),
        ({("data.__init__", "data.tar"), ("data.tar", "data.__init__")}, ["data: "]),
        ({("evaluation.tasks.probes", "evaluation.metrics.probes"),
          ("evaluation.metrics.structure", "evaluation.tasks.__init__")}, ["evaluation: "]),
        ({("state.table", "ops.pairs"), ("ops.gather", "state.bank")}, ["openclip_ext: "]),
    ],
)  # fmt: skip
def test_a_circle_is_seen(found, expected):
    assert [line[: line.index(": ") + 2] for line in circles(found)] == expected


def test_a_relative_import_is_refused():
    with pytest.raises(AssertionError, match="data.rows: write imports within the package in full"):
        arrows({"data.rows": "from .tar import f", "data.tar": ""})
