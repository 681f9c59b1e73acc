"""The model card of an exported run: what it is, what it was trained on and how, its scores, and its command."""

import shlex
from typing import Any

from openclip_ext import upstream
from openclip_ext.evaluation.loading import LoadedModel
from openclip_ext.redact import redacted
from openclip_ext.report.params import Params, shown
from openclip_ext.report.run_files import Row, RunFiles
from openclip_ext.report.tables import markdown_table
from openclip_ext.training.flags import build_parser

_NOT_GIVEN: tuple[Any, ...] = (None, [], (), False)
PACKAGES = ("openclip-ext", "open_clip_torch", "torch")


def model_card(model: LoadedModel, run: RunFiles | None, *, name: str, repo: str, scores: Row, weights: str) -> str:
    """The text of `README.md`.

    Args:
        model: as exported.
        run: whose model it is, if any's.
        name: of the model.
        repo: where it will be on the hub.
        scores: by metric.
        weights: which of the checkpoint's.
    """
    params = run.params if run else Params()
    text = upstream.model_card(name, _description(model, params), _details(model, params, weights), _usage(repo))
    text += "\n## Scores\n\n"
    rows = [[metric, f"{value:.4g}"] for metric, value in scores.items()]
    text += markdown_table(["metric", "value"], rows) if rows else "Not evaluated yet.\n"
    if params.history:
        text += "\n## Settings changed on the way\n\n"
        text += "".join(f"* `{name}`: {story}\n" for name, story in params.changes().items())
    if params.flags:
        text += f"\n## Training command\n\n```sh\n{training_command(params)}\n```\n"
    return redacted(text)  # records of OpenCLIP's own runs hold flags as they were given


def _description(model: LoadedModel, params: Params) -> str:
    start = params.flags.get("pretrained")
    how = f"fine-tuned from {start}" if start else "trained from random weights" if params.flags else "exported"
    ours = "openclip-ext" in params.versions
    return f"A {model.name} model, {how} with OpenCLIP" + (" and openclip-ext." if ours else ".")


def _details(model: LoadedModel, params: Params, weights: str) -> dict[str, Any]:
    flags, changes = params.flags, params.changes()
    wanted = upstream.flags_with(upstream.Role.TRAINING)
    training = [key for key in wanted if key in changes or flags.get(key) not in _NOT_GIVEN]
    details = {
        "Architecture": model.name,
        "Training data": changes.get("train_data", flags.get("train_data")),
        "Training": {key: changes.get(key) or shown(flags[key]) for key in training},
        "Weights": f"{weights}; sha256 of the checkpoint: {model.sha256}",
        "Versions": {key: params.versions[key] for key in PACKAGES if key in params.versions},
    }
    return {key: value for key, value in details.items() if value}


def _usage(repo: str) -> str:
    return (
        "```python\nimport open_clip\n\n"
        f'model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{repo}")  # or local-dir:FOLDER\n'
        f'tokenizer = open_clip.get_tokenizer("hf-hub:{repo}")\n```'
    )


def training_command(params: Params) -> str:
    """The command line that gives the last of these flags, all that differ from their defaults, and processes."""
    words = _program(params)
    for action in build_parser()._actions:
        value = params.flags.get(action.dest)
        if not action.option_strings or _listed(value) in (None, _listed(action.default), action.default or []):
            continue
        flag = action.option_strings[-1]
        if action.nargs == 0:
            words.append(flag)
        elif isinstance(value, dict):
            words += [flag, *(shlex.quote(f"{key}={item}") for key, item in value.items())]
        elif isinstance(value, list | tuple) and action.nargs is None:  # a flag that is repeated
            words += [word for item in value for word in (flag, shlex.quote(str(item)))]
        elif isinstance(value, list | tuple):
            words += [flag, *(shlex.quote(str(item)) for item in value)]
        else:
            words += [flag, shlex.quote(str(value))]
    return " ".join(words)


def _program(params: Params) -> list[str]:
    """What starts as many processes as there were."""
    ours = "openclip-ext" in params.versions
    processes = params.flags.get("world_size")
    if isinstance(processes, int) and processes > 1:
        number = str(processes)
        launcher = ["accelerate", "launch", "--num_processes"] if ours else ["torchrun", "--nproc_per_node"]
        return [*launcher, number, "-m", *(["openclip_ext", "train"] if ours else ["open_clip_train.main"])]
    return ["openclip-ext", "train"] if ours else ["python", "-m", "open_clip_train.main"]


def _listed(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value
