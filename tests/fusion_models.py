"""Fusion models small enough for a test."""

import contextlib

import torch

from openclip_ext.fusion.config import make_config
from openclip_ext.fusion.masking import Masking
from openclip_ext.fusion.model import FusionModel
from openclip_ext.fusion.objective import FusionObjective
from openclip_ext.losses import LossContext, ObjectivePlan, Vocabulary, Widths
from towers import inputs, tower_model

VOCABULARY = Vocabulary(64, frozenset({0, 62, 63}), 63)
CONFIG = {"layers": 2, "width": 16, "heads": 2, "decoder_layers": 2, "momentum": 0.9, "mask_share": 0.4}


def pretraining(pairs, loss="clip", terms=None, **changes):
    """(model, objective, batch) in float64."""
    torch.manual_seed(0)
    config = make_config(CONFIG | changes, "")
    towers = tower_model("vit")
    model = FusionModel(towers, Masking(VOCABULARY, config.mask_share), config.momentum, bool(terms))
    model = model.double().train()
    context = LossContext(num_samples=30, vocabulary=VOCABULARY, widths=Widths(embed=8, image_trunk=32, text_trunk=16))
    plan = ObjectivePlan(loss, {}, terms)
    objective = FusionObjective(plan, context, config, *model.state_widths, contextlib.nullcontext).double().train()
    image, text = inputs(towers)
    batch = {
        "image": torch.randn(pairs, *image.shape[1:]).double(),
        "text": torch.randint(1, 60, (pairs, text.shape[1])),
        "row_seeds": torch.arange(pairs) + 11,
    }
    batch["text"][:, 7], batch["text"][:, 8:] = 63, 0
    return model, objective, batch


def outputs(model, objective, batch):
    """What the objective makes of a batch, as the training loop calls both."""
    features = model(**{name: batch[name] for name in ("image", "text", "row_seeds")})
    required = [features.pop(name) for name in ("image_features", "text_features", "logit_scale")]
    constants = {"text_tokens": batch["text"], "row_seeds": batch["row_seeds"], "sample_ids": batch["row_seeds"]}
    constants["logit_bias"] = torch.tensor(-1.0)
    return objective(*required, **features, **constants)
