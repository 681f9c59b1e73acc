"""Zero-shot classification with class names and templates."""

import os
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from openclip_ext import _host
from openclip_ext.errors import UserError

IMAGENET_CLASSES = 1000


@torch.no_grad()
def zero_shot_accuracy(
    model,
    tokenizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    class_names: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
    *,
    device: torch.device,
    autocast,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Share of images whose class is the best (top1), or among the five best (top5), by cosine with the class's text.

    A class is the mean text embedding over templates, as OpenCLIP computes it.

    Args:
        model: an OpenCLIP model, in evaluation mode.
        tokenizer: the model's.
        batches: (images, class indices).
        class_names: one name per class.
        templates: format strings or functions of a class name.
        device: where the model is.
        autocast: a function that returns the context to run the model in.
        dtype: of images; None: as loaded.
        progress: show progress bars.

    Returns:
        `top1`, `top5` in [0, 1], and `num_samples`.

    Raises:
        UserError: there is no image.
    """
    with autocast():
        classifier = _host.zero_shot_weights(model, tokenizer, class_names, templates, device, progress=progress)
    top = min(5, len(class_names))
    hits, total = torch.zeros(2, dtype=torch.int64), 0
    for images, labels in tqdm(batches, desc="zero-shot", unit="batch", disable=not progress):
        with autocast():
            features = model.encode_image(images.to(device=device, dtype=dtype), normalize=True)
            best = (features @ classifier).topk(top).indices
        correct = best == labels.to(device)[:, None]
        hits += torch.stack([correct[:, 0].sum(), correct.any(1).sum()]).cpu()
        total += len(labels)
    if total == 0:
        raise UserError("zero-shot classification: there is no image to classify")
    return {"top1": hits[0].item() / total, "top5": hits[1].item() / total, "num_samples": total}


def imagenet_loader(folder: str, transform, *, flag: str, batch_size: int, workers: int):
    """(images, class indices) of an ImageNet validation folder: 1,000 folders, named by wnid or by class index.

    Raises:
        UserError: no such folder, or not 1,000 class folders.
    """
    from torchvision.datasets import ImageFolder

    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if len(classes) != IMAGENET_CLASSES:
        raise UserError(
            f"{flag} {folder}: holds {len(classes)} class folders and ImageNet has {IMAGENET_CLASSES}; "
            "give the folder that holds the wnid folders"
        )
    # ImageNet-V2 names its folders by class index, which do not sort as numbers.
    as_index = {index: int(name) for index, name in enumerate(classes)} if all(map(str.isdigit, classes)) else None
    try:
        dataset = ImageFolder(folder, transform=transform, target_transform=as_index and as_index.get)
    except FileNotFoundError as error:
        raise UserError(f"{flag} {folder}: {error}") from error
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=workers)
