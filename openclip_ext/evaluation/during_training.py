"""What `--val-data`, `--imagenet-val`, `--imagenet-v2` and `--probe-val` measure between epochs."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from openclip_ext import _host
from openclip_ext.errors import UserError
from openclip_ext.evaluation.class_folders import ProbeData, encoded
from openclip_ext.evaluation.encoder import Encoder
from openclip_ext.evaluation.probes import knn_accuracy, linear_probe_accuracy
from openclip_ext.evaluation.retrieval import retrieval_metrics
from openclip_ext.evaluation.zero_shot import zero_shot_classifier, zero_shot_counts, zero_shot_scores


@dataclasses.dataclass
class Evaluator:
    """Held-out data and how to run the model on it.

    Attributes:
        tokenizer: the model's.
        device: where the model is.
        autocast: a function that returns the context to run the model in.
        dtype: of images; None: as loaded.
        pairs: batches with `image` and `text`, or None.
        imagenet: metric prefix to batches of (images, class indices).
        val_frequency: epochs between evaluations on `pairs` and on `probe`; 0: never.
        zeroshot_frequency: epochs between evaluations on `imagenet`; 0: never.
        probe: labelled images, or None.
        progress: show progress bars.
        skipped: (kind, shard, count) of what could not be used of `pairs` the last time.
    """

    tokenizer: Any
    device: torch.device
    autocast: Any
    dtype: torch.dtype | None
    pairs: Iterable[dict] | None
    imagenet: dict[str, Iterable]
    val_frequency: int
    zeroshot_frequency: int
    probe: ProbeData | None = None
    progress: bool = True
    skipped: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)

    def due(self, epoch: int, last: bool) -> bool:
        """Whether anything is measured after `epoch` completed epochs."""
        has_data = self.pairs is not None or self.probe is not None
        return self._due(has_data, self.val_frequency, epoch, last) or self._due(
            bool(self.imagenet), self.zeroshot_frequency, epoch, last
        )

    @staticmethod
    def _due(has_data: bool, frequency: int, epoch: int, last: bool) -> bool:
        return has_data and frequency > 0 and (last or epoch % frequency == 0)

    def evaluate(self, model, epoch: int, last: bool) -> dict[str, float]:
        """Metrics under OpenCLIP's names. The model is left in evaluation mode."""
        model.eval()
        metrics: dict[str, float] = {}
        if self._due(bool(self.imagenet), self.zeroshot_frequency, epoch, last):
            metrics |= self._imagenet_metrics(model)
        if self._due(self.pairs is not None, self.val_frequency, epoch, last):
            metrics |= self._pair_metrics(model)
        if self._due(self.probe is not None, self.val_frequency, epoch, last):
            metrics |= self._probe_metrics(model)
        return metrics

    def _imagenet_metrics(self, model) -> dict[str, float]:
        """`…-top1` and `…-top5` of each set."""
        encoder = Encoder(model=model, tokenizer=self.tokenizer, transform=None, device=self.device,
                          autocast=self.autocast, dtype=self.dtype)  # fmt: skip
        classifier = zero_shot_classifier(encoder, *_host.imagenet_names(), progress=self.progress)
        metrics = {}
        for prefix, batches in self.imagenet.items():
            scores = zero_shot_scores(zero_shot_counts(encoder, classifier, batches, progress=self.progress))
            metrics |= {f"{prefix}-top1": scores["top1"], f"{prefix}-top5": scores["top5"]}
        return metrics

    def _probe_metrics(self, model) -> dict[str, float]:
        """Accuracy of the image tower's features as they are: of their nearest neighbours, and of a linear probe."""
        how = {"device": self.device, "autocast": self.autocast, "dtype": self.dtype, "progress": self.progress}
        data = *encoded(model, self.probe.train, **how), *encoded(model, self.probe.val, **how)
        return {
            "knn-top1": knn_accuracy(*data),
            "linear-probe-top1": linear_probe_accuracy(*(part.numpy() for part in data)),
        }

    @torch.no_grad()
    def _pair_metrics(self, model) -> dict[str, float]:
        """Retrieval, and `clip_val_loss`: InfoNCE within batches, as OpenCLIP computes it."""
        images, texts, loss, count = [], [], 0.0, 0
        self.skipped.clear()
        for batch in tqdm(self.pairs, desc="validation", unit="batch", disable=not self.progress, leave=False):
            self.skipped += batch["skipped"]
            with self.autocast():
                image = batch["image"].to(device=self.device, dtype=self.dtype)
                out = model(image, batch["text"].to(self.device))
            logits = out["logit_scale"].float() * out["image_features"].float() @ out["text_features"].float().T
            labels = torch.arange(len(logits), device=logits.device)
            loss += (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)).item() / 2 * len(logits)
            count += len(logits)
            images.append(out["image_features"].float())
            texts.append(out["text_features"].float())
        if count == 0:
            raise UserError("--val-data: no usable pair in these shards; look at them with: openclip-ext shards check")
        return retrieval_metrics(torch.cat(images), torch.cat(texts)) | {
            "clip_val_loss": loss / count,
            "num_samples": count,
        }
