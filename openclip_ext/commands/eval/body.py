"""`openclip-ext eval`: scores of one checkpoint on several tasks, as a table and as JSON."""

import argparse
import datetime
import os
import re
from importlib.metadata import version
from typing import Any

from openclip_ext.errors import UserError
from openclip_ext.evaluation.loading import LoadedModel, choose_device, load_model
from openclip_ext.evaluation.ranks import join_ranks, leave_ranks
from openclip_ext.evaluation.tasks import EVAL_FAMILIES, tasks_from
from openclip_ext.evaluation.tasks.base import run_tasks, table
from openclip_ext.files import write_json
from openclip_ext.redact import redacted_values

PACKAGES = ("openclip-ext", "open_clip_torch", "torch", "torchvision", "timm", "numpy")


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    """Check all tasks, load the model, run them, print a table and write the report (after each task anew).

    Processes that `accelerate launch` or `torchrun` has started share the pictures; the first one has the scores.

    The report:

        created       when, ISO 8601
        versions      of packages, by name
        model         OpenCLIP's name of the architecture
        checkpoint    source (as given), path (of the file, null: from the hub), sha256 (of the file, without one of
                      the weights)
        precision, device, processes (that shared the work)
        tasks         by name: dataset (path as given), num_samples, num_classes (of which one is right; not of
                      retrieval), data, seconds, scores (name to number), and what the task adds, such as a note
        data          of a task, what its scores were measured on: images, texts (of retrieval), and checksum, a SHA-256
                      of the content, which is the same on any machine and in any folder. It is over files' bytes and
                      captions for retrieval, in whatever form they come; over names in the class folders, sizes and
                      classes for folders, those of all sets for probes; over names and sizes in shards; null where
                      it is not known without reading everything

    Raises:
        UserError: a wrong flag, a path that does not fit, or a checkpoint that cannot be had.
    """
    tasks = tasks_from(args, families=EVAL_FAMILIES)
    require_folder(args.out)
    ranks, device = join_ranks(choose_device(args.device).type)
    model = load_model(
        args.pretrained or args.fusion, name=args.model, model_config=args.model_config, device=device,
        precision=args.precision, cache_dir=args.cache_dir, flag="--pretrained" if args.pretrained else "--fusion",
    )  # fmt: skip
    report = describe(model) | {"processes": ranks.world_size, "tasks": {}}
    out = args.out or (default_path(model) if ranks.first else "")
    if ranks.first:
        _require_writable(out)
    for task in tasks:
        report["tasks"] |= run_tasks(model, [task], ranks)
        if ranks.first:
            write_json(redacted_values(report), out)
    leave_ranks(ranks)
    if ranks.first:
        print(table(report["tasks"]))
        print(out)
    return report


def describe(model: LoadedModel) -> dict[str, Any]:
    """The report's part that does not depend on tasks."""
    return {
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in PACKAGES},
        "model": model.name,
        "checkpoint": {"source": model.source, "path": model.path, "sha256": model.sha256},
        "precision": model.precision,
        "device": str(model.device),
    }


def require_folder(path: str | None) -> None:
    """Make the folder of a file to be written. Raises UserError: `--out` cannot be written to."""
    if path is None:
        return
    if os.path.isdir(path):
        raise UserError(f"--out {path}: is a folder; give a file in it, such as {os.path.join(path, 'eval.json')}")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: its folder cannot be made ({error.strerror}); give another") from error


def default_path(model: LoadedModel) -> str:
    """`eval-TIME.json` in the run's folder, where `report` and `export` find it, or `runs/eval/TIME-MODEL.json`."""
    stamp = datetime.datetime.now().strftime("%Y_%m_%d-%H_%M_%S_%f")
    if model.source and os.path.isdir(model.source):
        return os.path.join(model.source, f"eval-{stamp}.json")
    os.makedirs(os.path.join("runs", "eval"), exist_ok=True)
    return os.path.join("runs", "eval", f"{stamp}-{re.sub(r'[^A-Za-z0-9._-]+', '-', model.name)}.json")


def _require_writable(out: str) -> None:
    """Raises UserError: a report cannot be written there, which is better known before an hour of evaluation."""
    try:
        with open(out + ".partial", "w"):
            os.remove(out + ".partial")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give another file") from error
