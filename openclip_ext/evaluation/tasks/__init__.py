"""Tasks of `openclip-ext eval`: which families there are, and what their flags ask for.

A task family is a module with `TITLE`, `add_arguments(group)` and `tasks(args) -> list[Task]`. Imports no torch: the
flags are part of `--help`.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from openclip_ext.errors import UserError
from openclip_ext.evaluation.flags import add_cache_arguments, add_loading_arguments, require_loading
from openclip_ext.evaluation.tasks import probes, questions, retrieval, zero_shot
from openclip_ext.evaluation.tasks.base import Task
from openclip_ext.options import require_use

FAMILIES: Sequence[Any] = (zero_shot, retrieval, probes)
#: Fusion models have parts beside the weights that `interpolate` mixes: their tasks are of `eval` alone.
EVAL_FAMILIES = (*FAMILIES, questions)

#: What flags have a use with; see `require_use`.
USED_WITH = {
    "classes": tuple(zero_shot.IMAGENET_SETS),
    **dict.fromkeys(
        ("caption_separator", "caption_key", "csv_img_key", "csv_caption_key", "csv_separator"), ("retrieval",)
    ),
    "probes": ("probe_train",),
    **dict.fromkeys(("shots", "seeds"), ("probes=few-shot",)),
    "task_images": tuple(questions.FILES),
    "rerank": ("fusion",),
}


def add_task_arguments(parser: argparse.ArgumentParser, families: Sequence[Any] = FAMILIES) -> None:
    """The flags of all families, and those of how data is loaded."""
    for family in families:
        family.add_arguments(parser.add_argument_group(family.TITLE))
    group = parser.add_argument_group("loading")
    add_loading_arguments(group)
    add_cache_arguments(group, "features for retrieval and probes")


def tasks_from(args: argparse.Namespace, *, required: bool = True, families: Sequence[Any] = FAMILIES) -> list[Task]:
    """What the flags of `add_task_arguments` ask for, in the order of the families.

    Raises:
        UserError: nothing is asked for and something is `required`, two tasks would have one name, a path does not
            fit, or a flag is given that no task looks at.
    """
    require_loading(args)
    tasks = [task for family in families for task in family.tasks(args)]
    require_use(args, _given(args, families), USED_WITH)
    if required and not tasks:
        raise UserError("nothing to evaluate: name data with --imagenet-val, --zero-shot, or another; see --help")
    names = [task.name for task in tasks]
    if twice := [task for task in tasks if names.count(task.name) > 1]:
        raise UserError(f"{twice[0].dataset} and {twice[1].dataset}: both would be called {twice[0].name}; rename one")
    return tasks


def _given(args: argparse.Namespace, families: Sequence[Any]) -> set[str]:
    """Names of the families' flags that are not as they are by default."""
    parser = argparse.ArgumentParser()
    add_task_arguments(parser, families)
    return {name for name, default in vars(parser.parse_args([])).items() if getattr(args, name) != default}
