"""How fast the model moves in training: a copy of it takes some steps, and batches are encoded again later.

age     steps since a batch was encoded
error   root mean square, over a batch's anchors and the columns of an older one, of the score with the columns as
        they were minus that with the columns encoded now, over the scores' spread; the larger of both directions
        (`openclip_ext.state.recent_pairs`)
"""

import argparse
import copy
import dataclasses
import math
import random
from typing import Any

from openclip_ext.commands.diagnose.encoding import Source, pairs_in
from openclip_ext.data.table import Table
from openclip_ext.errors import UserError
from openclip_ext.evaluation.loading import LoadedModel
from openclip_ext.losses.recent import RecentOptions
from openclip_ext.training.accelerator import make_accelerator
from openclip_ext.training.build import build_trainer
from openclip_ext.training.data import TrainingData
from openclip_ext.training.flags import parse_args
from openclip_ext.training.log import EpochLog
from openclip_ext.training.objective import plan_objective

OLDEST = 16  # steps
CHECKS = 3  # the first is for the optimizer's averages to fill, and does not count


def probe_drift(model: LoadedModel, source: Source, args: argparse.Namespace) -> dict[str, Any]:
    """Train a copy with `clip` and AdamW at a constant rate, all of it, on pictures as in evaluation.

    Recent pairs are kept and checked, as in training with `--recent-batches 16`, but never join a batch.

    Returns:
        lr, batch_size (of all processes), steps; limit; errors by age, means of the checks that count; and
        usable, how many recent batches would join: the ages below the first that fails.

    Raises:
        UserError: fewer pairs than a batch, or a loss that does not stay finite.
    """
    steps = OLDEST + 1
    flags = {"--model": model.name, "--train-data": args.train_data, "--batch-size": args.batch_size,
             "--lr": args.probe_lr, "--lr-scheduler": "const", "--warmup": 0, "--epochs": CHECKS, "--workers": 0,
             "--logs": "none", "--device": model.device.type, "--precision": model.precision, "--seed": args.seed,
             "--loss": "clip", "--recent-batches": OLDEST, "--recent-check": 1, "--recent-limit": 1e9}  # fmt: skip
    config = parse_args([str(part) for flag in flags.items() for part in flag])
    config = dataclasses.replace(config, caption_key=args.caption_key, caption_separator=args.caption_separator)
    accelerator = make_accelerator(config)
    batch = args.batch_size * accelerator.num_processes
    if pairs_in(source) < batch:
        raise UserError(f"--probe-lr {args.probe_lr}: a step takes {batch} pairs; use a smaller --batch-size")
    source, pairs = _part(source, steps * batch, args.seed), pairs_in(source)
    data = TrainingData(source, num_samples=steps * batch, size=pairs, num_ids=pairs, sample_id="index")
    trained = copy.deepcopy(model.model).requires_grad_(True)
    trainer, _ = build_trainer(
        config, accelerator, plan_objective(config), data, trained, model.transform, model.tokenizer, None
    )
    recent: Any = trainer.loss.base
    found = []
    for check in range(CHECKS):
        for _ in trainer.steps(_silent(check, steps, batch)):
            pass
        trainer.clock.end_epoch()
        found.append(dict(recent.recent.errors))
        recent.recent.usable = 0  # it has just found all ages fresh, by a limit that lets all pass
    errors = {age: math.fsum(one[age] for one in found[1:]) / (CHECKS - 1) for age in found[-1]}
    limit = RecentOptions().recent_limit
    fresh = [age for age, error in errors.items() if error > limit]
    return {"lr": args.probe_lr, "batch_size": batch, "steps": steps * CHECKS, "limit": limit, "errors": errors,
            "usable": min(fresh) - 1 if fresh else OLDEST}  # fmt: skip


def _part(source: Source, pairs: int, seed: int) -> Source:
    """Of a table, whose epoch is the table, as many rows as the steps of an epoch take."""
    if not isinstance(source, Table):
        return source
    rows = random.Random(seed).choices(source.rows, k=pairs)
    return Table(source.name, rows)


def _silent(epoch: int, steps: int, pairs: int) -> EpochLog:
    return EpochLog(
        epoch=epoch, steps=steps, epochs=CHECKS, samples_per_step=pairs, every=steps, write=None, show=False
    )
