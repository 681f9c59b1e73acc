"""Zero-shot classification: an image belongs to the class whose texts are nearest.

C   classes       D   width of features
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from openclip_ext import upstream
from openclip_ext.errors import UserError
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.evaluation.ranks import ALONE, Ranks

TOPS = (1, 3, 5)


@torch.no_grad()
def zero_shot_classifier(
    encoder: Encoder,
    class_names: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
    *,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> Tensor:
    """(D, C) unit columns: a class is the mean text feature over templates, as OpenCLIP computes it.

    Of several ranks each encodes a share of the classes, as many times as any other, and all return the whole.

    Args:
        encoder: the model.
        class_names: one name per class.
        templates: format strings, or functions of a class name.
        ranks: this process, of how many.
        progress: show a progress bar.
    """
    size = upstream.CLASSES_PER_BATCH  # the same batches on any number of ranks
    batches = [class_names[start : start + size] for start in range(0, len(class_names), size)]
    rounds = math.ceil(len(batches) / ranks.world_size)
    own = [batches[number] if number < len(batches) else [""]
           for number in range(ranks.rank, rounds * ranks.world_size, ranks.world_size)]  # fmt: skip
    with encoder.autocast():
        columns = upstream.zero_shot_weights(
            encoder.model, encoder.tokenizer, [name for batch in own for name in batch], templates, encoder.device,
            progress=progress,
        )  # fmt: skip
    if ranks.world_size == 1:
        return columns
    parts = [part.split(size, dim=1) for part in ranks.on_all(columns.cpu())]
    in_order = [part[number] for number in range(rounds) for part in parts]
    return torch.cat(in_order[: len(batches)], dim=1).to(encoder.device)


@torch.no_grad()
def zero_shot_counts(
    encoder: Encoder,
    classifier: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    desc: str = "zero-shot",
    progress: bool = True,
) -> Tensor:
    """(C, 4) int64 on the CPU: by class, its images, and those of them that have it among their best 1, 3 and 5.

    Counts of parts of a data set add up to those of the whole. Images of class -1, which make up for missing ones, do
    not count. Among classes with equal scores `topk` decides, as in OpenCLIP, whose numbers these are.

    Args:
        encoder: the model.
        classifier: as `zero_shot_classifier` returns it.
        batches: (images, class indices).
        desc: what the progress bar is called.
        progress: show it.
    """
    num_classes = classifier.shape[1]
    counts = torch.zeros(num_classes, 1 + len(TOPS), dtype=torch.int64, device=encoder.device)
    for features, labels in encoder.labelled(batches, normalize=True, desc=desc, progress=progress):
        labels = labels.to(encoder.device, non_blocking=True)
        with encoder.autocast():
            logits = 100.0 * features @ classifier  # scaled as OpenCLIP's, so that rounding makes the same ties
        correct = logits.topk(min(max(TOPS), num_classes)).indices == labels[:, None]
        row = torch.stack([torch.ones_like(labels), *(correct[:, :top].any(1) for top in TOPS)], dim=1)
        # Without a mask, for whose size a GPU would have to be waited for.
        counts.index_add_(0, labels.clamp(min=0), row.long() * (labels >= 0)[:, None])
    return counts.cpu()


def zero_shot_scores(counts: Tensor) -> dict[str, float]:
    """`top1`, `top3`, `top5`, shares of images in [0, 1], and `mean_per_class`, the mean of top1 over classes.

    Classes without an image are left out of the mean.

    Args:
        counts: (C, 4), as `zero_shot_counts` returns them.

    Raises:
        UserError: there is no image.
    """
    total = counts[:, 0].sum().item()
    if total == 0:
        raise UserError("zero-shot classification: there is no image to classify")
    scores = {f"top{top}": counts[:, column].sum().item() / total for column, top in enumerate(TOPS, start=1)}
    present = counts[counts[:, 0] > 0].double()
    return scores | {"mean_per_class": (present[:, 1] / present[:, 0]).mean().item()}
