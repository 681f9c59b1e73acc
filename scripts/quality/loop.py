"""One run: a model trained by one method, and its score."""

import dataclasses
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from openclip_ext.losses import Objective
from openclip_ext.losses.base import total_loss
from openclip_ext.training.encode_again import KeptInputs

from .methods import Method
from .tasks import Files, Setting, Task, TwoTowers, features, stream
from .trained import TRAINED, score_trained

LEARNED_FROM = 1 / 0.07  # where a learned logit scale starts, as OpenCLIP's does
LARGEST_SCALE = 100.0  # to which OpenCLIP clamps it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run is known by. Two runs that are equal have the same score.

    Attributes:
        task: its name.
        setting: see `Setting`.
        method: see `Method`.
        batch_size: pairs that are encoded at once.
        scale: `fixed` or `learned`, the logit scale.
        lr: the peak of the one-cycle schedule.
        seed: of initial parameters, order and captions.
        split: what the score is taken on.
    """

    task: str
    setting: Setting
    method: str
    batch_size: int
    scale: str
    lr: float
    seed: int
    split: str


def score(run: Run, files: Files = ()) -> dict[str, float]:
    """Train and score.

    Args:
        run: what is trained.
        files: of a task that is read from files.

    Returns:
        `score` in percent; `seconds` of CPU time that training took on one core; `steps`; `pairs` seen;
        `logit_scale` at the end; `recent`, the mean number of recent steps that joined, for methods that have them.
    """
    torch.set_num_threads(1)
    if run.task in TRAINED:
        return score_trained(run, files)
    task, model = begin(run, files)
    started = time.process_time()
    found = train(run, task, model)
    seconds = time.process_time() - started
    scale = float(model.logit_scale.exp())
    return {"score": task.score(model, run.split), "seconds": seconds, "logit_scale": scale, **found}


def begin(run: Run, files: Files = ()) -> tuple[Task, TwoTowers]:
    """What a run learns, and its model before the first step."""
    task = features(*files) if files else stream(run.setting)
    torch.manual_seed(run.seed)
    learned = run.scale == "learned"
    return task, TwoTowers(*task.towers(), LEARNED_FROM if learned else run.setting.scale, learned)


def train(run: Run, task: Task, model: TwoTowers) -> dict[str, float]:
    """Train on the run's pairs in the order of its seed; what `score` returns of it."""
    joined, method = list(steps(run, task, model)), Method(run.method)
    found = {"steps": len(joined), "pairs": len(joined) * method.pairs_per_step(run.batch_size)}
    return found | ({"recent": sum(joined) / len(joined)} if method.without_recent else {})


def steps(run: Run, task: Task, model: TwoTowers) -> Iterator[float]:
    """Take the steps of `train`; yields after each how many recent steps joined in it."""
    pairs, method = task.splits["train"], Method(run.method)
    loss = method.build(len(pairs.image), task.embed_dim)
    size = method.pairs_per_step(run.batch_size)
    order = visits(len(pairs.image), run.setting.epochs, size, run.seed)
    captions = torch.randint(pairs.text.shape[1], order.shape, generator=torch.Generator().manual_seed(run.seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=run.setting.decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.lr, total_steps=len(order), pct_start=0.1)
    kept = KeptInputs(loss, model)
    for step, (ids, caption) in enumerate(zip(order, captions, strict=True)):
        loss.begin_step(step=step, total_steps=len(order))
        images, texts = pairs.image[ids].split(run.batch_size), pairs.text[ids, caption].split(run.batch_size)
        inputs = [{"image": image, "text": text} for image, text in zip(images, texts, strict=True)]
        optimizer.zero_grad()
        outputs = take_gradient(model, loss, inputs, ids, kept.features(inputs, model))
        optimizer.step()
        schedule.step()
        loss.commit()
        with torch.no_grad():
            model.logit_scale.clamp_(max=torch.tensor(LARGEST_SCALE).log())
        yield float(outputs.get("recent_batches_used", 0))


def visits(count: int, epochs: int, size: int, seed: int) -> Tensor:
    """Ids by step, (steps, size): epochs in random order one after the other, the last one filled up."""
    generator = torch.Generator().manual_seed(seed)
    steps = -(-epochs * count // size)
    rounds = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return order[: steps * size].view(steps, size)


def take_gradient(
    model: TwoTowers, loss: Objective, inputs: list[dict[str, Tensor]], ids: Tensor, again: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Set the gradient of one optimizer step, and return what the loss returns.

    Several batches count as one: they are encoded without gradient, the loss is taken on all of them, and each batch is
    encoded anew with the gradient of its features.
    """
    if len(inputs) == 1:
        outputs = loss(**model(**inputs[0]), sample_ids=ids, **again)
        total_loss(outputs).backward()
        return outputs
    with torch.no_grad():
        found = [model(**part) for part in inputs]
    leaves = {key: torch.cat([part[key] for part in found]) for key in found[0] if key.endswith("_features")}
    leaves = {key: value.requires_grad_() for key, value in leaves.items()}
    scale = {"logit_scale": model.logit_scale.exp(), "logit_bias": model.logit_bias}
    outputs = loss(**leaves, **scale, sample_ids=ids, **again)
    total_loss(outputs).backward()
    rows = len(inputs[0]["image"])
    gradients = [value.grad.split(rows) for value in leaves.values() if value.grad is not None]
    for part, *gradient in zip(inputs, *gradients, strict=True):
        features = model(**part)
        torch.autograd.backward([features[key] for key in leaves], gradient)
    return outputs
