"""Patching OpenCLIP's own source: what is there, applying the patch for it, and taking it back."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from openclip_ext.errors import UserError
from openclip_ext.stock_loop.patch_files import NONE, FilePatch, Patch, digest, patches

PACKAGE = "open_clip_train"
#: Beside the patched files: the originals.
BACKUP = f"{PACKAGE}/.openclip_ext_backup"


@dataclasses.dataclass(frozen=True)
class Target:
    """OpenCLIP's source as found.

    Attributes:
        root: the folder that holds `open_clip_train/`.
        version: None: the folder does not tell.
        patch: the one whose files these are, in whatever state; None: there is none.
        state: `clean`, `applied`, or, with a reason, what else.
    """

    root: Path
    version: str | None
    patch: Patch | None
    state: str

    @property
    def backup(self) -> Path:
        return self.root / BACKUP

    def __str__(self) -> str:
        return f"OpenCLIP {self.version or 'of unknown version'} in {self.root}"


def find_target(folder: str | None = None) -> Target:
    """OpenCLIP in a folder or a source checkout, or, without one, the installed one, which is not imported.

    Raises:
        UserError: it is not there.
    """
    if folder is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise UserError(f"{PACKAGE} is not installed; pip install open_clip_torch, or name a copy with --target")
        return _examine(Path(spec.origin).parent.parent)
    for root in (Path(folder), Path(folder, "src")):
        if (root / PACKAGE / "main.py").is_file():
            return _examine(root)
    raise UserError(f"--target {folder}: holds neither {PACKAGE}/ nor src/{PACKAGE}/; name the folder that does")


def _examine(root: Path) -> Target:
    try:
        found = re.search(r"__version__ = ['\"](.+?)['\"]", (root / "open_clip/version.py").read_text())
    except OSError:  # a copy of the training package alone
        found = None
    version = found and found[1]
    patch = max(
        (patch for patch in patches() if version in (None, patch.version) and _known(root, patch)),
        key=lambda patch: _known(root, patch),
        default=None,
    )
    if patch is None:
        return Target(root, version, None, "not supported")
    return Target(root, patch.version, patch, _state(root, patch))


def _known(root: Path, patch: Patch) -> int:
    """How many of the files are as before or after the patch."""
    return sum(_digest_of(root / file.path) in (file.before, file.after) for file in patch.files if file.before != NONE)


def _state(root: Path, patch: Patch) -> str:
    found = {file: _digest_of(root / file.path) for file in patch.files}
    if all(sha256 == file.before for file, sha256 in found.items()):
        return "clean"
    if all(sha256 == file.after for file, sha256 in found.items()):
        return "applied"
    modified = [file.path for file, sha256 in found.items() if sha256 not in (file.before, file.after)]
    return f"modified ({', '.join(modified)})" if modified else "half applied"


def _digest_of(path: Path) -> str:
    return digest(path.read_bytes()) if path.is_file() else NONE


def apply(target: Target) -> Patch:
    """Patch it, wholly or not at all; the originals are kept beside it.

    Raises:
        UserError: it is not as the patch expects it, or cannot be written to.
    """
    patch = _require(target, "clean")
    contents = {file.path: file.applied_to(_original(target.root, file)) for file in patch.files}
    try:
        _back_up(target, patch)
        try:
            _replace(target.root, contents)
        except BaseException:
            if _state(target.root, patch) == "clean":
                shutil.rmtree(target.backup)
            raise
    except OSError as error:
        raise _unwritable(target, patch, error) from error
    return patch


def _unwritable(target: Target, patch: Patch, error: OSError) -> UserError:
    """What became of the files, which may have failed to be put back too."""
    if _state(target.root, patch) == target.state != "half applied":
        return UserError(f"{target}: cannot be written to, nothing was changed ({error})")
    return UserError(
        f"{target}: could be written to only in part ({error}); the originals are in {target.backup}: put them back "
        f"with: openclip-ext patch revert --target {target.root}"
    )


def _original(root: Path, file: FilePatch) -> bytes:
    return (root / file.path).read_bytes() if file.before != NONE else b""


def revert(target: Target) -> Patch:
    """Put the originals back, byte for byte, and remove what the patch added, the backup too.

    Raises:
        UserError: it is not patched, was changed since, there is no backup, or it cannot be written to.
    """
    patch = _require(target, "applied", "half applied")
    kept = {file.path: target.backup / file.path for file in patch.files if file.before != NONE}
    if not all(path.is_file() for path in kept.values()):
        raise UserError(
            f"{target}: there is no backup in {target.backup}; take the patch back with: openclip-ext patch diff "
            f"--target {target.root} | patch -R -p1 -d {target.root}, or reinstall OpenCLIP"
        )
    damaged = [file.path for file in patch.files if _digest_of(target.backup / file.path) != file.before]
    if damaged:
        raise UserError(f"{target}: the backup of {', '.join(damaged)} is not the original; reinstall OpenCLIP")
    contents: dict[str, bytes | None] = {file.path: None for file in patch.files}
    contents |= {name: path.read_bytes() for name, path in kept.items()}
    try:
        _replace(target.root, contents)
    except OSError as error:
        raise _unwritable(target, patch, error) from error
    shutil.rmtree(target.backup, ignore_errors=True)
    return patch


def _require(target: Target, *states: str) -> Patch:
    """Its patch. Raises UserError: there is none, or it is in another state."""
    if target.patch is None:
        raise UserError(unsupported(target))
    if target.state in states:
        return target.patch
    remedy = {
        "applied": "it is patched already; nothing to do",
        "clean": "it is not patched; nothing to revert",
        "half applied": "a patch was interrupted; put the originals back with: openclip-ext patch revert --target "
        f"{target.root}",
    }.get(target.state, f"{target.state}; supported are unchanged files of {_supported()}: reinstall it, or use a copy")
    raise UserError(f"{target}: {remedy}")


def unsupported(target: Target) -> str:
    """Why there is no patch for it, and what there is."""
    for patch in patches():
        if patch.version == target.version:
            return (
                f"{target}: its files differ from those of {patch.supported} (another commit, or line endings that git "
                f"converted: core.autocrlf); supported are unchanged files of {_supported()}"
            )
    return f"{target}: no patch for it; supported: {_supported()}"


def _supported() -> str:
    return ", ".join(patch.supported for patch in patches())


def _back_up(target: Target, patch: Patch) -> None:
    """Keep the originals: in place only once complete."""
    partial = target.backup.with_name(target.backup.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for file in patch.files:
            if file.before != NONE:
                (partial / file.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(target.root / file.path, partial / file.path)
        shutil.rmtree(target.backup, ignore_errors=True)  # of a patch that was not reverted but overwritten
        os.replace(partial, target.backup)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace(root: Path, contents: Mapping[str, bytes | None]) -> None:
    """Give files a new content, or with None remove them; after an exception all that can be written are as before."""
    before = {name: (root / name).read_bytes() if (root / name).exists() else None for name in contents}
    done = []
    try:
        written = {
            name: _write_beside(root / name, content) for name, content in contents.items() if content is not None
        }
        for name in contents:
            done.append(name)
            _put(root / name, written.get(name))
    except BaseException:
        for name in done:
            with contextlib.suppress(OSError):
                content = before[name]
                _put(root / name, None if content is None else _write_beside(root / name, content))
        raise
    finally:
        for name in contents:
            with contextlib.suppress(OSError):
                _beside(root / name).unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.openclip_ext_new")


def _write_beside(path: Path, content: bytes) -> Path:
    new = _beside(path)
    new.write_bytes(content)
    if path.exists():
        shutil.copymode(path, new)
    return new


def _put(path: Path, new: Path | None) -> None:
    if new is None:
        path.unlink(missing_ok=True)
    else:
        os.replace(new, path)
