"""How a model lays out images and texts, in numbers on the features of pairs.

M   pairs        D   width
v, t   shared unit features of images and texts, (M, D); row j of one belongs to row j of the other
p      private unit features of a modality, (M, D), where the model was trained with `feature_separation`
"""

import dataclasses
import math

import torch
from torch import Tensor

from openclip_ext.evaluation.metrics.retrieval import retrieval_metrics
from openclip_ext.ops.gram import sum_of_squared_cross_gaps, sum_of_squared_gaps

#: What is measured, and how it is called in tables; an arrow says which way is better, where one way is.
TITLES = {
    "modality_gap": "modality gap",
    "alignment": "alignment ↓",
    "uniformity_image": "uniformity, images ↓",
    "uniformity_text": "uniformity, texts ↓",
    "consistency_error_across": "consistency error, across ↓",
    "consistency_error_within": "consistency error, within ↓",
    "image_to_text_R@1": "image→text recall@1 ↑",
    "text_to_image_R@1": "text→image recall@1 ↑",
    "private_share_image": "private share, images",
    "private_share_text": "private share, texts",
    "private_overlap_image": "private overlap, images ↓",
    "private_overlap_text": "private overlap, texts ↓",
}


@dataclasses.dataclass(frozen=True)
class Structure:
    """What is known of one checkpoint.

    Attributes:
        label: its name in tables and pictures.
        features: arguments of `structure_metrics`.
        metrics: what that returns.
    """

    label: str
    features: dict[str, Tensor]
    metrics: dict[str, float]


def structure_metrics(
    image: Tensor, text: Tensor, image_private: Tensor | None = None, text_private: Tensor | None = None
) -> dict[str, float]:
    """The numbers below, in float64 and without an (M, M) matrix.

        modality_gap               || mean_j v_j - mean_j t_j ||                           Liang et al., NeurIPS 2022
        alignment                  mean_j ||v_j - t_j||^2                                  Wang & Isola, ICML 2020
        uniformity_image, _text    log mean_{j != k} exp(-2 ||v_j - v_k||^2)               the same
        consistency_error_across   mean_{j != k} (<v_j, t_k> - <v_k, t_j>)^2               Goel et al., NeurIPS 2022
        consistency_error_within   mean_{j != k} (<v_j, v_k> - <t_j, t_k>)^2               the same
        image_to_text_R@1, text_to_image_R@1                                               `retrieval_metrics`

    and with private features, for each modality:

        private_share_image, _text     tr Cov(p) / (tr Cov(v) + tr Cov(p))
        private_overlap_image, _text   mean_j <v_j, p_j>^2; unrelated directions give 1 / D

    Args:
        image, text: shared features of at least two pairs.
        image_private, text_private: private features; None: there are none, nor are their entries.
    """
    image, text = image.double(), text.double()
    pairs = len(image) * (len(image) - 1)
    within = sum_of_squared_gaps(image, text)
    across = (sum_of_squared_cross_gaps(image, text) - within).clamp(min=0)
    values = {
        "modality_gap": (image.mean(0) - text.mean(0)).norm(),
        "alignment": (image - text).square().sum(1).mean(),
        "uniformity_image": _uniformity(image),
        "uniformity_text": _uniformity(text),
        "consistency_error_across": across / pairs,
        "consistency_error_within": within / pairs,
    }
    metrics = {name: value.item() for name, value in values.items()}
    recall = retrieval_metrics(image, text)
    metrics |= {name: recall[name] for name in ("image_to_text_R@1", "text_to_image_R@1")}
    for modality, shared, private in (("image", image, image_private), ("text", text, text_private)):
        if private is not None:
            variance, own_variance = _total_variance(shared), _total_variance(private.double())
            both = variance + own_variance
            metrics[f"private_share_{modality}"] = own_variance / both if both else 0.0
            metrics[f"private_overlap_{modality}"] = (shared * private).sum(1).square().mean().item()
    return {name: metrics[name] for name in TITLES if name in metrics}


def _uniformity(features: Tensor, block: int = 1024) -> Tensor:
    """`log mean_{j != k} exp(-2 ||x_j - x_k||^2)` of unit rows, on blocks of rows."""
    parts = []
    for start in range(0, len(features), block):
        exponent = -4 * (1 - features[start : start + block] @ features.T)
        exponent.diagonal(start).fill_(-torch.inf)
        parts.append(exponent.logsumexp((0, 1)))
    return torch.stack(parts).logsumexp(0) - math.log(len(features) * (len(features) - 1))


def _total_variance(features: Tensor) -> float:
    """Trace of the covariance."""
    return features.var(0, correction=0).sum().item()
