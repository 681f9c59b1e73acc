"""`--fusion` and `--task`: the fusion model of a run, from its config or from another run."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openclip_ext.data.questions import (
    Questions,
    QuestionTable,
    answer_table,
    class_table,
    covered,
    frequent_answers,
    read_questions,
)
from openclip_ext.errors import UserError
from openclip_ext.evaluation.metrics.vqa import normalise_answer
from openclip_ext.files import read_json
from openclip_ext.fusion.config import (
    ANSWERING,
    CLASSES,
    QUESTIONS,
    FusionConfig,
    make_config,
    read_config,
    require_same,
)
from openclip_ext.fusion.loading import answer_tokens, load_fusion, take_weights
from openclip_ext.fusion.masking import Masking
from openclip_ext.fusion.model import FusionModel
from openclip_ext.fusion.objective import FusionObjective
from openclip_ext.fusion.tasks import TaskObjective
from openclip_ext.losses import Loss, LossContext, ObjectivePlan, Vocabulary
from openclip_ext.report.params import read_params
from openclip_ext.training.config import RunConfig

#: Answers of a list where none is given: as many as ALBEF's, most frequent first.
MOST_ANSWERS = 3128


@dataclasses.dataclass(frozen=True)
class Fusion:
    """The fusion model of a run.

    Attributes:
        config: of the model.
        task: what it is fine-tuned for; None: pre-training.
        flags: of the run, where the run that it starts from knows better.
        weights: of the objective of that run, by their names there; empty: all is new.
        table: what to train on, of tasks with questions.
        answers: of vqa, all there are.
        remarks: for the log.
    """

    config: FusionConfig
    task: str | None
    flags: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    table: QuestionTable | None = None
    answers: Sequence[str] = ()
    remarks: Sequence[str] = ()

    @property
    def notes(self) -> dict[str, Any]:
        """What its checkpoints say of it."""
        return {"fusion": dataclasses.asdict(self.config), "task": self.task, "answers": list(self.answers)}

    def require_same(self, content: Mapping[str, Any], source: str) -> None:
        """Raises UserError: a checkpoint is of another model, task or answer list."""
        require_same(self.config, content.get("fusion"), source)
        if content.get("task") != self.task:
            was = f"--task {content['task']}" if content.get("task") else "without --task"
            raise UserError(f"{source}: was trained {was}; to start from it, give it as --fusion")
        if list(content.get("answers", [])) != list(self.answers):
            raise UserError(f"{source}: has another list of answers; use the data or --answers it was trained with")

    def model(self, model: nn.Module, vocabulary: Vocabulary, *, trunk_features: bool) -> FusionModel:
        """OpenCLIP's model with its tokens, and with hidden words and a momentum copy where those are trained on."""
        if self.task in ANSWERING:
            return FusionModel(model)
        masking = Masking(vocabulary, self.config.mask_share, self.config.mask_id)
        return FusionModel(model, masking, self.config.momentum, trunk_features)

    def objective(
        self, plan: ObjectivePlan, context: LossContext, paired: FusionModel, autocast: Callable, tokenizer: Callable
    ) -> Loss:
        """What is minimised, with the weights it starts from."""
        widths = paired.state_widths
        if self.task in ANSWERING:
            assert self.task is not None
            tokens = answer_tokens(tokenizer, self.answers) if self.answers else None
            loss: Loss = TaskObjective(context, self.config, self.task, *widths, autocast, tokens)
        else:
            loss = FusionObjective(plan, context, self.config, *widths, autocast)
        take_weights(loss, self.weights)
        return loss


def read_fusion(config: RunConfig) -> Fusion:
    """What `--fusion`, `--task` and their kin say.

    Raises:
        UserError: a file that does not fit, a run that has no such model, or data without what the task needs.
    """
    assert config.fusion is not None
    flags: dict[str, Any] = {}
    weights: Mapping[str, Tensor] = {}
    if config.fusion.endswith(".json"):
        model = read_config(config.fusion)
    else:
        path, content = load_fusion(config.fusion)
        model, weights = make_config(content["fusion"], f"--fusion {path}:"), content.get("loss", {})
        known = read_params(Path(path).parent.parent).flags
        flags = {"pretrained": path} if "pretrained" not in config.given else {}
        flags |= {name: known[name] for name in ("model", "model_config") if name not in config.given and name in known}
    if config.task == "retrieval":
        model = dataclasses.replace(model, words=0.0)
    if config.task not in QUESTIONS or not config.train_data:
        return Fusion(model, config.task, flags, weights)
    questions = read_questions(config.task, config.train_data, config.task_images, "--train-data")
    remarks = questions.remarks()
    if config.task in CLASSES:
        table, answers = class_table(questions, CLASSES[config.task], "--train-data"), []
    else:
        answers = read_answers(config.answers, questions)
        table = answer_table(questions, answers, normalise_answer)
        remarks += answer_remarks(questions, answers, len(table))
    return Fusion(model, config.task, flags, weights, table, answers, remarks)


def read_answers(path: str | None, questions: Questions) -> list[str]:
    """`--answers`, else the most frequent of the training set.

    Raises:
        UserError: no JSON list of texts.
    """
    if path is None:
        return frequent_answers(questions, normalise_answer, MOST_ANSWERS)
    try:
        answers = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--answers {path}: cannot be read as JSON ({error})") from error
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f'--answers {path}: must be a list of texts, such as ["yes", "no"]')
    return list(dict.fromkeys(map(normalise_answer, answers)))


def answer_remarks(questions: Questions, answers: Sequence[str], usable: int) -> list[str]:
    """How much an answer list covers. Raises UserError: nothing."""
    share = covered(questions, answers, normalise_answer)
    if not usable:
        raise UserError(f"--answers: holds no answer to any question of {questions.name}; give a list that does")
    if share == 1:
        return []
    left = len(questions.rows) - usable
    return [f"the list of {len(answers):,} answers has {100 * share:.1f} % of those given; {left:,} questions are left "
            "out, since it has none of theirs"]  # fmt: skip


class Pictures:
    """Several pictures as one tensor (n, 3, H, W), each by a transform of one."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, pictures: Sequence[Any]) -> Tensor:
        return torch.stack([self.transform(picture) for picture in pictures])
