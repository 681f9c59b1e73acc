"""Checkpoints in OpenCLIP's format, with the loss's state beside the model's."""

import dataclasses
import os
import re
from typing import Any

import torch

from openclip_ext import _host
from openclip_ext.errors import UserError
from openclip_ext.training import sharding

LATEST = "epoch_latest.pt"


def save_checkpoint(
    path: str | None, *, epoch: int, name: str, model, optimizer, scaler, loss, distributed: bool, keys=None
) -> None:
    """Write a checkpoint that stock OpenCLIP loads, whole or not at all.

    Keys as OpenCLIP writes them: `epoch, name, state_dict, optimizer`, `scaler` if there is one. Keys of ours, which
    OpenCLIP ignores: `loss` (state of the loss), `loss_optimizer` (the optimizer's last group, if the loss has
    parameters; in `optimizer` it would keep OpenCLIP from resuming), and `momentum_encoder` if there is one.

    A sharded model is gathered, so all ranks call this; those that write nothing pass None for `path`.
    """
    keep = path is not None
    optimizer_state = sharding.whole(optimizer.state_dict(), keep)
    loss_optimizer = None
    if any(True for _ in loss.parameters()):
        optimizer_state, loss_optimizer = split_optimizer(optimizer_state)
    content: dict[str, Any] = {
        "epoch": epoch,
        "name": name,
        "state_dict": sharding.whole(_host.checkpoint_from_model(model, distributed), keep),
        "optimizer": optimizer_state,
    }
    if path is None:
        return
    if scaler is not None:
        content["scaler"] = scaler.state_dict()
    if loss.state_dict():
        content["loss"] = loss.state_dict()
    if keys is not None:
        content["momentum_encoder"] = keys.state_dict()
    if loss_optimizer is not None:
        content["loss_optimizer"] = loss_optimizer
    torch.save(content, path + ".partial")
    os.replace(path + ".partial", path)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    path: str
    epoch: int  # completed epochs; 0 for a file that holds only weights
    content: dict[str, Any]

    def restore_model(self, model, model_name: str) -> None:
        """Load the weights into a model that is not sharded. Raises UserError: they are another architecture's."""
        _host.load_model_weights(model, self.content.get("state_dict", self.content), self.path, model_name)

    def restore(self, *, optimizer, scaler, loss, keys=None) -> list[str]:
        """Load everything else the checkpoint holds.

        Returns:
            Remarks for the log: what had to start anew.

        Raises:
            UserError: it belongs to another optimizer, loss, or data set.
        """
        if "epoch" not in self.content:
            return ["the file holds weights only: optimizer and loss start anew"]
        remarks = self.restore_loss(loss)
        if keys is not None and "momentum_encoder" in self.content:
            keys.load_state_dict(self.content["momentum_encoder"])
        elif keys is not None:
            remarks.append("it holds no momentum encoder: that starts as a copy of the image tower")
        state, more = self.optimizer_state(optimizer)
        remarks += more
        try:
            optimizer.load_state_dict(sharding.sharded(state, optimizer))
        except ValueError as error:
            raise UserError(f"--resume {self.path}: its optimizer state does not fit --opt ({error})") from error
        if scaler is not None and "scaler" in self.content:
            scaler.load_state_dict(self.content["scaler"])
        return remarks

    def optimizer_state(self, optimizer) -> tuple[dict, list[str]]:
        """What `optimizer.load_state_dict` takes, the group of the loss's parameters last; and remarks for the log."""
        state, remarks = _merge(self.content["optimizer"], self.content.get("loss_optimizer")), []
        if len(state["param_groups"]) < len(optimizer.param_groups):
            state["param_groups"].append(optimizer.state_dict()["param_groups"][-1])
            remarks.append("the loss's parameters have no optimizer state in it")
        for group, current in zip(state["param_groups"], optimizer.param_groups, strict=False):
            if "fused" in current:  # which kernel runs is this run's choice
                group["fused"] = current["fused"]
        return state, remarks

    def restore_loss(self, loss) -> list[str]:
        """Load the loss's state; returns remarks for the log. Raises UserError: another loss's, or data set's."""
        expected, found = loss.state_dict(), self.content.get("loss", {})
        if not expected:
            return []
        if not found:
            return ["it holds no loss state: the loss starts anew"]
        different = sorted(expected.keys() ^ found.keys())
        different += [key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape]
        if different:
            key = different[0]
            shapes = [str(tuple(state[key].shape)) if key in state else "none" for state in (found, expected)]
            raise UserError(
                f"--resume {self.path}: its loss state does not fit --loss and the data ({key}: {shapes[0]} in the "
                f"checkpoint, {shapes[1]} now); use the same --loss and shards, or start from its weights with "
                f"--pretrained {self.path}"
            )
        loss.load_state_dict(found)
        return []


def load_checkpoint(path: str, flag: str = "--resume") -> Checkpoint:
    """Read a checkpoint to CPU memory; tensors and plain values only. `flag` is how it was named, for messages.

    Raises:
        UserError: no such file, or not a checkpoint.
    """
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise UserError(f"{flag} {path}: not a checkpoint of tensors and plain values ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: not a checkpoint (holds a {type(content).__name__})")
    return Checkpoint(path, content.get("epoch", 0), content)


def latest_checkpoint(folder: str, most_recent: bool) -> str | None:
    """The checkpoint that `--resume latest` means, None if there is none.

    Args:
        folder: where the run keeps its checkpoints.
        most_recent: the run uses `--save-most-recent`: its fixed file name counts, as in OpenCLIP.
    """
    if most_recent:
        path = os.path.join(folder, LATEST)
        return path if os.path.exists(path) else None
    names = os.listdir(folder) if os.path.isdir(folder) else []
    epochs = {int(match[1]): name for name in names if (match := re.fullmatch(r"epoch_(\d+)\.pt", name))}
    return os.path.join(folder, epochs[max(epochs)]) if epochs else None


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
