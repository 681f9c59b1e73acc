"""`openclip-ext interpolate`: two checkpoints mixed in several shares, each mixture scored on tasks."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from openclip_ext.commands.eval.body import describe
from openclip_ext.commands.interpolate.mixing import interpolate, parse_alphas, require_same_architecture, require_share
from openclip_ext.commands.interpolate.picture import draw_interpolation
from openclip_ext.errors import UserError
from openclip_ext.evaluation.loading import LoadedModel, choose_device, load_model, weights_sha256
from openclip_ext.evaluation.ranks import join_ranks, leave_ranks
from openclip_ext.evaluation.tasks import tasks_from
from openclip_ext.evaluation.tasks.base import run_tasks
from openclip_ext.files import atomic, make_out_folder, write_json
from openclip_ext.report.compare import shown_metrics
from openclip_ext.report.run_files import is_run, task_scores
from openclip_ext.report.tables import cell, markdown_table, percent, title

Weights = dict[str, Tensor]


def run_interpolate(args: argparse.Namespace) -> dict[str, Any] | None:
    """Score the mixtures, print a table, write `interpolation.json` and `interpolation.png` into `--out`.

    Without tasks, `--save` alone is done. Several processes share each task, as in `openclip-ext eval`.

    The report is as that of `openclip-ext eval`, with these in place of `checkpoint` and `tasks`:

        a, b          the checkpoints, each with source, path, sha256
        metrics       names of the scores in the table and the picture
        mixtures      by alpha, each with alpha, sha256 (of the weights), tasks (as in `openclip-ext eval`)

    Raises:
        UserError: a wrong flag or path, or checkpoints of different architectures.
    """
    alphas, save = parse_alphas(args.alpha), _save_request(args)
    tasks = tasks_from(args, required=save is None)
    out = Path(args.out)
    if tasks:
        make_out_folder(out)
    common = {
        "name": args.model, "model_config": args.model_config, "cache_dir": args.cache_dir,
        "run": _run_of(args.b) or _run_of(args.a),
    }  # fmt: skip
    ranks, device = join_ranks(choose_device(args.device).type)
    (a, first), (b, second) = (_weights(source, flag, common) for source, flag in ((args.a, "A"), (args.b, "B")))
    require_same_architecture(first, second)
    if save and ranks.first:
        _save(first, second, *save, sources=(args.a, args.b))
    if not tasks:
        leave_ranks(ranks)
        return None
    model = load_model(args.b, **common, device=device, precision=args.precision, flag="B")
    report = describe(model) | {"a": a, "b": b, "mixtures": []}
    del report["checkpoint"]
    for alpha in tqdm(alphas, desc="mixtures", unit="mixture", disable=not ranks.first):
        mixture = _mixture(model, first, second, alpha)
        row = {"alpha": alpha, "sha256": mixture.sha256, "tasks": run_tasks(mixture, tasks, ranks)}
        if not ranks.first:
            continue
        report["mixtures"].append(row)
        write_json(report, str(out / "interpolation.json"))  # before a wrong --metric can end it
        report["metrics"] = shown_metrics(list(task_scores(row)), args.metric)
    leave_ranks(ranks)
    if not ranks.first:
        return None
    write_json(report, str(out / "interpolation.json"))
    _show(report, args, out)
    return report


def _save_request(args: argparse.Namespace) -> tuple[float, Path] | None:
    """What `--save` asks for. Raises UserError: no share, or a file that is there or cannot be."""
    if args.save is None:
        return None
    text, name = args.save
    try:
        alpha = float(text)
    except ValueError as error:
        raise UserError(f"--save {text} {name}: give the share of B first, such as --save 0.5 mixed.pt") from error
    path = Path(name)
    require_share(alpha, f"--save {text} {name}")
    if path.suffix != ".pt":
        raise UserError(f"--save {text} {name}: the file's name must end in .pt")
    if path.exists():
        raise UserError(f"--save {text} {name}: exists already; give another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--save {text} {name}: no such folder: {path.parent}")
    return alpha, path


def _weights(source: str, flag: str, common: dict[str, Any]) -> tuple[dict, Weights]:
    """Where a checkpoint is from, and its weights in float32 on the CPU."""
    model = load_model(source, **common, device="cpu", precision="fp32", flag=flag)
    return {"source": model.source, "path": model.path, "sha256": model.sha256}, model.model.state_dict()


def _run_of(source: str) -> str | None:
    """The folder of the run whose checkpoint, or folder, `source` is."""
    path = Path(source).absolute()
    for folder in (path, path.parent.parent):
        if path.exists() and is_run(folder):
            return str(folder)
    return None


@torch.no_grad()
def _mixture(model: LoadedModel, first: Weights, second: Weights, alpha: float) -> LoadedModel:
    """The model with the mixture in place of its weights."""
    for name, value in model.model.state_dict().items():
        value.copy_(interpolate(first, second, alpha, name))
    # Tasks may keep features by this hash.
    return dataclasses.replace(model, path=None, sha256=weights_sha256(model.model))


def _save(first: Weights, second: Weights, alpha: float, path: Path, sources: tuple[str, str]) -> None:
    """Write the mixture as a checkpoint that OpenCLIP's `--pretrained` takes."""
    state = {name: interpolate(first, second, alpha, name).to(second[name].dtype) for name in second}
    origin = {"a": sources[0], "b": sources[1], "alpha": alpha}
    with atomic(path) as partial:
        torch.save({"name": path.stem, "state_dict": state, "interpolation": origin}, partial)
    print(f"{path}: alpha {alpha:g}")


def _show(report: dict, args: argparse.Namespace, out: Path) -> None:
    """Draw the picture and print the table."""
    metrics = report["metrics"]
    rows = [{"alpha": mixture["alpha"], "scores": task_scores(mixture)} for mixture in report["mixtures"]]
    heading = f"{report['model']}, A: {args.a}, B: {args.b}"
    draw_interpolation(sorted(rows, key=lambda row: row["alpha"]), metrics, heading, str(out / "interpolation.png"))
    best = {name: max(row["scores"][name] for row in rows) for name in metrics if percent(name)}
    cells = [
        [f"{row['alpha']:g}", *(cell(name, row["scores"][name]) + " *" * (row["scores"][name] == best.get(name))
                                for name in metrics)]
        for row in rows
    ]  # fmt: skip
    print(markdown_table(["alpha", *(title(name) for name in metrics)], cells) + "* best of its column")
    print(", ".join(str(out / f"interpolation.{kind}") for kind in ("json", "png")))
