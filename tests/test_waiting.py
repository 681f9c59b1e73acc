"""The host does not wait for the device within a step, so that it is ahead with giving it work.

Without a GPU this looks for the operations whose result, or its size, the host would have to wait for.
"""

import collections
import traceback

import pytest
import torch
from torch.overrides import TorchFunctionMode

from openclip_ext.cli import main
from openclip_ext.state.table import SampleTable
from openclip_ext.terms.caption_words import CaptionWordsTerm
from openclip_ext.testing.checks import ToyModel, evaluate_loss, toy_loss, toy_steps
from openclip_ext.training.loop import Trainer
from ours import LOSSES, TERMS

WAITING = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__"),
    *("nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "equal", "bincount", "repeat_interleave"),
}


class Waits(TorchFunctionMode):
    """Counts the lines of the package that would wait."""

    def __init__(self):
        super().__init__()
        self.lines = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name in WAITING or (name in ("__getitem__", "__setitem__") and _has_mask(args[1])):
            ours = [frame for frame in traceback.extract_stack() if "/openclip_ext/" in frame.filename]
            self.lines.update(f"{frame.filename}:{frame.lineno} {frame.line}" for frame in ours[-1:])
        return function(*args, **(kwargs or {}))


def _has_mask(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


@pytest.fixture
def ids_as_on_a_gpu(monkeypatch):
    """Where ids of samples and words are checked without waiting."""
    monkeypatch.setattr(SampleTable, "check", lambda *given: None)
    monkeypatch.setattr(CaptionWordsTerm, "_require_tokens", lambda *given: None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in LOSSES),
        ("clip", {"terms": dict.fromkeys(TERMS, {})}),
        ("dcl", {"recent_batches": 2}),
        ("emc2", {"kernel": "mh"}),
    ],
)
def test_a_loss_does_not_wait(ids_as_on_a_gpu, name, options):
    loss = toy_loss(name, options)
    model = ToyModel(loss.needs)
    for step, batch in enumerate(toy_steps()):
        loss.begin_step(step=step, total_steps=2)
        with Waits() as waits:
            outputs = evaluate_loss(loss, model, *batch)
            sum(outputs.values()).backward()
            loss.commit()
        # i-SIR gathers the anchors whose draws fell into the same block of columns.
        assert not [line for line in waits.lines if "resampling.py" not in line]


def test_a_step_of_training_waits_once(train_flags, monkeypatch):
    counts, waits = [], None
    update, backward = Trainer._update, Trainer._backward

    def counted_backward(self, batches):
        nonlocal waits
        with Waits() as waits:
            return backward(self, batches)

    def counted_update(self, outputs, batches):
        with waits:
            update(self, outputs, batches)
        counts.append(dict(waits.lines))

    monkeypatch.setattr(Trainer, "_backward", counted_backward)
    monkeypatch.setattr(Trainer, "_update", counted_update)
    assert main(train_flags("--loss", "dcl", "--grad-clip-norm", 1, "--accum-freq", 2, "--ema", 0.9)) == 0
    assert len(counts) == 4
    for lines in counts:
        ((line, count),) = lines.items()
        assert "faults.py" in line and count == 1
