"""The model card of an exported run: what it is, what it was trained on and how, its scores, and its command."""

import ast
import shlex
from typing import Any

from openclip_ext import upstream
from openclip_ext.evaluation.loading import LoadedModel
from openclip_ext.report.run_files import Row, RunFiles, shown
from openclip_ext.report.tables import markdown_table
from openclip_ext.training.flags import build_parser

_NOT_GIVEN = (None, "None", "[]", "False")
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
    params = run.params if run else {}
    text = upstream.model_card(name, _description(model, params), _details(model, params, weights), _usage(repo))
    text += "\n## Scores\n\n"
    rows = [[metric, f"{value:.4g}"] for metric, value in scores.items()]
    text += markdown_table(["metric", "value"], rows) if rows else "Not evaluated yet.\n"
    if params:
        text += f"\n## Training command\n\n```sh\n{training_command(params)}\n```\n"
    return text


def _description(model: LoadedModel, params: dict[str, str]) -> str:
    start = params.get("pretrained")
    how = f"fine-tuned from {start}" if start else "trained from random weights" if params else "exported"
    return f"A {model.name} model, {how} with OpenCLIP" + (" and openclip-ext." if "openclip-ext" in params else ".")


def _details(model: LoadedModel, params: dict[str, str], weights: str) -> dict[str, Any]:
    training = upstream.flags_with(upstream.Role.TRAINING)
    details = {
        "Architecture": model.name,
        "Training data": params.get("train_data"),
        "Training": {key: shown(params[key]) for key in training if params.get(key) not in _NOT_GIVEN},
        "Weights": f"{weights}; sha256 of the checkpoint: {model.sha256}",
        "Versions": {key: params[key] for key in PACKAGES if key in params},
    }
    return {key: value for key, value in details.items() if value}


def _usage(repo: str) -> str:
    return (
        "```python\nimport open_clip\n\n"
        f'model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{repo}")  # or local-dir:FOLDER\n'
        f'tokenizer = open_clip.get_tokenizer("hf-hub:{repo}")\n```'
    )


def training_command(params: dict[str, str]) -> str:
    """The command line that gives these parameters: all flags that differ from their defaults.

    Args:
        params: as a run's `params.txt` has them.
    """
    words = ["openclip-ext" if "openclip-ext" in params else "python -m open_clip_train.main"]
    words += ["train"] if "openclip-ext" in params else []
    for action in build_parser()._actions:
        text = params.get(action.dest)
        if text is None or not action.option_strings or text in (str(action.default), str(action.default or [])):
            continue
        flag, value = action.option_strings[-1], _literal(text)
        if action.nargs == 0:
            words.append(flag)
        elif isinstance(value, dict):
            words += [flag, *(shlex.quote(f"{key}={item}") for key, item in value.items())]
        elif isinstance(value, list | tuple) and action.nargs is None:  # a flag that is repeated
            words += [word for item in value for word in (flag, shlex.quote(str(item)))]
        elif isinstance(value, list | tuple):
            words += [flag, *(shlex.quote(str(item)) for item in value)]
        elif value is not None:
            words += [flag, shlex.quote(text)]
    return " ".join(words)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
