"""Training from many initial values at once."""

import dataclasses
import math

import torch
from runs.methods import parse_method
from torch import Tensor, nn
from torch.nn.functional import normalize

from openclip_ext import create_loss
from openclip_ext.losses import Objective
from openclip_ext.losses.emc2.loss import EMC2Loss
from openclip_ext.registry import get_spec

from .data import NUISANCE, PAIRS, SCALE, WIDTHS, Noise, optimum, shares, simulate

RATE = 0.02  # step size of SGD, which falls to 0 over the last four fifths of training
APART = 60.0  # logits that scores of other initial values are lower by


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run is known by.

    Attributes:
        method: `NAME[+OPTION=VALUE…]`.
        batch_size: pairs per step.
        noise: see `Noise.deviation`.
        starts: initial values.
        steps: of SGD.
    """

    method: str
    batch_size: int
    noise: float
    starts: int
    steps: int


def is_decoupled(method: str) -> bool:
    """Whether the method's target leaves the positive out of the denominator."""
    name, options = parse_method(method)
    default = name in ("dcl", "sogclr") or getattr(get_spec(name).options, "decoupled", False)
    return {"true": True, "false": False}[options.get("decoupled", str(default)).lower()]


def train(run: Run) -> dict:
    """Train from each initial value.

    Returns:
        `metric` of each: `1 - |a - a*| / |a*|` of the shares a at the end and a* at the optimum of the noiseless loss
        over all pairs; 1 at the optimum. And the `shares`, averaged over the steps of the second half.
    """
    torch.manual_seed(0)
    trainer = Trainer(run)
    total = torch.zeros(run.starts, len(WIDTHS))
    last = range(run.steps // 2, run.steps)
    for step in range(run.steps):
        trainer.step(step)
        if step in last:
            total += shares(trainer.weights.detach())
    found, best = total / len(last), optimum(is_decoupled(run.method)).float()
    metric = 1 - (found - best).norm(dim=1) / best.norm()
    return {"metric": metric.tolist(), "shares": found.tolist()}


class Trainer:
    """SGD from all initial values in one go: a batch holds `batch_size` pairs of each.

    What belongs to different initial values has scores that are lower by 60, so none is a negative of another, and the
    gradients are those that each would have by itself. Each has its own order of pairs, noise, and sample ids.

    Attributes:
        weights: (starts, 2, K), of unit norm per tower.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.pairs, self.noise = run, simulate(), Noise(run.noise)
        self.generator = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(0.2 + torch.rand(run.starts, 2, len(WIDTHS), generator=self.generator))
        self.start = torch.arange(run.starts).repeat_interleave(run.batch_size)
        self.loss = self._build()
        self._order: list[Tensor] = []

    def step(self, step: int) -> None:
        loss, run = self.loss, self.run
        loss.begin_step(step=step, total_steps=run.steps)
        pairs = self._next_pairs()
        ids = self.start * PAIRS + pairs
        image, text, scale = self._encode(self.start, pairs)
        outputs = loss(image, text, torch.tensor(scale), sample_ids=ids, stored_features=self._stored(ids))
        # The loss is a mean over all anchors, each initial value's a mean over its own.
        (gradient,) = torch.autograd.grad(run.starts * outputs["contrastive_loss"], self.weights)
        loss.commit()
        with torch.no_grad():
            rate = RATE * min(1.0, (1 - step / run.steps) / 0.8)
            self.weights.copy_(normalize(self.weights - rate * gradient, dim=2))

    def _build(self) -> Objective:
        """The loss, whose K is what each initial value's would be: the others count among a batch's negatives."""
        run, (name, options) = self.run, parse_method(self.run.method)
        if hasattr(get_spec(name).options, "negatives"):
            seen, own = run.starts * run.batch_size - 1, run.batch_size - 1
            options["negatives"] = str(round((PAIRS - 1) * seen / own))
        width = sum(WIDTHS) + (NUISANCE if run.noise else 0) + run.starts
        return create_loss(name, num_samples=run.starts * PAIRS, embed_dim=width, **dict(options))

    def _next_pairs(self) -> Tensor:
        """Pairs of a step, (starts * batch_size,): each initial value goes through all in an order of its own."""
        if not self._order:
            keys = torch.rand(self.run.starts, PAIRS, generator=self.generator)
            self._order = list(keys.argsort(1).split(self.run.batch_size, dim=1))
        return self._order.pop(0).flatten()

    def _encode(self, start: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, float]:
        """Unit features of pairs by the weights of initial values, with noise, and the scale."""
        weights = normalize(self.weights, dim=2)[start][:, :, self.pairs.kind]
        image, text = weights[:, 0] * self.pairs.image[pairs], weights[:, 1] * self.pairs.text[pairs]
        image, text, scale = self.noise.add(image, text, SCALE, self.generator)
        whole = scale + APART
        code, part = math.sqrt(APART / whole) * torch.eye(self.run.starts)[start], math.sqrt(scale / whole)
        return torch.cat([part * image, code], 1), torch.cat([part * text, code], 1), whole

    def _stored(self, ids: Tensor) -> Tensor | None:
        """The negatives of chains that keep ids alone, encoded now, (2, B, D); texts of images first."""
        base = self.loss.base
        if not isinstance(base, EMC2Loss) or base.options.bank != "index":
            return None
        text_ids, image_ids = base.stored_ids(ids).clamp_min(0)
        _, text, _ = self._encode(text_ids // PAIRS, text_ids % PAIRS)
        image, _, _ = self._encode(image_ids // PAIRS, image_ids % PAIRS)
        return torch.stack([text, image])
