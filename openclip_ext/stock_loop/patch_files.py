"""Patch files: one per version of OpenCLIP, in `patches/` and in the installed package.

A patch is a unified diff, below lines that say which version it is for and the SHA-256 of every file it touches, before
and after; `scripts/make_patch.py` writes them. So a file is either exactly the original, exactly the result, or
something else, which is left alone.
"""

import dataclasses
import functools
import hashlib
import re
from pathlib import Path

from openclip_ext.errors import UserError

NONE = "none"  # in place of a digest: there is no file

_VERSION = re.compile(rb"^Version: (\S+)(?: at commit (\w+))?$", re.MULTILINE)
_DIGESTS = re.compile(rb"^sha256: (\w+) -> (\w+) (\S+)$", re.MULTILINE)
_FILE = re.compile(rb"^--- \S+\n\+\+\+ b/", re.MULTILINE)
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@")


@dataclasses.dataclass(frozen=True)
class FilePatch:
    """What a patch does to one file.

    Attributes:
        path: relative to the folder that holds OpenCLIP's packages.
        before, after: SHA-256 of the file, `NONE` where there is none.
        hunks: (lines of the file before it, lines each marked ` `, `-` or `+`).
    """

    path: str
    before: str
    after: str
    hunks: tuple[tuple[int, tuple[bytes, ...]], ...]

    def applied_to(self, original: bytes) -> bytes:
        """The file after it. Raises UserError: the patch is damaged, or not for this file."""
        old, new, position = original.splitlines(keepends=True), [], 0
        for start, lines in self.hunks:
            new += old[position:start]
            kept = [line[1:] for line in lines if line[:1] != b"+"]
            position = start + len(kept)
            if old[start:position] != kept:
                raise UserError(f"{self.path}: line {start + 1} is not what the patch says; reinstall openclip-ext")
            new += [line[1:] for line in lines if line[:1] != b"-"]
        result = b"".join(new + old[position:])
        if digest(result) != self.after:
            raise UserError(f"{self.path}: the patch gives another file than it says; reinstall openclip-ext")
        return result


@dataclasses.dataclass(frozen=True)
class Patch:
    """A patch for one version of OpenCLIP.

    Attributes:
        name: of its file.
        version: of OpenCLIP, as in `open_clip.__version__`.
        commit: of OpenCLIP's repository, None where the version tells enough.
        files: what it touches.
        text: the whole file.
    """

    name: str
    version: str
    commit: str | None
    files: tuple[FilePatch, ...]
    text: bytes

    @property
    def supported(self) -> str:
        """The version with its commit, in words."""
        return f"{self.version} at commit {self.commit}" if self.commit else self.version


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def parse_patch(name: str, text: bytes) -> Patch:
    """A patch from the content of its file."""
    hunks: dict[str, list] = {}
    header, *parts = _FILE.split(text)
    for part in parts:
        path, *lines = part.splitlines(keepends=True)
        hunks[path.strip().decode()] = _hunks(lines)
    files = tuple(
        FilePatch(path.decode(), before.decode(), after.decode(), tuple(hunks[path.decode()]))
        for before, after, path in _DIGESTS.findall(header)
    )
    found = _VERSION.search(header)
    assert found, f"{name} does not say for which version it is"
    version, commit = found.groups()
    return Patch(name, version.decode(), commit.decode() if commit else None, files, text)


def _hunks(lines: list[bytes]) -> list[tuple[int, tuple[bytes, ...]]]:
    hunks: list[tuple[int, list[bytes]]] = []
    for line in lines:
        if match := _HUNK.match(line):
            start, length = int(match[1]), int(match[2] or 1)
            hunks.append((start - 1 if length else start, []))
        else:
            hunks[-1][1].append(line)
    return [(start, tuple(content)) for start, content in hunks]


@functools.cache
def patches() -> tuple[Patch, ...]:
    """All that this package brings, by version."""
    here = Path(__file__).parent.parent
    folder = here / "_patches" if (here / "_patches").is_dir() else here.parent / "patches"
    found = (parse_patch(path.name, path.read_bytes()) for path in folder.glob("*.patch"))
    return tuple(sorted(found, key=lambda patch: patch.version))
