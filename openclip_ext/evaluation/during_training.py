"""What `--val-data`, `--imagenet-val`, `--imagenet-v2` and `--probe-val` measure between epochs."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from openclip_ext.errors import RankError
from openclip_ext.evaluation.datasets.labelled import LabelledBatches, LabelledSet
from openclip_ext.evaluation.datasets.probe_sets import ProbeData, probe_features
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.evaluation.metrics.probes import knn_accuracy, linear_probe_accuracy
from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics
from openclip_ext.evaluation.metrics.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores
from openclip_ext.evaluation.ranks import ALONE, Ranks


@dataclasses.dataclass
class Evaluator:
    """Held-out data and how to run the model on it.

    Attributes:
        tokenizer: the model's.
        device: where the model is.
        autocast: a function that returns the context to run the model in.
        dtype: of images; None: as loaded.
        pairs: batches with `image` and `text`, or None.
        zero_shot: by metric prefix: batches of a labelled set, and that set, which says its classes in words.
        ranks: those that share the data: `pairs`, `zero_shot` and `probe` are this one's part.
        val_frequency: epochs between evaluations on `pairs` and on `probe`; 0: never.
        zeroshot_frequency: epochs between evaluations on `zero_shot`; 0: never.
        probe: labelled images, or None.
        progress: show progress bars.
        skipped: (kind, shard, count) of what could not be used of `pairs` the last time.
    """

    tokenizer: Any
    device: torch.device
    autocast: Any
    dtype: torch.dtype | None
    pairs: Iterable[dict] | None
    zero_shot: dict[str, tuple[LabelledBatches, LabelledSet]]
    val_frequency: int
    zeroshot_frequency: int
    ranks: Ranks = ALONE
    probe: ProbeData | None = None
    progress: bool = True
    skipped: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)

    def due(self, epoch: int, last: bool) -> bool:
        """Whether anything is measured after `epoch` completed epochs."""
        has_data = self.pairs is not None or self.probe is not None
        return self._due(has_data, self.val_frequency, epoch, last) or self._due(
            bool(self.zero_shot), self.zeroshot_frequency, epoch, last
        )

    @staticmethod
    def _due(has_data: bool, frequency: int, epoch: int, last: bool) -> bool:
        return has_data and frequency > 0 and (last or epoch % frequency == 0)

    def evaluate(self, model, epoch: int, last: bool) -> dict[str, float]:
        """Metrics under OpenCLIP's names on the first rank, none on the others. All ranks take part.

        The model is left in evaluation mode.
        """
        model.eval()
        self.ranks.share_buffers(model)
        encoder = Encoder(
            model=model, tokenizer=self.tokenizer, device=self.device, autocast=self.autocast, dtype=self.dtype
        )
        metrics: dict[str, float] = {}
        if self._due(bool(self.zero_shot), self.zeroshot_frequency, epoch, last):
            metrics |= self._zero_shot_metrics(encoder)
        if self._due(self.pairs is not None, self.val_frequency, epoch, last):
            metrics |= self._pair_metrics(encoder)
        if self._due(self.probe is not None, self.val_frequency, epoch, last):
            metrics |= self._probe_metrics(encoder)
        return metrics

    def _zero_shot_metrics(self, encoder: Encoder) -> dict[str, float]:
        """`…-top1` and `…-top5` of each set. Sets with the same words share a classifier."""
        metrics, made = {}, []
        for prefix, (batches, labelled) in self.zero_shot.items():
            words = labelled.class_names, labelled.templates
            classifier = next((classifier for known, classifier in made if known == words), None)
            if classifier is None:
                classifier = zero_shot_classifier(encoder, *words, ranks=self.ranks, progress=self.progress)
                made.append((words, classifier))
            parts = self.ranks.on_first(zero_shot_counts(encoder, classifier, batches, progress=self.progress))
            if parts:
                scores = zero_shot_scores(torch.stack(parts).sum(0))
                metrics |= {f"{prefix}-top1": scores["top1"], f"{prefix}-top5": scores["top5"]}
        return metrics

    def _probe_metrics(self, encoder: Encoder) -> dict[str, float]:
        """Accuracy of the image tower's features as they are: of their nearest neighbours, and of a linear probe."""
        train, val = (
            probe_features(encoder, batches, ranks=self.ranks, progress=self.progress)
            for batches in (self.probe.train, self.probe.val)
        )
        if train is None or val is None:
            return {}
        return {
            "knn-top1": knn_accuracy(*train, *val),
            "linear-probe-top1": linear_probe_accuracy(*(part.numpy() for part in (*train, *val))),
        }

    def _pair_metrics(self, encoder: Encoder) -> dict[str, float]:
        """Retrieval, and `clip_val_loss`: InfoNCE within batches, as OpenCLIP computes it."""
        rows, losses, skipped = [], [], []
        bar = tqdm(self.pairs, desc="validation", unit="batch", disable=not self.progress, leave=False)
        for batch, out in encoder.paired(bar):
            skipped += batch["skipped"]
            if batch["position"][0] < 0:  # makes up for a batch that this rank does not have
                continue
            image, text = out["image_features"].float(), out["text_features"].float()
            losses.append(_info_nce(image, text, out["logit_scale"].float()))
            rows.append((batch["position"], image.cpu(), text.cpu()))
        parts = self.ranks.on_first((rows, losses, skipped))
        self.skipped[:] = [row for _, _, skips in parts for row in skips]
        rows = [row for rows, _, _ in parts for row in rows]
        if self.ranks.first and not rows:
            raise RankError("--val-data: no usable pair in these shards; look at them with: openclip-ext shards check")
        if not rows:
            return {}
        positions, images, texts = (torch.cat(column) for column in zip(*rows, strict=True))
        order = positions.argsort()
        images, texts = images[order].to(self.device), texts[order].to(self.device)
        # A sum that does not depend on the order in which ranks come.
        loss = math.fsum(loss for _, losses, _ in parts for loss in losses) / len(order)
        return retrieval_metrics(images, texts) | {"clip_val_loss": loss, "num_samples": len(order)}


def _info_nce(image: Tensor, text: Tensor, scale: Tensor) -> float:
    """The sum over both ways and a batch's pairs, by half."""
    logits = scale * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)).item() / 2 * len(logits)
