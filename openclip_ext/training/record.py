"""What a run records of itself: versions, flags, and which flags changed at which step."""

import dataclasses
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.files import atomic, read_json, write_json

TEXT, JSON = "params.txt", "params.json"
PACKAGES = ("openclip-ext", "open_clip_torch", "torch", "accelerate", "webdataset", "timm")


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run's `params.json` holds, beside versions of packages.

    Attributes:
        flags: every flag by its name, as they were last.
        history: changes by resuming, in order: `epoch` (completed ones), `step` (optimizer steps taken), and `changed`
            (flag to [value before, value since]).
    """

    flags: dict[str, Any]
    history: list[dict] = dataclasses.field(default_factory=list)

    def as_of(self, epoch: int, step: int | None = None) -> "Record":
        """How it was before the run first went on from here: what it did from there on is about to be redone.

        Args:
            epoch: completed ones.
            step: optimizer steps taken; None: those of these epochs.
        """
        flags = dict(self.flags)
        kept: list[dict] = []
        for entry in reversed(self.history):
            before = entry["epoch"] < epoch or (step is not None and entry["epoch"] == epoch and entry["step"] < step)
            if before:
                kept.insert(0, entry)
            else:
                flags |= {name: value for name, (value, _) in entry["changed"].items()}
        return Record(flags, kept)

    def changes(self, flags: Mapping[str, Any]) -> dict[str, list]:
        """[value before, value now] of the flags that differ, bookkeeping aside; those that only one side knows do not
        count."""
        now = _as_json(flags)
        return {
            name: [before, now[name]]
            for name, before in self.flags.items()
            if name in now and now[name] != before and upstream.role_of(name) is not upstream.Role.BOOKKEEPING
        }

    def write(self, folder: str) -> None:
        """Write `params.json`, and `params.txt` as OpenCLIP does: a line for each flag and version."""
        versions = {name: version(name) for name in PACKAGES}
        write_json({"versions": versions, "flags": self.flags, "history": self.history}, os.path.join(folder, JSON))
        with atomic(os.path.join(folder, TEXT)) as partial, open(partial, "w") as file:
            file.writelines(f"{name}: {value}\n" for name, value in sorted((versions | self.flags).items()))


def read_record(folder: str) -> Record | None:
    """What a run recorded; None where its folder holds no `params.json`, as OpenCLIP's own.

    Raises:
        UserError: the file is damaged.
    """
    path = os.path.join(folder, JSON)
    if not os.path.isfile(path):
        return None
    try:
        content = read_json(path)
        return Record(dict(content["flags"]), [_change(**row) for row in content["history"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: cannot be read as the record of a run ({error}); repair or remove it") from error


def _change(epoch: int, step: int, changed: dict[str, list]) -> dict[str, Any]:
    """An entry of the history. Raises ValueError, TypeError, AttributeError: it is none."""
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in changed.values()):
        raise ValueError("a change is [before, after]")
    return {"epoch": int(epoch), "step": int(step), "changed": changed}


def _as_json(flags: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file."""
    return json.loads(json.dumps(dict(flags)))
