"""Fusion models as tasks of `openclip-ext eval`: questions and statements on pictures, and retrieval ranked again.

Imports no torch: the flags are part of `--help`.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openclip_ext.errors import UserError
from openclip_ext.fusion.config import CLASSES

if TYPE_CHECKING:
    from openclip_ext.data.questions import Questions
    from openclip_ext.evaluation.loading import LoadedModel
    from openclip_ext.evaluation.ranks import Ranks
    from openclip_ext.evaluation.tasks.retrieval import RetrievalTask

TITLE = "fusion models"
#: By flag: the task, and what its file is.
FILES = {
    "vqa": ("vqa", "VQA v2's questions in JSON, with their annotations beside them"),
    "nlvr2": ("nlvr2", "NLVR2's statements on two images, a JSON object per line"),
    "snli_ve": ("ve", "SNLI-VE's hypotheses, a JSON object per line"),
}


def add_arguments(group) -> None:
    group.add_argument(
        "--fusion", metavar="RUN",
        help="a run or checkpoint of train --fusion: instead of --pretrained, for what it was fine-tuned for, and to "
        "rank the best of --retrieval again by matching",
    )  # fmt: skip
    for dest, (_, what) in FILES.items():
        group.add_argument(f"--{dest.replace('_', '-')}", metavar="FILE", help=what)
    group.add_argument(
        "--task-images", metavar="FOLDER", help="pictures of these files (default: images beside the file)"
    )
    group.add_argument(
        "--rerank", type=int, default=128, metavar="K",
        help="candidates of each query that are ranked again (default: %(default)s)",
    )  # fmt: skip


def tasks(args: argparse.Namespace) -> list["QuestionTask | RerankTask"]:
    """What the flags ask for. Raises UserError: a file or run that does not fit."""
    files = {dest: getattr(args, dest) for dest in FILES if getattr(args, dest)}
    if files and not args.fusion:
        dest, path = next(iter(files.items()))
        raise UserError(f"--{dest.replace('_', '-')} {path}: is for fusion models; name one with --fusion")
    if args.rerank < 1:
        raise UserError(f"--rerank {args.rerank}: must be at least 1")
    if not args.fusion:
        return []
    if args.pretrained:
        raise UserError(
            f"--pretrained {args.pretrained}: --fusion {args.fusion} has its own towers; give one of the two"
        )
    from openclip_ext.data.questions import read_questions
    from openclip_ext.fusion.loading import load_fusion

    path, content = load_fusion(args.fusion)
    found: list[QuestionTask | RerankTask] = []
    for dest, file in files.items():
        task, flag = FILES[dest][0], f"--{dest.replace('_', '-')}"
        if content.get("task") != task:
            was = f"--task {content['task']}" if content.get("task") else "without --task"
            raise UserError(f"{flag} {file}: {path} was trained {was}; give a run of --task {task} as --fusion")
        questions = read_questions(task, file, args.task_images, flag)
        if not all(question.answers for question in questions.rows):
            raise UserError(f"{flag} {file}: has questions without answers, and cannot be scored; give annotations too")
        found.append(QuestionTask(f"{task}-{Path(file).stem}", file, task, questions, content, args.batch_size))
    return found + _rerank_tasks(args, path, content)


def _rerank_tasks(args: argparse.Namespace, path: str, content: dict) -> list["QuestionTask | RerankTask"]:
    from openclip_ext.evaluation.tasks import retrieval

    if args.retrieval and content.get("task") not in (None, "retrieval"):
        raise UserError(
            f"--retrieval {args.retrieval[0]}: {path} was trained with --task {content['task']}, and has no matching "
            "head; give one of pre-training or of --task retrieval as --fusion"
        )
    return [RerankTask(f"{task.name}-reranked", task.dataset, task, content, args.rerank)
            for task in retrieval.tasks(args)]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class QuestionTask:
    """The share of right answers to questions, or of right classes of statements.

    Attributes:
        name, dataset: see `Task`.
        task: of the fusion model.
        questions: with their answers.
        content: of the checkpoint.
        batch_size: of pictures.
    """

    name: str
    dataset: str
    task: str
    questions: "Questions"
    content: dict[str, Any]
    batch_size: int

    def run(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, Any]:
        """`accuracy`: VQA's soft one, or the share that is right; with a note of pictures that are missing."""
        from openclip_ext.evaluation.fusion import predictions

        rows = self.questions.rows
        classes = CLASSES[self.task] if self.task in CLASSES else self.content["answers"]
        said = predictions(model, self.content, rows, classes, self.batch_size, ranks)
        if not ranks.first:
            return {}
        scores = [self._score(answer, row.answers) for answer, row in zip(said, rows, strict=True)]
        result = {"num_samples": len(rows), "scores": {"accuracy": sum(scores) / len(scores)}}
        if self.task not in CLASSES:
            result |= {"num_answers": len(classes)}
        notes = self.questions.remarks()
        return result | ({"note": notes[0]} if notes else {})

    @property
    def _score(self) -> Callable[[str, tuple[str, ...]], float]:
        from openclip_ext.evaluation.metrics.vqa import soft_accuracy

        return (lambda answer, given: float(answer == given[0])) if self.task in CLASSES else soft_accuracy


@dataclasses.dataclass(frozen=True)
class RerankTask:
    """Recall both ways, where the first candidates by features are ranked again by the matching head.

    Attributes:
        name, dataset: see `Task`.
        retrieval: the same without.
        content: of the checkpoint.
        candidates: per query.
    """

    name: str
    dataset: str
    retrieval: "RetrievalTask"
    content: dict[str, Any]
    candidates: int

    def run(self, model: "LoadedModel", ranks: "Ranks") -> dict[str, Any]:
        """Scores are recalls."""
        from openclip_ext.evaluation.fusion import reranked_metrics

        task = self.retrieval
        metrics, images, texts = reranked_metrics(
            model, self.content, task.pairs, self.candidates, task.batch_size, task.workers, ranks
        )
        if not ranks.first:
            return {}
        scores = {name: value for name, value in metrics.items() if "_R@" in name}
        return {"num_samples": images, "num_texts": texts, "candidates": self.candidates, "scores": scores}
