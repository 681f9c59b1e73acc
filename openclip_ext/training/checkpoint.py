"""Checkpoints in OpenCLIP's format, with the loss's state beside the model's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.distributed.tensor import DTensor

from openclip_ext import upstream
from openclip_ext.data.hash_ids import HashIds
from openclip_ext.errors import UserError
from openclip_ext.files import load_tensors, save_tensors
from openclip_ext.training import sharding
from openclip_ext.training.average import WeightAverage
from openclip_ext.training.lora import Adapters
from openclip_ext.training.parts import PARTS, parts_of, read_parts, remove_parts, write_parts


def save_checkpoint(
    path: str | None,
    *,
    epoch: int,
    name: str,
    model,
    optimizer,
    scaler,
    loss,
    distributed: bool,
    momentum_encoder=None,
    average: WeightAverage | None = None,
    adapters: Adapters | None = None,
    hash_ids: HashIds | None = None,
    clock: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that stock OpenCLIP loads, whole or not at all.

    Keys as OpenCLIP writes them: `epoch, name, state_dict, optimizer`, `scaler` if there is one, and `state_dict_ema`
    of an average, which its main branch reads. Keys of ours, which OpenCLIP ignores: `loss` (state of the loss; what of
    it is spread over ranks is kept in parts beside the file, and its `parts` says where, see `training.parts`),
    `loss_optimizer` (the optimizer's last group, if the loss has parameters; in `optimizer` it would keep OpenCLIP from
    resuming), and if there are any `sample_hashes` (by sample id), `momentum_encoder` and `lora` (options, and the
    `state_dict` and `state_dict_ema` of adapters, which the weights have merged); `clock` (of `Trainer.time_state`; a
    checkpoint from within an epoch has the number of completed ones as its `epoch`, so that OpenCLIP repeats what was
    begun); and `notes`, plain values under their own keys, such as `loss_name`.

    A sharded model is gathered, and each rank writes its parts of the loss's state, so all ranks call this; those that
    write no file of their own pass None for `path`.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    keep = path is not None
    optimizer_state = sharding.whole(optimizer.state_dict(), keep)
    loss_optimizer = None
    if any(True for _ in loss.parameters()):
        optimizer_state, loss_optimizer = split_optimizer(optimizer_state)
    weights = _weights(model, average, adapters, distributed, keep)
    content: dict[str, Any] = {"epoch": epoch, "name": name, **weights, "optimizer": optimizer_state}
    loss_state, spread = _loss_state(loss)
    if spread:
        loss_state[PARTS] = write_parts(spread, path)
    if path is None:
        return
    found = {
        "clock": clock,
        "scaler": scaler and scaler.state_dict(),
        "loss": loss_state or None,
        "sample_hashes": hash_ids and hash_ids.hashes,
        "momentum_encoder": momentum_encoder and momentum_encoder.state_dict(),
        "loss_optimizer": loss_optimizer,
    }
    content |= {**(notes or {}), **{key: value for key, value in found.items() if value is not None}}
    folder = loss_state[PARTS]["folder"] if spread else None
    try:
        save_tensors(content, path)
    except OSError:
        if folder:
            remove_parts(path, only=folder)
        raise
    remove_parts(path, keep=folder)


def _loss_state(loss) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """What every rank has of a loss's state, and what is spread over them."""
    state = loss.state_dict()
    spread = {key: value for key, value in state.items() if isinstance(value, DTensor)}
    return {key: value for key, value in state.items() if key not in spread}, spread


def _weights(model, average: WeightAverage | None, adapters: Adapters | None, distributed: bool, keep: bool) -> dict:
    """`state_dict`, and if there are any `lora` and `state_dict_ema`; what was sharded is gathered."""

    def states(prefixed: bool) -> tuple[dict, dict]:
        state = model.state_dict() if adapters is None else adapters.merged_state_dict()
        own = {} if adapters is None else adapters.state_dict()
        return sharding.whole(upstream.checkpoint_from_state(state, prefixed), keep), sharding.whole(own, keep)

    weights = {}
    weights["state_dict"], own = states(distributed)
    if adapters is not None:
        weights["lora"] = {"options": adapters.options_dict(), "state_dict": own}
    if average is not None:
        with average.applied():
            # Without DDP's prefix, as OpenCLIP 4 reads it. Copied now: then the memory holds the model's own again.
            state, own = map(_copied, states(False)) if keep else states(False)
        weights["state_dict_ema"] = state
        if adapters is not None:
            weights["lora"]["state_dict_ema"] = own
    return weights


def _copied(state: dict) -> dict:
    return {key: value.to("cpu", copy=True) for key, value in state.items()}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    path: str
    epoch: int  # completed epochs; 0 for a file that holds only weights
    content: dict[str, Any]

    @property
    def step(self) -> int | None:
        """Optimizer steps taken; None: it does not say."""
        return self.content["clock"]["step"] if "clock" in self.content else None

    def restore_model(self, model, model_name: str) -> None:
        """Load the weights into a model that is not sharded. Raises UserError: they are another architecture's."""
        upstream.load_model_weights(model, self.content.get("state_dict", self.content), self.path, model_name)

    def restore_adapters(self, adapters: Adapters | None) -> None:
        """Load what `--lora` trained, after `restore_model`. Raises UserError: the run and the file differ in it."""
        saved = self.content.get("lora")
        if adapters is not None and saved:
            adapters.restore(saved, self.path)
        elif adapters is not None and "epoch" in self.content:
            raise UserError(
                f"--resume {self.path}: was trained without --lora; to adapt its weights, start with --pretrained "
                f"{self.path}"
            )
        elif saved and adapters is None:
            raise UserError(
                f"--resume {self.path}: was trained with --lora r={saved['options']['r']}; give that flag again, or "
                f"start from its merged weights with --pretrained {self.path}"
            )

    def restore_average(self, average: WeightAverage | None) -> list[str]:
        """Load the average of weights, if there is one here and there; remarks for the log."""
        state = self.content.get("state_dict_ema")
        if average is None:
            return ["its average of weights is left behind: give --ema to go on with it"] if state else []
        if not state:
            return ["it holds no average of weights: that starts as a copy of them"]
        state = {key.removeprefix("module."): value for key, value in state.items()}
        average.load_state_dict(state | self.content.get("lora", {}).get("state_dict_ema", {}))
        return []

    def restore(
        self, *, optimizer, scaler, loss, momentum_encoder=None, average: WeightAverage | None = None
    ) -> list[str]:
        """Load everything else the checkpoint holds.

        Returns:
            Remarks for the log: what had to start anew.

        Raises:
            UserError: it belongs to another optimizer, loss, or data set.
        """
        if "epoch" not in self.content:
            return ["the file holds weights only: optimizer and loss start anew"]
        remarks = self.restore_loss(loss) + self.restore_average(average)
        if momentum_encoder is not None and "momentum_encoder" in self.content:
            momentum_encoder.load_state_dict(self.content["momentum_encoder"])
        elif momentum_encoder is not None:
            remarks.append("it holds no momentum encoder: that starts as a copy of what it follows")
        state, more = self.optimizer_state(optimizer)
        remarks += more
        try:
            optimizer.load_state_dict(sharding.sharded(state, optimizer))
        except ValueError as error:
            raise UserError(
                f"--resume {self.path}: its optimizer state does not fit --opt, or flags that lock or group parameters "
                f"({error}); use those it was trained with, or start from its weights with --pretrained {self.path}"
            ) from error
        if scaler is not None and "scaler" in self.content:
            scaler.load_state_dict(self.content["scaler"])
        return remarks

    def restore_ids(self, sample_id: str | None, hash_ids: HashIds | None) -> None:
        """Number samples as the loss's state in the checkpoint has them.

        Args:
            sample_id: how this run identifies samples, None where its loss does not.
            hash_ids: of this run, new; None where it needs none.

        Raises:
            UserError: they were identified in another way.
        """
        hashes = self.content.get("sample_hashes")
        if sample_id is None or not self.content.get("loss"):
            return
        if (hashes is None) != (hash_ids is None):
            raise UserError(
                f"--resume {self.path}: its loss does not know samples by --sample-id {sample_id}; use the one it was "
                f"trained with, or start from its weights with --pretrained {self.path}"
            )
        if hash_ids is not None and hashes is not None:
            hash_ids(hashes)

    def optimizer_state(self, optimizer) -> tuple[dict, list[str]]:
        """What `optimizer.load_state_dict` takes, the group of the loss's parameters last; and remarks for the log."""
        state, remarks = _merge(self.content["optimizer"], self.content.get("loss_optimizer")), []
        if len(state["param_groups"]) < len(optimizer.param_groups):
            state["param_groups"].append(optimizer.state_dict()["param_groups"][-1])
            remarks.append("the loss's parameters have no optimizer state in it")
        for group, current in zip(state["param_groups"], optimizer.param_groups, strict=False):
            # Which kernel runs, and how rates differ, is this run's choice.
            group |= {key: current[key] for key in ("fused", "lr_scale") if key in current}
        return state, remarks

    def restore_loss(self, loss) -> list[str]:
        """Load the loss's state; returns remarks for the log. Raises UserError: another loss's, or data set's."""
        expected, found = loss.state_dict(), dict(self.content.get("loss", {}))
        in_parts = parts_of(found)
        noted = found.pop(PARTS, None)
        found |= in_parts
        remarks = _recent_remarks(expected, found)
        found = {key: value for key, value in found.items() if key in expected or not _is_recent(key)}
        # Recent pairs come in any number, and a loss can do without.
        found |= {key: value for key, value in expected.items() if _is_recent(key) and key not in found}
        if not expected:
            return remarks
        if not self.content.get("loss"):
            return ["it holds no loss state: the loss starts anew"]
        different = sorted(expected.keys() ^ found.keys())
        different += [
            key
            for key in expected.keys() & found.keys()
            if not _is_recent(key) and expected[key].shape != found[key].shape
        ]
        if different:
            key = different[0]
            shapes = [str(tuple(state[key].shape)) if key in state else "none" for state in (found, expected)]
            raise UserError(
                f"--resume {self.path}: its loss state does not fit --loss and the data ({key}: {shapes[0]} in the "
                f"checkpoint, {shapes[1]} now); use the same --loss and shards, or start from its weights with "
                f"--pretrained {self.path}"
            )
        if in_parts:
            read = {key: expected[key] for key in in_parts}
            read_parts(read, self.path, noted)
            found |= read
        loss.load_state_dict(found)
        return remarks


def _is_recent(key: str) -> bool:
    """Whether an entry of a loss's state belongs to its memory of recent pairs."""
    return "recent" in key.split(".")


def _recent_remarks(expected: dict, found: dict) -> list[str]:
    """How many steps' pairs a checkpoint and a run keep, where that differs."""
    kept, saved = (
        next((len(value) for key, value in state.items() if _is_recent(key) and key.endswith(".image")), 0)
        for state in (expected, found)
    )
    if not found or kept == saved:
        return []
    if kept == 0:
        return [f"its pairs of {saved} recent steps are left behind: give --recent-batches to go on with them"]
    if saved > kept:
        return [f"of its pairs of {saved} recent steps, those of the last {kept} are kept"]
    return [f"it holds the pairs of {saved} recent steps, of {kept}: more join as training goes on"]


def load_checkpoint(path: str, flag: str = "--resume") -> Checkpoint:
    """Read a checkpoint to CPU memory; tensors and plain values only. `flag` is how it was named, for messages.

    Raises:
        UserError: no such file, or not a checkpoint.
    """
    content = load_tensors(path, flag)
    return Checkpoint(path, content.get("epoch", 0), content)


def split_optimizer(state: dict) -> tuple[dict, dict]:
    """An optimizer's state without its last group, the loss's, and that group's."""
    *groups, loss_group = state["param_groups"]
    own = set(loss_group["params"])
    model_state = {index: value for index, value in state["state"].items() if index not in own}
    loss_state = {index: value for index, value in state["state"].items() if index in own}
    return {"state": model_state, "param_groups": groups}, {"state": loss_state, "param_groups": [loss_group]}


def _merge(state: dict, loss_state: dict | None) -> dict:
    if loss_state is None:
        return {"state": state["state"], "param_groups": list(state["param_groups"])}
    return {
        "state": state["state"] | loss_state["state"],
        "param_groups": [*state["param_groups"], *loss_state["param_groups"]],
    }
