"""`openclip-ext export`: a run's model as a folder that OpenCLIP loads by name, ready for the hub."""

import argparse
import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from openclip_ext import upstream
from openclip_ext.commands.export.model_card import model_card
from openclip_ext.errors import UserError
from openclip_ext.evaluation.loading import LoadedModel, checkpoint_file, load_model
from openclip_ext.files import load_tensors
from openclip_ext.report.run_files import Row, RunFiles, metrics, read_run, task_scores

AVERAGE = "state_dict_ema"  # where a checkpoint keeps the average of its weights over the steps
EMA = "ema-"  # how the names of its metrics start


def run_export(args: argparse.Namespace) -> Path:
    """Write the folder, whole or not at all, and say how to load it; returns its path.

    Raises:
        UserError: nothing to export, a folder that is in use, or weights of another architecture.
    """
    if args.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise UserError(f"--repo {args.repo}: a repository of the hub is ORGANIZATION/NAME")
    if args.repo and args.to != "hf":
        raise UserError(f"--repo {args.repo}: is for the hub; add --to hf, or drop it")
    source = Path(args.source)
    run = read_run(args.source) if source.is_dir() else None
    path, flag = _checkpoint(args)
    name = source.resolve().name if run else source.stem
    out = Path(args.out) if args.out else source / "export" if run else source.with_name(f"{name}-export")
    with _new_folder(out) as folder:
        model = load_model(
            path, name=args.model, model_config=args.model_config, run=args.source if run else None, device="cpu",
            precision="fp32", flag=flag,
        )  # fmt: skip
        if args.weights == "ema":
            _load_average(model, flag)
        upstream.save_pretrained(model.model, model.tokenizer, model.name, model.flags, folder, repo=args.repo)
        repo = args.repo or f"ORGANIZATION/{name}"
        if args.to == "hf":
            (folder / "README.md").write_text(_card(args, model, run, name, repo))
    print(f"{out}: load it with --model local-dir:{out}")
    if args.to == "hf":
        print(f"before you publish: read {out / 'README.md'}, fill in its licence, and look for paths of your machine")
        print(f"then: hf upload {repo} {out}")
    return out


def _card(args: argparse.Namespace, model: LoadedModel, run: RunFiles | None, name: str, repo: str) -> str:
    kind = "average over the steps" if args.weights == "ema" else "as trained"
    weights = f"{Path(model.path or model.name).name}, {kind}"
    scores = _scores(run, model, args.weights == "ema") if run else {}
    return model_card(model, run, name=name, repo=repo, scores=scores, weights=weights)


def _checkpoint(args: argparse.Namespace) -> tuple[str, str]:
    """The file to export, and how it was named."""
    if args.epoch is not None and args.checkpoint:
        raise UserError(f"--epoch {args.epoch} --checkpoint {args.checkpoint}: these exclude each other; drop one")
    if args.checkpoint:
        return checkpoint_file(args.checkpoint, "--checkpoint"), "--checkpoint"
    if args.epoch is None:
        return checkpoint_file(args.source, "RUN"), "RUN"
    path = Path(args.source) / "checkpoints" / f"epoch_{args.epoch}.pt"
    if not path.is_file():
        kept = sorted(file.stem for file in path.parent.glob("epoch_*.pt"))
        raise UserError(f"--epoch {args.epoch}: {path} is not there; the run keeps: {', '.join(kept) or 'none'}")
    return str(path), "--epoch"


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end, or disappears after an error.

    Raises:
        UserError: `out` is in use, or cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; give another folder, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        partial.chmod(0o755)  # as any folder: mkdtemp makes a private one
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); give another folder") from error
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load_average(model: LoadedModel, flag: str) -> None:
    """Put the average of the weights in their place. Raises UserError: the checkpoint has none."""
    average = load_tensors(model.path, flag).get(AVERAGE) if model.path else None
    if model.path is None or not isinstance(average, dict):
        raise UserError(f"--weights ema: {model.path} has no average of weights; use --weights model")
    upstream.load_model_weights(model.model, average, model.path, model.name)


def _scores(run: RunFiles, model: LoadedModel, average: bool) -> Row:
    """What was measured of this checkpoint, or of its average of weights: in training and by `openclip-ext eval`."""
    own = model.path is not None and Path(model.path).resolve().parent.parent == run.folder
    rows = [row for row in run.validation if own and row["epoch"] == model.epoch]
    measured = {name: value for row in rows for name, value in metrics(row).items()}
    if average:
        return {name.removeprefix(EMA): value for name, value in measured.items() if name.startswith(EMA)}
    scores = {name: value for name, value in measured.items() if not name.startswith(EMA)}
    for report in run.evaluations:
        if report["checkpoint"].get("sha256") == model.sha256:
            scores |= task_scores(report)
    return scores
