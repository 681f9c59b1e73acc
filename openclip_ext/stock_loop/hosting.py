"""Losses in a training loop that is not ours, such as OpenCLIP's own once it is patched (`patches/`).

What such a loop does, `args` being its flags and `spec` what the entry point of `--loss` in `open_clip.losses` names:

    hosted = spec.host(args)                                    # ValueError: one line about a flag
    loss = hosted.build(model, rank=…, world_size=…)            # before DDP and the optimizer see the model
    optimizer.add_param_group({"params": loss.parameters(), "weight_decay": 0.0})    # if it has any
    remarks = hosted.restore(loss, checkpoint, path)            # if the run resumes; ValueError as above
    make_row = hosted.row_maker(image_transform, tokenizer)     # where hosted.needs has sample ids or second views
    …
    loss.begin_step(step=…, total_steps=…)                      # once per optimizer step, from here on
    out = hosted.run(model, image, text, …)                     # in place of model(image, text)
    out |= hosted.encode_again([(image, text), …])              # of all batches that count as one step
    outputs = loss(**out, sample_ids=…, output_dict=True)       # backward: the sum of what ends in `_loss`
    loss.commit()                                               # where the optimizer's step was taken

Gradients of the loss's parameters are to be averaged over ranks, and its `state_dict` kept in checkpoints, under the
keys that `openclip_ext.training.checkpoint` names.
"""

import argparse
import contextlib
import functools
import os
import re
import warnings
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from openclip_ext import upstream
from openclip_ext.data.listing import ShardListing, expand_urls
from openclip_ext.data.rows import RowFormat, random_state_kept, row_seed
from openclip_ext.data.table import Table
from openclip_ext.data.tar import Skips, read_shard
from openclip_ext.errors import UserError
from openclip_ext.losses import LossContext, Objective, Vocabulary
from openclip_ext.registry import batch_keys
from openclip_ext.state.table import describe_parts
from openclip_ext.training.checkpoint import Checkpoint
from openclip_ext.training.config import run_config
from openclip_ext.training.data import training_data
from openclip_ext.training.encode_again import KeptInputs
from openclip_ext.training.objective import plan_objective
from openclip_ext.training.pair_model import feature_widths, freeze_unused_bias, pair_model, run_on_views

RowMaker = Callable[[Image.Image, str, int, int], dict[str, Tensor]]


class Hosting:
    """A loss and its terms as another loop's flags name them.

    Args:
        args: see `openclip_ext.registry.LossSpec.host`.

    Attributes:
        needs: what the loop has to provide, some of `openclip_ext.registry.NEEDS`: `sample_ids`, `image_aug` and
            `text_aug` (rows have them), `logit_bias` (a model that has one), `teacher_features` (what the teacher
            returns, each name preceded by `dist_`). `run` provides the others.
        sample_ids: by the names of the shards the range of their samples' ids, in order; what a shard has beyond them
            repeats them. None where neither ids nor second views are needed.

    Raises:
        UserError: unknown name or option, a value that is not accepted, or flags that do not go together.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        config = run_config(upstream.Flags(vars(args)))
        self._plan = plan_objective(config)
        self._args = args
        self._trunks: dict | None = None
        self._kept: KeptInputs | None = None
        self._model: nn.Module | None = None
        self.needs = self._plan.needs
        _require_agreement(args, self.needs)
        data = training_data(config, self._plan)
        assert data is not None
        self._data = data
        if isinstance(self._data.source, ShardListing):
            _require_braces(args.train_data, self._data.source.urls)
            _warn_of_captions(args.train_data, self._data.source.caption_keys)
        self.sample_ids = _ids_by_shard(self._data.source, args) if batch_keys(self.needs) else None

    def __repr__(self) -> str:
        return f"<loss {self._plan.spec.name}>"

    def row_maker(self, image_transform: Callable[[Image.Image], Tensor], tokenizer: Callable) -> RowMaker:
        """A function `make(picture, caption, sample_id, epoch)` of the data pipeline, which can be pickled.

        It returns the sample's `image` (3, H, W) and `text` (L,), and what is needed of `sample_ids` (a number),
        `image_aug` and `text_aug`. Views are a function of seed, epoch and sample id; of samples with one caption they
        are those of `openclip-ext train`, which draws from several where this knows one.
        """
        rows = RowFormat(
            image_transform=image_transform,
            tokenizer=tokenizer,
            image_aug_transform=image_transform if "image_aug" in self.needs else None,
            text_aug="text_aug" in self.needs,
        )

        return functools.partial(_make_row, rows, self._args.seed, "sample_ids" in self.needs)

    def build(
        self,
        model: nn.Module,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        image_dtype: torch.dtype | None = None,
    ) -> Objective:
        """The loss, on the device, with heads of the model's widths.

        Args:
            model: OpenCLIP's, not wrapped yet. A logit bias that the loss does not use is frozen.
            rank: of this process.
            world_size: number of processes.
            device: where losses are computed.
            image_dtype: of images as the model takes them; None: float32.

        Every rank must call this with the same random state: heads are drawn from it.

        Raises:
            UserError: there is no room for the loss's state, or its file cannot be used.
        """
        freeze_unused_bias(model, self.needs)
        if "trunk_features" in self.needs:
            self._trunks = upstream.find_trunks(model)
        widths = feature_widths(pair_model(model, self.needs), image_dtype) if "widths" in self.needs else None
        vocabulary = None
        if "vocabulary" in self.needs:
            vocabulary = Vocabulary(*upstream.read_vocabulary(upstream.create_tokenizer(self._args)))
        loss = self._plan.build(
            LossContext(
                num_samples=self._data.size,
                rank=rank,
                world_size=world_size,
                device=torch.device(device),
                widths=widths,
                vocabulary=vocabulary,
            )
        )
        if spread := describe_parts(loss):
            raise UserError(
                f"--loss {self._plan.spec.name}: {spread}, and OpenCLIP's loop writes checkpoints by one process; drop "
                "…_shard=true from --loss-arg, or use openclip-ext train"
            )
        self._model, self._kept = model, KeptInputs(loss, model)
        return loss

    def restore(self, loss: Objective, checkpoint: dict, path: str) -> list[str]:
        """Load the loss's state from a checkpoint's content; remarks for the log.

        Args:
            loss: what `build` returned, on its device.
            checkpoint: the content; one without a state lets the loss start anew.
            path: what `--resume` named, for messages.

        Raises:
            UserError: the state is another loss's, or another data set's, or knows samples by hashes of their keys.
        """
        content = Checkpoint(path, checkpoint.get("epoch", 0), checkpoint)
        content.restore_ids(self._data.sample_id, None)
        return content.restore_loss(loss)

    def run(
        self,
        model: Callable[[Tensor, Tensor], dict[str, Tensor]],
        image: Tensor,
        text: Tensor,
        image_aug: Tensor | None = None,
        text_aug: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the loss takes: the model's output, and trunk features, those of second views and token ids if needed.

        `model` runs what `build` was given, wrapped or not. See `openclip_ext.training.pair_model.run_on_views`.
        """
        out = run_on_views(model, self._trunks, image, text, image_aug, text_aug)
        if "text_tokens" in self.needs:
            out["text_tokens"] = text
        return out

    def encode_again(self, batches: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """What the loss is given in some steps beside the features of the step: those of a batch it asked to keep.

        Args:
            batches: images and texts, in this order, of all batches that count as one step.
        """
        if "encoded_again" not in self.needs:
            return {}
        assert self._kept is not None and self._model is not None  # since `build`
        model = self._model
        inputs = [{"image": image, "text": text} for image, text, *_ in batches]
        return self._kept.features(inputs, lambda image, text: dict(model(image, text)))

    def create_task(self, args: argparse.Namespace, model: nn.Module, *, teacher: nn.Module | None = None):
        """OpenCLIP 4's `TrainingTask` with this loss, which does all that a loop has to.

        Args:
            args: OpenCLIP's flags, with `rank`, `world_size` and `device`.
            model: OpenCLIP's, not wrapped yet.
            teacher: of distillation, None: there is none.
        """
        from openclip_ext.stock_loop.task_v4 import create_task

        return create_task(self, args, model, teacher=teacher)


def _make_row(
    rows: RowFormat, seed: int, with_id: bool, picture: Image.Image, caption: str, sample_id: int, epoch: int
) -> dict[str, Tensor]:
    # Without workers this runs in the training process, whose random state must not depend on it.
    with contextlib.nullcontext() if get_worker_info() else random_state_kept():
        row = rows.training_row(picture, [caption], row_seed(seed, epoch, sample_id))
    if with_id:
        row["sample_ids"] = sample_id
    return {name: value[0] for name, value in rows.batch([row]).items()}


def _ids_by_shard(source: ShardListing | Table, args: argparse.Namespace) -> dict[str, range]:
    if not isinstance(source, ShardListing):
        raise UserError(
            f"--loss {args.loss}: it or a term of it needs sample ids or second views, which OpenCLIP's loop has for "
            "WebDataset shards only; pack some with openclip-ext shards pack, or use openclip-ext train"
        )
    ids = {url: source.ids_of(url) for url in source.urls}
    for url in (url for url, own in ids.items() if not own):
        if next(read_shard(url, Skips().record), None):  # the loop would look for an id to repeat
            raise UserError(
                f"--train-data {args.train_data}: {url} holds samples, and sizes.json says 0; write it anew with: "
                f"openclip-ext shards index {os.path.dirname(url) or '.'}"
            )
    return ids


def _require_braces(sources: str, urls: Sequence[str]) -> None:
    """Raises UserError: `--train-data` has folders or globs, which OpenCLIP's pipeline takes for names of shards."""
    expanded = {url for pattern in sources.split("::") for url in expand_urls(pattern, "--train-data")}
    if not expanded.issuperset(urls):
        raise UserError(
            f"--train-data {sources}: OpenCLIP's loop expands neither folders nor globs; name shards with braces, such "
            f"as --train-data '{_range_of(urls)}'"
        )


def _warn_of_captions(sources: str, keys: Sequence[str]) -> None:
    if keys:
        warnings.warn(
            f"--train-data {sources}: samples have several captions in their JSON, as sizes.json notes, under "
            f"{', '.join(keys)}; OpenCLIP's loop uses one of each sample in all epochs, for second views too; to draw "
            "from all, use openclip-ext train",
            stacklevel=2,
        )


def _range_of(urls: Sequence[str]) -> str:
    """From the first to the last, if their names differ in one number; `{00000..00003}.tar` is what it looks like."""
    first, last = (re.fullmatch(r"(.*?)(\d+)(\D*)", url, re.DOTALL) for url in (urls[0], urls[-1]))
    if not (first and last) or (first[1], first[3]) != (last[1], last[3]):
        return "{" + ",".join(urls[:2]) + ",…}"
    return f"{first[1]}{{{first[2]}..{last[2]}}}{first[3]}"


def _require_agreement(args: argparse.Namespace, needs: frozenset[str]) -> None:
    """Raises UserError: flags of OpenCLIP's own loop that do not go with the loss."""
    if args.siglip and args.loss != "siglip":
        raise UserError(f"--siglip --loss {args.loss}: these exclude each other; drop one")
    if getattr(args, "horovod", False):
        raise UserError(f"--horovod --loss {args.loss}: does not average the loss's gradients; use torchrun")
    for name in ("torchcompile", "torchscript"):
        if "trunk_features" in needs and getattr(args, name, False):
            raise UserError(
                f"--{name}: hides the towers' inner outputs, which --loss {args.loss} or a term of it needs; drop it"
            )
