"""One epoch on Accelerate. The loop does not know which loss it runs."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from openclip_ext.data.pipeline import TrainLoader
from openclip_ext.errors import UserError
from openclip_ext.losses.objective import Objective, total_loss
from openclip_ext.training.log import EpochLog

#: Entries of a model's output that do not belong to a sample.
SCALARS = ("logit_scale", "logit_bias")
MAX_SKIPPED_STEPS = 100


@dataclasses.dataclass
class Trainer:
    """Everything a step needs.

    Attributes:
        accelerator: owns device, wrapping, autocast, gradient scaling and clipping.
        model: prepared by the accelerator.
        loss: not prepared: its state must not be broadcast, and gradients of its parameters are averaged here.
        optimizer: prepared by the accelerator.
        schedule: sets the learning rate for a step; None: leave it.
        loader: not prepared: it is split by rank and worker already.
        input_dtype: of images; None: as loaded.
        accum_freq: batches per optimizer step.
        grad_clip_norm: None: no clipping.
        total_steps: of the whole run.
    """

    accelerator: Accelerator
    model: nn.Module
    loss: Objective
    optimizer: Any
    schedule: Callable[[int], float] | None
    loader: TrainLoader
    input_dtype: torch.dtype | None
    accum_freq: int
    grad_clip_norm: float | None
    total_steps: int
    sample_ids: Callable[[Tensor], Tensor] | None = None
    skipped_steps: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.num_batches // self.accum_freq

    def train_epoch(self, epoch: int, log: EpochLog) -> list[tuple[str, str, int]]:
        """Train for one epoch; returns (kind, shard, count) of what this rank could not use.

        Raises:
            UserError: the data holds no full batch, or the loss stays non-finite.
        """
        self.model.train()
        self.loss.train()
        self.loader.stream.set_epoch(epoch)
        skipped: list[tuple[str, str, int]] = []
        batches = self._batches(skipped)
        for index in range(self.steps_per_epoch):
            step = epoch * self.steps_per_epoch + index
            if self.schedule is not None:
                self.schedule(step)
            self.loss.begin_step(step=step, total_steps=self.total_steps)
            outputs = self._backward(list(itertools.islice(batches, self.accum_freq)))
            self._update(outputs)
            outputs["logit_scale"] = self.unwrapped.logit_scale.detach().exp()
            log.step(index, step, outputs, lr=self.optimizer.param_groups[0]["lr"], skipped_steps=self.skipped_steps)
        for _ in batches:  # what does not fill a step, so that workers end their epoch
            pass
        return skipped

    @property
    def unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _batches(self, skipped: list) -> Iterator[dict]:
        """Batches on the device."""
        device = self.accelerator.device
        for batch in self.loader.batches:
            skipped += batch.pop("skipped")
            if "error" in batch:
                raise UserError(batch["error"])
            if self.sample_ids is not None:
                batch["sample_id"] = self.sample_ids(batch["sample_id"])
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            if self.input_dtype is not None:
                batch["image"] = batch["image"].to(self.input_dtype)
            yield batch

    def _backward(self, batches: list[dict]) -> dict[str, Tensor]:
        """Gradients of one optimizer step; the loss's outputs, detached."""
        self.optimizer.zero_grad()
        run = self._backward_whole if len(batches) == 1 else self._backward_in_parts
        outputs = run(batches)
        return {name: value.detach() for name, value in outputs.items()}

    def _backward_whole(self, batches: list[dict]) -> dict[str, Tensor]:
        (batch,) = batches
        outputs = self._loss(self.model(batch["image"], batch["text"]), batch.get("sample_id"))
        self.accelerator.backward(total_loss(outputs))
        return outputs

    def _backward_in_parts(self, batches: list[dict]) -> dict[str, Tensor]:
        """The gradient of the concatenated batches with the memory of one (GradCache, Gao et al., 2021).

        Features of all parts are computed without gradient, the loss is taken once on all of them, and each part is
        run again to carry its share of the feature gradients into the model. So every gradient, that of the logit
        scale included, is that of one large batch, and the loss sees each step once.
        """
        random_states, parts = [], []
        for batch in batches:
            random_states.append(_random_state(self.accelerator.device))
            with torch.no_grad():
                parts.append(self.model(batch["image"], batch["text"]))
        per_sample = [key for key, value in parts[0].items() if key not in SCALARS and value is not None]
        leaves = {key: torch.cat([part[key] for part in parts]).requires_grad_() for key in per_sample}
        scalars = {key: parts[-1][key].detach().clone().requires_grad_() for key in SCALARS if parts[-1].get(key) is not None}
        sample_ids = torch.cat([batch["sample_id"] for batch in batches]) if "sample_id" in batches[0] else None
        outputs = self._loss(leaves | scalars, sample_ids)
        self.accelerator.backward(total_loss(outputs))
        gradients = {key: leaf.grad.split([len(part[key]) for part in parts]) for key, leaf in leaves.items() if leaf.grad is not None}
        for number, (batch, state) in enumerate(zip(batches, random_states, strict=True)):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model), _replayed(state):
                again = self.model(batch["image"], batch["text"])
                pairs = [(again[key], parts_of[number]) for key, parts_of in gradients.items()]
                if last:
                    pairs += [(again[key], leaf.grad) for key, leaf in scalars.items() if leaf.grad is not None]
                torch.autograd.backward(*zip(*pairs, strict=True))
        return outputs

    def _loss(self, model_out: dict[str, Tensor], sample_ids: Tensor | None) -> dict[str, Tensor]:
        extra = {key: value for key, value in model_out.items() if key not in ("image_features", "text_features", "logit_scale")}
        if sample_ids is not None:
            extra["sample_ids"] = sample_ids
        return self.loss(model_out["image_features"], model_out["text_features"], model_out["logit_scale"], **extra)

    def _update(self, outputs: dict[str, Tensor]) -> None:
        """Step the optimizer and commit the loss's state, or do neither where something is not finite."""
        parameters = list(self.loss.parameters())
        _average_gradients(parameters, self.accelerator.num_processes)
        finite = _finite_on_all_ranks(total_loss(outputs), self.accelerator.num_processes)
        if finite:
            if self.grad_clip_norm is not None:
                self.accelerator.clip_grad_norm_([*self.model.parameters(), *parameters], self.grad_clip_norm)
            self.optimizer.step()
        if finite and not self.optimizer.step_was_skipped:
            self.skipped_steps = 0
            self.loss.commit()
            with torch.no_grad():
                self.unwrapped.logit_scale.clamp_(0, math.log(100))  # as in OpenCLIP
            return
        self.skipped_steps += 1
        if self.skipped_steps == MAX_SKIPPED_STEPS:
            raise UserError(
                f"the loss or its gradient was not finite for {MAX_SKIPPED_STEPS} steps in a row; lower --lr, raise "
                "--warmup, or use --grad-clip-norm 1 or --precision fp32"
            )


def _average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    if world_size > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size


def _finite_on_all_ranks(value: Tensor, world_size: int) -> bool:
    finite = value.isfinite().to(torch.float32)
    if world_size > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def _random_state(device: torch.device) -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: tuple) -> Iterator[None]:
    """Random draws as they were at `state`, and afterwards as if nothing had been drawn here."""
    now = _random_state(torch.device("cuda") if state[1] is not None else torch.device("cpu"))
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


def _set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
