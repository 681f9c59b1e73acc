"""Training with a batch of four, and the exact gradient on the way."""

import dataclasses
import time

import torch
from runs.methods import parse_method
from torch import Tensor, nn
from torch.nn.functional import normalize

from openclip_ext import create_loss
from openclip_ext.losses import Objective
from openclip_ext.losses.emc2.loss import EMC2Loss

from ..global_loss import global_loss
from .views import stored_views

WIDTH, EMBED = 256, 64  # of the hidden layer and of features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run is known by.

    Attributes:
        method: `NAME[+OPTION=VALUE…]`.
        folder, images: see `stored_views`.
        batch_size: images per step, of both views.
        scale: the inverse temperature.
        lr: of SGD.
        epochs: times that each image is seen.
        every: steps between two exact gradients.
        seed: of initial parameters and order.
    """

    method: str
    folder: str
    images: int
    batch_size: int
    scale: float
    lr: float
    epochs: int
    every: int
    seed: int


def train(run: Run) -> dict:
    """Train, and every so many steps take the exact gradient of the decoupled loss over all images.

    Returns:
        `iterations`, and at each `squared_norm` of that gradient with respect to all parameters, and the `loss`.
        `seconds` of CPU time that training took, without them.
    """
    views = stored_views(run.folder, run.images)
    torch.manual_seed(run.seed)
    model = nn.Sequential(nn.Linear(views.shape[2], WIDTH), nn.ReLU(), nn.Linear(WIDTH, EMBED))
    loss = build(run.method, run.images)
    optimizer = torch.optim.SGD(model.parameters(), lr=run.lr)
    generator = torch.Generator().manual_seed(run.seed)
    orders = [torch.randperm(run.images, generator=generator) for _ in range(run.epochs)]
    batches = [ids for order in orders for ids in order.split(run.batch_size) if len(ids) == run.batch_size]
    curve, seconds = [(0, *exact(model, views, run.scale))], 0.0
    for step, ids in enumerate(batches):
        started = time.process_time()
        loss.begin_step(step=step, total_steps=len(batches))
        take_gradient(model, loss, views, ids, run.scale)
        optimizer.step()
        loss.commit()
        seconds += time.process_time() - started
        if (step + 1) % run.every == 0:
            curve.append((step + 1, *exact(model, views, run.scale)))
    iterations, norms, losses = map(list, zip(*curve, strict=True))
    return {"iterations": iterations, "squared_norm": norms, "loss": losses, "seconds": seconds}


def build(method: str, images: int) -> Objective:
    """The loss. Raises UserError: no such loss, option or value."""
    name, options = parse_method(method)
    return create_loss(name, num_samples=images, embed_dim=EMBED, **dict(options))


def take_gradient(model: nn.Module, loss: Objective, views: Tensor, ids: Tensor, scale: float) -> None:
    """Set the gradient of a step: the first views are the images of the loss, the second ones its texts."""
    first, second = (normalize(model(view[ids]), dim=1) for view in views)
    stored = encode_stored(model, loss, views, ids)
    outputs = loss(first, second, torch.tensor(scale), sample_ids=ids, stored_features=stored)
    model.zero_grad()
    outputs["contrastive_loss"].backward()


def encode_stored(model: nn.Module, loss: Objective, views: Tensor, ids: Tensor) -> Tensor | None:
    """For `emc2` with `bank=index`: features of the chains' states, (2, B, D), with gradient. None: not asked for.

    The state of a first view's chain is another image's second view, and the other way round. A chain that has none yet
    gets the features of any, which the loss does not look at.
    """
    if not isinstance(loss.base, EMC2Loss) or loss.base.options.bank != "index":
        return None
    states = loss.base.stored_ids(ids).clamp_min(0)
    return torch.stack([normalize(model(views[1 - d, states[d]]), dim=1) for d in range(2)])


def exact(model: nn.Module, views: Tensor, scale: float) -> tuple[float, float]:
    """Squared norm of the gradient of the decoupled loss over all images, and its value."""
    first, second = (normalize(model(view), dim=1) for view in views)
    value = global_loss(first, second, scale, decoupled=True)
    gradient = torch.autograd.grad(value, list(model.parameters()))
    return sum(part.square().sum().item() for part in gradient), value.item()
