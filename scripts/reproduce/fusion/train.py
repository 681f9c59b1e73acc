"""One run: what `openclip-ext demo --fusion` does, with a loss and terms."""

import contextlib
import dataclasses
import os
import tempfile

from openclip_ext.commands.demo.fusion import run_fusion_demo
from openclip_ext.data.scenes import SPLITS

SEP, BR, GC = "feature_separation=0.5", "brownian_bridge=0.25", "geometric_consistency=0.1"
#: Terms by the name of a row, `NAME=WEIGHT` as `--loss-term` takes them.
ROWS: dict[str, tuple[str, ...]] = {"base": (), "Sep": (SEP,), "Br": (BR,), "GC": (GC,), "all": (SEP, BR, GC)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run is known by.

    Attributes:
        row: of `ROWS`.
        loss: the base loss.
        scenes: to train each stage on.
        epochs: a factor on those of the demo.
        seed: of scenes, initial weights and batches.
    """

    row: str
    loss: str
    scenes: int
    epochs: float
    seed: int


def train(run: Run) -> dict:
    """What `run_fusion_demo` returns. Without a word: several at a time would write through each other."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return run_fusion_demo(
            folder,
            loss=run.loss,
            terms=ROWS[run.row],
            seed=run.seed,
            epochs=run.epochs,
            sizes={"train": run.scenes, "val": min(SPLITS["val"], run.scenes)},
            batch_size=min(50, run.scenes),
        )
