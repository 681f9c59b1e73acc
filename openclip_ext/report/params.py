"""What a run was started with: versions, typed flags, and settings that a resumed run changed on the way."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

from openclip_ext.errors import UserError
from openclip_ext.files import read_json

TYPED = "params.json"
LITERAL_LIMIT = 10_000  # characters of a value in `params.txt` that are read as Python's
PARAMS = "params.txt"  # of stock OpenCLIP, and of runs from before `params.json`: as Python prints the values
_TEXTS = frozenset({"model", "model_config", "pretrained", "train_data", "loss"})
_PACKAGES = frozenset({"openclip-ext", "open_clip_torch", "torch", "accelerate", "webdataset", "timm"})


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings with which a run was resumed, where they were others before.

    Attributes:
        epoch, step: completed ones at that time.
        changed: by flag, the value before and after.
    """

    epoch: int
    step: int
    changed: dict[str, tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Params:
    """Of a run.

    Attributes:
        flags: the last values, by their name in Python, `batch_size` of `--batch-size`.
        versions: by package; empty for runs of stock OpenCLIP.
        history: in order of time.
    """

    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    history: tuple[Change, ...] = ()

    def flags_at(self, epoch: float) -> dict[str, Any]:
        """The values with which the run came to this number of completed epochs."""
        flags = dict(self.flags)
        for change in reversed(self.history):
            if change.epoch >= epoch:
                flags |= {name: before for name, (before, _) in change.changed.items()}
        return flags

    def changes(self) -> dict[str, str]:
        """By flag that was changed on the way, its values and when, in words."""
        stories: dict[str, str] = {}
        for change in self.history:
            when = f"until epoch {change.epoch} (step {change.step:,})"
            for name, (before, after) in change.changed.items():
                stories[name] = f"{stories.get(name, shown(before))} {when}, then {shown(after)}"
        return stories


def read_params(folder: Path) -> Params:
    """Of the run whose folder it is; empty where it is no run's.

    Raises:
        UserError: a file that is damaged.
    """
    if (folder / TYPED).is_file():
        return _typed(folder / TYPED)
    values = _lines(text_of(folder / PARAMS))
    return Params(
        flags={name: _literal(value) for name, value in values.items() if name not in _PACKAGES},
        versions={name: value for name, value in values.items() if name in _PACKAGES},
    )


def _typed(path: Path) -> Params:
    try:
        content = read_json(path)
        history = [
            Change(
                epoch=int(row["epoch"]),
                step=int(row["step"]),
                changed={_dest(name): (before, after) for name, (before, after) in row["changed"].items()},
            )
            for row in content.get("history", ())
        ]
        versions = {str(name): str(value) for name, value in content["versions"].items()}
        return Params(_plain_flags(content["flags"]), versions, tuple(history))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: is not what a run writes ({type(error).__name__}: {error}); repair it, or remove it where "
            f"{PARAMS} lies beside it"
        ) from error


def _plain_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises ValueError: a value that no flag has, or none that is used as text or number."""
    for name, value in flags.items():
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any(isinstance(part, dict | list) and not all(map(_is_scalar, part)) for part in parts):
            raise ValueError(f"{name} is {str(value)[:40]}")
        wanted = str if name in _TEXTS else int if name == "seed" else None
        if wanted and not isinstance(value, wanted | None):
            raise ValueError(f"{name} is {str(value)[:40]}")
    return dict(flags)


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, dict | list)


def _dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _lines(text: str) -> dict[str, str]:
    """`name: value` lines; a line that is none continues the value before it, as in a separator that breaks lines."""
    values: dict[str, str] = {}
    last = None
    for line in text.splitlines():
        match = re.match(r"([A-Za-z][\w-]*): (.*)", line)
        if match:
            last = match[1]
            values[last] = match[2]
        elif last is not None:
            values[last] += "\n" + line
    return values


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text) if len(text) <= LITERAL_LIMIT else text
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):  # `literal_eval` says so
        return text


def shown(value: Any) -> str:
    """A value for people: of several their words, joined."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def text_of(path: Path) -> str:
    """A file's text; empty where there is no such file. Raises UserError: it cannot be read as text."""
    if not path.is_file():
        return ""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error
