"""The loss and its terms as flags name them, checked against the model that is to be trained."""

from collections.abc import Mapping
from typing import Any

from openclip_ext.errors import UserError
from openclip_ext.losses import ObjectivePlan
from openclip_ext.losses.recent import RecentOptions
from openclip_ext.registry import NEEDS, get_spec
from openclip_ext.training.config import RunConfig

_RECENT = ("recent_batches", "recent_check", "recent_limit")


def plan_objective(config: RunConfig) -> ObjectivePlan:
    """The loss and its terms, with those that OpenCLIP adds for distillation and for CoCa models.

    Raises:
        UserError: unknown names or options, or a need that the model does not meet.
    """
    terms: dict[str, Mapping[str, Any]] = dict(config.loss_terms)
    weight = 1.0
    if config.distill_model:
        if not config.distill_pretrained:
            raise UserError(f"--distill-model {config.distill_model}: give its weights with --distill-pretrained")
        terms.setdefault("distill", {})
    coca = "coca" in config.model.lower().rsplit("/", 1)[-1]
    if coca:
        terms.setdefault("caption", {"weight": config.coca_caption_loss_weight})
        weight = config.coca_contrastive_loss_weight
    plan = ObjectivePlan(config.loss, {**config.loss_options, **_recent_options(config)}, terms, weight=weight)
    if "stored_features" in plan.needs:
        raise UserError(
            "--loss-arg bank=index: is for callers that encode stored samples again, and shards are read in order; use "
            "bank=embedding, with bank_device=cpu or mmap if it is too large"
        )
    if "caption_logits" in plan.needs and not coca:
        raise UserError(f"--loss-term caption: --model {config.model} makes no captions; use a CoCa model")
    if coca and plan.needs & {"image_aug", "text_aug"}:
        raise UserError(
            f"--model {config.model}: a CoCa model makes captions of first views only; drop the --loss-term that needs "
            "second views, or use another model"
        )
    if "teacher_features" in plan.needs and not (config.distill_model or config.fusion):
        raise UserError(f"--loss {config.loss}: it or a term of it needs a teacher; name one with --distill-model")
    if config.fusion and coca:
        raise UserError(f"--fusion {config.fusion}: a CoCa model makes captions itself; use another --model")
    if config.pairs == "views":
        _require_views_only(config, plan, coca)
    return plan


def _recent_options(config: RunConfig) -> dict[str, str]:
    """Those that flags of their own name. Raises UserError: the loss has none, or one is given in both ways."""
    given = {name: getattr(config, name) for name in _RECENT if getattr(config, name) is not None}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')} {value}"
        if not issubclass(get_spec(config.loss).options, RecentOptions):
            raise UserError(
                f"{flag}: loss {config.loss} has no use for recent pairs; drop it, or use one that weighs an anchor's "
                "negatives against each other, such as dcl"
            )
        if name in config.loss_options:
            raise UserError(f"{flag}: --loss-arg {name}={config.loss_options[name]} is given too; keep one")
    return {name: str(value) for name, value in given.items()}


def _require_views_only(config: RunConfig, plan: ObjectivePlan, coca: bool) -> None:
    """Raises UserError: the model, the loss or a term needs more than two views of an image and the sample's id."""
    if coca:
        raise UserError(f"--model {config.model}: a CoCa model makes captions, and --pairs views has none; use another")
    parts = [(f"--loss {plan.spec.name}", plan.spec, plan.options)]
    parts += [(f"--loss-term {spec.name}", spec, options) for spec, _, options in plan.terms]
    for flag, spec, options in parts:
        beyond = [need for need in spec.needs_for(options) if not NEEDS[need].of_views]
        if beyond:
            raise UserError(
                f"{flag}: needs {', '.join(sorted(beyond))}, and with --pairs views there are two views of each image "
                "and nothing else; drop it"
            )
