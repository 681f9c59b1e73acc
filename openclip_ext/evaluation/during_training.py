"""What `--val-data`, `--imagenet-val`, `--imagenet-v2`, `--zero-shot` and `--probe-val` measure between epochs."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from openclip_ext.errors import RankError
from openclip_ext.evaluation.datasets.probe_sets import ProbeData, probe_features
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.evaluation.metrics.probes import knn_accuracy, linear_probe_accuracy
from openclip_ext.evaluation.metrics.retrieval import RETRIEVAL_METRICS, retrieval_metrics
from openclip_ext.evaluation.metrics.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores
from openclip_ext.evaluation.ranks import ALONE, Ranks

#: What is measured, by what on.
ZERO_SHOT_SCORES = ("top1", "top5")
PROBE_METRICS = ("knn-top1", "linear-probe-top1")
PAIR_METRICS = (*RETRIEVAL_METRICS, "clip_val_loss")


@dataclasses.dataclass(frozen=True)
class ZeroShotSet:
    """Pictures to classify.

    Attributes:
        name: what its metrics' names begin with.
        batches: of (images, class indices).
        class_names: by class index.
        templates: format strings, or functions of a class name.
        shared: `batches` are this rank's part; else every rank has all.
    """

    name: str
    batches: Iterable
    class_names: Sequence[str]
    templates: Sequence[str | Callable[[str], str]]
    shared: bool = True


@dataclasses.dataclass
class Evaluator:
    """Held-out data and how to run the model on it.

    Attributes:
        tokenizer: the model's.
        device: where the model is.
        autocast: a function that returns the context to run the model in.
        dtype: of images; None: as loaded.
        pairs: batches with `image` and `text`, or None.
        zero_shot: sets to classify.
        ranks: those that share the data: `pairs`, `probe` and what is shared of `zero_shot` are this one's part.
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
    zero_shot: Sequence[ZeroShotSet]
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
        """`…-top1` and `…-top5` of each set. Sets with the same words share their classifier."""
        metrics: dict[str, float] = {}
        classifiers: dict[tuple, Tensor] = {}
        for one in self.zero_shot:
            words = tuple(one.class_names), tuple(one.templates)
            if words not in classifiers:
                classifiers[words] = zero_shot_classifier(encoder, *words, ranks=self.ranks, progress=self.progress)
            counts = zero_shot_counts(encoder, classifiers[words], one.batches, desc=one.name, progress=self.progress)
            if parts := self.ranks.on_first(counts):
                scores = zero_shot_scores(torch.stack(parts).sum(0) if one.shared else parts[0])
                metrics |= {f"{one.name}-{score}": scores[score] for score in ZERO_SHOT_SCORES}
        return metrics

    def _probe_metrics(self, encoder: Encoder) -> dict[str, float]:
        """Accuracy of the image tower's features as they are: of their nearest neighbours, and of a linear probe."""
        assert self.probe is not None
        train, val = (
            probe_features(encoder, batches, ranks=self.ranks, progress=self.progress)
            for batches in (self.probe.train, self.probe.val)
        )
        if train is None or val is None:
            return {}
        data = [part.to(encoder.device) for part in (*train, *val)]
        scores = knn_accuracy(*data), linear_probe_accuracy(*data)
        return dict(zip(PROBE_METRICS, scores, strict=True))

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
