"""`--warm-start-pass`: one pass over the training data, without gradient, that fills the memory of a loss."""

import itertools

import torch
from tqdm import tqdm

from openclip_ext.training.loop import Trainer, concatenated, model_inputs


@torch.no_grad()
def warm_start_pass(trainer: Trainer, epoch: int) -> list[tuple[str, str, int]]:
    """Show the loss the data once, in batches as large as those of an optimizer step; nothing else changes.

    The model runs as it does in training, so that the features are those that a first visit would see; running
    statistics are put back afterwards.

    Args:
        trainer: before its first step.
        epoch: whose order of the data to take; one that training does not come to, so that it meets other batches.

    Returns:
        (kind, shard, count) of what this rank could not use.
    """
    accelerator, loss = trainer.accelerator, trainer.loss
    buffers = [(buffer, buffer.clone()) for buffer in trainer.paired.buffers()]
    trainer.model.train()
    loss.train()
    trainer.loader.set_epoch(epoch)
    skipped: list[tuple[str, str, int]] = []

    def read(batch: dict) -> None:
        skipped.extend(batch.pop("skipped"))
        batch.pop("place", None)

    batches = trainer.batches(read)
    size = trainer.loader.num_samples // trainer.loader.num_batches  # of a batch on all ranks
    with tqdm(
        total=trainer.loader.num_samples, unit="sample", unit_scale=True, desc="warm start",
        disable=not accelerator.is_main_process,
    ) as bar:  # fmt: skip
        while group := list(itertools.islice(batches, trainer.accum_freq)):
            features = concatenated([trainer.model(**model_inputs(batch)) for batch in group])
            required = [features.pop(key) for key in ("image_features", "text_features", "logit_scale")]
            loss.warm_start(*required, **features, **concatenated([trainer.constants(batch) for batch in group]))
            bar.update(len(group) * size)
    for buffer, before in buffers:
        buffer.copy_(before)
    return skipped
