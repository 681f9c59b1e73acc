"""Files of a run and of tensors: their names, reading them so that nothing in them is run, and folders to write to."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from openclip_ext.errors import UserError

LATEST = "epoch_latest.pt"
JSON_LIMIT = 1 << 26  # bytes: a million shards take half of that in a sizes.json
PARTIAL = ".partial"  # how names of files end that are being written


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[str]:
    """The name of a file to write in the block; it replaces `path` when that ends, and is removed where it fails.

    So `path` is there whole or as it was, after a loss of power too. The name differs between processes: several
    machines may share a folder.
    """
    partial = f"{os.fspath(path)}.{uuid.uuid4().hex[:8]}{PARTIAL}"
    try:
        yield partial
        _to_disk(partial, os.O_RDWR)
        os.replace(partial, path)
        with contextlib.suppress(OSError):  # some systems open no folders; the file itself is on the disk
            _to_disk(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def _to_disk(path: str, flags: int) -> None:
    """Wait until what has been written is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial(folder: str) -> None:
    """Remove what processes that were killed while they wrote have left in a folder that no other one writes to."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if re.fullmatch(rf".*\.[0-9a-f]{{8}}{re.escape(PARTIAL)}", name):
            os.remove(os.path.join(folder, name))


def write_json(content: Any, path: str | os.PathLike) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic(path) as partial, open(partial, "w") as file:
        json.dump(content, file, indent=1)


def parse_json(text: str | bytes) -> Any:
    """What JSON says that may come from elsewhere. Raises ValueError: it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: str | os.PathLike, limit: int = JSON_LIMIT) -> Any:
    """What a JSON file says that may come from elsewhere.

    Raises:
        ValueError: it is none, is larger than `limit` bytes, or is nested too deeply.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit:,} bytes")
    return parse_json(content)


class Rows:
    """A JSONL file that is added to.

    Rows that cannot be written, as on a full disk, are kept in memory, in order, and written with the next one that
    can. No line is ever there in part, unless the process is killed while it writes.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        self._waiting = ""

    def append(self, row: Mapping[str, Any]) -> OSError | None:
        """Add a line; returns why it has to wait, None: it is written. NaN and infinity, for which JSON has no word,
        become null."""
        clean = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        self._waiting += json.dumps(clean) + "\n"
        size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(self._waiting.encode()) < len(self._waiting.encode()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            return error
        self._waiting = ""
        return None


def step_file(epoch: int, step: int) -> str:
    """The name of a checkpoint from within an epoch: how many are completed, and steps taken in the run."""
    return f"epoch_{epoch}_step_{step}.pt"


def checkpoints(folder: str, most_recent: bool = False) -> list[str]:
    """The checkpoints that `--resume latest` may mean, the newest first.

    Args:
        folder: where the run keeps its checkpoints.
        most_recent: the run uses `--save-most-recent`: its fixed file name counts, as in OpenCLIP.
    """
    if most_recent:
        path = os.path.join(folder, LATEST)
        return [path] if os.path.exists(path) else []
    names = os.listdir(folder) if os.path.isdir(folder) else []
    times = {
        (int(match[1]), int(match[2] or 0)): name
        for name in names
        if (match := re.fullmatch(r"epoch_(\d+)(?:_step_(\d+))?\.pt", name))
    }
    return [os.path.join(folder, times[time]) for time in sorted(times, reverse=True)]


def step_files(folder: str) -> list[str]:
    """The checkpoints from within epochs, the newest first."""
    return [path for path in checkpoints(folder) if "_step_" in os.path.basename(path)]


def last_checkpoint(run: str) -> str | None:
    """The checkpoint of a run's last epoch, or where it keeps none of an epoch, its newest; None: there is none."""
    folder = os.path.join(run, "checkpoints")
    within = set(step_files(folder))
    paths = [path for path in checkpoints(folder) if path not in within]
    return next(iter([*paths, *checkpoints(folder), *checkpoints(folder, most_recent=True)]), None)


def keep_rows(path: str | os.PathLike, wanted: Callable[[dict], bool]) -> None:
    """Leave out of a JSONL file the rows that are not wanted, and lines that are damaged or were never finished."""
    if not os.path.exists(path):
        return
    with open(path, errors="replace") as file:
        lines = list(file)

    def is_kept(line: str) -> bool:
        try:
            return line.endswith("\n") and wanted(parse_json(line))
        except (ValueError, KeyError, TypeError):
            return False

    kept = [line for line in lines if is_kept(line)]
    if len(kept) < len(lines):
        with atomic(path) as partial, open(partial, "w") as file:
            file.writelines(kept)


def file_sha256(path: str) -> str:
    """As `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(content: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write tensors and plain values as `torch.save` does, whole or not at all.

    The file is a zip, which holds a checksum of each tensor: `damage` compares them.

    Raises:
        OSError: they cannot be written; what was at `path` is still there.
    """
    import torch

    try:
        with atomic(path) as partial, open(partial, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # by which PyTorch's writer says that a write failed
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None


def damage(path: str) -> str | None:
    """What is wrong with a file that `torch.save` wrote, from the checksums in it; None: nothing. Reads all of it.

    `torch.load` compares none. Files from before PyTorch 1.6, and those written without checksums, count as whole.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if start == b"\x80\x02":
            return None
        if start != b"PK":
            return "it does not begin as one"
        with zipfile.ZipFile(path) as archive:
            if not any(record.CRC for record in archive.infolist()):
                return None
            name = archive.testzip()
            return name and f"{name.partition('/')[2]} in it does not fit its checksum"
    except Exception as error:  # damaged bytes make the reader raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def load_tensors(path: str, flag: str, *, mapped: bool = False) -> dict[str, Any]:
    """What a `.safetensors` file, or a pickle of tensors and plain values, holds; on the CPU.

    Args:
        path: of the file.
        flag: how it was named, for messages.
        mapped: read values when they are looked at, not now, where the format allows.

    Raises:
        UserError: no such file, not such a file, or a pickle that holds more.
    """
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")
    try:
        content = _load(path, mapped)
    except Exception as error:  # bytes that are no such file make the readers raise anything
        raise UserError(f"{flag} {path}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: not a checkpoint (holds a {type(content).__name__})")
    return content


def _load(path: str, mapped: bool) -> Any:
    if path.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key) if mapped else file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*TorchScript archive.*")  # which is refused
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))


def _reason(error: Exception) -> str:
    if "TorchScript" in str(error):
        return "a TorchScript archive, which is code; save the state_dict of what it holds"
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"not a checkpoint of tensors and plain values: it asks for {found[1]}, and is not read"
    detail = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return f"not a checkpoint of tensors and plain values ({detail})"


def make_out_folder(path: str | os.PathLike) -> None:
    """Make the folder of `--out` where there is none. Raises UserError: that cannot be done."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be made a folder ({error.strerror}); give another") from error
