"""What a run has left in its folder: flags, training rows, validation rows. Runs of stock OpenCLIP are read too."""

import contextlib
import dataclasses
import datetime
import math
import os
import re
from pathlib import Path

from openclip_ext.errors import UserError
from openclip_ext.files import file_sha256, last_checkpoint, parse_json, read_json
from openclip_ext.report.eval_json import is_report
from openclip_ext.report.params import PARAMS, TYPED, Params, read_params, text_of

Row = dict[str, float]

TRAINING = "metrics.jsonl"
VALIDATION = "checkpoints/results.jsonl"
FILES = (TYPED, PARAMS, TRAINING, VALIDATION)
STOCK_LOG = "out.log"
MOST_STEPS = 1 << 53
_LARGEST = 10**300  # of numbers that floats have

#: Where stock OpenCLIP reports training: in the lines of its log.
_STOCK_LINE = re.compile(
    r"Train Epoch: (?P<epoch>\d+) \[\s*(?P<seen>\d+)/(?P<epoch_samples>\d+) .*? LR: (?P<lr>\S+) "
    r"Logit Scale: (?P<logit_scale>\S+) (?P<losses>.*)"
)
_STOCK_LOSS = re.compile(r"(\w*loss): (\S+) \(\S+\)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run's folder, read.

    Attributes:
        folder: where it is; or the file, of a report of `openclip-ext eval` that stands for a run without a folder.
        params: flags, versions and history; empty where the run has kept none.
        training: rows with `step` (from 0), losses, `lr` and whatever else was reported, by step.
        validation: rows with `epoch` (completed ones) and metrics, by epoch.
        evaluations: reports of `openclip-ext eval` that were written into the folder, by the time of their creation.
        last_checkpoint: name of the file of the last epoch, None where none is kept.
        last_sha256: of that file, where an evaluation may be of another that was there before; None: of none.
    """

    folder: Path
    params: Params
    training: list[Row]
    validation: list[Row]
    evaluations: list[dict]
    last_checkpoint: str | None = None
    last_sha256: str | None = None

    @property
    def name(self) -> str:
        return self.folder.stem if self.folder.is_file() else self.folder.name

    @property
    def scores(self) -> Row:
        """The metrics of the last evaluation during training, and as `task/score` those of `evaluations_of_the_end`."""
        scores = metrics(self.validation[-1]) if self.validation else {}
        for report in self.evaluations_of_the_end:
            scores |= task_scores(report)
        return scores

    @property
    def evaluations_of_the_end(self) -> list[dict]:
        """Those of the last checkpoint."""
        return [report for report in self.evaluations if self._is_of_the_end(report)]

    @property
    def earlier(self) -> list[str]:
        """Checkpoints whose `evaluations` are not part of `scores`: the run has a later one, if of the same name."""
        return sorted({Path(_scored(report)).name for report in self.evaluations if not self._is_of_the_end(report)})

    def _is_of_the_end(self, report: dict) -> bool:
        if self.last_checkpoint is None:
            return True
        known = report["checkpoint"].get("sha256")
        return _is_of(report, self.last_checkpoint) and (None in (known, self.last_sha256) or known == self.last_sha256)


def _scored(report: dict) -> str:
    """The file that a report of `openclip-ext eval` is about."""
    return report["checkpoint"].get("path") or report["checkpoint"].get("source") or ""


def _is_of(report: dict, name: str) -> bool:
    return Path(_scored(report)).name == name


def metrics(row: Row) -> Row:
    """A row of `validation` without what is no metric."""
    return {name: value for name, value in row.items() if name not in ("epoch", "num_samples")}


def task_scores(report: dict) -> Row:
    """The scores in a report of `openclip-ext eval` as `task/score`."""
    return {
        f"{task}/{name}": value
        for task, result in report["tasks"].items()
        for name, value in result["scores"].items()
        if isinstance(value, int | float)
    }


def is_run(folder: Path) -> bool:
    """Whether any of a run's files lies in the folder."""
    return any((folder / name).is_file() for name in FILES)


def read_run(path: str) -> RunFiles:
    """Read a run's folder. A run that was resumed wrote some steps and epochs twice: the last ones count.

    A report of `openclip-ext eval` is read as a run that has nothing else.

    Raises:
        UserError: no such folder, not a run's, or a damaged file in it.
    """
    folder = Path(path)
    if folder.is_file():
        report = _evaluation(folder)
        if report is None:
            raise UserError(f"{path}: not a report of openclip-ext eval; give one, or the folder of a run, logs/NAME")
        return RunFiles(folder.resolve(), Params(), [], [], [report])
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a run, logs/NAME")
    if not is_run(folder):
        raise UserError(f"{path}: not the folder of a run (none of {', '.join(FILES)} is in it)")
    folder = folder.resolve()
    params = read_params(folder)
    # The file may hold rows of validation too, at the steps of others: what has no loss is no step of training.
    training = _read_rows(folder / TRAINING, "step", "loss") or _stock_training(folder / STOCK_LOG, params)
    last, evaluations = last_checkpoint(str(folder)), _evaluations(folder)
    return RunFiles(
        folder, params, training, _read_rows(folder / VALIDATION, "epoch"), evaluations,
        last and Path(last).name, last and _sha256_if_newer(last, evaluations),
    )  # fmt: skip


def _sha256_if_newer(path: str, evaluations: list[dict]) -> str | None:
    """The file's, if it was written after one of its evaluations was: by a resumed run, or as a copy of the same file.

    Else None: a large file takes long to read. None too where it cannot be read.
    """
    times = [_time(report["created"]) for report in evaluations if _is_of(report, os.path.basename(path))]
    with contextlib.suppress(OSError):
        if times and min(times) < os.path.getmtime(path):
            return file_sha256(path)
    return None


def _time(created: str) -> float:
    """In seconds as files have it; 0 where it is no time."""
    try:
        return datetime.datetime.fromisoformat(created).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0


def _read_rows(path: Path, key: str, required: str = "") -> list[Row]:
    """Rows of a JSONL file by `key`; numbers only, null is NaN. A last line that was never finished does not count.

    With `required`, rows that do not have it are left out.
    """
    lines = text_of(path).split("\n")[:-1]
    rows: dict[float, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if required and row.get(required, ...) is ...:
                continue
            position = row[key]
            if not isinstance(position, int | float) or not abs(position) < MOST_STEPS:
                raise ValueError(position)
            if path.name == TRAINING and row.get("kind") == "validation":
                continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: line {number} is no JSON object with {key!r}; repair or remove it") from error
        rows[position] = {
            name: math.nan if value is None or (isinstance(value, int) and abs(value) > _LARGEST) else value
            for name, value in row.items()
            if value is None or isinstance(value, int | float)
        }
    return [rows[position] for position in sorted(rows)]


def _evaluations(folder: Path) -> list[dict]:
    """The JSON files in the folder that `openclip-ext eval` has written, the oldest first."""
    reports = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(UserError):  # whatever else lies there
            reports.append(_evaluation(path))
    return sorted((report for report in reports if report), key=lambda report: report["created"])


def _evaluation(path: Path) -> dict | None:
    """A report of `openclip-ext eval`; None: the file is something else."""
    try:
        report = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no JSON ({error}); repair or remove it") from error
    return report if is_report(report) else None


def _stock_training(path: Path, params: Params) -> list[Row]:
    """Training rows from the log of stock OpenCLIP; empty where it has none, or where the batch size is not known."""
    try:
        per_step = math.prod(int(params.flags[name]) for name in ("batch_size", "accum_freq", "world_size"))
    except (KeyError, ValueError, TypeError):
        return []
    rows: dict[float, Row] = {}
    for line in text_of(path).splitlines():
        match = _STOCK_LINE.search(line)
        if not match:
            continue
        epoch, seen, epoch_samples = (int(match[name]) for name in ("epoch", "seen", "epoch_samples"))
        step = (epoch * epoch_samples + seen) // per_step - 1
        losses = {name.lower(): float(value) for name, value in _STOCK_LOSS.findall(match["losses"])}
        rows[step] = {
            "step": step, "epoch": epoch, "lr": float(match["lr"]), "logit_scale": float(match["logit_scale"]), **losses
        }  # fmt: skip
    return [rows[step] for step in sorted(rows)]
