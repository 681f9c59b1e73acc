"""Contrastive losses of other packages, called as OpenCLIP's are; each import fails where the package is not there."""

from collections.abc import Callable

import torch


def _inf_cl() -> Callable:
    from inf_cl import cal_flash_loss

    return lambda image, text, scale: (
        (cal_flash_loss(image, text, scale=scale).mean() + cal_flash_loss(text, image, scale=scale).mean()) / 2
    )


def _pytorch_metric_learning() -> Callable:
    from pytorch_metric_learning.losses import NTXentLoss

    def loss(image, text, scale):
        labels = torch.arange(len(image), device=image.device)
        return NTXentLoss(temperature=1 / scale.item())(image, labels, ref_emb=text, ref_labels=labels)

    return loss


def _lightly() -> Callable:
    from lightly.loss.ntx_ent_loss import NTXentLoss

    return lambda image, text, scale: NTXentLoss(temperature=1 / scale.item())(image, text)


#: By the name of the package. Those that know no pairs of two modalities take both as one set, or one direction.
PEERS = {"inf-cl": _inf_cl, "pytorch-metric-learning": _pytorch_metric_learning, "lightly": _lightly}
