"""Optimizer steps on Accelerate. The loop does not know which loss it runs."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openclip_ext.data.hash_ids import HashIds
from openclip_ext.data.pipeline import TrainLoader
from openclip_ext.errors import RankError, UserError
from openclip_ext.losses.base import Loss, total_loss
from openclip_ext.registry import batch_keys
from openclip_ext.training import sharding
from openclip_ext.training.average import WeightAverage
from openclip_ext.training.clock import Clock
from openclip_ext.training.encode_again import KeptInputs
from openclip_ext.training.faults import Faults
from openclip_ext.training.image_only import MomentumEncoder
from openclip_ext.training.log import EpochLog
from openclip_ext.training.lora import Adapters
from openclip_ext.training.profile import part
from openclip_ext.training.replay import random_state, replayed
from openclip_ext.training.stopping import GO_ON, Stop, elected

#: What the loss is given as the batch has it, by the name of its argument.
_CONSTANTS = {"sample_ids": "sample_ids", "row_seeds": "row_seeds", "text_tokens": "text", "targets": "targets"}
_MODEL_INPUTS = ("image", "text", *sorted(batch_keys() - {"sample_ids"}))


@dataclasses.dataclass
class Trainer:
    """Everything a step needs.

    Attributes:
        accelerator: owns device, wrapping, autocast, gradient scaling and clipping.
        module: OpenCLIP's model.
        paired: the same as the loss needs it, see `training.pair_model`.
        model: that, prepared by the accelerator.
        loss: not prepared: its state must not be broadcast, and gradients of its
            parameters are averaged here.
        optimizer: prepared by the accelerator.
        schedule: sets the learning rate for a step; None: leave it.
        loader: not prepared: it is split by rank and worker already.
        input_dtype: of images; None: as loaded.
        accum_freq: batches per optimizer step.
        grad_clip_norm: None: no clipping.
        clock: the time, which a step taken moves on.
        faults: tells of steps that are not taken, and ends the run where there are too many.
        teacher: of distillation; None: there is none.
        hash_ids: numbers samples by hashes of their keys; None: batches hold ids.
        momentum_encoder: an average of the model, which follows each step taken; None: there is none.
        average: of the weights, likewise, for evaluation.
        adapters: of LoRA, in the model.
        stop: asks this process to stop.
        stop_reason: of a rank that is to stop, the same on all, as of the last step.
    """

    accelerator: Accelerator
    module: nn.Module
    paired: nn.Module
    model: nn.Module
    loss: Loss
    optimizer: Any
    schedule: Callable[[int], float] | None
    loader: TrainLoader
    input_dtype: torch.dtype | None
    accum_freq: int
    grad_clip_norm: float | None
    clock: Clock
    faults: Faults
    teacher: nn.Module | None = None
    hash_ids: HashIds | None = None
    momentum_encoder: MomentumEncoder | None = None
    average: WeightAverage | None = None
    adapters: Adapters | None = None
    stop: Stop = dataclasses.field(default_factory=lambda: Stop(None))
    stop_reason: int = GO_ON
    skipped_steps: int = 0

    def __post_init__(self) -> None:
        self.kept_inputs = KeptInputs(self.loss, self.paired)

    def time_state(self) -> dict[str, Any]:
        """What a run that goes on from here needs besides weights and states of optimizer and loss.

        Complete on the first rank. A collective call.
        """
        return self.clock.state_dict(kept_inputs=self.kept_inputs.state(), skipped_steps=self.skipped_steps)

    def restore_time(self, state: dict[str, Any]) -> None:
        """Inverse of `time_state`, but for what the clock was made with."""
        own = self.clock.load_state_dict(state)
        self.skipped_steps = own.get("skipped_steps", 0)
        self.kept_inputs.restore(own.get("kept_inputs"), self.accelerator.device)

    def steps(self, log: EpochLog) -> Generator[None]:
        """Take the steps that are left of the clock's epoch; pauses after each, when a checkpoint can be kept.

        Raises:
            UserError: the data holds no full batch, or the loss stays non-finite.
        """
        clock = self.clock
        self.model.train()
        self.loss.train()
        self.loader.set_epoch(clock.epoch)
        batches = self.batches(clock.read)
        while not clock.epoch_is_over:
            clock.begin_step()
            if self.schedule is not None:
                self.schedule(clock.scheduled_step)
            self.loss.begin_step(step=clock.scheduled_step, total_steps=clock.total_steps)
            with part("data"):
                inputs = list(itertools.islice(batches, self.accum_freq))
            outputs = self._backward(inputs)
            with part("optimizer"):
                self._update(outputs, inputs)
            outputs["logit_scale"] = self.module.get_parameter("logit_scale").detach().exp()
            log.step(clock.index, clock.step, outputs, lr=self._learning_rate(), skipped_steps=self.skipped_steps)
            clock.end_step()
            yield
        for _ in batches:  # what does not fill a step, so that workers end their epoch
            pass

    def _learning_rate(self) -> float:
        """The schedule's, whatever the first group makes of it."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    def batches(self, read: Callable[[dict], None]) -> Iterator[dict]:
        """Batches on the device, each after `read` has taken out of it what is not data.

        Ranks agree on the first one of each data worker, so that none waits for another that has no data.
        """
        device = self.accelerator.device
        workers = max(1, self.loader.batches.num_workers)
        for number, batch in enumerate(self.loader.batches):
            read(batch)
            error = batch.get("error")
            if number < workers and self.accelerator.num_processes > 1:
                error = next(filter(None, gather_object([error])), None)
            if error is not None:
                raise UserError(error) if number < workers else RankError(error)
            if self.hash_ids is not None:
                batch["sample_ids"] = self._numbered(batch["sample_ids"])
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            for key in ("image", "image_aug"):
                if self.input_dtype is not None and key in batch:
                    batch[key] = batch[key].to(self.input_dtype)
            yield batch

    def _numbered(self, hashes: Tensor) -> Tensor:
        """Ids of this rank's samples. Every rank numbers those of all, so that all agree."""
        of_all = self.accelerator.gather(hashes.to(self.accelerator.device)).cpu()
        start = self.accelerator.process_index * len(hashes)
        assert self.hash_ids is not None
        return self.hash_ids(of_all)[start : start + len(hashes)]

    def _backward(self, batches: list[dict]) -> dict[str, Tensor]:
        """Gradients of one optimizer step; the loss's outputs, detached."""
        self.optimizer.zero_grad()
        if ids := [batch["sample_ids"] for batch in batches if "sample_ids" in batch]:
            self.loss.expect(torch.cat(ids))
        run = self._backward_whole if len(batches) == 1 else self._backward_in_parts
        with part("encoders"):
            again = self.kept_inputs.features([model_inputs(batch) for batch in batches], self.model)
        outputs = run(batches, again)
        return {name: value.detach() for name, value in outputs.items()}

    def _backward_whole(self, batches: list[dict], again: dict[str, Tensor]) -> dict[str, Tensor]:
        (batch,) = batches
        with part("encoders"):
            model_out = self.model(**model_inputs(batch))
        outputs = self._loss(model_out, self.constants(batch) | again)
        with part("encoders"):
            self.accelerator.backward(total_loss(outputs))
        return outputs

    def _backward_in_parts(self, batches: list[dict], again: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradient of the concatenated batches with the memory of one (GradCache, Gao et al., 2021).

        Features of all parts are computed without gradient, the loss is taken once on all of them, and each part is
        run again to carry its share of the feature gradients into the model. So every gradient, that of the logit
        scale included, is that of one large batch, and the loss sees each step once.
        """
        random_states, parts = [], []
        for batch in batches:
            random_states.append(random_state(self.accelerator.device))
            with part("encoders"), torch.no_grad():
                parts.append(self.model(**model_inputs(batch)))
        leaves = {key: value.detach().clone() for key, value in concatenated(parts).items()}
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point())
        outputs = self._loss(leaves, concatenated([self.constants(batch) for batch in batches]) | again)
        self.accelerator.backward(total_loss(outputs))
        sizes = [len(batch["image"]) for batch in batches]
        gradients = {key: leaf.grad.split(sizes) for key, leaf in leaves.items() if leaf.grad is not None and leaf.ndim}
        for number, (batch, state) in enumerate(zip(batches, random_states, strict=True)):
            last = number == len(batches) - 1
            # Gradients of a sharded model are averaged with every part: to wait with them takes room for all of them.
            average = last or self.accelerator.is_fsdp2
            together = contextlib.nullcontext() if average else self.accelerator.no_sync(self.model)
            with part("encoders"), together, replayed(state):
                replay = self.model(**model_inputs(batch))
                pairs = [(replay[key], gradient[number]) for key, gradient in gradients.items()]
                if last:  # scalars belong to no part
                    pairs += [(replay[key], x.grad) for key, x in leaves.items() if x.grad is not None and not x.ndim]
                values, their_gradients = zip(*pairs, strict=True)
                torch.autograd.backward(values, their_gradients)
        return outputs

    def constants(self, batch: dict) -> dict[str, Tensor]:
        """What the loss is given that has no gradient."""
        constants = {argument: batch[key] for argument, key in _CONSTANTS.items() if key in batch}
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_out = self.teacher(batch["image"], batch["text"])
            constants |= {f"dist_{key}": value for key, value in teacher_out.items() if value is not None}
        return constants

    def _loss(self, model_out: dict[str, Tensor], constants: dict[str, Tensor]) -> dict[str, Tensor]:
        features = dict(model_out)
        required = [features.pop(key) for key in ("image_features", "text_features", "logit_scale")]
        self._features = [value.detach() for value in required[:2]]
        with part("loss"):
            return self.loss(*required, **features, **constants)

    def _update(self, outputs: dict[str, Tensor], batches: list[dict]) -> None:
        """Step the optimizer and commit the loss's state, or do neither where something is not finite."""
        self._average_gradients()
        outputs["grad_norm"] = self._gradient_norm()
        checked = [total_loss(outputs)]
        if self.accelerator.scaler is None:  # which looks at the gradients itself, and expects infinite ones
            checked.append(outputs["grad_norm"])
        finite, votes = self.faults.are_finite(checked, self.clock.skipped, self.stop.votes())
        self.stop_reason = elected(votes)
        if finite:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # else it refuses to unscale the gradients of the next step
        if finite and not self.optimizer.step_was_skipped:
            self.skipped_steps = 0
            self.loss.commit()
            if self.momentum_encoder is not None:
                self.momentum_encoder.update()
            with torch.no_grad():
                self.module.get_parameter("logit_scale").clamp_(0, math.log(100))  # as in OpenCLIP
            if self.average is not None:
                self.average.update()
            return
        self.skipped_steps += 1
        if not finite or self.skipped_steps >= self.faults.max_skipped:
            when = self.clock.step, self.clock.epoch, self.skipped_steps
            self.faults.skip_step(*when, outputs, batches, self._features)

    def _gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients, before they are clipped if they are to be."""
        self.accelerator.unscale_gradients()
        return sharding.gradient_norm(self._parameters_with_gradient(), self.grad_clip_norm)

    def _average_gradients(self) -> None:
        """Over ranks: the loss's, and of a sharded model those of what is not sharded. Accelerate averages the rest."""
        if self.accelerator.num_processes == 1:
            return
        own: Iterable[nn.Parameter] = self.loss.parameters()
        if self.accelerator.is_fsdp2:
            own = [p for p in self._parameters_with_gradient() if not isinstance(p, DTensor)]
        for parameter in own:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.accelerator.num_processes

    def _parameters_with_gradient(self) -> list[nn.Parameter]:
        """The model's and the loss's, as the optimizer has them: a sharded model may show them gathered."""
        groups = self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of a batch."""
    return {key: batch[key] for key in _MODEL_INPUTS if key in batch}


def concatenated(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Per-sample tensors of several batches as one; of scalars, which are equal, the last."""
    keys = [key for key, value in parts[0].items() if value is not None]
    return {key: torch.cat([part[key] for part in parts]) if parts[0][key].ndim else parts[-1][key] for key in keys}
