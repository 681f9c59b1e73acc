"""What fine-tuning minimises, task by task. Each is a loss that the training loop calls as any.

    vqa      an answer decoder writes each annotator's answer
    nlvr2    does a text hold of two images? two classes
    ve       does an image entail, leave open, or contradict a text? three classes
    assign   does a text belong to the first of two images, the second, or neither? the stage before nlvr2

`retrieval` goes on with the pre-training's contrast and matching, without masked words.

    B   samples on this rank        K   annotators of a question
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from openclip_ext.fusion.answers import AnswerDecoder
from openclip_ext.fusion.config import CLASSES, TWO_IMAGES, FusionConfig
from openclip_ext.fusion.encoder import ClassHead, FusionEncoder
from openclip_ext.fusion.masking import Masking
from openclip_ext.losses import Loss, LossContext
from openclip_ext.losses.context import require_vocabulary
from openclip_ext.ops.counter_random import uniform
from openclip_ext.ops.gather import global_mean
from openclip_ext.ops.precision import promoted

#: Draws of `assign`; those of masked words and of negatives have other numbers.
STREAM = 5


class TaskObjective(Loss):
    """The loss of a task over the fused text, by a head on the encoder; both are parameters of this loss.

    Args:
        context: with the vocabulary.
        config: of the encoder and the decoder.
        task: a key of `CLASSES`, or `vqa`.
        image_width, text_width: of the towers' tokens.
        autocast: returns the context to run the encoder in.
        answers: (A, M) token ids of the answers there are, of vqa.
    """

    answers: Tensor

    def __init__(
        self, context: LossContext, config: FusionConfig, task: str, image_width: int, text_width: int,
        autocast: Callable[[], AbstractContextManager], answers: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(context=context)
        vocabulary = require_vocabulary(context, "--fusion")
        self.task, self.autocast = task, autocast
        self.masking = Masking(vocabulary, config.mask_share, config.mask_id)
        self.encoder = FusionEncoder(config, image_width, text_width, images=2 if task in TWO_IMAGES else 1)
        self.head = ClassHead(config.width, len(CLASSES[task])) if task in CLASSES else None
        self.decoder = None
        if answers is not None:
            self.register_buffer("answers", answers, persistent=False)
            self.decoder = AnswerDecoder(config, vocabulary.size, answers.shape[1])

    def compute(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        text_tokens: Tensor,
        image_states: Tensor,
        text_states: Tensor,
        targets: Tensor | None = None,
        row_seeds: Tensor | None = None,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """States and seeds as `FusionModel` names them, and targets: classes (B,), or answers (B, K), -1 for none.

        Returns:
            NAME_loss, the mean over the samples of all ranks, and NAME_accuracy, that of this rank, of classes.
        """
        if self.task == "assign":
            assert row_seeds is not None
            image_states, targets = assigned(image_states, row_seeds)
        assert targets is not None
        with self.autocast():
            fused, attended = self.fused(text_tokens, image_states, text_states)
            if self.decoder is not None:
                return self._answers(fused, attended, targets)
            assert self.head is not None
            (scores,) = promoted(self.head(fused[:, 0]))
        total = cross_entropy(scores, targets, reduction="sum")
        return {
            f"{self.task}_loss": global_mean(total, len(targets), self.context.world_size),
            f"{self.task}_accuracy": (scores.argmax(1) == targets).float().mean(),
        }

    def fused(self, text_tokens: Tensor, image_states: Tensor, text_states: Tensor) -> tuple[Tensor, Tensor]:
        """The text's tokens with the images seen (B, L, C), and which of them there are (B, L)."""
        attended = self.masking.attended(text_tokens)
        images = image_states.unbind(1) if self.encoder.twins is not None else (image_states,)
        return self.encoder(text_states, attended, *images), attended

    @torch.no_grad()
    def predict(self, text_tokens: Tensor, image_states: Tensor, text_states: Tensor) -> Tensor:
        """(B,): the class, or the place of the answer in the list."""
        with self.autocast():
            fused, attended = self.fused(text_tokens, image_states, text_states)
            if self.decoder is not None:
                return self.decoder.rank(fused, attended, self.answers, self.masking.attended(self.answers))
            assert self.head is not None
            return self.head(fused[:, 0]).argmax(1)

    def _answers(self, fused: Tensor, attended: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`- mean over questions of sum over answers of (share of annotators) log p(answer)`."""
        assert self.decoder is not None
        rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
        known = targets >= 0
        places, votes = (rows[known] * len(self.answers) + targets[known]).unique(return_counts=True)
        row, answers = places // len(self.answers), self.answers[places % len(self.answers)]
        said = self.masking.attended(answers)
        likelihood = self.decoder.log_likelihood(fused[row], attended[row], answers, said)
        total = -(likelihood * votes).sum() / targets.shape[1]
        return {"vqa_loss": global_mean(total, len(targets), self.context.world_size)}


def assigned(image_states: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Two images for each text, its own among them or not, and the class: (B, 2, T, width) and (B,).

    The others are those of the next pairs of the batch; the class is drawn by each pair's seed.
    """
    classes = (3 * uniform(torch.zeros_like(seeds), seeds, stream=STREAM)).long().clamp_max(2)
    own, next_, third = image_states, image_states.roll(-1, 0), image_states.roll(-2, 0)
    choices = torch.stack([torch.stack([own, next_], 1), torch.stack([next_, own], 1), torch.stack([next_, third], 1)])
    return choices[classes, torch.arange(len(classes), device=classes.device)], classes
