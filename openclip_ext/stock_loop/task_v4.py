"""OpenCLIP 4: a registered loss as a `TrainingTask`, for OpenCLIP's own loop once `patches/open_clip-main.patch` is in.

The only module here that imports OpenCLIP at its top: nothing but `Hosting.create_task` imports it.
"""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from open_clip.task import CLIPTask
from torch import Tensor, nn

from openclip_ext.errors import UserError
from openclip_ext.losses import Objective
from openclip_ext.losses.base import total_loss
from openclip_ext.training.checkpoint import Checkpoint, split_optimizer

logger = logging.getLogger(__name__)

VIEWS = ("image", "text", "image_aug", "text_aug")


class Hosted(Protocol):
    """What a task asks of `openclip_ext.stock_loop.hosting.Hosting`, which makes tasks and so imports this module."""

    needs: frozenset[str]

    def build(
        self, model: nn.Module, *, rank: int, world_size: int, device: torch.device, image_dtype: torch.dtype | None
    ) -> Objective: ...

    def restore(self, loss: Objective, checkpoint: dict, path: str) -> list[str]: ...

    def run(
        self,
        model: Callable[[Tensor, Tensor], dict[str, Tensor]],
        image: Tensor,
        text: Tensor,
        image_aug: Tensor | None = None,
        text_aug: Tensor | None = None,
    ) -> dict[str, Tensor]: ...

    def encode_again(self, batches: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]: ...


class LossTask(CLIPTask):
    """A model and an `Objective` in OpenCLIP's loop.

    The model stays `trainable_module`, so that checkpoints, layer decay, evaluation and DDP see what they know. The
    loss is called once per optimizer step, with accumulation too, and its gradient is that of one large batch. The
    patched loop calls, beyond `CLIPTask`'s methods, `model_forward`, `loss_parameters`, `begin_step`, `end_step`,
    `on_save_checkpoint` and `on_load_checkpoint`; in a batch it puts `sample_ids` and the second views needed.

    Args:
        model: OpenCLIP's, not wrapped yet.
        hosted: whose `build` made the loss.
        loss: what it returned.
        teacher: of distillation, None: there is none.
        world_size: number of processes; gradients of the loss's parameters are averaged over them.
    """

    def __init__(
        self, model: nn.Module, hosted: Hosted, loss: Objective, *, teacher: nn.Module | None, world_size: int
    ) -> None:
        super().__init__(model, loss=loss)
        self.hosted = hosted
        self.teacher = teacher if teacher is None else teacher.requires_grad_(False).eval()
        self._accumulated: _Accumulated | None = None
        if world_size > 1:
            for parameter in loss.parameters():
                parameter.register_post_accumulate_grad_hook(_average)

    def train(self, mode: bool = True) -> "LossTask":
        """The teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def prepare_fsdp(self, *args, **options) -> "LossTask":
        """As `TrainingTask`; exits where the loss has what OpenCLIP's loop loses or cannot reach under FSDP2."""
        if self.loss.state_dict() or "trunk_features" in self.hosted.needs:
            with _exit_on_user_error():
                raise UserError(
                    "--fsdp: OpenCLIP's loop shards and saves the model alone, and this --loss or a term of it has a "
                    "state or looks into the towers; drop --fsdp, or launch openclip-ext train with accelerate launch "
                    "--use_fsdp"
                )
        return super().prepare_fsdp(*args, **options)

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the optimizer has to train besides the model."""
        return list(self.loss.parameters())

    def begin_step(self, *, step: int, total_steps: int) -> None:
        """Before the first forward pass of an optimizer step."""
        self._accumulated = None
        self.loss.begin_step(step=step, total_steps=total_steps)

    def end_step(self) -> None:
        """After an optimizer step that was taken."""
        self.loss.commit()

    def model_forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features of all views in a batch, and the logit scale."""
        views = {key: batch[key] for key in VIEWS if key in batch}
        out = self.hosted.run(lambda image, text: self.trainable_module(image=image, text=text), **views)
        return {key: value for key, value in out.items() if value is not None}

    def training_forward(self, batch: dict[str, Tensor]) -> tuple[dict, dict]:
        """Losses with their sum `loss`, and scalars to log."""
        model_out = self.model_forward(batch)
        outputs = self._objective(model_out, [batch])
        losses, report = _losses_and_report(outputs)
        losses["loss"] = total_loss(losses)
        return losses, self._report(model_out) | report

    def compute_accum_loss(self, inputs: dict, inputs_no_accum: dict, accum_batches: list[dict]) -> tuple[dict, dict]:
        """Losses of all accumulated batches, whose gradient is the share of the one that was run again just now.

        The first call of a step takes the loss and its gradients for the features; this one and the others carry them
        into the model, the last one those of the logit scale and of the loss's own parameters too.

        Args:
            inputs: features of all batches, of which one has a graph.
            inputs_no_accum: logit scale and bias.
            accum_batches: what they were computed from.
        """
        if self._accumulated is None:
            self._accumulated = self._accumulate(inputs, inputs_no_accum, accum_batches)
        step = self._accumulated
        step.parts_left -= 1
        share = _product(inputs, step.gradients)
        if step.parts_left == 0:
            share = share + _product(inputs_no_accum, step.gradients)
            share = share + _product(dict(enumerate(self.loss_parameters())), step.gradients)
        assert isinstance(share, Tensor)
        # The value of the loss with the gradient of `share`; the loop sums losses, so it is enough for one to have it.
        losses = {name: value.clone() for name, value in step.losses.items()}
        losses[next(iter(losses))] += share - share.detach()
        return losses, self._report(inputs_no_accum) | step.report

    def _accumulate(self, inputs: dict, inputs_no_accum: dict, accum_batches: list[dict]) -> "_Accumulated":
        leaves: dict = {key: _leaf(value) for key, value in (inputs | inputs_no_accum).items()}
        with torch.enable_grad():
            outputs = self._objective(leaves, accum_batches)
            wanted = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
            wanted |= dict(enumerate(self.loss_parameters()))
            gradients = torch.autograd.grad(total_loss(outputs), tuple(wanted.values()), allow_unused=True)
        found = {key: gradient for key, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
        losses, report = _losses_and_report({name: value.detach() for name, value in outputs.items()})
        return _Accumulated(losses, report, found, parts_left=len(accum_batches))

    @torch.compiler.disable  # it holds state, and is small beside the model
    def _objective(self, model_out: dict[str, Tensor], batches: list[dict]) -> dict[str, Tensor]:
        given = model_out | self.hosted.encode_again([(batch["image"], batch["text"]) for batch in batches])
        given["logit_scale"] = given["logit_scale"].mean()  # FSDP2 makes it (1,)
        if "sample_ids" in self.hosted.needs:
            given["sample_ids"] = torch.cat([batch["sample_ids"] for batch in batches])
        if "caption_logits" in self.hosted.needs:
            given["logits"] = given["logits"][:, :-1]
            given["labels"] = torch.cat([batch["text"] for batch in batches])[:, 1:]
        if self.teacher is not None:
            given |= self._teacher_features(batches)
        return self.loss(**given, output_dict=True)

    @torch.no_grad()
    def _teacher_features(self, batches: list[dict]) -> dict[str, Tensor]:
        assert self.teacher is not None
        outputs = [self.teacher(image=batch["image"], text=batch["text"]) for batch in batches]
        features = {key: torch.cat([out[key] for out in outputs]) for key in ("image_features", "text_features")}
        return {f"dist_{key}": value for key, value in (features | {"logit_scale": outputs[0]["logit_scale"]}).items()}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the loss's state under the keys of `openclip_ext.training.checkpoint`; the loss's group leaves
        `optimizer`, where it would keep OpenCLIP from resuming without the loss."""
        if state := self.loss.state_dict():
            checkpoint["loss"] = state
        if self.loss_parameters():
            checkpoint["optimizer"], checkpoint["loss_optimizer"] = split_optimizer(checkpoint["optimizer"])

    def on_load_checkpoint(self, checkpoint: dict, optimizer, path: str) -> None:
        """Restore the loss, and put its group back into `checkpoint["optimizer"]`.

        Exits where the state belongs to another loss or data set.
        """
        with _exit_on_user_error():
            remarks = self.hosted.restore(self.loss, checkpoint, path)
        if optimizer is not None and "optimizer" in checkpoint:
            content = Checkpoint(path, checkpoint.get("epoch", 0), checkpoint)
            checkpoint["optimizer"], more = content.optimizer_state(optimizer)
            remarks += more
        for remark in remarks:
            logger.warning("--resume %s: %s", path, remark)


@dataclasses.dataclass
class _Accumulated:
    """The loss of an optimizer step's batches together, and its gradients by the names of features and scalars, and
    by the numbers of the loss's parameters."""

    losses: dict[str, Tensor]
    report: dict[str, Tensor]
    gradients: dict
    parts_left: int


@contextlib.contextmanager
def _exit_on_user_error() -> Iterator[None]:
    """One line and exit code 2, where OpenCLIP's loop would let the error end in a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _losses_and_report(outputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    losses = {name: value for name, value in outputs.items() if name.endswith("_loss")}
    device = next(iter(losses.values())).device  # where the loop averages both over ranks
    return losses, {name: value.detach().to(device) for name, value in outputs.items() if name not in losses}


def _leaf(value: Tensor) -> Tensor:
    if not value.is_floating_point():  # token ids
        return value
    # Of half-precision values the gradient would need the scale that the loop applies later.
    return value.detach().to(torch.promote_types(value.dtype, torch.float32)).requires_grad_()


def _product(values: dict, gradients: dict) -> Tensor | float:
    """The sum of values times gradients."""
    return sum((values[key] * gradients[key]).sum() for key in values if key in gradients)


def _average(parameter: nn.Parameter) -> None:
    """Over ranks, as DDP does with the model's gradients."""
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def create_task(hosted: Hosted, args, model: nn.Module, *, teacher: nn.Module | None = None) -> LossTask:
    """What `Hosting.create_task` returns."""
    from open_clip import get_input_dtype

    with torch.random.fork_rng(devices=[]), _exit_on_user_error():
        torch.default_generator.manual_seed(args.seed)  # heads of the loss are the same on all ranks
        loss = hosted.build(
            model,
            rank=args.rank,
            world_size=args.world_size,
            device=torch.device(args.device),
            image_dtype=get_input_dtype(args.precision),
        )
    return LossTask(model, hosted, loss, teacher=teacher, world_size=args.world_size)
